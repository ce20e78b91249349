"""Artifacts: adapters and classifiers saved as folders, which are checked when they are loaded."""
