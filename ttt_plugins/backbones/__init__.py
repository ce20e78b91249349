"""What a classifier is made of, and the classifier as the methods see it."""
