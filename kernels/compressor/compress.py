"""A compressor's step: entries pooled, normalised, turned, rounded and stored in one pass."""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.cache.write_rows import ring_rows
from scission.kernels.latents.latent_rows import padded
from scission.kernels.latents.tiles import (
    load_rotation,
    norm_rows,
    round_kv_row,
    round_trip_index,
    signs,
    through_bf16,
    turn_pairs,
)
from scission.kernels.places import Places
from scission.kernels.target import Target

# a program looks for complete entries among so many tokens: one where there are few
MAX_GROUP = 16
FEW_TOKENS = 512
# rows of a ring that a program brings up to date
STATE_ROWS = 4
STATE_WARPS = 4
# of a ring that are pooled at once: 16 of 128 rows of 512 channels take 16.6 us on an H200; 8 with
# loads under way for up to four steps 30 us, 32 on twice the warps 22 us
MAX_ROWS = 16


@triton.jit
def _pool(
    kv_ptr,
    score_ptr,
    ape_ptr,
    ring_kv_ptr,
    ring_score_ptr,
    token,
    position,
    start,
    slot,
    stride_kv_token,
    stride_score_token,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    RATIO: tl.constexpr,
    HALVES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The entry [1, PADDED] float32 that is complete with `token` at `position`: a running softmax
    over its rows, per channel, in an order that does not depend on what is fresh.
    """
    size: tl.constexpr = RATIO * HALVES
    row: tl.constexpr = WIDTH * HALVES
    offs = tl.arange(0, PADDED)[None, :]
    largest = tl.full([1, PADDED], float("-inf"), tl.float32)
    total = tl.zeros([1, PADDED], tl.float32)
    weighted = tl.zeros([1, PADDED], tl.float32)
    for first in range(0, size, ROWS):
        numbers = first + tl.arange(0, ROWS)[:, None]
        at = position - (size - 1) + numbers
        # the first half of a row serves the next block's entry, the second half its own
        columns = (numbers // RATIO) * WIDTH + offs
        is_fresh = at >= start
        tokens = token - (size - 1) + numbers
        # positions before the begin have no row: any number will do
        kept = slot * size + tl.maximum(at, 0) % size
        score_ptrs = tl.where(
            is_fresh, score_ptr + tokens * stride_score_token, ring_score_ptr + kept * row
        )
        kv_ptrs = tl.where(is_fresh, kv_ptr + tokens * stride_kv_token, ring_kv_ptr + kept * row)
        mask = (at >= 0) & (offs < WIDTH)
        score = tl.load(score_ptrs + columns, mask=mask, other=float("-inf"))
        kv = tl.load(kv_ptrs + columns, mask=mask, other=0.0)
        # a ring's scores have it already
        ape_ptrs = ape_ptr + (numbers % RATIO) * row + columns
        score += tl.load(ape_ptrs, mask=is_fresh & mask, other=0.0)
        above = tl.maximum(largest, tl.max(score, axis=0)[None, :])
        # where all rows so far are before the begin
        reference = tl.where(above == float("-inf"), 0.0, above)
        faded = tl.exp(largest - reference)
        weights = tl.exp(score - reference)
        total = total * faded + tl.sum(weights, axis=0)[None, :]
        weighted = weighted * faded + tl.sum(weights * kv, axis=0)[None, :]
        largest = above
    return tl.where(offs < WIDTH, weighted / tl.where(offs < WIDTH, total, 1.0), 0.0)


@triton.jit
def _transform(x, scale, SIZE: tl.constexpr, INNER: tl.constexpr):
    """[1, SIZE] float32: the Hadamard transform, as those of INNER and of SIZE / INNER values."""
    x = tl.reshape(x, [SIZE // INNER, INNER])
    x = tl.sum(x[:, :, None] * signs(INNER)[None, :, :], axis=1)
    x = tl.sum(x[:, None, :] * signs(SIZE // INNER)[:, :, None], axis=0)
    return tl.reshape(x, [1, SIZE]) * scale


@triton.jit
def compress_kernel(
    # tensors
    kv_ptr,
    score_ptr,
    ape_ptr,
    norm_weight_ptr,
    rotation_ptr,
    ring_kv_ptr,
    ring_score_ptr,
    entries_ptr,
    positions_ptr,
    sequences_ptr,
    cu_seqlens_ptr,
    block_tables_ptr,
    slots_ptr,
    # sizes, strides in elements, meta-parameters
    num_tokens,
    eps,
    scale,
    entries_per_block,
    stride_kv_token,
    stride_score_token,
    stride_rotation_token,
    stride_tables_seq,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    RATIO: tl.constexpr,
    HALVES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    ROUNDING: tl.constexpr,
    IS_SINGLE: tl.constexpr,
):
    """One program, some tokens: writes the entries that are complete with them. Where each is the
    only one of its sequence, into the rings as well.
    """
    size: tl.constexpr = RATIO * HALVES
    row: tl.constexpr = WIDTH * HALVES
    offs = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    offs_positions = tl.load(positions_ptr + offs, mask=offs < num_tokens, other=-1)
    is_last = (offs_positions >= 0) & ((offs_positions + 1) % RATIO == 0)
    token = tl.program_id(0) * GROUP - 1
    for _ in range(tl.sum(is_last.to(tl.int32), axis=0)):
        token = tl.min(tl.where(is_last & (offs > token), offs, num_tokens), axis=0)
        at = token.to(tl.int64)
        position = tl.load(positions_ptr + at)
        sequence = tl.load(sequences_ptr + at)
        first = tl.load(cu_seqlens_ptr + sequence)
        x = _pool(
            kv_ptr,
            score_ptr,
            ape_ptr,
            ring_kv_ptr,
            ring_score_ptr,
            at,
            position,
            position - (at - first),
            tl.load(slots_ptr + sequence),
            stride_kv_token,
            stride_score_token,
            WIDTH,
            PADDED,
            RATIO,
            HALVES,
            ROWS,
        )
        channels = tl.arange(0, PADDED)
        is_channel = channels < WIDTH
        weight = tl.load(norm_weight_ptr + channels, mask=is_channel, other=0.0)[None, :]
        x = through_bf16(norm_rows(through_bf16(x), eps, WIDTH) * weight)
        cos, sin = load_rotation(rotation_ptr + at * stride_rotation_token, WIDTH, ROPE_DIM, PADDED)
        x = through_bf16(turn_pairs(x, cos, sin))
        if ROUNDING == "kv":
            x = round_kv_row(x, WIDTH, ROPE_DIM)
        elif ROUNDING == "index":
            inner: tl.constexpr = 16
            x = through_bf16(_transform(x, scale, PADDED, inner))
            x = tl.reshape(round_trip_index(tl.reshape(x, [PADDED // 32, 32])), [1, PADDED])
        entry = position // RATIO
        block = tl.load(
            block_tables_ptr + sequence * stride_tables_seq + entry // entries_per_block
        )
        entries_ptrs = (
            entries_ptr + (block * entries_per_block + entry % entries_per_block) * WIDTH + channels
        )
        values = tl.reshape(x, [PADDED]).to(tl.bfloat16)
        tl.store(entries_ptrs, values, mask=is_channel)
    if IS_SINGLE:
        at = tl.program_id(0).to(tl.int64)
        position = tl.load(positions_ptr + at)
        if position >= 0:
            # the position that this row takes the place of is the one before the entry's first
            ring_row = tl.load(slots_ptr + at) * size + position % size
            for half in tl.static_range(HALVES):
                channels = tl.arange(0, PADDED)
                mask = channels < WIDTH
                columns = half * WIDTH + channels
                kv = tl.load(kv_ptr + at * stride_kv_token + columns, mask=mask)
                score = tl.load(score_ptr + at * stride_score_token + columns, mask=mask)
                score += tl.load(ape_ptr + (position % RATIO) * row + columns, mask=mask)
                tl.store(ring_kv_ptr + ring_row * row + columns, kv, mask=mask)
                tl.store(ring_score_ptr + ring_row * row + columns, score, mask=mask)


@triton.jit
def keep_states_kernel(
    # tensors
    kv_ptr,
    score_ptr,
    ape_ptr,
    ring_kv_ptr,
    ring_score_ptr,
    cu_seqlens_ptr,
    context_lens_ptr,
    writer_sequences_ptr,
    writer_slots_ptr,
    writer_ends_ptr,
    # sizes, strides in elements, meta-parameters
    stride_kv_token,
    stride_score_token,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    RATIO: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program, some rows of one writer's two rings."""
    tokens, rows, positions, is_mine = ring_rows(
        tl.program_id(0),
        tl.program_id(1) * ROWS + tl.arange(0, ROWS),
        cu_seqlens_ptr,
        context_lens_ptr,
        writer_sequences_ptr,
        writer_slots_ptr,
        writer_ends_ptr,
        SIZE,
    )
    offs = tl.arange(0, PADDED)[None, :]
    mask = is_mine[:, None] & (offs < WIDTH)
    kv = tl.load(kv_ptr + tokens[:, None] * stride_kv_token + offs, mask=mask)
    score = tl.load(score_ptr + tokens[:, None] * stride_score_token + offs, mask=mask)
    score += tl.load(ape_ptr + (positions % RATIO)[:, None] * WIDTH + offs, mask=mask)
    tl.store(ring_kv_ptr + rows[:, None] * WIDTH + offs, kv, mask=mask)
    tl.store(ring_score_ptr + rows[:, None] * WIDTH + offs, score, mask=mask)


def compress_(
    kv: Tensor,
    score: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    eps: float,
    block_rotation: Tensor,
    ring_kv: Tensor,
    ring_score: Tensor,
    entries: Tensor,
    ratio: int,
    rounding: Literal["kv", "index"] | None,
    places: Places,
    target: Target,
) -> None:
    assert kv.stride(1) == 1 and score.stride(1) == 1 and block_rotation.stride(1) == 1
    pools = (ring_kv, ring_score, entries)
    assert ape.is_contiguous() and all(pool.is_contiguous() for pool in pools)
    num_tokens, row = kv.shape
    width = entries.shape[1]
    if not num_tokens:
        return
    size = ratio * row // width
    group = tokens_of_group(ratio, num_tokens, is_single=places.is_single)
    compress_kernel[(triton.cdiv(num_tokens, group),)](
        kv,
        score,
        ape,
        norm_weight,
        torch.view_as_real(block_rotation),
        ring_kv,
        ring_score,
        entries,
        places.positions,
        places.sequences,
        places.cu_seqlens,
        places.block_tables,
        places.slots,
        num_tokens,
        eps,
        width**-0.5,
        places.block_size // ratio,
        kv.stride(0),
        score.stride(0),
        2 * block_rotation.stride(0),
        places.block_tables.stride(0),
        WIDTH=width,
        PADDED=padded(width, 64),
        ROPE_DIM=2 * block_rotation.shape[1],
        RATIO=ratio,
        HALVES=row // width,
        ROWS=rows_at_once(size, target),
        GROUP=group,
        ROUNDING=rounding or "",
        IS_SINGLE=places.is_single,
        num_warps=num_warps(width),
    )
    if places.is_single:
        return
    num_writers = places.writer_slots.shape[0]
    keep_states_kernel[(num_writers, triton.cdiv(min(size, places.max_tokens), STATE_ROWS))](
        kv,
        score,
        ape,
        ring_kv,
        ring_score,
        places.cu_seqlens,
        places.context_lens,
        places.writer_sequences,
        places.writer_slots,
        places.writer_ends,
        kv.stride(0),
        score.stride(0),
        WIDTH=row,
        PADDED=triton.next_power_of_2(row),
        RATIO=ratio,
        SIZE=size,
        ROWS=STATE_ROWS,
        num_warps=STATE_WARPS,
    )


def tokens_of_group(ratio: int, num_tokens: int, *, is_single: bool) -> int:
    return 1 if is_single or num_tokens <= FEW_TOKENS else min(ratio, MAX_GROUP)


def rows_at_once(size: int, target: Target) -> int:
    """Of a ring's rows; the same for all steps, so that all pool in the same order. 16 spill on
    gfx1201.
    """
    return min(size, MAX_ROWS if target.backend == "cuda" else MAX_ROWS // 2)


def num_warps(width: int) -> int:
    """So many that a thread has four channels of all rows that are pooled at once: other counts
    add up across warps, at twice the time.
    """
    return max(1, min(4, width // 128))
