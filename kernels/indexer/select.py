"""The columns of the k largest scores of ragged rows, in ascending order.

A row of up to `Tile.size` scores is held by one program, which finds the k-th largest by counting
how many reach two thresholds at a time. Of a longer row it holds the candidates that `narrow`
has listed. Should the sample have misled (fewer than k candidates, or more than fit), it reads the
row itself, a dozen times: slow, but exact. Nothing depends on the order in which programs run.
"""

import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.indexer.narrow import narrow
from scission.kernels.indexer.selection import LOG_PARTS, Entries, plan_selection
from scission.kernels.indexer.threshold import length_of, order_of, threshold
from scission.kernels.target import Target


@triton.jit
def _drop_equal(picks, equal, num_equal):
    """Of `picks`, 1 or 0 in int32, those that are `equal` beyond the first num_equal become 0."""
    if num_equal < picks.shape[0]:
        picks = tl.where(tl.cumsum(equal, axis=0) > num_equal, picks - equal, picks)
    return picks


@triton.jit
def _candidate_columns(
    counts_ptr, candidates_ptr, num_parts, capacity, SIZE: tl.constexpr, LOG_PARTS: tl.constexpr
):
    """[SIZE] columns of one row's candidates in order, 0 past the last; and their number."""
    parts = tl.arange(0, 1 << LOG_PARTS)
    counts = tl.load(counts_ptr + parts, mask=parts < num_parts, other=0)
    total = tl.sum(counts, axis=0)
    ends = tl.cumsum(counts, axis=0)
    lanes = tl.arange(0, SIZE)
    # the number of parts that end before a lane, by binary search
    part = tl.zeros([SIZE], tl.int32)
    for level in tl.static_range(LOG_PARTS):
        half = 1 << (LOG_PARTS - 1 - level)
        part += tl.where(tl.gather(ends, part + (half - 1), axis=0) <= lanes, half, 0)
    first = tl.gather(ends - counts, part, axis=0)
    is_present = lanes < tl.where(total <= SIZE, total, 0)
    columns = tl.load(candidates_ptr + part * capacity + lanes - first, mask=is_present, other=0)
    return columns, total


