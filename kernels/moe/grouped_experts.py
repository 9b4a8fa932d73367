"""Experts over codes, each over its own rows, in two launches: w1 and w3 with the activation, w2.

Codes are multiplied as they are stored. FP4: an e2m1 magnitude picks one of eight e4m3 codes of a
table, which holds its group's share of the scale; what is left, a scale a row and 128 inputs, is
applied to the dot, as FP8's scale a block of 128 x 128 is. A shared expert in FP8, which every
token takes, runs in the same launches.

Few rows are a matter of streaming the weights: the inputs are split over programs until the chip is
busy. Partial sums are added in a fixed order, by the program that comes last (a counter says which
that is, and nothing else) or by who reads the rows.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.linear.block_fp8 import dot_type
from scission.kernels.linear.rows import QuantizedRows, Scaling
from scission.kernels.moe.fp4_layout import TILE, Fp4Experts
from scission.kernels.moe.outputs import ExpertOutputs
from scission.kernels.moe.row_groups import RowGroups
from scission.kernels.rounding import (
    dot_as,
    quantize_blocks,
    quantize_blocks_dynamic,
    round_to_bf16,
    store_rounded,
)
from scission.kernels.target import Target

# programs over whose inputs a shared expert is divided besides: its codes are twice as large
SHARED_SPLIT = 2
_MAX_SPLIT = 4
# two programs a multiprocessor. H200, 6 of 256 experts of [4096, 4096] beside a shared one, one
# token: 24.3 us by 256 programs, 27.8 by 512; eight tokens: 110.7 by 1600, 112.9 by 3200
_NUM_PROGRAMS = 256


@dataclass(frozen=True, slots=True)
class Fp8Experts:
    """Codes [experts, out, in] float8_e4m3fn, scales [experts, out / 128, in / 128] float32."""

    codes: Tensor
    scales: Tensor

    @property
    def num_experts(self) -> int:
        return self.codes.shape[0]

    @property
    def out_features(self) -> int:
        return self.codes.shape[1]

    @property
    def in_features(self) -> int:
        return self.codes.shape[2]


@dataclass(frozen=True, slots=True)
class Activation:
    """What stands between w1, w3 and w2, and how w2's input is quantised."""

    limit: float | None  # None: no clamp
    clamps_first: bool  # before silu (DeepSeek-V4), or after it (Step)
    scaling: Scaling  # "ue8m0" or "dynamic"


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes: block_n outputs of block_m rows of one expert."""

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int  # of FP4's loop
    num_fp8_stages: int


def tiles(target: Target) -> tuple[Tile, ...]:
    """Every tile that is launched, by rows. Of 32 rows, 128 outputs spill on gfx1201."""
    fp4, fp8 = target.num_stages(5), target.num_stages(3)
    three = target.num_stages(3)
    # four warps run out of registers on AMD's
    few = Tile(128, 16, 4 if target.has_ptx else 8, fp4, fp8)
    more = Tile(64, 32, 4, three, three)
    if target.name == "gfx1201":
        return few, more
    return few, more, Tile(64, 64, 4, three, three)


def pick_tile(num_pairs: int, num_experts: int, target: Target) -> Tile:
    """By the rows that an expert has on average."""
    wanted = num_pairs / num_experts
    return next((tile for tile in tiles(target) if wanted <= tile.block_m), tiles(target)[-1])


def pick_split(num_programs: int, num_blocks: int) -> int:
    """Over how many programs the inputs are divided."""
    split = 1
    while split < _MAX_SPLIT and num_programs * split < _NUM_PROGRAMS and num_blocks >= 8 * split:
        split *= 2
    return split


@triton.jit
def decode_fp4(codes, words, BLOCK_N: tl.constexpr, HAS_PTX: tl.constexpr):
    """A tile's codes and scale words -> e4m3 codes of the first and the second halves of its words.

    codes: [BLOCK_N, 64] bytes with HAS_PTX, else [BLOCK_N, 16] int32. Returns [BLOCK_N, 64] each,
    outputs in their own order, inputs as word, group, code.
    """
    groups = tl.arange(0, 4)
    shifts = (words[:, None] >> (8 + 4 * groups)[None, :]) & 15  # [BLOCK_N, 4]
    if HAS_PTX:
        # e4m3 codes of 0, 0.5, 1, 1.5 and of 2, 3, 4, 6, with the group's exponent
        small = 0x14100800 + shifts * 0x08080800
        large = 0x24201C18 + shifts * 0x08080808
        small = tl.reshape(tl.broadcast_to(small[:, :, None], [BLOCK_N, 4, 16]), [BLOCK_N, 64])
        large = tl.reshape(tl.broadcast_to(large[:, :, None], [BLOCK_N, 4, 16]), [BLOCK_N, 64])
        first, second = tl.inline_asm_elementwise(
            """{
            .reg .b32 picks, signs, bytes;
            and.b32 picks, $2, 0x77777777;
            and.b32 signs, $2, 0x80808080;
            prmt.b32 bytes, $3, $7, picks;
            or.b32 $0, bytes, signs;
            shr.u32 picks, picks, 16;
            shl.b32 signs, $2, 4;
            and.b32 signs, signs, 0x80808080;
            prmt.b32 bytes, $3, $7, picks;
            or.b32 $1, bytes, signs;
            }""",
            "=&r,=r,r,r,r,r,r,r,r,r,r",
            [codes, small, large],
            dtype=(tl.uint8, tl.uint8),
            is_pure=True,
            pack=4,
        )
    else:
        places = tl.arange(0, 4)
        codes = codes[:, :, None]
        magnitudes = (codes >> (4 * places)[None, None, :]) & 7
        signs = (codes >> (8 * places)[None, None, :]) & 0x80
        first = _e4m3_bits(magnitudes, signs, shifts, BLOCK_N)
        magnitudes = (codes >> (16 + 4 * places)[None, None, :]) & 7
        signs = ((codes << 4) >> (8 * places)[None, None, :]) & 0x80
        second = _e4m3_bits(magnitudes, signs, shifts, BLOCK_N)
    return _in_order(first, BLOCK_N), _in_order(second, BLOCK_N)


@triton.jit
def _e4m3_bits(magnitudes, signs, shifts, BLOCK_N: tl.constexpr):
    """[BLOCK_N, 16, 4] e2m1 magnitudes and signs -> [BLOCK_N, 64] bytes, scaled by group."""
    shifts = tl.broadcast_to(shifts[:, :, None], [BLOCK_N, 4, 4])
    shifts = tl.reshape(shifts, [BLOCK_N, 16])[:, :, None]
    # one half is 2 ** -1, the other steps are half a binade each
    bits = magnitudes * 4 + tl.where(magnitudes == 1, 4, 8) + shifts * 8
    bits = tl.where(magnitudes == 0, 0, bits) | signs
    return tl.reshape(bits.to(tl.uint8), [BLOCK_N, 64])


@triton.jit
def _in_order(codes, BLOCK_N: tl.constexpr):
    """A tile's rows, and the words of each group of inputs, as the dot takes them."""
    bits = tl.reshape(codes, [BLOCK_N // 64, 2, 4, 8, 4, 4, 4])
    bits = tl.permute(bits, (0, 2, 1, 3, 5, 4, 6))
    return tl.reshape(bits, [BLOCK_N, 64]).to(tl.float8e4nv, bitcast=True)


@triton.jit
def row_scales(words, BLOCK_N: tl.constexpr):
    """[BLOCK_N] scale words in the tile's order -> the outputs' scales, in theirs."""
    bits = tl.reshape((words & 0xFF) << 23, [BLOCK_N // 64, 2, 4, 8])
    bits = tl.reshape(tl.permute(bits, (0, 2, 1, 3)), [BLOCK_N])
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _dot_fp4(
    x_ptr, x_scales_ptr, rows_x, codes_ptr, scales_ptr, expert, pid_n, first, last, num_blocks,
    out_features, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, DOT_TYPE: tl.constexpr,
    HAS_PTX: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_M]: an expert's outputs of some rows, over the blocks [first, last)."""
    offs_n = tl.arange(0, BLOCK_N)
    # a word's first four inputs: word, group, code
    slots = tl.arange(0, 64)
    offs_k = (slots // 4 % 4) * 32 + (slots // 16) * 8 + slots % 4
    outputs = pid_n * BLOCK_N
    tile = expert * (out_features // 128) + outputs // 128
    codes_ptr += tile * num_blocks * 8192 + (outputs % 128) * 64
    # of a pointer's elements from tile to tile
    STEP: tl.constexpr = 8192 if HAS_PTX else 2048
    if HAS_PTX:
        codes_ptrs = codes_ptr + offs_n[:, None] * 64 + tl.arange(0, 64)[None, :]
    else:
        words_ptr = codes_ptr.to(tl.pointer_type(tl.int32))
        codes_ptrs = words_ptr + offs_n[:, None] * 16 + tl.arange(0, 16)[None, :]
    scales_ptrs = scales_ptr + expert * num_blocks * out_features + outputs + offs_n
    x_ptrs = x_ptr + rows_x[None, :] * (num_blocks * 128) + offs_k[:, None]
    x_scales_ptrs = x_scales_ptr + rows_x * num_blocks
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in tl.range(first, last, num_stages=NUM_STAGES):
        words = tl.load(scales_ptrs + block * out_features)
        # the tables are of values 2 ** 6 times as large
        x_scales = tl.load(x_scales_ptrs + block) * 0.015625
        codes = tl.load(codes_ptrs + block * STEP)
        x = x_ptrs + block * 128
        low, high = decode_fp4(codes, words, BLOCK_N, HAS_PTX)
        part = dot_as(low, tl.load(x), DOT_TYPE)
        part = tl.dot(high.to(DOT_TYPE), tl.load(x + 4).to(DOT_TYPE), part, input_precision="ieee")
        acc += part * row_scales(words, BLOCK_N)[:, None] * x_scales[None, :]
    return acc


@triton.jit
def _dot_fp8(
    x_ptr, x_scales_ptr, rows_x, codes_ptr, scales_ptr, expert, pid_n, first, last, num_blocks,
    out_features, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, DOT_TYPE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """As `_dot_fp4`, of FP8 codes with a scale a block of 128 x 128."""
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, 128)
    codes_ptr += expert * out_features * num_blocks * 128
    codes_ptrs = codes_ptr + offs_n[:, None].to(tl.int64) * (num_blocks * 128) + offs_k[None, :]
    scales_ptr += (expert * (out_features // 128) + pid_n * BLOCK_N // 128) * num_blocks
    x_ptrs = x_ptr + rows_x[None, :] * (num_blocks * 128) + offs_k[:, None]
    x_scales_ptrs = x_scales_ptr + rows_x * num_blocks
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in tl.range(first, last, num_stages=NUM_STAGES):
        scale = tl.load(scales_ptr + block)
        x_scales = tl.load(x_scales_ptrs + block)
        part = dot_as(tl.load(codes_ptrs + block * 128), tl.load(x_ptrs + block * 128), DOT_TYPE)
        acc += part * (x_scales * scale)[None, :]
    return acc


@triton.jit
def activate(a, b, weights, limit, CLAMPS_FIRST: tl.constexpr, SCALING: tl.constexpr):
    """[rows, 128] float32 of gate and up -> codes [rows, 128] and scales [rows] of w2's input.

    Sums and products pass through bf16, as everything does that flows between the layers. limit:
    infinite where there is no clamp.
    """
    a, b = round_to_bf16(a), round_to_bf16(b)
    b = tl.minimum(tl.maximum(b, -limit), limit)
    # the gate is clipped from above only
    if CLAMPS_FIRST:
        a = tl.minimum(a, limit)
    gate = a / (1.0 + tl.exp(-a))
    if CLAMPS_FIRST:
        product = round_to_bf16(gate * b * weights[:, None])
    else:
        product = round_to_bf16(tl.minimum(gate, limit) * b)
    if SCALING == "ue8m0":
        codes, scales = quantize_blocks(product)
    else:
        codes, scales = quantize_blocks_dynamic(product)
    if not CLAMPS_FIRST:
        # as if it multiplied w2's output: the codes are the same without it
        scales *= weights
    return codes, scales


@triton.jit
def grouped_experts_kernel(
    # tensors
    x_ptr,
    x_scales_ptr,
    codes_ptr,
    scales_ptr,
    shared_codes_ptr,
    shared_scales_ptr,
    block_experts_ptr,
    block_rows_ptr,
    row_tokens_ptr,
    row_weights_ptr,
    out_ptr,
    counters_ptr,
    inner_ptr,
    inner_scales_ptr,
    # sizes, meta-parameters
    num_tokens,
    num_rows,
    out_features,
    num_blocks,
    num_shared_slots,
    limit,
    shared_limit,
    FORMAT: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    ACTIVATES: tl.constexpr,
    CLAMPS_FIRST: tl.constexpr,
    SCALING: tl.constexpr,
    SHARED_SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    HAS_PTX: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    NUM_FP8_STAGES: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    """One program, BLOCK_N outputs of one block of rows over a share of the inputs.

    Slots: first the shared expert's blocks of tokens, SHARED_SPLIT of each, then the blocks of one
    expert's rows. out: [split, num_rows + SHARED_SPLIT * num_tokens, out_features]; the shared
    expert's rows come last. BY_TOKEN: a row's input is its token's, else its own. ACTIVATES: the
    last of the programs that share 128 channels of gate and up puts out w2's input, quantised, as
    rows [num_rows + num_tokens] of inner.
    """
    slot = tl.program_id(0)
    pid_n = tl.program_id(1)
    split = tl.program_id(2)
    total_rows = num_rows
    if HAS_SHARED:
        total_rows += SHARED_SPLIT * num_tokens
    offs_m = tl.arange(0, BLOCK_M)
    if HAS_SHARED and slot < num_shared_slots:
        half = slot % SHARED_SPLIT
        tokens = slot // SHARED_SPLIT * BLOCK_M + offs_m
        mask_m = tokens < num_tokens
        rows_x = tl.where(mask_m, tokens, 0).to(tl.int64)
        if not BY_TOKEN:
            rows_x += num_rows
        per_program = (num_blocks + NUM_SPLITS * SHARED_SPLIT - 1) // (NUM_SPLITS * SHARED_SPLIT)
        first = (split * SHARED_SPLIT + half) * per_program
        acc = _dot_fp8(
            x_ptr, x_scales_ptr, rows_x, shared_codes_ptr, shared_scales_ptr, 0, pid_n, first,
            tl.minimum(first + per_program, num_blocks), num_blocks, out_features,
            BLOCK_N, BLOCK_M, DOT_TYPE, NUM_FP8_STAGES,
        )  # fmt: skip
        rows = num_rows + half * num_tokens + tokens
        _put(acc, out_ptr, split, total_rows, rows, mask_m, pid_n, out_features, BLOCK_N)
        if ACTIVATES:
            _activate_last(
                out_ptr, counters_ptr, inner_ptr, inner_scales_ptr, slot // SHARED_SPLIT, pid_n,
                num_rows + tokens, num_tokens, total_rows, mask_m,
                tl.full([BLOCK_M], 1.0, tl.float32), shared_limit, out_features,
                CLAMPS_FIRST, SCALING, BLOCK_N, BLOCK_M, NUM_SPLITS, SHARED_SPLIT,
            )  # fmt: skip
    else:
        block = slot - num_shared_slots
        expert = tl.load(block_experts_ptr + block).to(tl.int64)
        if expert >= 0:
            rows = tl.load(block_rows_ptr + block * 2) + offs_m
            mask_m = rows < tl.load(block_rows_ptr + block * 2 + 1)
            rows_x = tl.where(mask_m, rows, 0)
            if BY_TOKEN:
                # a number that is 1 is known when this is compiled: nothing to wait for
                if num_tokens == 1:
                    rows_x = rows_x * 0
                else:
                    rows_x = tl.load(row_tokens_ptr + rows_x, mask=mask_m, other=0)
            rows_x = rows_x.to(tl.int64)
            per_program = (num_blocks + NUM_SPLITS - 1) // NUM_SPLITS
            first = split * per_program
            last = tl.minimum(first + per_program, num_blocks)
            if FORMAT == "fp4":
                acc = _dot_fp4(
                    x_ptr, x_scales_ptr, rows_x, codes_ptr, scales_ptr, expert, pid_n, first,
                    last, num_blocks, out_features, BLOCK_N, BLOCK_M, DOT_TYPE, HAS_PTX,
                    NUM_STAGES,
                )  # fmt: skip
            else:
                acc = _dot_fp8(
                    x_ptr, x_scales_ptr, rows_x, codes_ptr, scales_ptr, expert, pid_n, first,
                    last, num_blocks, out_features, BLOCK_N, BLOCK_M, DOT_TYPE, NUM_FP8_STAGES,
                )  # fmt: skip
            _put(acc, out_ptr, split, total_rows, rows, mask_m, pid_n, out_features, BLOCK_N)
            if ACTIVATES:
                _activate_last(
                    out_ptr, counters_ptr, inner_ptr, inner_scales_ptr,
                    block + num_shared_slots // SHARED_SPLIT, pid_n, rows, 0, total_rows, mask_m,
                    tl.load(row_weights_ptr + rows, mask=mask_m, other=0.0), limit, out_features,
                    CLAMPS_FIRST, SCALING, BLOCK_N, BLOCK_M, NUM_SPLITS, 1,
                )  # fmt: skip


@triton.jit
def _put(acc, out_ptr, split, total_rows, rows, mask_m, pid_n, out_features, BLOCK_N: tl.constexpr):
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    starts = (split * total_rows + rows).to(tl.int64) * out_features
    store_rounded(out_ptr + starts[None, :] + offs_n[:, None], acc, mask_m[None, :])


@triton.jit
def _activate_last(
    out_ptr, counters_ptr, inner_ptr, inner_scales_ptr, group, pid_n, rows, stride_half,
    total_rows, mask_m, weights, limit, out_features, CLAMPS_FIRST: tl.constexpr,
    SCALING: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    NUM_SPLITS: tl.constexpr, NUM_HALVES: tl.constexpr,
):  # fmt: skip
    """Count this program in; the last one of its 128 channels activates and quantises them.

    The partial sums of row r lie at rows r, r + stride_half, .. of every split.
    """
    inner = out_features // 2
    channels = pid_n * BLOCK_N % inner // 128
    counter_ptr = counters_ptr + group * (inner // 128) + channels
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    if arrived == NUM_SPLITS * NUM_HALVES * (2 * 128 // BLOCK_N) - 1:
        # ready for the next launch
        tl.store(counter_ptr, 0)
        offs = channels * 128 + tl.arange(0, 128)
        a = tl.zeros([BLOCK_M, 128], tl.float32)
        b = tl.zeros([BLOCK_M, 128], tl.float32)
        # unrolled: one load does not wait for the other
        for part in tl.static_range(NUM_SPLITS * NUM_HALVES):
            row = part // NUM_HALVES * total_rows + part % NUM_HALVES * stride_half + rows
            ptrs = out_ptr + row.to(tl.int64)[:, None] * out_features + offs[None, :]
            # others wrote them: not from this multiprocessor's own cache
            a += tl.load(ptrs, mask=mask_m[:, None], other=0.0, cache_modifier=".cg")
            b += tl.load(ptrs + inner, mask=mask_m[:, None], other=0.0, cache_modifier=".cg")
        codes, scales = activate(a, b, weights, limit, CLAMPS_FIRST, SCALING)
        starts = rows.to(tl.int64)
        tl.store(inner_ptr + starts[:, None] * inner + offs[None, :], codes, mask=mask_m[:, None])
        tl.store(inner_scales_ptr + starts * (inner // 128) + channels, scales, mask=mask_m)


@triton.jit
def activate_rows_kernel(
    # tensors
    gate_up_ptr,
    row_weights_ptr,
    inner_ptr,
    inner_scales_ptr,
    # sizes, meta-parameters
    num_blocks,
    limit,
    CLAMPS_FIRST: tl.constexpr,
    SCALING: tl.constexpr,
    IS_ORDERED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program, blocks of 128 channels of one row of [num_rows, 2 * num_blocks * 128].

    IS_ORDERED: their codes are put out as FP4's tiles order inputs (`many_fp4`).
    """
    row = tl.program_id(0).to(tl.int64)
    offs_b = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    mask_b = offs_b < num_blocks
    offs = offs_b[:, None] * 128 + tl.arange(0, 128)[None, :]
    width = num_blocks * 128
    ptrs = gate_up_ptr + row * 2 * width + offs
    a = tl.load(ptrs, mask=mask_b[:, None], other=0.0).to(tl.float32)
    b = tl.load(ptrs + width, mask=mask_b[:, None], other=0.0).to(tl.float32)
    weights = tl.full([BLOCKS], 1.0, tl.float32) * tl.load(row_weights_ptr + row)
    codes, scales = activate(a, b, weights, limit, CLAMPS_FIRST, SCALING)
    if IS_ORDERED:
        # group, word, half, code -> half, word, group, code
        codes = tl.reshape(codes.to(tl.uint8, bitcast=True), [BLOCKS, 4, 4, 2, 4])
        codes = tl.reshape(tl.permute(codes, (0, 3, 2, 1, 4)), [BLOCKS, 128])
        codes = codes.to(tl.float8e4nv, bitcast=True)
    tl.store(inner_ptr + row * width + offs, codes, mask=mask_b[:, None])
    tl.store(inner_scales_ptr + row * num_blocks + offs_b, scales, mask=mask_b)


ACTIVATE_BLOCKS = 8


def num_counters(num_experts: int, num_pairs: int, inner: int) -> int:
    """That `run_few` may need for so many pairs."""
    return (num_experts + num_pairs) * (inner // TILE)


def run_few(
    x: QuantizedRows,
    groups: RowGroups,
    w13: Fp4Experts | Fp8Experts,
    w2: Fp4Experts | Fp8Experts,
    shared: tuple[Fp8Experts, Fp8Experts] | None,
    activation: Activation,
    shared_limit: float | None,
    counters: Tensor,
    tile: Tile,
    target: Target,
) -> ExpertOutputs:
    """Two launches, for rows that are few: the last program of 128 channels activates them.

    Args:
        x: [num_tokens, dim], quantised.
        groups: with SHARED_SPLIT columns of shared rows where there is a shared expert.
        w13: outputs 2 * inner, gate then up.
        shared: w13 and w2 of an expert that every token takes, weight 1.
        counters: [`num_counters`] int32, zeros, and zeros again afterwards.
    """
    num_tokens, device = x.num_tokens, x.codes.device
    inner = w2.in_features
    rows = groups.num_pairs + num_tokens * (shared is not None)
    codes = torch.empty(rows, inner, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(rows, inner // TILE, dtype=torch.float32, device=device)
    shared13, shared2 = shared if shared is not None else (None, None)
    limits = _bound(activation.limit), _bound(shared_limit)
    _multiply(
        x.codes, x.scales, groups, w13, shared13, num_tokens, tile, target,
        activation=activation, limits=limits, counters=counters, inner=(codes, scales),
    )  # fmt: skip
    out = _multiply(codes, scales, groups, w2, shared2, num_tokens, tile, target)
    return ExpertOutputs(out, groups.row_of)


def run_many(
    x: QuantizedRows,
    groups: RowGroups,
    w13: Fp8Experts,
    w2: Fp8Experts,
    activation: Activation,
    tile: Tile,
    target: Target,
) -> ExpertOutputs:
    """Three launches, for many rows: whole sums in bfloat16, activated by a launch of their own."""
    gate_up = _multiply(
        x.codes, x.scales, groups, w13, None, x.num_tokens, tile, target, by_token=True
    )
    inner = activate_rows(gate_up, groups, activation)
    out = _multiply(inner.codes, inner.scales, groups, w2, None, x.num_tokens, tile, target)
    return ExpertOutputs(out, groups.row_of)


def activate_rows(
    gate_up: Tensor, groups: RowGroups, activation: Activation, *, is_ordered: bool = False
) -> QuantizedRows:
    """[.., num_pairs, 2 * inner] bfloat16 -> w2's input.

    Args:
        is_ordered: as FP4's tiles order inputs (`many_fp4`).
    """
    num_pairs, inner = groups.num_pairs, gate_up.shape[-1] // 2
    num_blocks, device = inner // TILE, gate_up.device
    codes = torch.empty(num_pairs, inner, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(num_pairs, num_blocks, dtype=torch.float32, device=device)
    activate_rows_kernel[(num_pairs, triton.cdiv(num_blocks, ACTIVATE_BLOCKS))](
        gate_up,
        groups.row_weights,
        codes,
        scales,
        num_blocks,
        _bound(activation.limit),
        CLAMPS_FIRST=activation.clamps_first,
        SCALING=activation.scaling,
        IS_ORDERED=is_ordered,
        BLOCKS=ACTIVATE_BLOCKS,
    )
    return QuantizedRows(None, codes, scales)


def _bound(limit: float | None) -> float:
    return float("inf") if limit is None else limit


def _multiply(
    x: Tensor,
    x_scales: Tensor,
    groups: RowGroups,
    w: Fp4Experts | Fp8Experts,
    shared: Fp8Experts | None,
    num_tokens: int,
    tile: Tile,
    target: Target,
    *,
    by_token: bool = False,
    activation: Activation | None = None,
    limits: tuple[float, float] = (0.0, 0.0),
    counters: Tensor | None = None,
    inner: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Rows [split, rows, out]: bfloat16 where they are whole, else float32.

    Args:
        by_token: x's rows are those of the tokens; with an activation they always are.
        activation, limits, counters, inner: of `run_few`'s first launch.
    """
    device, num_blocks = x.device, w.in_features // TILE
    num_shared_slots = 0
    num_rows = groups.num_pairs
    if shared is not None:
        num_shared_slots = SHARED_SPLIT * triton.cdiv(num_tokens, tile.block_m)
        num_rows += SHARED_SPLIT * num_tokens
    grid = (groups.num_blocks + num_shared_slots, w.out_features // tile.block_n)
    split = pick_split(grid[0] * grid[1], num_blocks)
    is_whole = split == 1 and shared is None and activation is None
    dtype = torch.bfloat16 if is_whole else torch.float32
    out = torch.empty(split, num_rows, w.out_features, dtype=dtype, device=device)
    inner_codes, inner_scales = inner if inner is not None else (x, x_scales)
    grouped_experts_kernel[(*grid, split)](
        x,
        x_scales,
        w.codes,
        w.scales,
        shared.codes if shared is not None else x,
        shared.scales if shared is not None else x_scales,
        groups.block_experts,
        groups.block_rows,
        groups.row_tokens,
        groups.row_weights,
        out,
        counters if counters is not None else groups.block_experts,
        inner_codes,
        inner_scales,
        num_tokens,
        groups.num_pairs,
        w.out_features,
        num_blocks,
        num_shared_slots,
        *limits,
        FORMAT="fp4" if isinstance(w, Fp4Experts) else "fp8",
        HAS_SHARED=shared is not None,
        BY_TOKEN=by_token or activation is not None,
        ACTIVATES=activation is not None,
        CLAMPS_FIRST=activation is not None and activation.clamps_first,
        SCALING=activation.scaling if activation is not None else "ue8m0",
        SHARED_SPLIT=SHARED_SPLIT,
        BLOCK_N=tile.block_n,
        BLOCK_M=tile.block_m,
        DOT_TYPE=dot_type(target, is_quantized=True),
        HAS_PTX=target.has_ptx,
        NUM_STAGES=tile.num_stages,
        NUM_FP8_STAGES=tile.num_fp8_stages,
        NUM_SPLITS=split,
        num_warps=tile.num_warps,
    )
    return out
