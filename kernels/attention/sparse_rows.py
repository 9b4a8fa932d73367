"""Sparse attention as one ragged kernel for decode and prefill: all heads of a token together.

There is one key-value head, so a token's heads share its keys: a program takes a token and a block
of its heads, and every tile of keys is loaded once, as keys and as values. Where tokens are too
few to fill the chip their keys are split over programs, and a second kernel adds the parts in a
fixed order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.dependent_launch import await_prior, dependent, release_next
from scission.kernels.places import Places
from scission.kernels.target import Target

_LOG2_E = 1.4426950408889634
# programs that keep 132 multiprocessors busy
_WANTED_PROGRAMS = 132
MAX_SPLITS = 32
ADD_CHANNELS = 128
ADD_WARPS = 2


@triton.jit
def turn_back(values, first_pair, rotation_ptr):
    """Pairs of channels of [rows, channels] fp32, numbered from first_pair; those from 0 turn."""
    rows: tl.constexpr = values.shape[0]
    channels: tl.constexpr = values.shape[1]
    pair = first_pair + tl.arange(0, channels // 2)
    cos = tl.load(rotation_ptr + pair * 2, mask=pair >= 0, other=1.0)[None, :]
    sin = tl.load(rotation_ptr + pair * 2 + 1, mask=pair >= 0, other=0.0)[None, :]
    a, b = tl.split(tl.reshape(values, [rows, channels // 2, 2]))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [rows, channels])


@triton.jit(do_not_specialize=["stride_tables_sequence"])
def sparse_rows_kernel(
    # tensors
    q_ptr,
    kv_ptr,
    ring_ptr,
    entries_ptr,
    picks_ptr,
    sink_ptr,
    inverse_ptr,
    positions_ptr,
    sequences_ptr,
    firsts_ptr,
    slots_ptr,
    tables_ptr,
    out_ptr,
    sums_ptr,
    # sizes, strides in elements, meta-parameters
    scale,
    num_heads,
    window,
    top_k,
    stride_q_token,
    stride_q_head,
    stride_picks_token,
    stride_inverse_token,
    stride_tables_sequence,
    stride_out_split,
    stride_out_token,
    stride_sums_split,
    stride_sums_token,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RATIO: tl.constexpr,
    ROWS_PER_BLOCK: tl.constexpr,
    HAS_PICKS: tl.constexpr,
    IS_SINGLE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Keys are numbered: first the window's, oldest first, then the entries.

    With IS_SPLIT, out is the unnormalised fp32 sum of this split's keys, sums its (largest score,
    sum of exponentials) to the base 2; else out is the result.
    """
    release_next(IS_DEPENDENT)
    await_prior(IS_DEPENDENT)
    num_blocks_h = tl.cdiv(num_heads, BLOCK_H)
    token = (tl.program_id(0) // num_blocks_h).to(tl.int64)
    block_h = tl.program_id(0) % num_blocks_h
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)

    position = tl.load(positions_ptr + token).to(tl.int32)
    sequence = token
    first = token
    if not IS_SINGLE:
        sequence = tl.load(sequences_ptr + token)
        first = tl.load(firsts_ptr + sequence).to(tl.int64)
    slot = tl.load(slots_ptr + sequence)
    num_window = tl.minimum(position + 1, window)
    num_keys = num_window
    if RATIO:
        num_entries = (position + 1) // RATIO
        if HAS_PICKS:
            num_entries = tl.minimum(num_entries, top_k)
        num_keys += num_entries
    # the oldest key: its row of the batch, were the whole window in it, and of the ring
    oldest = token.to(tl.int32) - num_window + 1
    oldest_in_ring = (position - num_window + 1) % window
    # keys before this one are in the ring alone
    num_in_ring = first.to(tl.int32) - oldest
    ring_row = slot.to(tl.int32) * window
    low = 0
    high = num_keys
    if IS_SPLIT:
        per_split = tl.cdiv(tl.cdiv(num_keys, BLOCK_N), num_splits) * BLOCK_N
        low = split * per_split
        high = tl.minimum(low + per_split, num_keys)

    offs_h = tl.arange(0, BLOCK_H)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, DIM)
    heads = block_h * BLOCK_H + offs_h
    mask_h = heads < num_heads
    q = tl.load(
        q_ptr + token * stride_q_token + heads[:, None] * stride_q_head + offs_d[None, :],
        mask=mask_h[:, None],
        other=0.0,
    )

    largest = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    values = tl.zeros([BLOCK_H, DIM], dtype=tl.float32)
    for start in tl.range(low, high, BLOCK_N, num_stages=NUM_STAGES):
        keys = start + offs_n
        is_seen = keys < high
        in_ring = oldest_in_ring + keys
        in_ring = ring_row + tl.where(in_ring >= window, in_ring - window, in_ring)
        is_fresh = keys >= num_in_ring
        base = tl.where(is_fresh, kv_ptr, ring_ptr)
        row = tl.where(is_fresh, oldest + keys, in_ring)
        if RATIO:
            entry = keys - num_window
            is_entry = (entry >= 0) & is_seen
            if HAS_PICKS:
                picked = picks_ptr + token * stride_picks_token + entry
                entry_row = tl.load(picked, mask=is_entry, other=0)
            else:
                table = tables_ptr + sequence * stride_tables_sequence
                block = tl.load(table + entry // ROWS_PER_BLOCK, mask=is_entry, other=0)
                entry_row = block.to(tl.int32) * ROWS_PER_BLOCK + entry % ROWS_PER_BLOCK
            base = tl.where(is_entry, entries_ptr, base)
            row = tl.where(is_entry, entry_row, row)
        rows = base + row.to(tl.int64) * DIM
        k = tl.load(rows[:, None] + offs_d[None, :], mask=is_seen[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # a row that has seen nothing yet has no largest score
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(largest - shift)
        total = total * fade + tl.sum(weights, 1)
        values = tl.dot(weights.to(k.dtype), k, values * fade[:, None])
        largest = new_largest

    outs = out_ptr + token * stride_out_token + heads * DIM
    if IS_SPLIT:
        sums = sums_ptr + split.to(tl.int64) * stride_sums_split + token * stride_sums_token
        tl.store(sums + heads * 2, largest, mask=mask_h)
        tl.store(sums + heads * 2 + 1, total, mask=mask_h)
        outs = outs + split.to(tl.int64) * stride_out_split
    else:
        sink = tl.load(sink_ptr + heads, mask=mask_h, other=0.0) * 1.4426950408889634
        shift = tl.maximum(largest, sink)
        fade = tl.exp2(largest - shift)
        total = total * fade + tl.exp2(sink - shift)
        values = values * (fade / total)[:, None]
        rotation_ptr = inverse_ptr + token * stride_inverse_token
        values = turn_back(values, PAIRS - DIM // 2, rotation_ptr)
    tl.store(
        outs[:, None] + offs_d[None, :],
        values.to(out_ptr.dtype.element_ty),
        mask=mask_h[:, None],
    )


@triton.jit
def add_splits_kernel(
    # tensors
    partials_ptr,
    sums_ptr,
    sink_ptr,
    inverse_ptr,
    out_ptr,
    # sizes, strides in elements, meta-parameters
    num_heads,
    num_splits,
    stride_partials_split,
    stride_sums_split,
    stride_inverse_token,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """One program, some channels of one head of one token.

    The splits' sums are brought on one scale, added in order, and divided by their total.
    """
    release_next(IS_DEPENDENT)
    await_prior(IS_DEPENDENT)
    pair = tl.program_id(0).to(tl.int64)
    first_channel = tl.program_id(1) * BLOCK_D
    offs_s = tl.arange(0, BLOCK_S).to(tl.int64)
    offs_d = first_channel + tl.arange(0, BLOCK_D)
    mask_s = offs_s < num_splits
    rows = offs_s * stride_partials_split + pair * DIM
    partials = tl.load(
        partials_ptr + rows[:, None] + offs_d[None, :], mask=mask_s[:, None], other=0.0
    )
    sums = sums_ptr + offs_s * stride_sums_split + pair * 2
    largest = tl.load(sums, mask=mask_s, other=float("-inf"))
    totals = tl.load(sums + 1, mask=mask_s, other=0.0)
    sink = tl.load(sink_ptr + pair % num_heads) * 1.4426950408889634
    shift = tl.maximum(tl.max(largest, 0), sink)
    fades = tl.exp2(largest - shift)
    total = tl.sum(totals * fades, 0) + tl.exp2(sink - shift)
    values = tl.sum(partials * (fades / total)[:, None], 0)[None, :]
    rotation_ptr = inverse_ptr + pair // num_heads * stride_inverse_token
    values = turn_back(values, first_channel // 2 + PAIRS - DIM // 2, rotation_ptr)
    outs = out_ptr + pair * DIM + offs_d
    tl.store(outs[None, :], values.to(out_ptr.dtype.element_ty))


@dataclass(frozen=True, slots=True)
class Tile:
    """Heads and keys of a program's step."""

    block_h: int
    block_n: int
    num_warps: int
    num_stages: int


def tiles(target: Target) -> tuple[Tile, Tile]:
    """For few tokens, whose keys are split most, and for many."""
    if target.has_ptx:
        return Tile(16, 32, 4, 1), Tile(64, 32, 8, 3)
    if target.warp_size == 32:
        return Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)
    return Tile(16, 32, 4, 1), Tile(32, 32, 4, 1)


def pick_tile(num_tokens: int, num_heads: int, target: Target) -> tuple[Tile, int]:
    """The tile and over how many programs a token's keys are divided; lengths do not count."""
    few, many = tiles(target)
    tile = few if num_tokens * -(-num_heads // many.block_h) < 8 else many
    num_programs = num_tokens * -(-num_heads // tile.block_h)
    return tile, max(1, min(_WANTED_PROGRAMS // num_programs, MAX_SPLITS))


def attend_rows(
    q: Tensor,
    kv: Tensor,
    ring: Tensor,
    window: int,
    entries: Tensor | None,
    picks: Tensor | None,
    ratio: int,
    sink: Tensor,
    scale: float,
    inverse: Tensor,
    places: Places,
    target: Target,
    launch: tuple[Tile, int] | None = None,
) -> Tensor:
    """`launch`: the tile, and over how many programs keys are divided; None: what is picked."""
    num_tokens, num_heads, dim = q.shape
    tile, num_splits = launch or pick_tile(num_tokens, num_heads, target)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    is_split = num_splits > 1
    partials = out
    sums = q.new_empty(
        (num_splits if is_split else 0, num_tokens, num_heads, 2), dtype=torch.float32
    )
    if is_split:
        partials = q.new_empty((num_splits, num_tokens, num_heads, dim), dtype=torch.float32)
    # [num_tokens, pairs, 2]
    turns = torch.view_as_real(inverse)
    pairs = turns.shape[1]
    num_blocks_h = -(-num_heads // tile.block_h)
    sparse_rows_kernel[(num_tokens * num_blocks_h, num_splits)](
        q,
        kv,
        ring,
        # what is not there is never read
        entries if entries is not None else ring,
        picks if picks is not None else places.cu_seqlens,
        sink,
        turns,
        places.positions,
        places.sequences,
        places.cu_seqlens,
        places.slots,
        places.block_tables,
        partials,
        sums,
        scale * _LOG2_E,
        num_heads,
        window,
        picks.shape[1] if picks is not None else 0,
        q.stride(0),
        q.stride(1),
        picks.stride(0) if picks is not None else 0,
        turns.stride(0),
        places.block_tables.stride(0),
        num_tokens * num_heads * dim,
        num_heads * dim,
        num_tokens * num_heads * 2,
        num_heads * 2,
        DIM=dim,
        PAIRS=pairs,
        BLOCK_H=tile.block_h,
        BLOCK_N=tile.block_n,
        RATIO=ratio,
        ROWS_PER_BLOCK=places.block_size // ratio if ratio else 0,
        HAS_PICKS=picks is not None,
        IS_SINGLE=places.is_single,
        IS_SPLIT=is_split,
        IS_DEPENDENT=target.has_ptx,
        NUM_STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        **dependent(target),
    )
    if is_split:
        add_splits(partials, sums, sink, turns, out, target)
    return out


def add_splits(
    partials: Tensor, sums: Tensor, sink: Tensor, turns: Tensor, out: Tensor, target: Target
) -> None:
    """
    Args:
        partials: [num_splits, num_tokens, num_heads, dim] float32.
        sums: [num_splits, num_tokens, num_heads, 2] float32: largest score and sum, to the base 2.
        turns: [num_tokens, pairs, 2] float32.
        out: [num_tokens, num_heads, dim], written.
    """
    num_splits, num_tokens, num_heads, dim = partials.shape
    block_d = min(dim, ADD_CHANNELS)
    add_splits_kernel[(num_tokens * num_heads, dim // block_d)](
        partials,
        sums,
        sink,
        turns,
        out,
        num_heads,
        num_splits,
        partials.stride(0),
        sums.stride(0),
        turns.stride(0),
        DIM=dim,
        PAIRS=turns.shape[1],
        BLOCK_S=max(2, triton.next_power_of_2(num_splits)),
        BLOCK_D=block_d,
        IS_DEPENDENT=target.has_ptx,
        num_warps=ADD_WARPS,
        **dependent(target),
    )
