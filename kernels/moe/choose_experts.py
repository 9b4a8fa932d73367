"""Few tokens' experts in one launch: scores, the choice, the weights, and rows grouped by expert.

Programs share out the gate's matrix; of each tile of tokens the last program adds the partial sums
and chooses, and the last of these groups the pairs. Counters say which program is last, nothing
else: every sum has its order.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.exact_dot import dot_exact
from scission.kernels.moe.row_groups import RowGroups, max_blocks
from scission.kernels.target import Target

BLOCK_T = 16
BLOCK_E = 32
MAX_TOKENS = 128
# pairs that one program groups
MAX_PAIRS = 1024
_NUM_PROGRAMS = 128

Score = Literal["sqrtsoftplus", "sigmoid"]


@dataclass(frozen=True, slots=True)
class Routing:
    """How experts are chosen, and which of them are here.

    gate: [num_experts, d] bfloat16 or float32. bias: [num_experts] float32, for the choice alone;
    None: none. table: [vocab_size, top_k] int64, the experts of each token id; None: by score.
    """

    gate: Tensor
    bias: Tensor | None
    table: Tensor | None
    top_k: int
    scaling: float
    score: Score
    first_expert: int
    num_local: int

    @property
    def num_experts(self) -> int:
        return self.gate.shape[0]


def expert_lanes(num_experts: int) -> int:
    """One of few sizes, so that few kernels are compiled."""
    return 64 if num_experts <= 64 else 256 if num_experts <= 256 else 512


def pair_lanes(num_pairs: int) -> int:
    return 64 if num_pairs <= 64 else MAX_PAIRS


def num_counters(num_tokens: int = MAX_TOKENS) -> int:
    return 1 + -(-num_tokens // BLOCK_T)


def block_k(gate_dtype: torch.dtype) -> int:
    return 256 if gate_dtype == torch.bfloat16 else 128


def num_warps(num_tokens: int, num_experts: int, target: Target) -> int:
    """The choice among one token's scores is quicker where fewer warps have to agree.

    Among more than 256 of many tokens, 8 spill on AMD's, and 16 on NVIDIA's.
    """
    if num_tokens == 1:
        return 4
    return 8 if num_experts <= 256 or target.has_ptx else 16


def pick_split(num_tokens: int, num_experts: int, num_blocks: int) -> int:
    """Over how many programs the inputs are divided: few where many tokens' sums are added."""
    tiles = triton.cdiv(num_tokens, BLOCK_T) * triton.cdiv(num_experts, BLOCK_E)
    most = 16 if num_tokens == 1 else 8 if num_experts <= 256 else 4
    split = 1
    while split < most and tiles * split < _NUM_PROGRAMS and split * 2 <= num_blocks:
        split *= 2
    return split


@triton.jit
def _log1p(x):
    """log(1 + x) of x in [0, 1], as 2 artanh(x / (2 + x)): a fast logarithm is too coarse."""
    s = x / (2.0 + x)
    t = s * s
    series = 1.0 / 15 + t * (1.0 / 17)
    series = 1.0 / 13 + t * series
    series = 1.0 / 11 + t * series
    series = 1.0 / 9 + t * series
    series = 1.0 / 7 + t * series
    series = 1.0 / 5 + t * series
    series = 1.0 / 3 + t * series
    return 2.0 * s * (1.0 + t * series)


@triton.jit
def score_of(logits, SCORE: tl.constexpr):
    """sqrt(softplus(logit)), or its sigmoid."""
    if SCORE == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-logits))
    return tl.sqrt(tl.maximum(logits, 0.0) + _log1p(tl.exp(-tl.abs(logits))))


