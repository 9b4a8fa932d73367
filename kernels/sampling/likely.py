"""Triton: where top-k and top-p cut a row of logits, without sorting it.

Tokens have an order without ties: by logit, equal ones by id (`ordered_keys`). A cut is the key of
the last token that is kept: the largest key so that the tokens from it on hold enough, k tokens or
top-p's mass. A histogram says which logits the cut can lie among; these tokens are listed, unless
they are too many, and the cut is found among them by bisection.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.sampling.reference import MASS_OF_THE_LARGEST, MIN_TEMPERATURE, NextTokens

BLOCK = 2048
NUM_WARPS = 16
# tokens that a list holds; where more are likely, every step of the bisection reads the whole row
MAX_LISTED = 16384
# that a row's vocabulary is cut into
MAX_PARTS = 64

_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_UNITS = tl.constexpr(MASS_OF_THE_LARGEST)
_BINS = tl.constexpr(512)
_BINS_PER_LOGIT = tl.constexpr(16)
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
def _masses(scaled):
    return (tl.exp(scaled.to(tl.float64)) * _UNITS + 0.5).to(tl.int64)


@triton.jit
def _scaled(row_ptr, offs, mask, largest, temperature):
    values = tl.load(row_ptr + offs, mask=mask, other=float("-inf"))
    return tl.div_rn(values - largest, tl.zeros_like(values) + temperature)


@triton.jit
def _bins(scaled):
    return tl.minimum(-scaled * _BINS_PER_LOGIT, _BINS - 1.0).to(tl.int32)


@triton.jit
def _held(
    row_ptr,
    keys_ptr,
    masses_ptr,
    num_listed,
    vocab_size,
    largest,
    temperature,
    least_logit,
    cut,
    counts_tokens,
    BLOCK: tl.constexpr,
    MAX_LISTED: tl.constexpr,
):
    """What the tokens whose keys are `cut` or more hold: their number, or their mass."""
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
            scaled = _scaled(row_ptr, offs, mask, largest, temperature)
            is_held = mask & (scaled >= least_logit) & (ordered_keys(scaled, offs) >= cut)
            if counts_tokens:
                held += tl.where(is_held, 1, 0).to(tl.int64)
            else:
                held += tl.where(is_held, _masses(scaled), 0)
    return tl.sum(held, axis=0)


@triton.jit
def _edge(bin):
    """The order of a bin's upper end, as in `ordered_keys`."""
    bits = (bin.to(tl.float32) * (-1.0 / _BINS_PER_LOGIT) + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit(do_not_specialize=["num_parts"])
def cut_rows_kernel(
    # tensors
    logits_ptr,
    positions_ptr,
    temperatures_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    bests_ptr,
    listed_keys_ptr,
    listed_masses_ptr,
    least_keys_ptr,
    # sizes, strides in elements, meta-parameters
    vocab_size,
    num_parts,
    stride_logits_row,
    BLOCK: tl.constexpr,
    MAX_LISTED: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """One program, one row: the key of the last token that top-k and top-p keep."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row).to(tl.float64)
    tl.store(least_keys_ptr + row, _KEY_OF_NO_CUT)
    is_random = (tl.load(positions_ptr + row) >= 0) & (temperature >= _MIN_TEMPERATURE)
    if (is_random & ((top_k > 0) | (top_p < 1.0))) == 0:
        return
    row_ptr = logits_ptr + row * stride_logits_row
    keys_ptr = listed_keys_ptr + row * MAX_LISTED
    masses_ptr = listed_masses_ptr + row * MAX_LISTED
    largest = largest_of_parts(bests_ptr + row * MAX_PARTS, num_parts, MAX_PARTS)
    least_logit = tl.log(tl.load(min_p_ptr + row).to(tl.float64)).to(tl.float32)

    counts = tl.zeros([_BINS], tl.int32)
    for start in range(0, vocab_size, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < vocab_size
        scaled = _scaled(row_ptr, offs, mask, largest, temperature)
        counts += tl.histogram(_bins(scaled), _BINS, mask=mask & (scaled >= least_logit))
    num_tokens = tl.sum(counts, axis=0)
    before = tl.cumsum(counts, axis=0)
    bins = tl.arange(0, _BINS)
    # the bin that holds the k-th; all bins where k cuts nothing
    has_top_k = (top_k > 0) & (top_k < num_tokens)
    last_bin = tl.sum((before < top_k).to(tl.int32), axis=0)
    first_bin = last_bin
    if has_top_k == 0:
        # each bin's mass lies between those of its two ends
        most = counts.to(tl.float32) * tl.exp(bins.to(tl.float32) * (-1.0 / _BINS_PER_LOGIT))
        ratio = tl.where(bins == _BINS - 1, 0.0, 0.9394130)  # exp(-1 / 16)
        limit = top_p.to(tl.float32)
        most_before = tl.cumsum(most, axis=0)
        least_before = tl.cumsum(most * ratio, axis=0)
        total_most = tl.sum(most, axis=0)
        total_least = tl.sum(most * ratio, axis=0)
        is_before = least_before < limit * total_most * (1 + _DOUBT) + _DOUBT
        last_bin = tl.minimum(tl.sum(is_before.to(tl.int32), axis=0), _BINS - 1)
        is_before = most_before < limit * total_least * (1 - _DOUBT) - _DOUBT
        first_bin = tl.minimum(tl.sum(is_before.to(tl.int32), axis=0), last_bin)
    num_listed = tl.sum(tl.where(bins <= last_bin, counts, 0), axis=0)

    total = tl.zeros([BLOCK], tl.int64)
    at = 0
    for start in range(0, vocab_size, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < vocab_size
        scaled = _scaled(row_ptr, offs, mask, largest, temperature)
        is_kept = mask & (scaled >= least_logit)
        is_listed = is_kept & (_bins(scaled) <= last_bin) & (num_listed <= MAX_LISTED)
        num_new = tl.sum(is_listed.to(tl.int32), axis=0)
        if (num_new > 0) | ((has_top_k == 0) & (tl.max(scaled, axis=0) > -24.0)):
            masses = tl.where(is_kept, _masses(scaled), 0)
            total += masses
            places = at + tl.cumsum(is_listed.to(tl.int32), axis=0) - 1
            tl.store(keys_ptr + places, ordered_keys(scaled, offs), mask=is_listed)
            tl.store(masses_ptr + places, masses, mask=is_listed)
        at += num_new
    # what one thread lists another one reads
    tl.debug_barrier()

    cut = _KEY_OF_NO_CUT
    low = tl.where(last_bin < _BINS - 1, _edge(last_bin + 1), _ORDER_OF_MINUS_INFINITY) << 32
    high = (_edge(first_bin) << 32) + 0x7FFFFFFF
    mass = tl.sum(total, axis=0)
    if has_top_k:
        while low < high:
            middle = low + (high - low + 1) // 2
            held = _held(
                row_ptr,
                keys_ptr,
                masses_ptr,
                num_listed,
                vocab_size,
                largest,
                temperature,
                least_logit,
                middle,
                True,
                BLOCK,
                MAX_LISTED,
            )
            if held >= top_k:
                low = middle
            else:
                high = middle - 1
        cut = low
        high = (_edge(tl.zeros_like(last_bin)) << 32) + 0x7FFFFFFF
        mass = _held(
            row_ptr,
            keys_ptr,
            masses_ptr,
            num_listed,
            vocab_size,
            largest,
            temperature,
            least_logit,
            cut,
            False,
            BLOCK,
            MAX_LISTED,
        )
    if top_p < 1.0:
        # one unit: the most likely token always stays
        wanted = tl.maximum(top_p * mass.to(tl.float64), 1.0)
        while low < high:
            middle = low + (high - low + 1) // 2
            held = _held(
                row_ptr,
                keys_ptr,
                masses_ptr,
                num_listed,
                vocab_size,
                largest,
                temperature,
                least_logit,
                middle,
                False,
                BLOCK,
                MAX_LISTED,
            )
            if held.to(tl.float64) >= wanted:
                low = middle
            else:
                high = middle - 1
        cut = low
    tl.store(least_keys_ptr + row, cut)


def cut_rows(logits: Tensor, rows: NextTokens, bests: Tensor, num_parts: int) -> Tensor:
    """The least key (`ordered_keys`) that each row keeps, one launch.

    Args:
        bests: [rows, MAX_PARTS] float32: the largest logit of each of the row's `num_parts` parts.

    Returns:
        [rows] int64.
    """
    num_rows, vocab_size = logits.shape
    keys, masses = (
        torch.empty(num_rows, MAX_LISTED, dtype=torch.int64, device=logits.device) for _ in range(2)
    )
    least_keys = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    cut_rows_kernel[(num_rows,)](
        logits,
        rows.positions,
        rows.temperatures,
        rows.top_k,
        rows.top_p,
        rows.min_p,
        bests,
        keys,
        masses,
        least_keys,
        vocab_size,
        num_parts,
        logits.stride(0),
        BLOCK=BLOCK,
        MAX_LISTED=MAX_LISTED,
        MAX_PARTS=MAX_PARTS,
        num_warps=NUM_WARPS,
    )
    return least_keys
