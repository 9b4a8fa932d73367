"""Long rows of scores, narrowed to candidates for the k largest by reading them once.

Every one of several programs a row derives the same threshold from the same sample of the row,
such that somewhat more than k scores should reach it, and lists those of its own part that do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.indexer.selection import Selection
from scission.kernels.indexer.threshold import length_of, threshold

NUM_WARPS = 8
_LISTED_WORDS: tl.constexpr = tl.constexpr(1024)


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
def _reached_words(x, least):
    """[words, 32] float32 -> [words] int32, a bit for each column that reaches the least."""
    return tl.sum(tl.where(x >= least, 1 << tl.arange(0, 32)[None, :], 0), axis=1)


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
    length = length_of(lengths_ptr, row, RATIO)
    if (length > SIZE) & (length > k):
        scores_ptr += row * stride_scores_row
        # one column of every SAMPLE-th part of the row, each time at another place
        lanes = tl.arange(0, SAMPLE)
        begins = (lanes.to(tl.int64) * length // SAMPLE).to(tl.int32)
        widths = ((lanes + 1).to(tl.int64) * length // SAMPLE).to(tl.int32) - begins
        scattered = ((lanes * 40503) & 0xFFFF) * 1.0 / 65536.0
        sample = tl.load(scores_ptr + begins + (scattered * widths).to(tl.int32))
        rank = _sample_rank(length, k, SIZE, SAMPLE)
        least, _ = threshold(sample, SAMPLE, rank, rank // 16)
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
            tl.store(words_ptr + (start - begin) // 32 + offs_w, _reached_words(x, least))
        if end_whole < end:
            columns = end_whole + offs
            x = tl.load(scores_ptr + columns, mask=columns < end, other=float("nan"))
            tl.store(words_ptr + (end_whole - begin) // 32 + offs_w, _reached_words(x, least))
        # other threads of this program read them
        tl.debug_barrier()
        num_words = tl.cdiv(tl.maximum(end - begin, 0), 32)
        candidates_ptr += slot * capacity
        total = _list_candidates(words_ptr, candidates_ptr, begin, num_words, capacity)
        tl.store(counts_ptr + slot, total)


def narrow(
    scores: Tensor, lengths: Tensor, k: int, ratio: int, selection: Selection
) -> tuple[Tensor, Tensor]:
    """Counts [num_rows, parts] and candidates [num_rows, parts, capacity], int32, of long rows.

    Args:
        lengths: [num_rows]: int32 lengths, or with a ratio int64 positions.
    """
    shape = (scores.shape[0], selection.num_parts)
    max_words = selection.longest // 32
    words = torch.empty(*shape, max_words, dtype=torch.int32, device=scores.device)
    counts = torch.empty(shape, dtype=torch.int32, device=scores.device)
    candidates = torch.empty(*shape, selection.capacity, dtype=torch.int32, device=scores.device)
    narrow_kernel[shape](
        scores,
        lengths,
        words,
        counts,
        candidates,
        k,
        max_words,
        selection.capacity,
        scores.stride(0),
        SIZE=selection.tile.size,
        SAMPLE=selection.sample,
        BLOCK=selection.block,
        RATIO=ratio,
        num_warps=NUM_WARPS,
    )
    return counts, candidates
