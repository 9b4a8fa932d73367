"""Models: one readable file each, on the shared layers."""
