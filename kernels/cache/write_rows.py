"""Rows written where a batch's places say: rings by writer, paged rows by token."""

import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.places import Places

ROWS = 4  # of a program
NUM_WARPS = 4


@triton.jit
def ring_rows(
    writer,
    offs,
    cu_seqlens_ptr,
    context_lens_ptr,
    writer_sequences_ptr,
    writer_slots_ptr,
    writer_ends_ptr,
    size,
):
    """Of the last `size` positions of a writer's chunk those numbered `offs`: the token, the ring's
    row, the position, and whether there is one.
    """
    sequence = tl.load(writer_sequences_ptr + writer)
    end = tl.load(writer_ends_ptr + writer)
    first_token = tl.load(cu_seqlens_ptr + sequence)
    num_tokens = tl.load(cu_seqlens_ptr + sequence + 1) - first_token
    # of padding -1
    start = tl.load(context_lens_ptr + sequence) - num_tokens
    positions = tl.maximum(tl.maximum(start, end - size), 0) + offs
    tokens = first_token + positions - start
    rows = tl.load(writer_slots_ptr + writer) * size + positions % size
    return tokens, rows, positions, positions < end


@triton.jit
def write_ring_kernel(
    # tensors
    ring_ptr,
    values_ptr,
    cu_seqlens_ptr,
    context_lens_ptr,
    writer_sequences_ptr,
    writer_slots_ptr,
    writer_ends_ptr,
    # sizes, strides in elements, meta-parameters
    size,
    stride_values_token,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program, some rows of one writer."""
    tokens, rows, _, is_mine = ring_rows(
        tl.program_id(0),
        tl.program_id(1) * ROWS + tl.arange(0, ROWS),
        cu_seqlens_ptr,
        context_lens_ptr,
        writer_sequences_ptr,
        writer_slots_ptr,
        writer_ends_ptr,
        size,
    )
    offs = tl.arange(0, PADDED)[None, :]
    mask = is_mine[:, None] & (offs < WIDTH)
    values = tl.load(values_ptr + tokens[:, None] * stride_values_token + offs, mask=mask)
    tl.store(ring_ptr + rows[:, None] * WIDTH + offs, values, mask=mask)


def write_ring_(ring: Tensor, values: Tensor, size: int, places: Places) -> None:
    assert ring.is_contiguous() and values.stride(1) == 1
    width = ring.shape[1]
    num_writers = places.writer_slots.shape[0]
    write_ring_kernel[(num_writers, triton.cdiv(min(size, places.max_tokens), ROWS))](
        ring,
        values,
        places.cu_seqlens,
        places.context_lens,
        places.writer_sequences,
        places.writer_slots,
        places.writer_ends,
        size,
        values.stride(0),
        WIDTH=width,
        PADDED=triton.next_power_of_2(width),
        ROWS=ROWS,
        num_warps=NUM_WARPS,
    )


@triton.jit
def write_paged_kernel(
    # tensors
    pool_ptr,
    values_ptr,
    positions_ptr,
    sequences_ptr,
    block_tables_ptr,
    # sizes, strides in elements, meta-parameters
    num_tokens,
    block_size,
    stride_values_token,
    stride_tables_seq,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program, the rows of some tokens."""
    tokens = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    positions = tl.load(positions_ptr + tokens, mask=tokens < num_tokens, other=-1)
    is_token = positions >= 0
    sequences = tl.load(sequences_ptr + tokens, mask=is_token, other=0)
    entries = sequences * stride_tables_seq + positions // block_size
    blocks = tl.load(block_tables_ptr + entries, mask=is_token, other=0)
    rows = blocks * block_size + positions % block_size
    offs = tl.arange(0, PADDED)[None, :]
    mask = is_token[:, None] & (offs < WIDTH)
    values = tl.load(values_ptr + tokens[:, None] * stride_values_token + offs, mask=mask)
    tl.store(pool_ptr + rows[:, None] * WIDTH + offs, values, mask=mask)


def write_paged_(pool: Tensor, values: Tensor, places: Places) -> None:
    assert pool.is_contiguous() and values.stride(1) == 1
    width, num_tokens = pool.shape[1], places.num_tokens
    write_paged_kernel[(triton.cdiv(num_tokens, ROWS),)](
        pool,
        values,
        places.positions,
        places.sequences,
        places.block_tables,
        num_tokens,
        places.block_size,
        values.stride(0),
        places.block_tables.stride(0),
        WIDTH=width,
        PADDED=triton.next_power_of_2(width),
        ROWS=ROWS,
        num_warps=NUM_WARPS,
    )
