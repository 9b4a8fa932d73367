"""Triton: the next token of every row of a running batch, by kernels that a graph can hold.

A row's vocabulary is cut into parts, one program each: `best_parts_kernel` finds the most likely
token of every part, `draw_parts_kernel` the one whose logit plus noise is largest, and
`feed_back_kernel` the best of all parts, which becomes the row's next token on the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.sampling.likely import MAX_PARTS, cut_rows, largest_of_parts, ordered_keys
from scission.kernels.sampling.reference import MIN_TEMPERATURE, NextTokens

BLOCK = 1024
NUM_WARPS = 4
FEED_WARPS = 1
# programs that fill a device's multiprocessors twice
_WANTED_PROGRAMS = 256

_NO_TOKEN = tl.constexpr(2**31 - 1)
_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
# more than single precision can be wrong by, in noise of up to 23
_DOUBT = tl.constexpr(1e-3)
_UNIT = tl.constexpr(2.0**-32)


def num_parts(num_rows: int) -> int:
    """Of every row's vocabulary, by the number of rows alone: a power of two."""
    wanted = -(-_WANTED_PROGRAMS // num_rows)
    return min(MAX_PARTS, 1 << (wanted - 1).bit_length())


@triton.jit
def best_parts_kernel(
    # tensors
    logits_ptr,
    positions_ptr,
    bests_ptr,
    tokens_ptr,
    # sizes, strides in elements, meta-parameters
    vocab_size,
    part_size,
    stride_logits_row,
    BLOCK: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """One program, one part of a row: its largest logit, and the lowest token that has it."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if tl.load(positions_ptr + row) < 0:
        return
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
    """One program, one part of a row: the largest of logit by temperature plus noise.

    `bests` [2, rows, MAX_PARTS]: the most likely tokens' logits are read, the draws' are written.
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
    min_logit = tl.log(tl.load(min_p_ptr + row).to(tl.float64)).to(tl.float32)
    least_key = tl.load(least_keys_ptr + row)
    first = part * part_size
    end = tl.minimum(first + part_size, vocab_size)
    best = float("-inf")
    token = first
    for start in range(first, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < end
        values = tl.load(logits_ptr + row * stride_logits_row + offs, mask=mask, other=0.0)
        scaled = tl.div_rn(values - largest, tl.zeros_like(values) + temperature)
        is_kept = mask & (scaled >= min_logit) & (ordered_keys(scaled, offs) >= least_key)
        bits = _draw_bits(seed, choice, count, start, BLOCK)
        near = tl.where(is_kept, scaled + _near_noise(bits), float("-inf"))
        # double precision is slow: only where it can change who wins
        if tl.max(near, axis=0) > best - _DOUBT:
            noisy = tl.where(is_kept, scaled + _exact_noise(bits), float("-inf"))
            block_best = tl.max(noisy, axis=0)
            if block_best > best:
                best = block_best
                token = tl.min(tl.where(noisy == block_best, offs, _NO_TOKEN), axis=0)
    at = (tl.num_programs(0) + row) * MAX_PARTS + part
    tl.store(bests_ptr + at, best)
    tl.store(tokens_ptr + at, token)


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
    # sizes, meta-parameters
    vocab_size,
    num_parts,
    MAX_PARTS: tl.constexpr,
):
    """One program, one row: the best of its parts becomes its token, and it stands one further."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + row)
    if position < 0:
        return
    is_random = tl.load(temperatures_ptr + row) >= _MIN_TEMPERATURE
    parts = tl.arange(0, MAX_PARTS)
    at = tl.where(is_random, tl.num_programs(0) + row, row) * MAX_PARTS + parts
    bests = tl.load(bests_ptr + at, mask=parts < num_parts, other=float("-inf"))
    tokens = tl.load(part_tokens_ptr + at, mask=parts < num_parts, other=_NO_TOKEN)
    token = tl.min(tl.where(bests == tl.max(bests, axis=0), tokens, _NO_TOKEN), axis=0)
    # logits that are no numbers have no best token; what follows reads tables by it
    token = tl.minimum(token, vocab_size - 1)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(positions_ptr + row, position + 1)
    tl.store(context_lens_ptr + row, (position + 2).to(tl.int32))
    tl.store(writer_ends_ptr + row, position + 2)
    tl.store(counts_ptr + row, tl.load(counts_ptr + row) + 1)


def draw_next(logits: Tensor, rows: NextTokens) -> None:
    """Four launches, of which greedy rows leave two at once; see the package's function."""
    num_rows, vocab_size = logits.shape
    parts = num_parts(num_rows)
    part_size = triton.cdiv(triton.cdiv(vocab_size, parts), BLOCK) * BLOCK
    bests = torch.empty(2, num_rows, MAX_PARTS, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(2, num_rows, MAX_PARTS, dtype=torch.int32, device=logits.device)
    grid = (num_rows, parts)
    best_parts_kernel[grid](
        logits,
        rows.positions,
        bests,
        tokens,
        vocab_size,
        part_size,
        logits.stride(0),
        BLOCK=BLOCK,
        MAX_PARTS=MAX_PARTS,
        num_warps=NUM_WARPS,
    )
    draw_parts_kernel[grid](
        logits,
        rows.positions,
        rows.temperatures,
        rows.seeds,
        rows.choices,
        rows.counts,
        rows.min_p,
        cut_rows(logits, rows, bests[0], parts),
        bests,
        tokens,
        vocab_size,
        part_size,
        logits.stride(0),
        BLOCK=BLOCK,
        MAX_PARTS=MAX_PARTS,
        num_warps=NUM_WARPS,
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
        vocab_size,
        parts,
        MAX_PARTS=MAX_PARTS,
        num_warps=FEED_WARPS,
    )
