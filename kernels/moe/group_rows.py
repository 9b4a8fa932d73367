"""Many pairs (token, expert) sorted by expert and cut into blocks, without a host sync."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.moe.row_groups import RowGroups, max_blocks

NUM_WARPS = 4


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
    weights_ptr,
    row_tokens_ptr,
    row_weights_ptr,
    row_of_ptr,
    # sizes, meta-parameters
    num_pairs,
    num_experts,
    num_steps,
    top_k,
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
    tl.store(row_of_ptr + pairs, offs, mask=offs < end)
    tl.store(row_tokens_ptr + offs, (pairs // top_k).to(tl.int32), mask=offs < end)
    weights = tl.load(weights_ptr + pairs, mask=offs < end, other=0.0)
    tl.store(row_weights_ptr + offs, weights, mask=offs < end)


def group_rows(experts: Tensor, weights: Tensor, num_experts: int, block_m: int) -> RowGroups:
    """Sort the pairs by expert, those of one expert in order of token.

    Args:
        experts: [num_tokens, k] of any integers; those outside [0, num_experts) take no row.
        weights: [num_tokens, k] float32.
        block_m: rows of a block at most.
    """
    num_pairs, device = experts.numel(), experts.device
    is_here = (experts >= 0) & (experts < num_experts)
    # who is not here comes last
    ordered, pairs = torch.sort(torch.where(is_here, experts, num_experts).flatten(), stable=True)
    num_blocks = max_blocks(num_pairs, num_experts, block_m)
    groups = RowGroups(
        block_m,
        block_experts=torch.empty(num_blocks, dtype=torch.int32, device=device),
        block_rows=torch.empty(num_blocks, 2, dtype=torch.int32, device=device),
        # rows of nobody are read, and what comes of them is not
        row_tokens=torch.zeros(num_pairs, dtype=torch.int32, device=device),
        row_weights=torch.zeros(num_pairs, dtype=torch.float32, device=device),
        row_of=torch.full(experts.shape, -1, dtype=torch.int32, device=device),
    )
    group_rows_kernel[(num_blocks,)](
        ordered,
        pairs,
        groups.block_experts,
        groups.block_rows,
        weights.contiguous(),
        groups.row_tokens,
        groups.row_weights,
        groups.row_of,
        num_pairs,
        num_experts,
        num_pairs.bit_length(),
        experts.shape[1],
        BLOCK_M=block_m,
        BLOCK_E=expert_lanes(num_experts),
        num_warps=NUM_WARPS,
    )
    return groups


def expert_lanes(num_experts: int) -> int:
    """One of few sizes, so that few kernels are compiled."""
    return 64 if num_experts <= 64 else 512
