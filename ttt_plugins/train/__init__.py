"""Training of everything that adapters are made of."""