@triton.jit
def choose(
    logits, tokens, mask_t, bias_ptr, table_ptr, token_ids_ptr, num_experts, top_k, scaling,
    SCORE: tl.constexpr, HAS_BIAS: tl.constexpr, IS_HASHED: tl.constexpr,
    EXPERT_LANES: tl.constexpr,
):  # fmt: skip
    """[tokens, EXPERT_LANES] logits -> experts and weights [tokens, 16], of columns below top_k,
    and 1 [tokens, EXPERT_LANES] where a token chose an expert.

    Of equal scores the lowest expert comes first; -1 where a score is NaN. An expert that a table
    names twice is chosen once, for both weights.
    """
    experts = tl.arange(0, EXPERT_LANES)[None, :]
    columns = tl.arange(0, 16)[None, :]
    scores = score_of(logits, SCORE)
    left = scores
    if HAS_BIAS:
        is_expert = experts < num_experts
        left += tl.load(bias_ptr + experts, mask=is_expert, other=0.0)
    left = tl.where(experts < num_experts, left, float("-inf"))
    chosen = tl.full([logits.shape[0], 16], -1, tl.int32)
    weights = tl.zeros([logits.shape[0], 16], tl.float32)
    selected = tl.zeros(logits.shape, tl.int32)
    if IS_HASHED:
        token_ids = tl.load(token_ids_ptr + tokens, mask=mask_t, other=0)
    for k in range(top_k):
        if IS_HASHED:
            best = tl.load(table_ptr + token_ids * top_k + k, mask=mask_t, other=0).to(tl.int32)
        else:
            top = tl.max(left, axis=1)
            is_top = left == top[:, None]
            best = tl.min(tl.where(is_top, experts, EXPERT_LANES), axis=1)
            left = tl.where(experts == best[:, None], float("-inf"), left)
        is_best = experts == best[:, None]
        score = tl.sum(tl.where(is_best, scores, 0.0), axis=1)
        best = tl.where(best < num_experts, best, -1)
        if IS_HASHED:
            is_again = chosen == best[:, None]
            weights += tl.where(is_again, score[:, None], 0.0)
            is_new = tl.max(is_again.to(tl.int32), axis=1) == 0
            best = tl.where(is_new, best, -1)
            score = tl.where(is_new, score, 0.0)
        chosen = tl.where(columns == k, best[:, None], chosen)
        weights = tl.where(columns == k, score[:, None], weights)
        selected = tl.where(is_best, 1, selected)
    weights = weights / tl.sum(weights, axis=1)[:, None] * scaling
    return chosen, weights, selected


