"""Where the state of running requests lives: what there is (layout), the tensors (storage), who owns which block."""
