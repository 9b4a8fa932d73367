"""The columns of the k largest scores of ragged rows, in ascending order.

A row of up to `Tile.size` scores is held by one program, which finds the k-th largest by counting
how many reach two thresholds at a time. Longer rows are narrowed first: every one of several
programs a row derives the same threshold from the same sample of the row, such that somewhat more
than k scores should reach it, reads its own part of the row once and lists those that do; the
program that selects then holds these candidates alone. Should a sample mislead (fewer than k
candidates, or more than fit), it reads the row itself, eleven times: slow, but exact. Nothing
depends on the order in which programs run.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.target import Target

# programs that fill a device: four a multiprocessor
_NUM_PROGRAMS = 528
LOG_PARTS = 6
SAMPLE = 4096
NARROW_BLOCK = 4096
NARROW_WARPS = 8
# by which k and a tile's size are to be missed: once in two million rows on either side
_DEVIATIONS = 5.0
# thirds of the range between two floats, before that between their bits is halved
_FLOAT_STEPS: tl.constexpr = tl.constexpr(12)
_LISTED_WORDS: tl.constexpr = tl.constexpr(1024)


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program holds of a row, and of a short one."""

    size: int
    short: int
    num_warps: int


def tiles(target: Target) -> tuple[Tile, ...]:
    """Every tile that rows are selected with; rows that the last one cannot hold are narrowed."""
    most_warps = 1024 // target.warp_size
    sizes = ((1024, 1024, 4), (2048, 1024, 4), (4096, 2048, 8), (8192, 2048, 16), (16384, 2048, 16))
    return tuple(Tile(size, short, min(warps, most_warps)) for size, short, warps in sizes)


def pick_tile(max_length: int, k: int, target: Target) -> tuple[Tile, bool]:
    """The smallest that holds a row, or else its candidates, which then is narrowed.

    The square root of a count of samples deviates by a half, whatever the count: a threshold
    midway between the roots of k and the size misses neither where they are far enough apart.
    """
    choices = tiles(target)
    if max_length <= choices[-1].size:
        return next(tile for tile in choices if max_length <= tile.size), False
    share = SAMPLE / max_length
    # the last one would hold more than a program's registers, with what candidates need besides
    for tile in choices[:-1]:
        if share**0.5 * (tile.size**0.5 - k**0.5) >= _DEVIATIONS:
            return tile, True
    return choices[-2], True


# --- order --------------------------------------------------------------------------------------


