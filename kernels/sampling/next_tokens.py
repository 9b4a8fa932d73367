"""Triton: the next token of every row of a running batch, by kernels that a graph can hold.

A row's vocabulary is cut into parts, one program each: `best_parts_kernel` finds the most likely
token of every part; `near_parts_kernel` how large logit plus noise becomes there, and
`draw_parts_kernel` the token where it is largest; `feed_back_kernel` the best of all parts, which
becomes the row's next token on the device. `likely` says what top-k and top-p leave.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.sampling.likely import (
    MAX_PARTS,
    NUM_BINS,
    cut_rows,
    largest_of_parts,
    least_logit,
    load_scaled,
    ordered_keys,
)
from scission.kernels.sampling.reference import MIN_TEMPERATURE, OF_PROMPT, NextTokens

BLOCK = 1024
NUM_WARPS = 4
FEED_WARPS = 1
# programs that keep a device's multiprocessors busy with loads
_WANTED_PROGRAMS = 2048

_NO_TOKEN = tl.constexpr(2**31 - 1)
_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_OF_PROMPT = tl.constexpr(OF_PROMPT)
# more than single precision can be wrong by, in noise of up to 23
_DOUBT = tl.constexpr(1e-3)
_UNIT = tl.constexpr(2.0**-32)


def num_parts(num_rows: int, vocab_size: int) -> int:
    """Of every row's vocabulary."""
    return min(MAX_PARTS, -(-_WANTED_PROGRAMS // num_rows), -(-vocab_size // BLOCK))


@triton.jit
def _is_penalised(presence_ptr, frequency_ptr, repetition_ptr, row):
    has_counts = (tl.load(presence_ptr + row) != 0.0) | (tl.load(frequency_ptr + row) != 0.0)
    return has_counts | (tl.load(repetition_ptr + row) != 1.0)


@triton.jit
def penalise_kernel(
    # tensors
    logits_ptr,
    positions_ptr,
    presence_ptr,
    frequency_ptr,
    repetition_ptr,
    seen_ptr,
    # sizes, strides in elements, meta-parameters
    vocab_size,
    part_size,
    stride_logits_row,
    stride_seen_row,
    BLOCK: tl.constexpr,
):
    """One program, one part of a row: the logits of tokens that it has seen are changed."""
    row = tl.program_id(0).to(tl.int64)
    is_penalised = _is_penalised(presence_ptr, frequency_ptr, repetition_ptr, row)
    if (is_penalised & (tl.load(positions_ptr + row) >= 0)) == 0:
        return
    presence = tl.load(presence_ptr + row)
    frequency = tl.load(frequency_ptr + row)
    repetition = tl.load(repetition_ptr + row)
    first = tl.program_id(1) * part_size
    end = tl.minimum(first + part_size, vocab_size)
    for start in range(first, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        seen = tl.load(seen_ptr + row * stride_seen_row + offs, mask=offs < end, other=0)
        if tl.max(seen, axis=0) > 0:
            mask = seen > 0
            logits = tl.load(logits_ptr + row * stride_logits_row + offs, mask=mask, other=0.0)
            counts = (seen % _OF_PROMPT).to(tl.float32)
            smaller = tl.div_rn(logits, tl.zeros_like(logits) + repetition)
            values = tl.where(logits > 0, smaller, logits * repetition)
            values -= frequency * counts + tl.where(counts > 0, presence, 0.0)
            tl.store(logits_ptr + row * stride_logits_row + offs, values, mask=mask)


@triton.jit
def best_parts_kernel(
    # tensors
    logits_ptr,
    positions_ptr,
    bests_ptr,
    tokens_ptr,
    bin_counts_ptr,
    bin_sums_ptr,
    bin_masses_ptr,
    # sizes, strides in elements, meta-parameters
    vocab_size,
    part_size,
    stride_logits_row,
    BLOCK: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    NUM_BINS: tl.constexpr,
):
    """One program, one part of a row: its largest logit, and the lowest token that has it.

    A row's first program clears what `likely` counts in.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if tl.load(positions_ptr + row) < 0:
        return
    if part == 0:
        bins = tl.arange(0, NUM_BINS)
        tl.store(bin_counts_ptr + row * NUM_BINS + bins, tl.zeros([NUM_BINS], tl.int32))
        tl.store(bin_masses_ptr + row * NUM_BINS + bins, tl.zeros([NUM_BINS], tl.int64))
        sums = tl.arange(0, 4)
        tl.store(bin_sums_ptr + row * 3 + sums, tl.zeros([4], tl.int64), mask=sums < 3)
    first = part * part_size
    end = tl.minimum(first + part_size, vocab_size)
    bests = tl.full([BLOCK], float("-inf"), tl.float32)
    tokens = tl.zeros([BLOCK], tl.int32) + _NO_TOKEN
    for start in range(first, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        values = tl.load(
            logits_ptr + row * stride_logits_row + offs, mask=offs < end, other=float("-inf")
        )
        is_better = values > bests
        bests = tl.where(is_better, values, bests)
        tokens = tl.where(is_better, offs, tokens)
    best = tl.max(bests, axis=0)
    tl.store(bests_ptr + row * MAX_PARTS + part, best)
    token = tl.min(tl.where(bests == best, tokens, _NO_TOKEN), axis=0)
    tl.store(tokens_ptr + row * MAX_PARTS + part, token)


@triton.jit
def _draw_bits(seed, choice, position, start, BLOCK: tl.constexpr):
    """The 32 random bits of the tokens [start, start + BLOCK); start is a multiple of 4."""
    groups = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zeros = tl.zeros_like(groups)
    lanes_0, lanes_1, lanes_2, lanes_3 = tl.philox(
        seed, groups, zeros + position.to(tl.uint32), zeros + choice.to(tl.uint32), zeros
    )
    lanes = tl.join(tl.join(lanes_0, lanes_2), tl.join(lanes_1, lanes_3))
    return lanes.reshape(BLOCK)


@triton.jit
def _near_noise(bits):
    """Gumbel noise in single precision, right to _DOUBT."""
    uniforms = bits.to(tl.float32) * _UNIT + 0.5 * _UNIT
    # log1p by its series where 1 - u would lose the digits of u, by the logarithm elsewhere
    series = uniforms * (1 + uniforms * (0.5 + uniforms * (0.333333 + uniforms * 0.25)))
    left = ((bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * _UNIT
    return -tl.log(tl.where(uniforms < 0.03, series, -tl.log(left)))


@triton.jit
def _exact_noise(bits):
    # 1 - u has 33 binary places: it is exact, and so is log1p by log
    left = 1.0 - (bits.to(tl.float64) + 0.5) * _UNIT
    return -tl.log(-tl.log(left)).to(tl.float32)


@triton.jit
def near_parts_kernel(
    # tensors
    logits_ptr,
    positions_ptr,
    temperatures_ptr,
    seeds_ptr,
    choices_ptr,
    counts_ptr,
    min_p_ptr,
    least_keys_ptr,
    bests_ptr,
    # sizes, strides in elements, meta-parameters
    vocab_size,
    part_size,
    stride_logits_row,
    BLOCK: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """One program, one part of a row: the largest of logit by temperature plus noise, nearly.

    `bests` [3, rows, MAX_PARTS]: the most likely tokens' logits are read, the second are written.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    temperature = tl.load(temperatures_ptr + row)
    if (tl.load(positions_ptr + row) < 0) | (temperature < _MIN_TEMPERATURE):
        return
    largest = largest_of_parts(bests_ptr + row * MAX_PARTS, tl.num_programs(1), MAX_PARTS)
    seed = tl.load(seeds_ptr + row).to(tl.uint64)
    choice = tl.load(choices_ptr + row)
    count = tl.load(counts_ptr + row)
    least = least_logit(min_p_ptr, row)
    least_key = tl.load(least_keys_ptr + row)
    first = part * part_size
    end = tl.minimum(first + part_size, vocab_size)
    bests = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(first, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < end
        scaled = load_scaled(logits_ptr + row * stride_logits_row, offs, mask, largest, temperature)
        is_kept = mask & (scaled >= least) & (ordered_keys(scaled, offs) >= least_key)
        noise = _near_noise(_draw_bits(seed, choice, count, start, BLOCK))
        bests = tl.maximum(bests, tl.where(is_kept, scaled + noise, float("-inf")))
    at = (tl.num_programs(0) + row) * MAX_PARTS + part
    tl.store(bests_ptr + at, tl.max(bests, axis=0))


@triton.jit
def draw_parts_kernel(
    # tensors
    logits_ptr,
    positions_ptr,
    temperatures_ptr,
    seeds_ptr,
    choices_ptr,
    counts_ptr,
    min_p_ptr,
    least_keys_ptr,
    bests_ptr,
    tokens_ptr,
    # sizes, strides in elements, meta-parameters
    vocab_size,
    part_size,
    stride_logits_row,
    BLOCK: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """One program, one part of a row: the largest of logit by temperature plus noise, exactly.

    Double precision is slow: it looks only at blocks that can hold the row's largest. Of `bests`
    [3, rows, MAX_PARTS] the first two are read, the third is written, as `tokens` [2, rows,
    MAX_PARTS]' second.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    num_rows = tl.num_programs(0)
    temperature = tl.load(temperatures_ptr + row)
    if (tl.load(positions_ptr + row) < 0) | (temperature < _MIN_TEMPERATURE):
        return
    tl.store(bests_ptr + (2 * num_rows + row) * MAX_PARTS + part, float("-inf"))
    tl.store(tokens_ptr + (num_rows + row) * MAX_PARTS + part, _NO_TOKEN)
    near_ptr = bests_ptr + (num_rows + row) * MAX_PARTS
    enough = largest_of_parts(near_ptr, tl.num_programs(1), MAX_PARTS) - _DOUBT
    if tl.load(near_ptr + part) < enough:
        return
    largest = largest_of_parts(bests_ptr + row * MAX_PARTS, tl.num_programs(1), MAX_PARTS)
    seed = tl.load(seeds_ptr + row).to(tl.uint64)
    choice = tl.load(choices_ptr + row)
    count = tl.load(counts_ptr + row)
    least = least_logit(min_p_ptr, row)
    least_key = tl.load(least_keys_ptr + row)
    first = part * part_size
    end = tl.minimum(first + part_size, vocab_size)
    best = float("-inf")
    token = first
    for start in range(first, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < end
        scaled = load_scaled(logits_ptr + row * stride_logits_row, offs, mask, largest, temperature)
        is_kept = mask & (scaled >= least) & (ordered_keys(scaled, offs) >= least_key)
        bits = _draw_bits(seed, choice, count, start, BLOCK)
        near = tl.where(is_kept, scaled + _near_noise(bits), float("-inf"))
        if tl.max(near, axis=0) >= enough:
            noisy = tl.where(is_kept, scaled + _exact_noise(bits), float("-inf"))
            block_best = tl.max(noisy, axis=0)
            if block_best > best:
                best = block_best
                token = tl.min(tl.where(noisy == block_best, offs, _NO_TOKEN), axis=0)
    tl.store(bests_ptr + (2 * num_rows + row) * MAX_PARTS + part, best)
    tl.store(tokens_ptr + (num_rows + row) * MAX_PARTS + part, token)


@triton.jit(do_not_specialize=["num_parts"])
def feed_back_kernel(
    # tensors
    bests_ptr,
    part_tokens_ptr,
    temperatures_ptr,
    tokens_ptr,
    positions_ptr,
    context_lens_ptr,
    writer_ends_ptr,
    counts_ptr,
    presence_ptr,
    frequency_ptr,
    repetition_ptr,
    seen_ptr,
    # sizes, strides in elements, meta-parameters
    vocab_size,
    num_parts,
    stride_seen_row,
    MAX_PARTS: tl.constexpr,
):
    """One program, one row: the best of its parts becomes its token, and it stands one further."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + row)
    if position < 0:
        return
    is_random = tl.load(temperatures_ptr + row) >= _MIN_TEMPERATURE
    parts = tl.arange(0, MAX_PARTS)
    num_rows = tl.num_programs(0)
    best_row = tl.where(is_random, 2 * num_rows + row, row)
    token_row = tl.where(is_random, num_rows + row, row)
    mask = parts < num_parts
    bests = tl.load(bests_ptr + best_row * MAX_PARTS + parts, mask=mask, other=float("-inf"))
    tokens = tl.load(part_tokens_ptr + token_row * MAX_PARTS + parts, mask=mask, other=_NO_TOKEN)
    token = tl.min(tl.where(bests == tl.max(bests, axis=0), tokens, _NO_TOKEN), axis=0)
    # logits that are no numbers have no best token; what follows reads tables by it
    token = tl.minimum(token, vocab_size - 1)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(positions_ptr + row, position + 1)
    tl.store(context_lens_ptr + row, (position + 2).to(tl.int32))
    tl.store(writer_ends_ptr + row, position + 2)
    tl.store(counts_ptr + row, tl.load(counts_ptr + row) + 1)
    if _is_penalised(presence_ptr, frequency_ptr, repetition_ptr, row):
        times_ptr = seen_ptr + row * stride_seen_row + token
        tl.store(times_ptr, tl.load(times_ptr) + 1)


def draw_next(logits: Tensor, rows: NextTokens, *, is_greedy: bool) -> None:
    """See the package's function of the same name: two launches for greedy rows, else nine."""
    num_rows, vocab_size = logits.shape
    device = logits.device
    parts = num_parts(num_rows, vocab_size)
    part_size = triton.cdiv(triton.cdiv(vocab_size, parts), BLOCK) * BLOCK
    bests = torch.empty(3, num_rows, MAX_PARTS, dtype=torch.float32, device=device)
    tokens = torch.empty(2, num_rows, MAX_PARTS, dtype=torch.int32, device=device)
    counts = torch.empty(num_rows, NUM_BINS, dtype=torch.int32, device=device)
    sums = torch.empty(num_rows, 3, dtype=torch.int64, device=device)
    masses = torch.empty(num_rows, NUM_BINS, dtype=torch.int64, device=device)
    grid = (num_rows, parts)
    sizes = (vocab_size, part_size, logits.stride(0))
    if not is_greedy:
        penalise_kernel[grid](
            logits,
            rows.positions,
            rows.presence,
            rows.frequency,
            rows.repetition,
            rows.seen,
            *sizes,
            rows.seen.stride(0),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            # products are rounded before they are added, as everywhere else
            enable_fp_fusion=False,
        )
    best_parts_kernel[grid](
        logits,
        rows.positions,
        bests,
        tokens,
        counts,
        sums,
        masses,
        *sizes,
        BLOCK=BLOCK,
        MAX_PARTS=MAX_PARTS,
        NUM_BINS=NUM_BINS,
        num_warps=NUM_WARPS,
    )
    if not is_greedy:
        given = (
            logits,
            rows.positions,
            rows.temperatures,
            rows.seeds,
            rows.choices,
            rows.counts,
            rows.min_p,
            cut_rows(logits, rows, bests[0], counts, sums, masses, parts, part_size),
            bests,
        )
        near_parts_kernel[grid](
            *given, *sizes, BLOCK=BLOCK, MAX_PARTS=MAX_PARTS, num_warps=NUM_WARPS
        )
        draw_parts_kernel[grid](
            *given, tokens, *sizes, BLOCK=BLOCK, MAX_PARTS=MAX_PARTS, num_warps=NUM_WARPS
        )
    feed_back_kernel[(num_rows,)](
        bests,
        tokens,
        rows.temperatures,
        rows.token_ids,
        rows.positions,
        rows.context_lens,
        rows.writer_ends,
        rows.counts,
        rows.presence,
        rows.frequency,
        rows.repetition,
        rows.seen,
        vocab_size,
        parts,
        rows.seen.stride(0),
        MAX_PARTS=MAX_PARTS,
        num_warps=FEED_WARPS,
    )
