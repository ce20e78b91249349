"""Integrations with other libraries; importing a module registers the methods with its library."""
