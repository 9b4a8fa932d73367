"""Where the state of running requests lives: layout, tensors (storage), who owns which block."""
