"""Rotary position embedding in place: interleaved pairs of the LAST channels, or split halves of
the FIRST.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scission.kernels.rope import reference
from scission.kernels.target import target_of

__all__ = ["StepRotations", "rotate_", "rotate_halves_", "rotations", "step_rotations"]


@dataclass(frozen=True, slots=True)
class StepRotations:
    """Each [num_tokens, rope_dim / 2] complex64."""

    plain: Tensor  # of the positions, by plain frequencies
    plain_inverse: Tensor
    compressed: Tensor  # of the positions, by the frequencies of layers with compressed entries
    compressed_inverse: Tensor
    blocks: Mapping[int, Tensor]  # by ratio: compressed, of the first position of a token's block


def rotations(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Unit complex numbers cos + i sin of every position's angles.

    The angle is the fp32 product of position and frequency: near position 10^6 an fp64 product
    gives other bits.

    Args:
        positions: [n] integers.
        frequencies: [rope_dim / 2] float32.

    Returns:
        [n, rope_dim / 2] complex64.
    """
    if frequencies.dtype != torch.float32:
        raise ValueError(f"frequencies must be float32, got {frequencies.dtype}")
    return reference.rotations(positions, frequencies)


def step_rotations(
    positions: Tensor, plain: Tensor, compressed: Tensor, ratios: Sequence[int]
) -> StepRotations:
    """All rotations of a step whose layers have two sets of frequencies; see `rotations`.

    Args:
        positions: [num_tokens] int64; of padding (-1) they are finite.
        plain, compressed: [rope_dim / 2] float32, the two sets.
        ratios: tokens of a block, for `blocks`.
    """
    if plain.dtype != torch.float32 or compressed.dtype != torch.float32:
        raise ValueError(f"frequencies must be float32, got {plain.dtype}, {compressed.dtype}")
    if plain.shape != compressed.shape:
        raise ValueError(f"frequencies {list(plain.shape)} and {list(compressed.shape)} differ")
    if target_of(positions.device) is None:
        tables = reference.turn_tables(positions, plain, compressed, ratios)
    else:
        # only where a kernel is launched is Triton needed
        from scission.kernels.rope import turn_tables

        tables = turn_tables.turn_tables(positions, plain, compressed, ratios)
    forward, inverse, compressed_forward, compressed_inverse, *blocks = tables.unbind()
    return StepRotations(
        forward,
        inverse,
        compressed_forward,
        compressed_inverse,
        dict(zip(ratios, blocks, strict=True)),
    )


def rotate_(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the last channels of x in place: (a, b) -> (a cos - b sin, a sin + b cos).

    Pair i is the channels (2i, 2i + 1) of the last rope_dim. The inverse rotation is the one by
    the conjugate.

    Args:
        x: [n, .., dim] float32 or bfloat16, last dim contiguous.
        rotation: [n, rope_dim / 2] complex64.

    Returns:
        x.
    """
    rope_dim = 2 * rotation.shape[-1]
    if x.shape[0] != rotation.shape[0] or x.shape[-1] < rope_dim:
        raise ValueError(f"x {list(x.shape)} does not fit rotation {list(rotation.shape)}")
    return reference.rotate_(x, rotation)


def rotate_halves_(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the first channels of x in place: (a, b) -> (a cos - b sin, b cos + a sin).

    Pair i is the channels (i, i + rope_dim / 2); those from rope_dim on stay.

    Args:
        x: [n, num_heads, dim] float32 or bfloat16.
        rotation: [n, rope_dim / 2] complex64.

    Returns:
        x.
    """
    rope_dim = 2 * rotation.shape[-1]
    if x.dim() != 3 or x.shape[0] != rotation.shape[0] or x.shape[-1] < rope_dim:
        raise ValueError(f"x {list(x.shape)} does not fit rotation {list(rotation.shape)}")
    return reference.rotate_halves_(x, rotation)
