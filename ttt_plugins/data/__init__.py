"""Sources of images, their loading, corruptions, and sets of labels."""
