"""Chunks of sequences from their projections to finished heads: prefill's attention, and mixes.

Three passes: heads are turned, and K and V written where blocks hold them; queries attend, a tile
of them with all query heads of a key-value head; and where rings hold K and V, these are written
last, since early queries of a chunk still see what its late tokens overwrite.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.cache import write_ring_
from scission.kernels.dense_attention.head_tiles import (
    add_keys,
    load_turned,
    normalized,
    store_heads,
)
from scission.kernels.dense_attention.heads import Heads, Turn
from scission.kernels.dense_attention.single_tokens import LOG2_E, empty_heads
from scission.kernels.dependent_launch import await_prior, dependent
from scission.kernels.linear.rows import QuantizedRows, Scaling
from scission.kernels.places import Places
from scission.kernels.target import Target

TURN_HEADS = 16  # of one token, that a program turns
TURN_WARPS = 4
SEQUENCES = 64  # that are searched at once for a tile's own


@triton.jit
def turn_heads_kernel(
    # tensors
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    rotation_ptr,
    query_scale_ptr,
    positions_ptr,
    sequences_ptr,
    block_tables_ptr,
    q_ptr,
    k_ptr,
    v_pool_ptr,
    # sizes, strides in elements, meta-parameters
    eps,
    num_heads,
    num_kv_heads,
    block_size,
    stride_qkv_token,
    stride_tables_seq,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PAIRS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_QUERY_SCALE: tl.constexpr,
    IS_PAGED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """One program, some heads of one token: query heads, then key heads.

    q is [tokens, num_heads, HEAD_DIM]. With IS_PAGED, k is the pool of keys, and padding writes no
    row of it or of the values'; else k is [tokens, num_kv_heads, HEAD_DIM], and values stay.
    """
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, HEAD_DIM)
    is_key = heads >= num_heads
    mask = heads < num_heads + num_kv_heads
    await_prior(IS_DEPENDENT)
    position = tl.load(positions_ptr + token)
    row_ptr = qkv_ptr + token * stride_qkv_token
    turned = load_turned(
        row_ptr + heads * HEAD_DIM,
        mask,
        is_key,
        q_weight_ptr,
        k_weight_ptr,
        rotation_ptr + token * PAIRS * 2,
        query_scale_ptr + token,
        eps,
        1,
        0,
        HEAD_DIM,
        PAIRS,
        HAS_NORM,
        HAS_QUERY_SCALE,
        1,
        dtype,
    ).to(dtype)
    q_outs = q_ptr + (token * num_heads + heads)[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(q_outs, turned, mask=(mask & ~is_key)[:, None])
    row = token
    is_kept = mask & is_key
    if IS_PAGED:
        is_kept = is_kept & (position >= 0)
        entry = tl.load(sequences_ptr + token) * stride_tables_seq
        entry += tl.maximum(position, 0) // block_size
        row = tl.load(block_tables_ptr + entry) * block_size + position % block_size
    outs = (row * num_kv_heads + heads - num_heads)[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(k_ptr + outs, turned, mask=is_kept[:, None])
    if IS_PAGED:
        values = row_ptr + (heads + num_kv_heads)[:, None] * HEAD_DIM + offs_d[None, :]
        v = tl.load(values, mask=is_kept[:, None], other=0.0)
        tl.store(v_pool_ptr + outs, v, mask=is_kept[:, None])


@triton.jit
def chunks_kernel(
    # tensors
    q_ptr,
    k_ptr,
    v_ptr,
    k_pool_ptr,
    v_pool_ptr,
    sink_ptr,
    gate_ptr,
    cu_seqlens_ptr,
    context_lens_ptr,
    block_tables_ptr,
    slots_ptr,
    out_ptr,
    scales_ptr,
    # sizes, strides in elements, meta-parameters
    scale,
    window,
    block_size,
    num_seqs,
    num_kv_heads,
    stride_v_token,
    stride_tables_seq,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    SEQUENCES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_GATE: tl.constexpr,
    SCALING: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program, some queries of one sequence with all heads of one key-value head.

    Row m of a tile is query m // GROUP with query head m % GROUP. Without a window all keys are
    read from the pools; with one, those of this step from k [tokens, num_kv_heads, HEAD_DIM] and v.
    Tiles are numbered so that sequence i begins with cu_seqlens[i] // queries + i: some are empty.
    """
    queries: tl.constexpr = BLOCK_M // GROUP
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    # the last queries of a chunk see most keys: they come first
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    offs_s = tl.arange(0, SEQUENCES)
    sequence = tl.full([], -1, tl.int32)
    for before in range(0, num_seqs, SEQUENCES):
        numbers = before + offs_s
        firsts = tl.load(cu_seqlens_ptr + numbers, mask=numbers < num_seqs, other=0)
        has_begun = (firsts // queries + numbers <= tile) & (numbers < num_seqs)
        sequence += tl.sum(has_begun.to(tl.int32), axis=0)
    begin = tl.load(cu_seqlens_ptr + sequence)
    num_queries = tl.load(cu_seqlens_ptr + sequence + 1) - begin
    query = (tile - begin // queries - sequence) * queries
    context = tl.load(context_lens_ptr + sequence)
    start = context - num_queries

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, HEAD_DIM)
    numbers = query + offs_m // GROUP
    mask_m = (offs_m < queries * GROUP) & (numbers < num_queries)
    num_heads = num_kv_heads * GROUP
    heads = kv_head * GROUP + offs_m % GROUP
    rows_m = (begin + numbers).to(tl.int64) * num_heads + heads
    q = tl.load(
        q_ptr + rows_m[:, None] * HEAD_DIM + offs_d[None, :], mask=mask_m[:, None], other=0.0
    )
    # of padding -1
    positions = (start + numbers)[:, None]
    low = start + query
    # of an empty tile nothing
    high = tl.where(query < num_queries, tl.minimum(low + queries, context), 0)

    largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    values = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    stride_pool_row = num_kv_heads * HEAD_DIM
    lanes = kv_head * HEAD_DIM + offs_d[None, :]
    seq = sequence.to(tl.int64)
    if HAS_WINDOW:
        slot = tl.load(slots_ptr + seq)
        first = tl.maximum(low + 1 - window, 0)
        for key in tl.range(
            first // BLOCK_N * BLOCK_N, tl.minimum(start, high), BLOCK_N, num_stages=NUM_STAGES
        ):
            keys = key + offs_n
            mask_n = ((keys >= first) & (keys < start))[:, None]
            offsets = (slot * window + keys % window)[:, None] * stride_pool_row + lanes
            k = tl.load(k_pool_ptr + offsets, mask=mask_n, other=0.0)
            v = tl.load(v_pool_ptr + offsets, mask=mask_n, other=0.0)
            seen = ((keys >= first) & (keys < start))[None, :] & (
                keys[None, :] > positions - window
            )
            largest, total, values = add_keys(q, k, v, seen, scale, largest, total, values, True)
        for key in tl.range(tl.maximum(first, start), high, BLOCK_N, num_stages=NUM_STAGES):
            keys = key + offs_n
            mask_n = (keys < high)[:, None]
            tokens = (begin + keys - start).to(tl.int64)[:, None]
            k = tl.load(k_ptr + tokens * stride_pool_row + lanes, mask=mask_n, other=0.0)
            v = tl.load(v_ptr + tokens * stride_v_token + lanes, mask=mask_n, other=0.0)
            seen = (keys[None, :] <= positions) & (keys[None, :] > positions - window)
            largest, total, values = add_keys(q, k, v, seen, scale, largest, total, values, True)
    else:
        table_ptr = block_tables_ptr + seq * stride_tables_seq
        # every query of the tile sees all of these
        whole = tl.maximum(tl.minimum(low + 1, high), 0) // BLOCK_N * BLOCK_N
        # read a step ahead, so that loads of keys do not wait for it; blocks hold whole tiles
        block = tl.load(table_ptr)
        for key in tl.range(0, whole, BLOCK_N, num_stages=NUM_STAGES):
            rows = block * block_size + key % block_size + offs_n
            after = key + BLOCK_N
            block = tl.load(table_ptr + after // block_size, mask=after < high, other=0)
            offsets = rows[:, None] * stride_pool_row + lanes
            k = tl.load(k_pool_ptr + offsets)
            v = tl.load(v_pool_ptr + offsets)
            largest, total, values = add_keys(q, k, v, None, scale, largest, total, values, False)
        for key in tl.range(whole, high, BLOCK_N, num_stages=NUM_STAGES):
            keys = key + offs_n
            rows = block * block_size + key % block_size + offs_n
            after = key + BLOCK_N
            block = tl.load(table_ptr + after // block_size, mask=after < high, other=0)
            offsets = rows[:, None] * stride_pool_row + lanes
            mask_n = (keys < high)[:, None]
            k = tl.load(k_pool_ptr + offsets, mask=mask_n, other=0.0)
            v = tl.load(v_pool_ptr + offsets, mask=mask_n, other=0.0)
            seen = keys[None, :] <= positions
            largest, total, values = add_keys(q, k, v, seen, scale, largest, total, values, True)

    values = normalized(largest, total, values, sink_ptr, heads, mask_m, HAS_SINK)
    store_heads(
        values,
        rows_m,
        mask_m,
        out_ptr,
        scales_ptr,
        gate_ptr + rows_m,
        HAS_GATE,
        dtype,
        SCALING,
        HEAD_DIM,
    )


def block_m(target: Target) -> int:
    """Rows of a tile: queries times the query heads of a key-value head."""
    return 128 if target.has_ptx else 64


def block_n(target: Target) -> int:
    """Keys of a step."""
    return 64 if target.has_ptx else 32


def num_warps(target: Target) -> int:
    return 8 if target.has_ptx else 4


def num_stages(target: Target) -> int:
    return 3 if target.has_ptx else 1


def attend_chunks(
    qkv: Tensor,
    heads: Heads,
    turn: Turn,
    k_pool: Tensor,
    v_pool: Tensor,
    places: Places,
    gate: Tensor | None,
    scaling: Scaling | None,
    static_scale: Tensor | None,
    target: Target,
) -> Tensor | QuantizedRows:
    """As `attend_heads`.

    Args:
        gate: contiguous.
        scaling: None where heads have not 128 channels.
    """
    num_tokens, num_heads = qkv.shape[0], heads.num_heads(qkv.shape[1])
    head_dim, num_kv_heads = heads.head_dim, heads.num_kv_heads
    is_paged = heads.window is None
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    k = k_pool if is_paged else qkv.new_empty(num_tokens, num_kv_heads, head_dim)
    v = qkv[:, (num_heads + num_kv_heads) * head_dim :]
    num_tiles = triton.cdiv(num_heads + num_kv_heads, TURN_HEADS)
    unused = qkv
    turn_heads_kernel[(num_tokens, num_tiles)](
        qkv,
        heads.q_weight if heads.q_weight is not None else unused,
        heads.k_weight if heads.k_weight is not None else unused,
        torch.view_as_real(turn.rotation),
        turn.query_scale if turn.query_scale is not None else unused,
        places.positions,
        places.sequences,
        places.block_tables,
        q,
        k,
        v_pool,
        heads.eps,
        num_heads,
        num_kv_heads,
        places.block_size,
        qkv.stride(0),
        places.block_tables.stride(0),
        HEAD_DIM=head_dim,
        BLOCK_H=TURN_HEADS,
        PAIRS=turn.rotation.shape[1] if heads.has_rope else 0,
        HAS_NORM=heads.q_weight is not None,
        HAS_QUERY_SCALE=turn.query_scale is not None,
        IS_PAGED=is_paged,
        IS_DEPENDENT=target.has_ptx,
        num_warps=TURN_WARPS,
        **dependent(target),
    )
    out, scales = empty_heads(qkv, (num_tokens, num_heads * head_dim), scaling, static_scale)
    group = num_heads // num_kv_heads
    rows = block_m(target)
    grid = (num_tokens // (rows // group) + places.num_seqs, num_kv_heads)
    chunks_kernel[grid](
        q,
        k,
        v,
        k_pool,
        v_pool,
        heads.sink if heads.sink is not None else unused,
        gate if gate is not None else unused,
        places.cu_seqlens,
        places.context_lens,
        places.block_tables,
        places.slots,
        out,
        scales,
        heads.scale * LOG2_E,
        heads.window or 0,
        places.block_size,
        places.num_seqs,
        num_kv_heads,
        v.stride(0),
        places.block_tables.stride(0),
        HEAD_DIM=head_dim,
        GROUP=group,
        SEQUENCES=SEQUENCES,
        BLOCK_M=rows,
        BLOCK_N=block_n(target),
        HAS_WINDOW=not is_paged,
        HAS_SINK=heads.sink is not None,
        HAS_GATE=gate is not None,
        SCALING=scaling or "none",
        NUM_STAGES=num_stages(target),
        num_warps=num_warps(target),
    )
    if heads.window is not None:
        write_ring_(k_pool.flatten(1), k.flatten(1), heads.window, places)
        write_ring_(v_pool.flatten(1), v, heads.window, places)
    return out if scaling is None else QuantizedRows(values=None, codes=out, scales=scales)
