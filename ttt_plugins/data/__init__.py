"""Where images come from: sources of any kind, loading, corruptions, sets of labels."""
