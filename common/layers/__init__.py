"""Layers that models share: weights pulled from a checkpoint, complete when constructed."""