@triton.jit
def _order_of(x):
    """Integers ordered as the floats are; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _float_of(order):
    """The inverse of `_order_of`."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _threshold(x, count, k, slack):
    """The value that k of x reach, or up to k + slack; and how many of x to take are equal to it.

    Args:
        x: [size] float32, below 2 ** 15 of them; NaN counts as absent, `count` >= k are present.

    Returns:
        The largest value that at least k of x reach, or one that k to k + slack do, and how many
        of those equal to it belong to the k largest (size, if all).
    """
    sizes = tl.where(x == x, tl.abs(x), 0.0).to(tl.int32, bitcast=True)
    high = tl.max(sizes, axis=0).to(tl.float32, bitcast=True)
    low = -high
    # reached by num_low >= k and by num_high < k; by none above the highest
    num_low = count
    num_high = count * 0
    third = high * (2.0 / 3.0)
    step = 0
    # thirds of the values come close to thirds of the counts; infinities have none
    while (num_low > k + slack) & (step < _FLOAT_STEPS) & (third > 0.0) & (third < 1e38):
        first = low + third
        second = high - third
        # both counts in one sum
        reached = (x >= first).to(tl.int32) + ((x >= second).to(tl.int32) << 16)
        total = tl.sum(reached, axis=0)
        num_first = total & 0xFFFF
        num_second = total >> 16
        if num_second >= k:
            low = second
            num_low = num_second
        elif num_first >= k:
            low = first
            num_low = num_first
            high = second
            num_high = num_second
        else:
            high = first
            num_high = num_first
        third = (high - low) * (1.0 / 3.0)
        step += 1
    # halves of the bits end at two neighbours
    low_order = _order_of(low)
    high_order = _order_of(high) + (num_high == 0).to(tl.int32)
    width = (high_order - low_order).to(tl.uint32, bitcast=True)
    while (num_low > k + slack) & (width > 1):
        middle = low_order + (width // 2).to(tl.int32, bitcast=True)
        num_middle = tl.sum((x >= _float_of(middle)).to(tl.int32), axis=0)
        if num_middle >= k:
            low_order = middle
            num_low = num_middle
        else:
            high_order = middle
            num_high = num_middle
        width = (high_order - low_order).to(tl.uint32, bitcast=True)
    return _float_of(low_order), tl.where(num_low > k, k - num_high, 1 << 15)


@triton.jit
def _drop_equal(picks, equal, num_equal):
    """Of `picks`, 1 or 0 in int32, those that are `equal` beyond the first num_equal become 0."""
    if num_equal < picks.shape[0]:
        picks = tl.where(tl.cumsum(equal, axis=0) > num_equal, picks - equal, picks)
    return picks


# --- rows ---------------------------------------------------------------------------------------


@triton.jit
def _length_of(lengths_ptr, row, RATIO: tl.constexpr):
    """A row's length, or the number of entries that a query at its position sees."""
    length = tl.load(lengths_ptr + row)
    if RATIO > 0:
        length = (length + 1) // RATIO
    return length.to(tl.int32)


@triton.jit
def _sample_rank(length, k, SIZE: tl.constexpr, SAMPLE: tl.constexpr):
    """Of how many samples the threshold should be the least, so that k to SIZE scores reach it."""
    share = SAMPLE * 1.0 / length
    # five deviations of a half above the root of k, or midway to that of the size: see `pick_tile`
    least = tl.sqrt(k * share)
    rank = tl.minimum(least + 2.5, 0.5 * (least + tl.sqrt(SIZE * share)))
    return tl.maximum((rank * rank).to(tl.int32), 1)


@triton.jit
def _count_bits(words):
    """[..] int32 -> how many bits of each are set."""
    pairs = words - ((words >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24) & 0xFF


@triton.jit
def _reached_words(x, threshold):
    """[words, 32] float32 -> [words] int32, a bit for each column that reaches the threshold."""
    return tl.sum(tl.where(x >= threshold, 1 << tl.arange(0, 32)[None, :], 0), axis=1)


@triton.jit
def _list_candidates(words_ptr, candidates_ptr, first, num_words, capacity):
    """List the columns, from `first` on, whose bits are set, in order, and count them all.

    They are rare: each step stores the lowest of every word.
    """
    lanes = tl.arange(0, _LISTED_WORDS)
    total = num_words * 0
    for start in range(0, num_words, _LISTED_WORDS):
        offs = start + lanes
        words = tl.load(words_ptr + offs, mask=offs < num_words, other=0)
        counts = _count_bits(words)
        places = total + tl.cumsum(counts, axis=0) - counts
        for _ in range(tl.max(counts, axis=0)):
            lowest = words & -words
            columns = first + offs * 32 + _count_bits(lowest - 1)
            mask = (words != 0) & (places < capacity)
            tl.store(candidates_ptr + places, columns, mask=mask)
            places += 1
            words ^= lowest
        total += tl.sum(counts, axis=0)
    return total


# of words that may be unaligned a thread takes one at a time, so that none changes threads
@triton.jit(do_not_specialize=["max_words"])
def narrow_kernel(
    # tensors
    scores_ptr,
    lengths_ptr,
    words_ptr,
    counts_ptr,
    candidates_ptr,
    # sizes, strides in elements, meta-parameters
    k,
    max_words,
    capacity,
    stride_scores_row,
    SIZE: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    RATIO: tl.constexpr,
):
    """One program, one part of one row longer than SIZE: the columns that may be picked.

    words: [rows, parts, max_words] int32, scratch: a bit for each column of the part.
    counts: [rows, parts] int32, also of what `candidates` [rows, parts, capacity] int32 cannot
    hold; rows of up to SIZE are left as they are.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    num_parts = tl.num_programs(1)
    length = _length_of(lengths_ptr, row, RATIO)
    if (length > SIZE) & (length > k):
        scores_ptr += row * stride_scores_row
        # one column of every SAMPLE-th part of the row, each time at another place
        lanes = tl.arange(0, SAMPLE)
        begins = (lanes.to(tl.int64) * length // SAMPLE).to(tl.int32)
        widths = ((lanes + 1).to(tl.int64) * length // SAMPLE).to(tl.int32) - begins
        scattered = ((lanes * 40503) & 0xFFFF) * 1.0 / 65536.0
        sample = tl.load(scores_ptr + begins + (scattered * widths).to(tl.int32))
        rank = _sample_rank(length, k, SIZE, SAMPLE)
        threshold, _ = _threshold(sample, SAMPLE, rank, rank // 16)
        share = tl.cdiv(tl.cdiv(length, num_parts), BLOCK) * BLOCK
        begin = part * share
        end = tl.minimum(begin + share, length)
        slot = row * num_parts + part
        words_ptr += slot * max_words
        offs_w = tl.arange(0, BLOCK // 32)
        offs = offs_w[:, None] * 32 + tl.arange(0, 32)[None, :]
        # whole blocks are loaded without a mask, 16 bytes at a time; the next one is on its way
        # while this one is compared
        end_whole = begin + tl.maximum(end - begin, 0) // BLOCK * BLOCK
        is_whole = offs * 0 + begin < end_whole
        following = tl.load(scores_ptr + begin + offs, mask=is_whole, other=0.0)
        for start in range(begin, end_whole, BLOCK):
            x = following
            is_whole = offs * 0 + start + BLOCK < end_whole
            following = tl.load(scores_ptr + start + BLOCK + offs, mask=is_whole, other=0.0)
            tl.store(words_ptr + (start - begin) // 32 + offs_w, _reached_words(x, threshold))
        if end_whole < end:
            columns = end_whole + offs
            x = tl.load(scores_ptr + columns, mask=columns < end, other=float("nan"))
            tl.store(words_ptr + (end_whole - begin) // 32 + offs_w, _reached_words(x, threshold))
        # other threads of this program read them
        tl.debug_barrier()
        num_words = tl.cdiv(tl.maximum(end - begin, 0), 32)
        candidates_ptr += slot * capacity
        total = _list_candidates(words_ptr, candidates_ptr, begin, num_words, capacity)
        tl.store(counts_ptr + slot, total)


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
        counts = tl.zeros([8], tl.int32)
        for start in range(0, length, BLOCK):
            mask = start + offs < length
            order = _order_of(tl.load(scores_ptr + start + offs, mask=mask, other=0.0))
            reaches = (order[:, None] >= thresholds[None, :]) & mask[:, None]
            counts += tl.sum(reaches.to(tl.int32), axis=0)
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
        order = _order_of(tl.load(scores_ptr + columns, mask=mask, other=0.0))
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
    threshold, num_equal = _threshold(x, count, k, 0)
    picks = (x >= threshold).to(tl.int32)
    picks = _drop_equal(picks, (x == threshold).to(tl.int32), num_equal)
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
    length = _length_of(lengths_ptr, row, RATIO)
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


# --- launches -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entries:
    """Whose columns are the entries of a sequence, and where these lie in the pool."""

    positions: Tensor  # [num_rows] int64
    sequences: Tensor  # [num_rows] int64: row of block_tables
    block_tables: Tensor  # [num_seqs, max_blocks] int64
    ratio: int  # tokens an entry
    rows_per_block: int


@dataclass(frozen=True, slots=True)
class Selection:
    """How rows of some bound are selected."""

    tile: Tile
    num_parts: int  # 0: no row is narrowed
    longest: int  # columns of a part

    @property
    def capacity(self) -> int:
        """Candidates of a part: more than the tile holds are of no use."""
        return min(self.longest, self.tile.size)

    @property
    def scratch_columns(self) -> int:
        """Of int32, beside each row's scores."""
        return self.num_parts * (self.longest // 32 + self.capacity + 1)


def plan_selection(num_rows: int, max_length: int, k: int, target: Target) -> Selection:
    tile, is_narrowed = pick_tile(max_length, k, target)
    if not is_narrowed:
        return Selection(tile, 0, 0)
    num_blocks = triton.cdiv(max_length, NARROW_BLOCK)
    num_parts = min(max(_NUM_PROGRAMS // max(num_rows, 1), 1), 1 << LOG_PARTS, num_blocks)
    longest = triton.cdiv(num_blocks, num_parts) * NARROW_BLOCK
    return Selection(tile, num_parts, longest)


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
        shape = (num_rows, selection.num_parts)
        max_words = selection.longest // 32
        words, counts, candidates = (
            torch.empty(*shape, width, dtype=torch.int32, device=scores.device)
            for width in (max_words, 1, selection.capacity)
        )
        narrow_kernel[shape](
            scores,
            bounds,
            words,
            counts,
            candidates,
            k,
            max_words,
            selection.capacity,
            scores.stride(0),
            SIZE=selection.tile.size,
            SAMPLE=SAMPLE,
            BLOCK=NARROW_BLOCK,
            RATIO=ratio,
            num_warps=NARROW_WARPS,
        )
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
