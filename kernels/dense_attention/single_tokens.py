"""One token of every sequence from its projections to finished heads: a decode step's attention.

A program takes one sequence's query heads of one key-value head and a part of the keys; it turns
its own queries, and the program whose part holds the token itself turns and writes its K, too. The
number of parts follows from the size of the batch, their length from what lies on the device. A
second kernel adds the parts in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.dense_attention.head_tiles import (
    add_keys,
    load_turned,
    normalized,
    store_heads,
)
from scission.kernels.dense_attention.heads import Heads, Turn
from scission.kernels.dependent_launch import await_prior, dependent
from scission.kernels.linear.rows import QuantizedRows, Scaling, SplitSums
from scission.kernels.linear.sum_parts import load_parts
from scission.kernels.places import Places
from scission.kernels.quant import FP8_BLOCK
from scission.kernels.rounding import rounded_as
from scission.kernels.target import Target

BLOCK_M = 16  # what a dot takes at least; a group's query heads and its key head
# more programs add more parts than they hide latency: on an H200, at 1024 tokens, 4 splits at batch
# 8 took 17.3 us and 8 18.9; none at 32 40.4 and 2 49.5
WANTED_PROGRAMS = 256
MAX_SPLITS = 32
NUM_WARPS = 4
LOG2_E = 1.4426950408889634
KERNEL_DTYPE = torch.bfloat16
# the interpreter multiplies bf16 as integers, and is given the other
DTYPES = {KERNEL_DTYPE: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["num_parts"])
def single_tokens_kernel(
    # tensors
    qkv_ptr,
    k_pool_ptr,
    v_pool_ptr,
    q_weight_ptr,
    k_weight_ptr,
    rotation_ptr,
    query_scale_ptr,
    sink_ptr,
    gate_ptr,
    positions_ptr,
    block_tables_ptr,
    slots_ptr,
    out_ptr,
    scales_ptr,
    sums_ptr,
    # sizes, strides in elements, meta-parameters
    eps,
    scale,
    window,
    block_size,
    num_kv_heads,
    max_blocks,
    num_parts,
    stride_qkv_part,
    stride_qkv_token,
    stride_tables_seq,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    PAIRS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_QUERY_SCALE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_GATE: tl.constexpr,
    SCALING: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program, a part of one sequence's keys for the query heads of one key-value head.

    num_parts, PARTS: of `load_parts`, of qkv. With more than one split, out is [tokens, heads,
    splits, HEAD_DIM] float32, not normalised, and sums is [tokens, heads, splits, 2]: the largest
    score and the sum of exponentials, 0 of parts without a key, whose out stays unwritten. Else out
    and scales are those of `store_heads`.
    """
    dtype: tl.constexpr = k_pool_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, HEAD_DIM)
    mask_m = offs_m < GROUP
    num_heads = num_kv_heads * GROUP
    heads = kv_head * GROUP + offs_m
    await_prior(IS_DEPENDENT)

    # the token sees keys from `first` on, in tiles that the splits take in turns
    position = tl.load(positions_ptr + token).to(tl.int32)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(position + 1 - window, 0)
    low = first // BLOCK_N * BLOCK_N + split * BLOCK_N
    step: tl.constexpr = BLOCK_N * NUM_SPLITS
    # the split whose turn it is when the token's own key comes
    is_own = (position >= 0) & (position // BLOCK_N % NUM_SPLITS == low // BLOCK_N % NUM_SPLITS)
    has_keys = low <= position

    # rows are the group's query heads, then the key head
    row_ptr = qkv_ptr + token * stride_qkv_token
    is_key = offs_m == GROUP
    turned = load_turned(
        row_ptr + tl.where(is_key, num_heads + kv_head, heads) * HEAD_DIM,
        (mask_m & has_keys) | (is_key & is_own),
        is_key,
        q_weight_ptr,
        k_weight_ptr,
        rotation_ptr + token * PAIRS * 2,
        query_scale_ptr + token,
        eps,
        num_parts,
        stride_qkv_part,
        HEAD_DIM,
        PAIRS,
        HAS_NORM,
        HAS_QUERY_SCALE,
        PARTS,
        dtype,
    )
    k_own = tl.sum(tl.where(is_key[:, None], turned, 0.0), axis=0)
    v_ptr = row_ptr + (num_heads + num_kv_heads + kv_head) * HEAD_DIM + offs_d
    mask_own = offs_d < tl.where(is_own, HEAD_DIM, 0)
    v_own = load_parts(v_ptr, mask_own, num_parts, stride_qkv_part, PARTS, dtype)
    q = turned.to(dtype)

    largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    values = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    stride_pool_row = num_kv_heads * HEAD_DIM
    slot = tl.load(slots_ptr + token)
    table_ptr = block_tables_ptr + token * stride_tables_seq
    # read a step ahead, so that loads of keys do not wait for it; blocks hold whole tiles
    block = tl.load(table_ptr + low // block_size, mask=low // block_size < max_blocks, other=0)
    for start in tl.range(low, position, step, num_stages=NUM_STAGES):
        keys = start + offs_n
        # the token's own row is not written yet
        mask_n = keys < position
        if HAS_WINDOW:
            mask_n = mask_n & (keys >= first)
            rows = slot * window + keys % window
        else:
            rows = block * block_size + start % block_size + offs_n
            after = start + step
            block = tl.load(table_ptr + after // block_size, mask=after < position, other=0)
        offsets = rows[:, None] * stride_pool_row + kv_head * HEAD_DIM + offs_d[None, :]
        k = tl.load(k_pool_ptr + offsets, mask=mask_n[:, None], other=0.0)
        v = tl.load(v_pool_ptr + offsets, mask=mask_n[:, None], other=0.0)
        largest, total, values = add_keys(
            q, k, v, mask_n[None, :], scale, largest, total, values, True
        )

    scores = tl.sum(q.to(tl.float32) * k_own[None, :], axis=1) * scale
    scores = tl.where(is_own, scores, float("-inf"))
    new_largest = tl.maximum(largest, scores)
    shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    weights = tl.exp2(scores - shift)
    fade = tl.exp2(largest - shift)
    total = total * fade + weights
    # weights are rounded as those of whole tiles are
    weights = rounded_as(weights, dtype)
    values = values * fade[:, None] + weights[:, None] * v_own[None, :]
    largest = new_largest

    if is_own:
        if HAS_WINDOW:
            row = slot * window + position % window
        else:
            own_block = tl.load(table_ptr + position // block_size)
            row = own_block * block_size + position % block_size
        own_offsets = row * stride_pool_row + kv_head * HEAD_DIM + offs_d
        tl.store(k_pool_ptr + own_offsets, k_own.to(dtype))
        tl.store(v_pool_ptr + own_offsets, v_own.to(dtype))

    rows = token * num_heads + heads
    if NUM_SPLITS > 1:
        parts = rows * NUM_SPLITS + split
        tl.store(sums_ptr + parts * 2, largest, mask=mask_m)
        tl.store(sums_ptr + parts * 2 + 1, total, mask=mask_m)
        outs = out_ptr + parts[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(outs, values, mask=mask_m[:, None] & has_keys)
    else:
        values = normalized(largest, total, values, sink_ptr, heads, mask_m, HAS_SINK)
        store_heads(
            values,
            rows,
            mask_m,
            out_ptr,
            scales_ptr,
            gate_ptr + rows,
            HAS_GATE,
            dtype,
            SCALING,
            HEAD_DIM,
        )


@triton.jit
def add_parts_kernel(
    # tensors
    parts_ptr,
    sums_ptr,
    sink_ptr,
    gate_ptr,
    out_ptr,
    scales_ptr,
    # sizes, meta-parameters
    num_heads,
    HEAD_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_GATE: tl.constexpr,
    DTYPE: tl.constexpr,
    SCALING: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """One program, one head of one token: its parts on one scale, finished by `store_heads`."""
    await_prior(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    offs_s = tl.arange(0, NUM_SPLITS)
    offs_d = tl.arange(0, HEAD_DIM)
    parts = row * NUM_SPLITS + offs_s
    largest = tl.load(sums_ptr + parts * 2)
    totals = tl.load(sums_ptr + parts * 2 + 1)
    has_keys = totals > 0.0
    # of parts without a key this is whatever was there
    values = tl.load(parts_ptr + parts[:, None] * HEAD_DIM + offs_d[None, :])
    values = tl.where(has_keys[:, None], values, 0.0)
    shift = tl.max(largest, axis=0)
    fades = tl.where(has_keys, tl.exp2(largest - shift), 0.0)
    value = tl.sum(values * fades[:, None], axis=0)
    total = tl.sum(totals * fades, axis=0)
    one = tl.arange(0, 1)
    value = normalized(
        shift + tl.zeros([1], tl.float32),
        total + tl.zeros([1], tl.float32),
        value[None, :],
        sink_ptr,
        row % num_heads + one,
        one < 1,
        HAS_SINK,
    )
    store_heads(
        value,
        row + one,
        one < 1,
        out_ptr,
        scales_ptr,
        gate_ptr + row + one,
        HAS_GATE,
        DTYPE,
        SCALING,
        HEAD_DIM,
    )


def pick_splits(num_seqs: int, num_kv_heads: int) -> int:
    """Over how many programs the keys of a sequence and a key-value head are divided: a power of
    two."""
    wanted = -(-WANTED_PROGRAMS // max(num_seqs * num_kv_heads, 1))
    return min(int(triton.next_power_of_2(wanted)), MAX_SPLITS)


def block_n(target: Target) -> int:
    """Keys of a step; 64 spill registers on gfx1201."""
    return 32 if target.name == "gfx1201" else 64


def num_stages(target: Target) -> int:
    return 3 if target.has_ptx else 1


def attend_single_tokens(
    qkv: Tensor | SplitSums,
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
    """As `attend_heads`, of a batch that is single.

    Args:
        gate: contiguous.
        scaling: None where heads have not 128 channels.
    """
    rows = qkv.parts if isinstance(qkv, SplitSums) else qkv
    num_parts = rows.shape[0] if rows.dim() == 3 else 1
    num_tokens, num_heads = rows.shape[-2], heads.num_heads(rows.shape[-1])
    head_dim, num_kv_heads = heads.head_dim, heads.num_kv_heads
    num_splits = pick_splits(num_tokens, num_kv_heads)
    shape = (num_tokens, num_heads * head_dim)
    out, scales = empty_heads(k_pool, shape, scaling, static_scale)
    parts, sums = out, out
    if num_splits > 1:
        by_split = (num_tokens, num_heads, num_splits)
        parts = k_pool.new_empty((*by_split, head_dim), dtype=torch.float32)
        sums = k_pool.new_empty((*by_split, 2), dtype=torch.float32)
    pairs = turn.rotation.shape[1] if heads.has_rope else 0
    unused = rows
    sink = heads.sink if heads.sink is not None else unused
    gates = gate if gate is not None else unused
    single_tokens_kernel[(num_tokens, num_kv_heads, num_splits)](
        rows,
        k_pool,
        v_pool,
        heads.q_weight if heads.q_weight is not None else unused,
        heads.k_weight if heads.k_weight is not None else unused,
        torch.view_as_real(turn.rotation),
        turn.query_scale if turn.query_scale is not None else unused,
        sink,
        gates,
        places.positions,
        places.block_tables,
        places.slots,
        parts,
        scales,
        sums,
        heads.eps,
        heads.scale * LOG2_E,
        heads.window or 0,
        places.block_size,
        num_kv_heads,
        places.block_tables.shape[1],
        num_parts,
        rows.stride(0),
        rows.stride(-2),
        places.block_tables.stride(0),
        HEAD_DIM=head_dim,
        GROUP=num_heads // num_kv_heads,
        BLOCK_M=BLOCK_M,
        BLOCK_N=block_n(target),
        NUM_SPLITS=num_splits,
        PARTS=triton.next_power_of_2(num_parts),
        PAIRS=pairs,
        HAS_NORM=heads.q_weight is not None,
        HAS_QUERY_SCALE=turn.query_scale is not None,
        HAS_WINDOW=heads.window is not None,
        HAS_SINK=heads.sink is not None and num_splits == 1,
        HAS_GATE=gate is not None and num_splits == 1,
        SCALING=scaling or "none",
        IS_DEPENDENT=target.has_ptx,
        NUM_STAGES=num_stages(target),
        num_warps=NUM_WARPS,
        **dependent(target),
    )
    if num_splits > 1:
        add_parts_kernel[(num_tokens * num_heads,)](
            parts,
            sums,
            sink,
            gates,
            out,
            scales,
            num_heads,
            HEAD_DIM=head_dim,
            NUM_SPLITS=num_splits,
            HAS_SINK=heads.sink is not None,
            HAS_GATE=gate is not None,
            DTYPE=DTYPES[k_pool.dtype],
            SCALING=scaling or "none",
            IS_DEPENDENT=target.has_ptx,
            num_warps=add_warps(num_splits),
            **dependent(target),
        )
    return out if scaling is None else QuantizedRows(values=None, codes=out, scales=scales)


def add_warps(num_splits: int) -> int:
    return 4 if num_splits > 4 else 1


def empty_heads(
    like: Tensor, shape: tuple[int, int], scaling: Scaling | None, static_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Where finished heads go: rows, and scales of blocks of 128, the one scale, or nothing.

    Args:
        like: of the activations' dtype, on their device.
        shape: of the rows.
    """
    if scaling is None:
        out = like.new_empty(shape)
        return out, out
    codes = like.new_empty(shape, dtype=torch.float8_e4m3fn)
    if static_scale is not None:
        return codes, static_scale
    return codes, like.new_empty((shape[0], shape[1] // FP8_BLOCK), dtype=torch.float32)
