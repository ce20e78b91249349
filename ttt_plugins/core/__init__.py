"""The parts of adaptation that the methods share."""
