"""Triton: where top-k and top-p cut a row of logits, without sorting it.

Tokens have an order without ties: by logit, equal ones by id (`ordered_keys`). A cut is the key of
the last token that is kept: the largest key so that the tokens from it on hold enough, k tokens or
top-p's mass. `count_bins_kernel` makes a histogram of the row's logits, which says in which bin
top-k cuts, and in which few top-p can; `sum_bins_kernel` sums masses where that is asked,
`list_likely_kernel` lists the tokens of the bin where the cut lies, and `find_cut_kernel` finds it
among them by bisection. Atomics add whole numbers, and no result depends on the order of the list.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.sampling.reference import MASS_OF_THE_LARGEST, MIN_TEMPERATURE, NextTokens

BLOCK = 1024
NUM_WARPS = 4
# a histogram costs as much as its bins: of more tokens at once than the other kernels take
COUNT_BLOCK = 4096
COUNT_WARPS = 8
FIND_WARPS = 8
NUM_BINS = 1024
# tokens that a list holds; where more are equally likely, each step of the bisection reads the row
MAX_LISTED = 16384
# that a row's vocabulary is cut into
MAX_PARTS = 64

_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_UNITS = tl.constexpr(MASS_OF_THE_LARGEST)
_BINS = tl.constexpr(NUM_BINS)
_BINS_PER_LOGIT = tl.constexpr(32)
_FALL = tl.constexpr(0.96923323)  # exp(-1 / 32): from a bin's most likely token to its least one
# masses are rounded: more than all tokens of a vocabulary can be off together
_DOUBT = tl.constexpr(1e-3)
_KEY_OF_NO_CUT = tl.constexpr(-(2**63))
_ORDER_OF_MINUS_INFINITY = tl.constexpr(-(0x7F800000 + 1))


@triton.jit
def ordered_keys(values, tokens):
    """Whole numbers that grow with the values, and for equal ones with falling tokens."""
    # -0 and 0 are one value
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - tokens).to(tl.int64)


@triton.jit
def largest_of_parts(bests_ptr, num_parts, MAX_PARTS: tl.constexpr):
    """A row's largest logit, from those of its parts."""
    parts = tl.arange(0, MAX_PARTS)
    return tl.max(tl.load(bests_ptr + parts, mask=parts < num_parts, other=float("-inf")), axis=0)


@triton.jit
def load_scaled(row_ptr, offs, mask, largest, temperature):
    """Logits less the largest, by the temperature; -inf where masked."""
    values = tl.load(row_ptr + offs, mask=mask, other=float("-inf"))
    return tl.div_rn(values - largest, tl.zeros_like(values) + temperature)


@triton.jit
def least_logit(min_p_ptr, row):
    """What min-p cuts off lies below it."""
    return tl.log(tl.load(min_p_ptr + row).to(tl.float64)).to(tl.float32)


@triton.jit
def _has_cut(positions_ptr, temperatures_ptr, top_k_ptr, top_p_ptr, row):
    is_random = tl.load(temperatures_ptr + row) >= _MIN_TEMPERATURE
    is_cut = (tl.load(top_k_ptr + row) > 0) | (tl.load(top_p_ptr + row) < 1.0)
    return (tl.load(positions_ptr + row) >= 0) & is_random & is_cut


@triton.jit
def _masses(scaled):
    return (tl.exp(scaled.to(tl.float64)) * _UNITS + 0.5).to(tl.int64)


@triton.jit
def _bins(scaled):
    return tl.minimum(-scaled * _BINS_PER_LOGIT, _BINS - 1.0).to(tl.int32)


