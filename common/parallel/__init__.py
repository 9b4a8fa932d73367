"""How ranks of one worker share a model."""
