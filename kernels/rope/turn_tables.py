"""A step's rotations of every kind in one launch."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra import libdevice

TOKENS = 8  # of a program
NUM_WARPS = 4

# the compiler's own sine is an approximation on NVIDIA; the interpreter knows no libraries
_HAS_LIBRARY = tl.constexpr(not knobs.runtime.interpret)


@triton.jit
def turn_tables_kernel(
    # tensors
    positions_ptr,
    plain_ptr,
    compressed_ptr,
    out_ptr,
    # sizes, meta-parameters
    num_tokens,
    PAIRS: tl.constexpr,
    PADDED: tl.constexpr,
    RATIOS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program, some tokens of one kind: plain, its inverse, compressed, its inverse, then the
    first positions of blocks by ratio.
    """
    kind = tl.program_id(1)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    positions = tl.load(positions_ptr + tokens, mask=tokens < num_tokens, other=0)
    for i in tl.static_range(len(RATIOS)):
        starts = positions - positions % RATIOS[i]
        positions = tl.where(kind == 4 + i, starts, positions)
    pairs = tl.arange(0, PADDED)[None, :]
    frequencies_ptr = plain_ptr if kind < 2 else compressed_ptr
    frequencies = tl.load(frequencies_ptr + pairs, mask=pairs < PAIRS, other=0.0)
    angles = positions.to(tl.float32)[:, None] * frequencies
    if _HAS_LIBRARY:
        cos, sin = libdevice.cos(angles), libdevice.sin(angles)
    else:
        cos, sin = tl.cos(angles), tl.sin(angles)
    sin = tl.where((kind == 1) | (kind == 3), -sin, sin)
    rows = kind.to(tl.int64) * num_tokens + tokens[:, None]
    ptrs = out_ptr + (rows * PAIRS + pairs) * 2
    mask = (tokens < num_tokens)[:, None] & (pairs < PAIRS)
    tl.store(ptrs, cos, mask=mask)
    tl.store(ptrs + 1, sin, mask=mask)


def turn_tables(
    positions: Tensor, plain: Tensor, compressed: Tensor, ratios: Sequence[int]
) -> Tensor:
    """[4 + number of ratios, num_tokens, rope_dim / 2] complex64, in the kernel's order."""
    num_tokens, num_pairs = positions.shape[0], plain.shape[0]
    shape = (4 + len(ratios), num_tokens, num_pairs, 2)
    out = torch.empty(shape, dtype=torch.float32, device=positions.device)
    if num_tokens:
        turn_tables_kernel[(triton.cdiv(num_tokens, TOKENS), shape[0])](
            positions,
            plain,
            compressed,
            out,
            num_tokens,
            PAIRS=num_pairs,
            PADDED=triton.next_power_of_2(num_pairs),
            RATIOS=tuple(ratios),
            TOKENS=TOKENS,
            num_warps=NUM_WARPS,
        )
    return torch.view_as_complex(out)
