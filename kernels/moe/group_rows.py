"""Pairs (token, expert) sorted by expert and cut into blocks of one expert, without a host sync."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Rows are the pairs in order of expert; the number of blocks is an upper bound.

    block_experts: [num_blocks] int32, -1 past the last; block_rows: [num_blocks, 2] int32, each
    block's first row and the row after its last. pairs: [num_pairs] int64, the pair of each row;
    rows: [num_pairs] int32, the row of each pair.
    """

    block_m: int
    block_experts: Tensor
    block_rows: Tensor
    pairs: Tensor
    rows: Tensor

    @property
    def num_blocks(self) -> int:
        return self.block_experts.shape[0]


@triton.jit
def _first_rows(sorted_ptr, experts, num_pairs, num_steps):
    """The first row whose expert is not below, for a vector of experts: binary search."""
    low = tl.zeros_like(experts)
    high = tl.zeros_like(experts) + num_pairs
    for _ in range(num_steps):
        is_open = low < high
        middle = (low + high) // 2
        is_below = tl.load(sorted_ptr + middle, mask=is_open, other=0) < experts
        low = tl.where(is_open & is_below, middle + 1, low)
        high = tl.where(is_open & (is_below == 0), middle, high)
    return low


@triton.jit
def group_rows_kernel(
    # tensors
    sorted_ptr,
    pairs_ptr,
    block_experts_ptr,
    block_rows_ptr,
    rows_ptr,
    # sizes, meta-parameters
    num_pairs,
    num_experts,
    num_steps,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program, one block: which expert and rows it has, and the row of each of its pairs."""
    block = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    starts = _first_rows(sorted_ptr, experts, num_pairs, num_steps)
    ends = _first_rows(sorted_ptr, experts + 1, num_pairs, num_steps)
    num_blocks = tl.where(experts < num_experts, (ends - starts + BLOCK_M - 1) // BLOCK_M, 0)
    last_block = tl.cumsum(num_blocks, axis=0)
    first_block = last_block - num_blocks
    is_mine = (first_block <= block) & (block < last_block)
    # no expert, one at most: the sums pick its numbers
    expert = tl.sum(tl.where(is_mine, experts + 1, 0), axis=0) - 1
    first = tl.sum(tl.where(is_mine, starts + (block - first_block) * BLOCK_M, 0), axis=0)
    end = tl.minimum(first + BLOCK_M, tl.sum(tl.where(is_mine, ends, 0), axis=0))
    tl.store(block_experts_ptr + block, expert)
    tl.store(block_rows_ptr + block * 2, first)
    tl.store(block_rows_ptr + block * 2 + 1, end)
    offs = first + tl.arange(0, BLOCK_M)
    pairs = tl.load(pairs_ptr + offs, mask=offs < end, other=0)
    tl.store(rows_ptr + pairs, offs, mask=offs < end)


def group_rows(experts: Tensor, num_experts: int, block_m: int) -> RowGroups:
    """Sort the pairs by expert, those of one expert in order of token.

    Args:
        experts: [num_tokens, k] int64, in [0, num_experts).
        block_m: rows of a block at most.
    """
    num_pairs = experts.numel()
    ordered, pairs = torch.sort(experts.flatten(), stable=True)
    # each expert's last block may be partial
    num_blocks = min(num_pairs, num_experts + num_pairs // block_m)
    block_experts, block_rows, rows = (
        torch.empty(shape, dtype=torch.int32, device=experts.device)
        for shape in ((num_blocks,), (num_blocks, 2), (num_pairs,))
    )
    group_rows_kernel[(num_blocks,)](
        ordered,
        pairs,
        block_experts,
        block_rows,
        rows,
        num_pairs,
        num_experts,
        num_pairs.bit_length(),
        BLOCK_M=block_m,
        BLOCK_E=expert_lanes(num_experts),
        num_warps=NUM_WARPS,
    )
    return RowGroups(block_m, block_experts, block_rows, pairs, rows)


def expert_lanes(num_experts: int) -> int:
    """One of few sizes, so that few kernels are compiled."""
    return 64 if num_experts <= 64 else 512
