"""Inputs split over programs: into how many parts, and the sum of what they wrote."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.dependent_launch import await_prior, dependent, release_next
from scission.kernels.linear.rows import SplitSums
from scission.kernels.rounding import store_rounded
from scission.kernels.target import Target, target_of

BLOCK = 512
MAX_SPLIT = 8
# of a part; a shorter one is over before its pipeline is full
_MIN_BLOCKS = 5


def pick_split(num_tiles: int, num_blocks: int, num_programs: int) -> int:
    """Over how many programs the blocks of inputs of a tile are divided.

    Args:
        num_blocks: of inputs.
        num_programs: wanted in all; not exceeded by dividing.
    """
    split = max(1, min(num_programs // num_tiles, num_blocks // _MIN_BLOCKS, MAX_SPLIT))
    # none of them without a block
    blocks_per_split = -(-num_blocks // split)
    return -(-num_blocks // blocks_per_split)


@triton.jit(do_not_specialize=["num_values", "split"])
def add_splits_kernel(
    # tensors
    partials_ptr,
    out_ptr,
    # sizes, meta-parameters
    num_values,
    split,
    MAX_SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """out[i] = sum of partials[:, i], always in the same order."""
    release_next(IS_DEPENDENT)
    await_prior(IS_DEPENDENT)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_values
    total = tl.zeros([BLOCK], tl.float32)
    # unrolled: all parts are on their way at once
    for part in tl.static_range(MAX_SPLIT):
        num_here = tl.where(part < split, num_values, 0)
        ptrs = partials_ptr + part * num_values.to(tl.int64) + offs
        total += tl.load(ptrs, mask=offs < num_here, other=0.0)
    store_rounded(out_ptr + offs, total, mask)


def add_splits(partials: Tensor, out: Tensor, target: Target) -> Tensor:
    """[split, n, m] float32 -> out [n, m] bfloat16 or float32, which is returned."""
    add_splits_kernel[(triton.cdiv(out.numel(), BLOCK),)](
        partials,
        out,
        out.numel(),
        partials.shape[0],
        MAX_SPLIT=MAX_SPLIT,
        BLOCK=BLOCK,
        IS_DEPENDENT=target.has_ptx,
        **dependent(target),
    )
    return out


def add_parts(sums: SplitSums) -> Tensor:
    """[n, m] bfloat16."""
    target = target_of(sums.parts.device)
    assert target is not None
    out = sums.parts.new_empty((sums.num_tokens, sums.width), dtype=torch.bfloat16)
    return add_splits(sums.parts, out, target)
