"""Integrations with other libraries; importing a module registers the methods in its library."""
