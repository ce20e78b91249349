"""The wrapped classifier, and what the methods need to know about its structure."""
