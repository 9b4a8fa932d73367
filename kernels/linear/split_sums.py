"""Inputs split over programs: into how many parts, and the sum of what they wrote."""

import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.dependent_launch import await_prior, dependent, release_next
from scission.kernels.rounding import store_rounded
from scission.kernels.target import Target

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
    parts = tl.arange(0, MAX_SPLIT)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_values
    # all parts are on their way at once
    ptrs = partials_ptr + parts[:, None] * num_values.to(tl.int64) + offs[None, :]
    partials = tl.load(ptrs, mask=(parts < split)[:, None] & mask[None, :], other=0.0)
    store_rounded(out_ptr + offs, tl.sum(partials, axis=0), mask)


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
