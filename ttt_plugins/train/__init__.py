"""Training of source classifiers, self-supervised heads, meta-models and learned optimizers."""
