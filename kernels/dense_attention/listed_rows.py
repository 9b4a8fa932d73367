"""Grouped-query attention over listed rows as one ragged kernel: decode, chunks and mixes of both.

A program takes a tile of one sequence's queries with all query heads of one key-value head, so that
every key is loaded once for the group. Where there are too few tiles to fill the chip, the keys are
split over programs too, and a second kernel adds the parts in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.dense_attention.key_rows import TILE_QUERIES, KeyRows
from scission.kernels.target import Target

# programs that keep 132 multiprocessors busy; fewer keys than this are not worth a split
_MIN_PROGRAMS = 264
_MIN_KEYS_PER_SPLIT = 128
_MAX_SPLITS = 32
ADD_WARPS = 1


@triton.jit
def listed_rows_kernel(
    # tensors
    q_ptr,
    k_ptr,
    v_ptr,
    rows_ptr,
    firsts_ptr,
    positions_ptr,
    tiles_ptr,
    sink_ptr,
    out_ptr,
    sums_ptr,
    # sizes, strides in elements, meta-parameters
    scale,
    window,
    group,
    keys_per_split,
    stride_q_token,
    stride_q_head,
    stride_pool_row,
    stride_rows_sequence,
    stride_out_split,
    stride_out_token,
    stride_sums_split,
    stride_sums_token,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINK: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Row m of a tile is query m // group with query head m % group of the key-value head.

    With IS_SPLIT, out is the unnormalised fp32 sum of this split's keys, sums its (largest score,
    sum of exponentials); else out is the result.
    """
    tile = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    sequence = tl.load(tiles_ptr + tile * 4)
    token = tl.load(tiles_ptr + tile * 4 + 1)
    num_queries = tl.load(tiles_ptr + tile * 4 + 2)
    num_keys = tl.load(tiles_ptr + tile * 4 + 3)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, HEAD_DIM)
    mask_m = offs_m < num_queries * group
    tokens = token + tl.where(mask_m, offs_m // group, 0)
    heads = kv_head * group + offs_m % group
    q = tl.load(
        q_ptr + tokens[:, None] * stride_q_token + heads[:, None] * stride_q_head + offs_d[None, :],
        mask=mask_m[:, None],
        other=0.0,
    )
    positions = tl.load(positions_ptr + tokens, mask=mask_m, other=-1)
    first = tl.load(firsts_ptr + sequence)

    # what the tile's queries can see, in columns of the sequence's keys
    last_position = tl.load(positions_ptr + token + num_queries - 1)
    low = (split * keys_per_split).to(tl.int64)
    high = tl.minimum(low + keys_per_split, tl.minimum(num_keys, last_position + 1 - first))
    if HAS_WINDOW:
        first_seen = tl.load(positions_ptr + token) - window + 1 - first
        low = tl.maximum(low, tl.maximum(first_seen, 0) // BLOCK_N * BLOCK_N)

    largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    values = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    for start in tl.range(low, high, BLOCK_N, num_stages=NUM_STAGES):
        columns = start + offs_n
        mask_n = columns < high
        row = tl.load(rows_ptr + sequence * stride_rows_sequence + columns, mask=mask_n, other=0)
        offsets = row[:, None] * stride_pool_row + kv_head * HEAD_DIM + offs_d[None, :]
        k = tl.load(k_ptr + offsets, mask=mask_n[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        key_positions = (first + columns)[None, :]
        is_seen = mask_n[None, :] & (key_positions <= positions[:, None]) & (key_positions >= 0)
        if HAS_WINDOW:
            is_seen = is_seen & (key_positions > positions[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # a row that has seen nothing yet has no largest score
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp(scores - shift[:, None])
        fade = tl.exp(largest - shift)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(v_ptr + offsets, mask=mask_n[:, None], other=0.0)
        values = values * fade[:, None] + tl.dot(weights.to(v.dtype), v)
        largest = new_largest

    outs = out_ptr + tokens * stride_out_token + heads * HEAD_DIM
    if IS_SPLIT:
        split_offset = split.to(tl.int64)
        sums = sums_ptr + split_offset * stride_sums_split + tokens * stride_sums_token + heads * 2
        tl.store(sums, largest, mask=mask_m)
        tl.store(sums + 1, total, mask=mask_m)
        outs = outs + split_offset * stride_out_split
    else:
        if HAS_SINK:
            sink = tl.load(sink_ptr + heads, mask=mask_m, other=0.0)
            shift = tl.maximum(largest, sink)
            fade = tl.exp(largest - shift)
            values = values * fade[:, None]
            total = total * fade + tl.exp(sink - shift)
        values = values / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        outs[:, None] + offs_d[None, :],
        values.to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None],
    )


@triton.jit
def add_splits_kernel(
    # tensors
    partials_ptr,
    sums_ptr,
    sink_ptr,
    out_ptr,
    # sizes, strides in elements, meta-parameters
    num_splits,
    num_heads,
    stride_partials_split,
    stride_sums_split,
    HEAD_DIM: tl.constexpr,
    HAS_SINK: tl.constexpr,
):
    """One program, one head of one token: the splits' sums on one scale, divided by their total."""
    pair = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, HEAD_DIM)
    shift = float("-inf")
    if HAS_SINK:
        shift = tl.load(sink_ptr + pair % num_heads)
    for split in range(num_splits):
        shift = tl.maximum(shift, tl.load(sums_ptr + split * stride_sums_split + pair * 2))
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    total = 0.0
    if HAS_SINK:
        total = tl.exp(tl.load(sink_ptr + pair % num_heads) - shift)
    values = tl.zeros([HEAD_DIM], dtype=tl.float32)
    for split in range(num_splits):
        sums = sums_ptr + split * stride_sums_split + pair * 2
        fade = tl.exp(tl.load(sums) - shift)
        total += tl.load(sums + 1) * fade
        partial = tl.load(partials_ptr + split * stride_partials_split + pair * HEAD_DIM + offs_d)
        values += partial * fade
    values = values / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + pair * HEAD_DIM + offs_d, values.to(out_ptr.dtype.element_ty))


def block_m(group: int, tile_queries: int) -> int:
    """Rows of a tile; a dot takes 16 at least."""
    return max(16, int(triton.next_power_of_2(group * tile_queries)))


def block_n(rows_per_tile: int, target: Target) -> int:
    """Keys of a step; with 64, tiles of many rows spill scalar registers on AMD (17 to 139)."""
    return 64 if target.has_ptx or rows_per_tile == 16 else 32


def num_warps(rows_per_tile: int) -> int:
    return 4 if rows_per_tile <= 64 else 8


def num_stages(target: Target) -> int:
    """Of the loop over keys; AMD's copies pass through registers, which are full already."""
    return 2 if target.has_ptx else 1


def pick_splits(num_programs: int, max_keys: int) -> int:
    """Over how many programs the keys are divided."""
    wanted = -(-_MIN_PROGRAMS // num_programs)
    return max(1, min(wanted, max_keys // _MIN_KEYS_PER_SPLIT, _MAX_SPLITS))


def attend_listed_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: KeyRows,
    tiles: Tensor,
    scale: float,
    window: int | None,
    sink: Tensor | None,
    target: Target,
) -> Tensor:
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    is_single = all(num_queries == 1 for _, num_queries, _ in keys.spans)
    rows_per_tile = block_m(group, 1 if is_single else TILE_QUERIES)
    max_keys = max(max(num_keys for *_, num_keys in keys.spans), 1)
    num_splits = pick_splits(tiles.shape[0] * num_kv_heads, max_keys) if is_single else 1
    columns = block_n(rows_per_tile, target)
    blocks = -(-max_keys // columns)
    keys_per_split = -(-blocks // num_splits) * columns
    num_splits = -(-max_keys // keys_per_split)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    is_split = num_splits > 1
    partials = out
    sums = q.new_empty(
        (num_splits if is_split else 0, num_tokens, num_heads, 2), dtype=torch.float32
    )
    if is_split:
        partials = q.new_empty((num_splits, num_tokens, num_heads, head_dim), dtype=torch.float32)
    has_sink = sink is not None
    # never read without one
    sinks = sink if sink is not None else sums
    listed_rows_kernel[(tiles.shape[0], num_kv_heads, num_splits)](
        q,
        k,
        v,
        keys.rows,
        keys.firsts,
        keys.positions,
        tiles,
        sinks,
        partials,
        sums,
        scale,
        window or 0,
        group,
        keys_per_split,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        keys.rows.stride(0),
        num_tokens * num_heads * head_dim,
        num_heads * head_dim,
        num_tokens * num_heads * 2,
        num_heads * 2,
        HEAD_DIM=head_dim,
        BLOCK_M=rows_per_tile,
        BLOCK_N=columns,
        HAS_WINDOW=window is not None,
        HAS_SINK=has_sink and not is_split,
        IS_SPLIT=is_split,
        NUM_STAGES=num_stages(target),
        num_warps=num_warps(rows_per_tile),
    )
    if is_split:
        add_splits_kernel[(num_tokens * num_heads,)](
            partials,
            sums,
            sinks,
            out,
            num_splits,
            num_heads,
            num_tokens * num_heads * head_dim,
            num_tokens * num_heads * 2,
            HEAD_DIM=head_dim,
            HAS_SINK=has_sink,
            num_warps=ADD_WARPS,
        )
    return out