@triton.jit
def choose_experts_kernel(
    # tensors
    x_ptr,
    gate_ptr,
    bias_ptr,
    table_ptr,
    token_ids_ptr,
    positions_ptr,
    partials_ptr,
    experts_ptr,
    weights_ptr,
    bits_ptr,
    first_rows_ptr,
    block_experts_ptr,
    block_rows_ptr,
    row_tokens_ptr,
    row_weights_ptr,
    row_of_ptr,
    counters_ptr,
    # sizes, meta-parameters
    num_tokens,
    d,
    num_experts,
    top_k,
    scaling,
    first_expert,
    num_local,
    blocks_per_split,
    num_slots,
    num_shared_rows,
    SCORE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_HASHED: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    GROUP_M: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERT_LANES: tl.constexpr,
    PAIR_LANES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    """One program, BLOCK_E experts' scores of BLOCK_T tokens over a share of the inputs.

    partials: [split, num_tokens, num_experts]. ROWS: BLOCK_T, or the only token there is.
    """
    pid_t = tl.program_id(0)
    split = tl.program_id(2)
    tokens = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = tokens < num_tokens
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = experts < num_experts
    acc = tl.zeros([BLOCK_E, BLOCK_T], tl.float32)
    for block in range(split * blocks_per_split, (split + 1) * blocks_per_split):
        offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < d
        gate_ptrs = gate_ptr + experts[:, None] * d + offs_k[None, :]
        gate = tl.load(gate_ptrs, mask=mask_e[:, None] & mask_k[None, :], other=0.0)
        x_ptrs = x_ptr + tokens[None, :].to(tl.int64) * d + offs_k[:, None]
        x = tl.load(x_ptrs, mask=mask_t[None, :] & mask_k[:, None], other=0.0)
        acc = dot_exact(gate, x, acc, DOT_TYPE)
    partials_ptrs = partials_ptr + (split * num_tokens + tokens)[None, :] * num_experts
    tl.store(partials_ptrs + experts[:, None], acc, mask=mask_e[:, None] & mask_t[None, :])
    tl.debug_barrier()
    arrived = tl.atomic_add(counters_ptr + 1 + pid_t, 1, sem="acq_rel")
    if arrived == tl.num_programs(1) * NUM_SPLITS - 1:
        tl.store(counters_ptr + 1 + pid_t, 0)
        rows = pid_t * BLOCK_T + tl.arange(0, ROWS)
        mask_r = rows < num_tokens
        lanes = tl.arange(0, EXPERT_LANES)
        mask = mask_r[:, None] & (lanes < num_experts)[None, :]
        logits = tl.zeros([ROWS, EXPERT_LANES], tl.float32)
        # unrolled: one load does not wait for the other
        for part in tl.static_range(NUM_SPLITS):
            ptrs = partials_ptr + (part * num_tokens + rows)[:, None] * num_experts
            logits += tl.load(ptrs + lanes[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        chosen, weights, selected = choose(
            logits, rows, mask_r, bias_ptr, table_ptr, token_ids_ptr, num_experts, top_k,
            scaling, SCORE, HAS_BIAS, IS_HASHED, EXPERT_LANES,
        )  # fmt: skip
        is_here = (chosen >= first_expert) & (chosen < first_expert + num_local)
        is_token = mask_r
        if HAS_POSITIONS:
            is_token &= tl.load(positions_ptr + rows, mask=mask_r, other=-1) >= 0
        is_here &= is_token[:, None]
        if ROWS == 1:
            _group_one(
                tl.reshape(tl.where(is_here, chosen - first_expert, -1), [16]),
                tl.reshape(weights, [16]),
                block_experts_ptr, block_rows_ptr, row_tokens_ptr, row_weights_ptr, row_of_ptr,
                top_k, num_slots, num_shared_rows, GROUP_M,
            )  # fmt: skip
        else:
            columns = tl.arange(0, 16)
            places = rows[:, None] * top_k + columns[None, :]
            mask_k = mask_r[:, None] & (columns < top_k)[None, :]
            tl.store(experts_ptr + places, tl.where(is_here, chosen, -1), mask=mask_k)
            tl.store(weights_ptr + places, weights, mask=mask_k)
            # a bit a token
            bits = selected << tl.arange(0, ROWS)[:, None]
            bits = tl.sum(tl.where(is_token[:, None], bits, 0), axis=0)
            tl.store(bits_ptr + pid_t * EXPERT_LANES + lanes, bits)
            tl.debug_barrier()
            arrived_tiles = tl.atomic_add(counters_ptr, 1, sem="acq_rel")
            if arrived_tiles == tl.num_programs(0) - 1:
                tl.store(counters_ptr, 0)
                _group(
                    experts_ptr, weights_ptr, bits_ptr, first_rows_ptr, block_experts_ptr,
                    block_rows_ptr, row_tokens_ptr, row_weights_ptr, row_of_ptr, num_tokens,
                    top_k, first_expert, num_local, num_slots, num_shared_rows, GROUP_M,
                    EXPERT_LANES, PAIR_LANES, BLOCK_T,
                )  # fmt: skip


@triton.jit
def _group_one(
    experts, weights, block_experts_ptr, block_rows_ptr, row_tokens_ptr, row_weights_ptr,
    row_of_ptr, top_k, num_slots, num_shared_rows, GROUP_M: tl.constexpr,
):  # fmt: skip
    """As `_group`, of the one token's [16] experts, without a way through memory."""
    pairs = tl.arange(0, 16)
    is_here = experts >= 0
    is_same = experts[None, :] == experts[:, None]
    is_below = is_here[None, :] & (experts[None, :] < experts[:, None])
    is_before = is_same & (pairs[None, :] < pairs[:, None])
    start = tl.sum(is_below.to(tl.int32), axis=1)
    count = tl.sum(is_same.to(tl.int32), axis=1)
    row = start + tl.sum(is_before.to(tl.int32), axis=1)
    is_leader = is_here & ((row - start) % GROUP_M == 0)
    is_earlier = is_leader[None, :] & (row[None, :] < row[:, None])
    block = tl.sum(is_earlier.to(tl.int32), axis=1)
    tl.store(row_tokens_ptr + row, pairs * 0, mask=is_here)
    tl.store(row_weights_ptr + row, weights, mask=is_here)
    shared = pairs - top_k
    of_pair = tl.where(is_here, row, -1)
    places = tl.where(shared < 0, of_pair, top_k + shared)
    tl.store(row_of_ptr + pairs, places, mask=shared < num_shared_rows)
    tl.store(block_experts_ptr + block, experts, mask=is_leader)
    tl.store(block_rows_ptr + block * 2, row, mask=is_leader)
    end = tl.minimum(row + GROUP_M, start + count)
    tl.store(block_rows_ptr + block * 2 + 1, end, mask=is_leader)
    num_leaders = tl.sum(is_leader.to(tl.int32), axis=0)
    tl.store(block_experts_ptr + pairs, -1, mask=(pairs >= num_leaders) & (pairs < num_slots))


@triton.jit
def _count_bits(x):
    """Of the lowest 16."""
    x = x - ((x >> 1) & 0x5555)
    x = (x & 0x3333) + ((x >> 2) & 0x3333)
    x = (x + (x >> 4)) & 0x0F0F
    return (x + (x >> 8)) & 0x1F


@triton.jit
def _group(
    experts_ptr, weights_ptr, bits_ptr, first_rows_ptr, block_experts_ptr, block_rows_ptr,
    row_tokens_ptr, row_weights_ptr, row_of_ptr, num_tokens, top_k, first_expert, num_local,
    num_slots, num_shared_rows, GROUP_M: tl.constexpr, EXPERT_LANES: tl.constexpr,
    PAIR_LANES: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Every pair's row, from the bits that say which tokens of a tile chose an expert; every
    GROUP_M-th row of an expert begins a block."""
    MAX_TILES: tl.constexpr = 8
    num_pairs = num_tokens * top_k
    pairs = tl.arange(0, PAIR_LANES)
    is_pair = pairs < num_pairs
    chosen = tl.load(experts_ptr + pairs, mask=is_pair, other=-1, cache_modifier=".cg")
    weights = tl.load(weights_ptr + pairs, mask=is_pair, other=0.0, cache_modifier=".cg")
    lanes = tl.arange(0, EXPERT_LANES)
    is_local = (lanes >= first_expert) & (lanes < first_expert + num_local)
    tiles = tl.arange(0, MAX_TILES)
    mask = (tiles * BLOCK_T < num_tokens)[:, None] & is_local[None, :]
    places = tiles[:, None] * EXPERT_LANES + lanes[None, :]
    bits = tl.load(bits_ptr + places, mask=mask, other=0, cache_modifier=".cg")
    counts = _count_bits(bits)  # [tiles, experts]
    count = tl.sum(counts, axis=0)
    start = tl.cumsum(count, axis=0) - count
    tl.store(first_rows_ptr + places, start[None, :] + tl.cumsum(counts, axis=0) - counts)
    num_blocks = (count + GROUP_M - 1) // GROUP_M
    block = tl.cumsum(num_blocks, axis=0) - num_blocks
    for i in range((num_tokens + GROUP_M - 1) // GROUP_M):
        is_block = i < num_blocks
        row = start + i * GROUP_M
        tl.store(block_experts_ptr + block + i, lanes - first_expert, mask=is_block)
        tl.store(block_rows_ptr + (block + i) * 2, row, mask=is_block)
        end = tl.minimum(row + GROUP_M, start + count)
        tl.store(block_rows_ptr + (block + i) * 2 + 1, end, mask=is_block)
    is_over = (pairs >= tl.sum(num_blocks, axis=0)) & (pairs < num_slots)
    tl.store(block_experts_ptr + pairs, -1, mask=is_over)
    tl.debug_barrier()
    is_here = chosen >= 0
    tokens = pairs // top_k
    places_of = tokens // BLOCK_T * EXPERT_LANES + chosen
    first = tl.load(first_rows_ptr + places_of, mask=is_here, other=0, cache_modifier=".cg")
    found = tl.load(bits_ptr + places_of, mask=is_here, other=0, cache_modifier=".cg")
    row_of = first + _count_bits(found & ((1 << (tokens % BLOCK_T)) - 1))
    width = top_k + num_shared_rows
    tl.store(row_tokens_ptr + row_of, tokens, mask=is_here)
    tl.store(row_weights_ptr + row_of, weights, mask=is_here)
    columns_ptr = row_of_ptr + tokens * width + pairs % top_k
    tl.store(columns_ptr, tl.where(is_here, row_of, -1), mask=is_pair)
    for shared in range(num_shared_rows):
        tl.store(
            row_of_ptr + pairs * width + top_k + shared,
            num_pairs + shared * num_tokens + pairs,
            mask=pairs < num_tokens,
        )


def can_choose(num_tokens: int, top_k: int) -> bool:
    # one token's pairs and shared rows are written by 16 lanes
    return 0 < num_tokens <= MAX_TOKENS and top_k <= 12 and num_tokens * top_k <= MAX_PAIRS


def dot_type(target: Target) -> tl.dtype:
    return tl.bfloat16 if target.decoded == "bfloat16" else tl.float32


def choose_experts(
    x: Tensor,
    routing: Routing,
    token_ids: Tensor | None,
    positions: Tensor | None,
    block_m: int,
    num_shared_rows: int,
    counters: Tensor,
    target: Target,
) -> RowGroups:
    """
    Args:
        x: [num_tokens, d] bfloat16; `can_choose` says how many tokens.
        token_ids: [num_tokens] int64, for a table and only there.
        positions: [num_tokens] int64; tokens at -1, padding, take no expert. None: no padding.
        num_shared_rows: columns of `row_of` after those of the choice.
        counters: [num_counters()] int32, zeros, and zeros again afterwards.
    """
    assert routing.table is None or token_ids is not None, "a table goes by token ids"
    num_tokens, d = x.shape
    top_k, device = routing.top_k, x.device
    num_pairs = num_tokens * top_k
    num_blocks = max_blocks(num_pairs, routing.num_local, block_m)
    size_k = block_k(routing.gate.dtype)
    split = pick_split(num_tokens, routing.num_experts, triton.cdiv(d, size_k))

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    groups = RowGroups(
        block_m,
        block_experts=ints(num_blocks),
        block_rows=ints(num_blocks, 2),
        row_tokens=ints(num_pairs),
        row_weights=floats(num_pairs),
        row_of=ints(num_tokens, top_k + num_shared_rows),
    )
    grid = (triton.cdiv(num_tokens, BLOCK_T), triton.cdiv(routing.num_experts, BLOCK_E), split)
    choose_experts_kernel[grid](
        x,
        routing.gate,
        routing.bias if routing.bias is not None else routing.gate,
        routing.table if routing.table is not None else counters,
        token_ids if token_ids is not None else counters,
        positions if positions is not None else counters,
        floats(split, num_tokens, routing.num_experts),
        ints(num_tokens, top_k),
        floats(num_tokens, top_k),
        ints(grid[0], expert_lanes(routing.num_experts)),
        ints(MAX_TOKENS // BLOCK_T, expert_lanes(routing.num_experts)),
        groups.block_experts,
        groups.block_rows,
        groups.row_tokens,
        groups.row_weights,
        groups.row_of,
        counters,
        num_tokens,
        d,
        routing.num_experts,
        top_k,
        routing.scaling,
        routing.first_expert,
        routing.num_local,
        triton.cdiv(triton.cdiv(d, size_k), split),
        num_blocks,
        num_shared_rows,
        SCORE=routing.score,
        HAS_BIAS=routing.bias is not None,
        IS_HASHED=routing.table is not None,
        HAS_POSITIONS=positions is not None,
        DOT_TYPE=dot_type(target),
        GROUP_M=block_m,
        ROWS=1 if num_tokens == 1 else BLOCK_T,
        EXPERT_LANES=expert_lanes(routing.num_experts),
        PAIR_LANES=pair_lanes(num_pairs),
        BLOCK_T=BLOCK_T,
        BLOCK_E=BLOCK_E,
        BLOCK_K=size_k,
        NUM_SPLITS=split,
        num_warps=num_warps(num_tokens, routing.num_experts, target),
    )
    return groups