@triton.jit
def count_bins_kernel(
    # tensors
    logits_ptr,
    positions_ptr,
    temperatures_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    bests_ptr,
    counts_ptr,
    # sizes, strides in elements, meta-parameters
    vocab_size,
    part_size,
    stride_logits_row,
    BLOCK: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """One program, one part of a row: its tokens by bins of logits, added to the row's."""
    row = tl.program_id(0).to(tl.int64)
    if _has_cut(positions_ptr, temperatures_ptr, top_k_ptr, top_p_ptr, row) == 0:
        return
    temperature = tl.load(temperatures_ptr + row)
    largest = largest_of_parts(bests_ptr + row * MAX_PARTS, tl.num_programs(1), MAX_PARTS)
    least = least_logit(min_p_ptr, row)
    first = tl.program_id(1) * part_size
    end = tl.minimum(first + part_size, vocab_size)
    counts = tl.zeros([_BINS], tl.int32)
    for start in range(first, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < end
        scaled = load_scaled(logits_ptr + row * stride_logits_row, offs, mask, largest, temperature)
        counts += tl.histogram(_bins(scaled), _BINS, mask=mask & (scaled >= least))
    bins = tl.arange(0, _BINS)
    tl.atomic_add(counts_ptr + row * _BINS + bins, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _bracket(counts, top_k, top_p):
    """The first and the last bin that a cut can lie in, and whether top-k is what cuts."""
    bins = tl.arange(0, _BINS)
    num_tokens = tl.sum(counts, axis=0)
    has_top_k = (top_k > 0) & (top_k < num_tokens)
    # the bin that holds the k-th
    is_before = tl.cumsum(counts, axis=0) < top_k
    last_bin = tl.sum(is_before.to(tl.int32), axis=0)
    first_bin = last_bin
    if has_top_k == 0:
        # a bin's mass lies between those of its two ends
        most = counts.to(tl.float32) * tl.exp(bins.to(tl.float32) * (-1.0 / _BINS_PER_LOGIT))
        least = most * tl.where(bins == _BINS - 1, 0.0, _FALL)
        limit = top_p.to(tl.float32)
        wanted = limit * tl.sum(most, axis=0) * (1 + _DOUBT) + _DOUBT
        is_before = tl.cumsum(least, axis=0) < wanted
        last_bin = tl.minimum(tl.sum(is_before.to(tl.int32), axis=0), _BINS - 1)
        wanted = limit * tl.sum(least, axis=0) * (1 - _DOUBT) - _DOUBT
        is_before = tl.cumsum(most, axis=0) < wanted
        first_bin = tl.minimum(tl.sum(is_before.to(tl.int32), axis=0), last_bin)
    return first_bin, last_bin, has_top_k


@triton.jit
def sum_bins_kernel(
    # tensors
    logits_ptr,
    positions_ptr,
    temperatures_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    bests_ptr,
    counts_ptr,
    sums_ptr,
    masses_ptr,
    # sizes, strides in elements, meta-parameters
    vocab_size,
    part_size,
    stride_logits_row,
    BLOCK: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """One program, one part of a row that top-p alone cuts: masses of the bins it can cut in.

    sums [rows, 3] int64: tokens listed, mass of all, mass above these bins.
    """
    row = tl.program_id(0).to(tl.int64)
    if _has_cut(positions_ptr, temperatures_ptr, top_k_ptr, top_p_ptr, row) == 0:
        return
    counts = tl.load(counts_ptr + row * _BINS + tl.arange(0, _BINS))
    first_bin, last_bin, has_top_k = _bracket(
        counts, tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    )
    if has_top_k:
        return
    temperature = tl.load(temperatures_ptr + row)
    largest = largest_of_parts(bests_ptr + row * MAX_PARTS, tl.num_programs(1), MAX_PARTS)
    least = least_logit(min_p_ptr, row)
    first = tl.program_id(1) * part_size
    end = tl.minimum(first + part_size, vocab_size)
    mass = tl.zeros([BLOCK], tl.int64)
    above = tl.zeros([BLOCK], tl.int64)
    for start in range(first, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < end
        scaled = load_scaled(logits_ptr + row * stride_logits_row, offs, mask, largest, temperature)
        bins = _bins(scaled)
        masses = tl.where(mask & (scaled >= least), _masses(scaled), 0)
        mass += masses
        above += tl.where(bins < first_bin, masses, 0)
        is_near = (masses > 0) & (bins >= first_bin) & (bins <= last_bin)
        tl.atomic_add(masses_ptr + row * _BINS + bins, masses, mask=is_near, sem="relaxed")
    tl.atomic_add(sums_ptr + row * 3 + 1, tl.sum(mass, axis=0), sem="relaxed")
    tl.atomic_add(sums_ptr + row * 3 + 2, tl.sum(above, axis=0), sem="relaxed")


@triton.jit
def _mass_wanted(top_p, mass):
    # one unit: the most likely token always stays
    return tl.maximum(top_p.to(tl.float64) * mass.to(tl.float64), 1.0)


@triton.jit
def _listed_bins(counts_ptr, sums_ptr, masses_ptr, top_k, top_p, row):
    """The first and the last bin that are listed; counts and masses of what lies above them.

    Both are the one that the cut lies in, except where top-p goes on after top-k: it can cut
    anywhere above.

    Returns:
        first, last bin, tokens and mass above the first, tokens listed, whether top-k cuts.
    """
    bins = tl.arange(0, _BINS)
    counts = tl.load(counts_ptr + row * _BINS + bins)
    first_bin, last_bin, has_top_k = _bracket(counts, top_k, top_p)
    mass_above = tl.zeros_like(row)
    if has_top_k:
        first_bin = tl.where(top_p < 1.0, 0, last_bin)
    else:
        masses = tl.load(masses_ptr + row * _BINS + bins)
        above = tl.load(sums_ptr + row * 3 + 2)
        wanted = _mass_wanted(top_p, tl.load(sums_ptr + row * 3 + 1))
        is_before = (above + tl.cumsum(masses, axis=0)).to(tl.float64) < wanted
        is_before = is_before & (bins >= first_bin) & (bins < last_bin)
        first_bin += tl.sum(is_before.to(tl.int32), axis=0)
        last_bin = first_bin
        mass_above = above + tl.sum(tl.where(bins < first_bin, masses, 0), axis=0)
    count_above = tl.sum(tl.where(bins < first_bin, counts, 0), axis=0)
    is_listed = (bins >= first_bin) & (bins <= last_bin)
    num_listed = tl.sum(tl.where(is_listed, counts, 0), axis=0)
    return first_bin, last_bin, count_above, mass_above, num_listed, has_top_k


@triton.jit
def list_likely_kernel(
    # tensors
    logits_ptr,
    positions_ptr,
    temperatures_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    bests_ptr,
    counts_ptr,
    sums_ptr,
    masses_ptr,
    listed_keys_ptr,
    listed_masses_ptr,
    # sizes, strides in elements, meta-parameters
    vocab_size,
    part_size,
    stride_logits_row,
    BLOCK: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    MAX_LISTED: tl.constexpr,
):
    """One program, one part of a row: its tokens in the bins that the cut can lie in."""
    row = tl.program_id(0).to(tl.int64)
    if _has_cut(positions_ptr, temperatures_ptr, top_k_ptr, top_p_ptr, row) == 0:
        return
    first_bin, last_bin, _, _, num_listed, _ = _listed_bins(
        counts_ptr, sums_ptr, masses_ptr, tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), row
    )
    if num_listed > MAX_LISTED:
        return
    temperature = tl.load(temperatures_ptr + row)
    largest = largest_of_parts(bests_ptr + row * MAX_PARTS, tl.num_programs(1), MAX_PARTS)
    least = least_logit(min_p_ptr, row)
    first = tl.program_id(1) * part_size
    end = tl.minimum(first + part_size, vocab_size)
    for start in range(first, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < end
        scaled = load_scaled(logits_ptr + row * stride_logits_row, offs, mask, largest, temperature)
        bins = _bins(scaled)
        is_listed = mask & (scaled >= least) & (bins >= first_bin) & (bins <= last_bin)
        num_new = tl.sum(is_listed.to(tl.int32), axis=0)
        if num_new > 0:
            at = tl.atomic_add(sums_ptr + row * 3, num_new.to(tl.int64), sem="relaxed")
            places = row * MAX_LISTED + at + tl.cumsum(is_listed.to(tl.int32), axis=0) - 1
            tl.store(listed_keys_ptr + places, ordered_keys(scaled, offs), mask=is_listed)
            tl.store(listed_masses_ptr + places, _masses(scaled), mask=is_listed)


@triton.jit
def _held(
    row_ptr,
    keys_ptr,
    masses_ptr,
    num_listed,
    vocab_size,
    largest,
    temperature,
    least,
    cut,
    counts_tokens,
    BLOCK: tl.constexpr,
    MAX_LISTED: tl.constexpr,
):
    """What the listed tokens whose keys are `cut` or more hold: their number, or their mass. Where
    there is no list: of all tokens.
    """
    held = tl.zeros([BLOCK], tl.int64)
    if num_listed <= MAX_LISTED:
        for start in range(0, num_listed, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            mask = offs < num_listed
            keys = tl.load(keys_ptr + offs, mask=mask, other=0)
            masses = tl.load(masses_ptr + offs, mask=mask, other=0)
            held += tl.where(mask & (keys >= cut), tl.where(counts_tokens, 1, masses), 0)
    else:
        for start in range(0, vocab_size, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            mask = offs < vocab_size
            scaled = load_scaled(row_ptr, offs, mask, largest, temperature)
            is_held = mask & (scaled >= least) & (ordered_keys(scaled, offs) >= cut)
            if counts_tokens:
                held += tl.where(is_held, 1, 0).to(tl.int64)
            else:
                held += tl.where(is_held, _masses(scaled), 0)
    return tl.sum(held, axis=0)


@triton.jit
def _order_of_edge(bin):
    """Of a bin's upper end, as in `ordered_keys`."""
    bits = (bin.to(tl.float32) * (-1.0 / _BINS_PER_LOGIT) + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _find(
    row_ptr,
    keys_ptr,
    masses_ptr,
    num_listed,
    vocab_size,
    largest,
    temperature,
    least,
    low,
    high,
    held_above,
    wanted,
    counts_tokens,
    BLOCK: tl.constexpr,
    MAX_LISTED: tl.constexpr,
):
    """The largest key of [low, high] from which on `wanted` or more is held; at `low` it is.

    First among logits, then among the tokens that have this one, if there are several.
    """
    order = low >> 32
    last = high >> 32
    while order < last:
        middle = order + (last - order + 1) // 2
        held = held_above + _held(
            row_ptr,
            keys_ptr,
            masses_ptr,
            num_listed,
            vocab_size,
            largest,
            temperature,
            least,
            middle << 32,
            counts_tokens,
            BLOCK,
            MAX_LISTED,
        )
        if held.to(tl.float64) >= wanted:
            order = middle
        else:
            last = middle - 1
    low = tl.maximum(low, order << 32)
    num_equal = _held(
        row_ptr,
        keys_ptr,
        masses_ptr,
        num_listed,
        vocab_size,
        largest,
        temperature,
        least,
        low,
        True,
        BLOCK,
        MAX_LISTED,
    ) - _held(
        row_ptr,
        keys_ptr,
        masses_ptr,
        num_listed,
        vocab_size,
        largest,
        temperature,
        least,
        (order + 1) << 32,
        True,
        BLOCK,
        MAX_LISTED,
    )
    high = tl.where(num_equal > 1, (order << 32) + 0x7FFFFFFF, low)
    while low < high:
        middle = low + (high - low + 1) // 2
        held = held_above + _held(
            row_ptr,
            keys_ptr,
            masses_ptr,
            num_listed,
            vocab_size,
            largest,
            temperature,
            least,
            middle,
            counts_tokens,
            BLOCK,
            MAX_LISTED,
        )
        if held.to(tl.float64) >= wanted:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit(do_not_specialize=["num_parts"])
def find_cut_kernel(
    # tensors
    logits_ptr,
    positions_ptr,
    temperatures_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    bests_ptr,
    counts_ptr,
    sums_ptr,
    masses_ptr,
    listed_keys_ptr,
    listed_masses_ptr,
    least_keys_ptr,
    # sizes, strides in elements, meta-parameters
    vocab_size,
    num_parts,
    stride_logits_row,
    BLOCK: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    MAX_LISTED: tl.constexpr,
):
    """One program, one row: the key of the last token that top-k and top-p keep."""
    row = tl.program_id(0).to(tl.int64)
    tl.store(least_keys_ptr + row, _KEY_OF_NO_CUT)
    if _has_cut(positions_ptr, temperatures_ptr, top_k_ptr, top_p_ptr, row) == 0:
        return
    temperature = tl.load(temperatures_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    row_ptr = logits_ptr + row * stride_logits_row
    keys_ptr = listed_keys_ptr + row * MAX_LISTED
    masses_ptr_of_list = listed_masses_ptr + row * MAX_LISTED
    largest = largest_of_parts(bests_ptr + row * MAX_PARTS, num_parts, MAX_PARTS)
    least = least_logit(min_p_ptr, row)
    first_bin, last_bin, count_above, mass_above, num_listed, has_top_k = _listed_bins(
        counts_ptr, sums_ptr, masses_ptr, top_k, top_p, row
    )
    mass = tl.load(sums_ptr + row * 3 + 1)
    if num_listed > MAX_LISTED:
        # the whole row is read, with what lies above
        count_above = tl.zeros_like(count_above)
        mass_above = tl.zeros_like(mass_above)

    cut = _KEY_OF_NO_CUT
    low = tl.where(last_bin < _BINS - 1, _order_of_edge(last_bin + 1), _ORDER_OF_MINUS_INFINITY)
    low = low << 32
    high = (_order_of_edge(first_bin) << 32) + 0x7FFFFFFF
    if has_top_k:
        low = _find(
            row_ptr,
            keys_ptr,
            masses_ptr_of_list,
            num_listed,
            vocab_size,
            largest,
            temperature,
            least,
            low,
            high,
            count_above.to(tl.int64),
            top_k.to(tl.float64),
            True,
            BLOCK,
            MAX_LISTED,
        )
        cut = low
        # top-p goes on among what is kept, of which all is listed then
        mass_above = tl.zeros_like(mass_above)
        mass = _held(
            row_ptr,
            keys_ptr,
            masses_ptr_of_list,
            num_listed,
            vocab_size,
            largest,
            temperature,
            least,
            cut,
            False,
            BLOCK,
            MAX_LISTED,
        )
    if top_p < 1.0:
        cut = _find(
            row_ptr,
            keys_ptr,
            masses_ptr_of_list,
            num_listed,
            vocab_size,
            largest,
            temperature,
            least,
            low,
            high,
            mass_above,
            _mass_wanted(top_p, mass),
            False,
            BLOCK,
            MAX_LISTED,
        )
    tl.store(least_keys_ptr + row, cut)


def cut_rows(
    logits: Tensor,
    rows: NextTokens,
    bests: Tensor,
    counts: Tensor,
    sums: Tensor,
    masses: Tensor,
    num_parts: int,
    part_size: int,
) -> Tensor:
    """The least key (`ordered_keys`) that each row keeps; four launches.

    Args:
        bests: [rows, MAX_PARTS] float32: the largest logit of each of the row's `num_parts` parts.
        counts: [rows, NUM_BINS] int32, zeros.
        sums: [rows, 3] int64, zeros.
        masses: [rows, NUM_BINS] int64, zeros.

    Returns:
        [rows] int64.
    """
    num_rows, vocab_size = logits.shape
    listed_keys, listed_masses = (
        torch.empty(num_rows, MAX_LISTED, dtype=torch.int64, device=logits.device) for _ in range(2)
    )
    least_keys = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    given = (
        logits,
        rows.positions,
        rows.temperatures,
        rows.top_k,
        rows.top_p,
        rows.min_p,
        bests,
        counts,
    )
    grid = (num_rows, num_parts)
    sizes = (vocab_size, part_size, logits.stride(0))
    count_bins_kernel[grid](
        *given, *sizes, BLOCK=COUNT_BLOCK, MAX_PARTS=MAX_PARTS, num_warps=COUNT_WARPS
    )
    sum_bins_kernel[grid](
        *given, sums, masses, *sizes, BLOCK=BLOCK, MAX_PARTS=MAX_PARTS, num_warps=NUM_WARPS
    )
    list_likely_kernel[grid](
        *given,
        sums,
        masses,
        listed_keys,
        listed_masses,
        *sizes,
        BLOCK=BLOCK,
        MAX_PARTS=MAX_PARTS,
        MAX_LISTED=MAX_LISTED,
        num_warps=NUM_WARPS,
    )
    find_cut_kernel[(num_rows,)](
        *given,
        sums,
        masses,
        listed_keys,
        listed_masses,
        least_keys,
        vocab_size,
        num_parts,
        logits.stride(0),
        BLOCK=BLOCK,
        MAX_PARTS=MAX_PARTS,
        MAX_LISTED=MAX_LISTED,
        num_warps=FIND_WARPS,
    )
    return least_keys