@triton.jit
def _store_picks(out_ptr, places, columns, mask, table_ptr, ROWS_PER_BLOCK: tl.constexpr):
    """Columns at their places; as rows of the pool where they are a sequence's entries."""
    if ROWS_PER_BLOCK > 0:
        blocks = tl.load(table_ptr + columns // ROWS_PER_BLOCK, mask=mask, other=0)
        columns = (blocks * ROWS_PER_BLOCK + columns % ROWS_PER_BLOCK).to(tl.int32)
    tl.store(out_ptr + places, columns, mask=mask)


@triton.jit
def _scan_row(
    scores_ptr, out_ptr, length, k, table_ptr, BLOCK: tl.constexpr, ROWS_PER_BLOCK: tl.constexpr
):
    """Pick from a row of any length by reading it again and again."""
    offs = tl.arange(0, BLOCK)
    steps = tl.arange(0, 8).to(tl.int64)
    # the order of the k-th largest lies in [low, low + 8 * width)
    low = tl.full([], -0x80000000, tl.int64)
    width = tl.full([], 0x20000000, tl.int64)
    num_above = length * 0
    for _ in range(11):
        thresholds = (low + steps * width).to(tl.int32)
        reached = tl.zeros([BLOCK, 8], tl.int32)
        # the next block is on its way while this one is compared
        following = tl.load(scores_ptr + offs, mask=offs < length, other=0.0)
        for start in range(0, length, BLOCK):
            mask = start + offs < length
            order = order_of(following)
            after = start + BLOCK + offs
            following = tl.load(scores_ptr + after, mask=after < length, other=0.0)
            reached += ((order[:, None] >= thresholds[None, :]) & mask[:, None]).to(tl.int32)
        counts = tl.sum(reached, axis=0)
        is_reached = counts >= k
        num_above = tl.maximum(num_above, tl.max(tl.where(is_reached, 0, counts), axis=0))
        low += tl.maximum(tl.sum(is_reached.to(tl.int64), axis=0) - 1, 0) * width
        width = tl.maximum(width // 8, 1)
    kth = low.to(tl.int32)
    num_equal = k - num_above
    num_picked = length * 0
    for start in range(0, length, BLOCK):
        columns = start + offs
        mask = columns < length
        order = order_of(tl.load(scores_ptr + columns, mask=mask, other=0.0))
        equal = (mask & (order == kth)).to(tl.int32)
        picks = _drop_equal((mask & (order >= kth)).to(tl.int32), equal, num_equal)
        places = num_picked + tl.cumsum(picks, axis=0) - 1
        _store_picks(out_ptr, places, columns, picks != 0, table_ptr, ROWS_PER_BLOCK)
        num_picked += tl.sum(picks, axis=0)
        num_equal = tl.maximum(num_equal - tl.sum(equal, axis=0), 0)


@triton.jit
def _pick_held(
    scores_ptr,
    out_ptr,
    columns,
    count,
    k,
    table_ptr,
    SIZE: tl.constexpr,
    ROWS_PER_BLOCK: tl.constexpr,
):
    """Pick from the first `count` >= k of `columns` [SIZE]."""
    x = tl.load(scores_ptr + columns, mask=tl.arange(0, SIZE) < count, other=float("nan"))
    kth, num_equal = threshold(x, count, k, 0)
    picks = (x >= kth).to(tl.int32)
    picks = _drop_equal(picks, (x == kth).to(tl.int32), num_equal)
    places = tl.cumsum(picks, axis=0) - 1
    _store_picks(out_ptr, places, columns, picks != 0, table_ptr, ROWS_PER_BLOCK)


@triton.jit
def select_kernel(
    # tensors
    scores_ptr,
    lengths_ptr,
    counts_ptr,
    candidates_ptr,
    sequences_ptr,
    tables_ptr,
    out_ptr,
    # sizes, strides in elements, meta-parameters
    k,
    num_parts,
    capacity,
    stride_scores_row,
    stride_tables_sequence,
    SIZE: tl.constexpr,
    SHORT: tl.constexpr,
    LOG_PARTS: tl.constexpr,
    RATIO: tl.constexpr,
    ROWS_PER_BLOCK: tl.constexpr,
):
    """One program, one row: out[row] = its picks, then -1.

    With a RATIO `lengths` are positions, and columns are entries of a sequence, picked as rows of
    its pool. Of rows longer than SIZE `narrow_kernel` has listed the candidates, in up to
    2 ** LOG_PARTS parts; LOG_PARTS 0: there are no such rows. Rows of up to SHORT are held in as
    small a tile: what a row's bound allows for, it rarely has.
    """
    row = tl.program_id(0).to(tl.int64)
    length = length_of(lengths_ptr, row, RATIO)
    scores_ptr += row * stride_scores_row
    out_ptr += row * k
    if RATIO > 0:
        tables_ptr += tl.load(sequences_ptr + row) * stride_tables_sequence
    offs = tl.arange(0, SIZE)
    if length <= k:
        for start in range(0, length, SIZE):
            columns = start + offs
            mask = columns < length
            _store_picks(out_ptr, columns, columns, mask, tables_ptr, ROWS_PER_BLOCK)
        for start in range(length, k, SIZE):
            tail = start + offs
            tl.store(out_ptr + tail, tl.full([SIZE], -1, tl.int32), mask=tail < k)
    elif length <= SHORT:
        lanes = tl.arange(0, SHORT)
        _pick_held(scores_ptr, out_ptr, lanes, length, k, tables_ptr, SHORT, ROWS_PER_BLOCK)
    elif length <= SIZE:
        _pick_held(scores_ptr, out_ptr, offs, length, k, tables_ptr, SIZE, ROWS_PER_BLOCK)
    elif LOG_PARTS > 0:
        columns, count = _candidate_columns(
            counts_ptr + row * num_parts,
            candidates_ptr + row * num_parts * capacity,
            num_parts,
            capacity,
            SIZE,
            LOG_PARTS,
        )
        if (count >= k) & (count <= SIZE):
            _pick_held(scores_ptr, out_ptr, columns, count, k, tables_ptr, SIZE, ROWS_PER_BLOCK)
        else:
            _scan_row(scores_ptr, out_ptr, length, k, tables_ptr, SIZE // 4, ROWS_PER_BLOCK)


def select_columns(
    scores: Tensor, lengths: Tensor | Entries, k: int, out: Tensor, target: Target
) -> None:
    """Write [num_rows, k] int32, contiguous: columns, or the pool rows of entries.

    Args:
        scores: [num_rows, max_length] float32, rows of adjacent columns.
        lengths: [num_rows] int32, or whose visible entries the columns are.
    """
    num_rows, max_length = scores.shape
    if isinstance(lengths, Entries):
        bounds, sequences, tables = lengths.positions, lengths.sequences, lengths.block_tables
        ratio, rows_per_block = lengths.ratio, lengths.rows_per_block
    else:
        # of a pool, which there is not
        bounds, sequences, tables, ratio, rows_per_block = lengths, lengths, lengths, 0, 0
    selection = plan_selection(num_rows, max_length, k, target)
    counts = candidates = bounds
    if selection.num_parts:
        counts, candidates = narrow(scores, bounds, k, ratio, selection)
    select_kernel[(num_rows,)](
        scores,
        bounds,
        counts,
        candidates,
        sequences,
        tables,
        out,
        k,
        selection.num_parts,
        selection.capacity,
        scores.stride(0),
        tables.stride(0),
        SIZE=selection.tile.size,
        SHORT=selection.tile.short,
        LOG_PARTS=LOG_PARTS if selection.num_parts else 0,
        RATIO=ratio,
        ROWS_PER_BLOCK=rows_per_block,
        num_warps=selection.tile.num_warps,
    )
