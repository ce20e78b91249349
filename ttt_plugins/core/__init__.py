"""How adaptation works, whatever the method."""
