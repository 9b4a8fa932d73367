"""Rotary position embedding in plain PyTorch: the definition."""

from collections.abc import Sequence

import torch
from torch import Tensor


def rotations(positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    return torch.complex(angles.cos(), angles.sin())


def turn_tables(
    positions: Tensor, plain: Tensor, compressed: Tensor, ratios: Sequence[int]
) -> Tensor:
    """[4 + number of ratios, num_tokens, rope_dim / 2] complex64: plain, its inverse, compressed,
    its inverse, then compressed of the blocks' first positions by ratio.
    """
    tables = [rotations(positions, plain), rotations(positions, compressed)]
    blocks = [rotations(positions - positions % ratio, compressed) for ratio in ratios]
    inverses = [table.conj_physical() for table in tables]
    return torch.stack([tables[0], inverses[0], tables[1], inverses[1], *blocks])


def rotate_(x: Tensor, rotation: Tensor) -> Tensor:
    num_pairs = rotation.shape[-1]
    if x.dim() == 3:
        rotation = rotation.unsqueeze(1)
    # [.., dim / 2, 2]
    pairs = x.view(*x.shape[:-1], -1, 2)
    if x.dtype == torch.float32:
        torch.view_as_complex(pairs)[..., -num_pairs:].mul_(rotation)
    else:
        turned = torch.view_as_complex(pairs[..., -num_pairs:, :].float()) * rotation
        pairs[..., -num_pairs:, :] = torch.view_as_real(turned)
    return x


def rotate_halves_(x: Tensor, rotation: Tensor) -> Tensor:
    num_pairs = rotation.shape[-1]
    # [n, 1, pairs]
    cos, sin = rotation.real.unsqueeze(1), rotation.imag.unsqueeze(1)
    a, b = x[..., :num_pairs].float(), x[..., num_pairs : 2 * num_pairs].float()
    first, second = a * cos - b * sin, b * cos + a * sin
    x[..., :num_pairs] = first
    x[..., num_pairs : 2 * num_pairs] = second
    return x
