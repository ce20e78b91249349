"""What is saved, checked, published and loaded: adapters and classifiers as folders."""
