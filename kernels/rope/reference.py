"""Rotary position embedding in plain PyTorch: the definition."""

import torch
from torch import Tensor


def rotations(positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    return torch.complex(angles.cos(), angles.sin())


def rotate_(x: Tensor, rotation: Tensor) -> Tensor:
    if x.dim() == 3:
        rotation = rotation.unsqueeze(1)
    tail = x[..., -2 * rotation.shape[-1] :]
    if x.dtype == torch.float32:
        torch.view_as_complex(tail.unflatten(-1, (-1, 2))).mul_(rotation)
    else:
        pairs = torch.view_as_complex(tail.float().unflatten(-1, (-1, 2)))
        tail.copy_(torch.view_as_real(pairs * rotation).flatten(-2))
    return x
