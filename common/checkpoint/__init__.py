"""Checkpoints: safetensors folders read into a model's parameters, checked both ways.

headers -> source -> weights is the way in; `inspect` says what a folder holds, `hub` finds the
folder, `deepseek_v4` is that model's table of tensors, from which random checkpoints are written.
"""
