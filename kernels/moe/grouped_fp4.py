"""Experts in FP4, each over its own rows: w1 and w3, the activation, w2, and the sum by token.

Codes are decoded in the kernel: an e2m1 nibble, shifted, is an e4m3 code of 2 ** -6 times its
value, so that FP8 inputs multiply it as it is (bf16 where there is no FP8 dot); the scales of the
32 inputs of a dot are applied as it is added up. As in the linear layers, few rows split their
inputs over several programs, whose partial sums are added in a fixed order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.linear.block_fp8 import dot_type
from scission.kernels.linear.quantize_input import quantize_input
from scission.kernels.moe.fp4_layout import SCALE_BLOCK, Fp4Experts
from scission.kernels.moe.group_rows import RowGroups, group_rows
from scission.kernels.rounding import dot_as, quantize_blocks, round_to_bf16, store_rounded
from scission.kernels.target import Target

ACTIVATE_BLOCKS = 8
COMBINE_BLOCK = 512
_MAX_SPLIT = 4


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes: block_n outputs of block_m rows of one expert."""

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int


def tiles(target: Target) -> tuple[Tile, ...]:
    """Every tile that `run_fp4_experts` launches, by rows.

    H200, 256 experts of [4096, 4096], us a call of 1, 8 and 64 tokens that choose 6, against the
    time of reading the distinct experts' codes (4.5 TB/s): 19.4 / 11.9, 107 / 88, 454 / 396.
    Tiles of 64 outputs take 20 to 30 % more, 5 stages 1 to 5 %. Of 32 rows, 128 spill on gfx1201.
    """
    stages = target.num_stages(3)
    return Tile(128, 16, 4, stages), Tile(64, 32, 4, stages), Tile(64, 64, 4, stages)


def pick_tile(num_pairs: int, num_experts: int, target: Target) -> Tile:
    """By the rows that an expert has on average."""
    wanted = num_pairs / num_experts
    return next((tile for tile in tiles(target) if wanted <= tile.block_m), tiles(target)[-1])


def pick_split(num_programs: int, num_blocks: int) -> int:
    """Over how many programs the inputs are divided; H200: 192 programs want 2, 1536 want none."""
    split = 1
    while split < _MAX_SPLIT and num_programs * split < 256 and num_blocks >= 4 * split:
        split *= 2
    return split


@triton.jit
def _decode_e2m1(codes, HAS_PTX: tl.constexpr):
    """[..] bytes -> e4m3 codes of 2 ** -6 times the values of the low and the high nibbles."""
    if HAS_PTX:
        # four bytes an instruction
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 magnitude, sign;
            and.b32 magnitude, $2, 0x07070707;
            shl.b32 magnitude, magnitude, 2;
            and.b32 sign, $2, 0x08080808;
            shl.b32 sign, sign, 4;
            or.b32 $0, magnitude, sign;
            shr.u32 magnitude, $2, 2;
            and.b32 magnitude, magnitude, 0x1c1c1c1c;
            and.b32 sign, $2, 0x80808080;
            or.b32 $1, magnitude, sign;
            }""",
            "=&r,=r,r",
            [codes],
            dtype=(tl.uint8, tl.uint8),
            is_pure=True,
            pack=4,
        )
    else:
        low = ((codes & 0x07) << 2) | ((codes & 0x08) << 4)
        high = ((codes >> 2) & 0x1C) | (codes & 0x80)
    return low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)


@triton.jit
def _group_scale(words, GROUP: tl.constexpr):
    """[..] int32 of four ue8m0 codes -> the GROUP-th one's value; code 0 counts as zero."""
    return (((words >> (8 * GROUP)) & 0xFF) << 23).to(tl.float32, bitcast=True)


@triton.jit
def grouped_fp4_kernel(
    # tensors
    x_ptr,
    x_scales_ptr,
    codes_ptr,
    scales_ptr,
    block_experts_ptr,
    block_rows_ptr,
    pairs_ptr,
    out_ptr,
    # sizes, meta-parameters
    num_rows,
    out_features,
    num_blocks,
    blocks_per_split,
    rows_per_x,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    HAS_PTX: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program, BLOCK_N outputs of one expert's block of rows over some blocks of 128 inputs.

    out: [split, num_rows, out_features]. With HAS_PAIRS row r takes the input pairs[r] //
    rows_per_x, else its own.
    """
    block_row = tl.program_id(0)
    pid_n = tl.program_id(1)
    split = tl.program_id(2)
    expert = tl.load(block_experts_ptr + block_row).to(tl.int64)
    row = tl.load(block_rows_ptr + block_row * 2)
    end = tl.load(block_rows_ptr + block_row * 2 + 1)
    first = split * blocks_per_split
    # a block of no expert has no work
    last = tl.where(expert >= 0, tl.minimum(first + blocks_per_split, num_blocks), first)
    expert = tl.maximum(expert, 0)
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < end
    if HAS_PAIRS:
        rows_x = tl.load(pairs_ptr + offs_m, mask=mask_m, other=0) // rows_per_x
    else:
        rows_x = tl.where(mask_m, offs_m, 0).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_b = tl.arange(0, 32)
    # tiles of 64 x 64 inputs lie 2048 bytes apart along the inputs
    codes_ptrs = (
        codes_ptr
        + expert * out_features * num_blocks * 64
        + (offs_n // 64)[:, None] * (num_blocks * 4096)
        + (offs_n % 64)[:, None] * 32
        + offs_b[None, :]
    )
    scales_ptrs = scales_ptr + expert * num_blocks * out_features + offs_n
    x_ptrs = x_ptr + rows_x[None, :] * (num_blocks * 128) + offs_b[:, None]
    x_scales_ptrs = x_scales_ptr + rows_x * num_blocks
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in tl.range(first, last, num_stages=NUM_STAGES):
        words = tl.load(scales_ptrs + block * out_features)
        # 64: what the shifted nibbles lack
        x_scales = tl.load(x_scales_ptrs + block) * 64.0
        low, high = _decode_e2m1(tl.load(codes_ptrs + block * 4096), HAS_PTX)
        x = x_ptrs + block * 128
        part = dot_as(low, tl.load(x), DOT_TYPE) * _group_scale(words, 0)[:, None]
        part += dot_as(high, tl.load(x + 32), DOT_TYPE) * _group_scale(words, 1)[:, None]
        low, high = _decode_e2m1(tl.load(codes_ptrs + block * 4096 + 2048), HAS_PTX)
        part += dot_as(low, tl.load(x + 64), DOT_TYPE) * _group_scale(words, 2)[:, None]
        part += dot_as(high, tl.load(x + 96), DOT_TYPE) * _group_scale(words, 3)[:, None]
        acc += part * x_scales[None, :]
    rows_out = split.to(tl.int64) * num_rows + offs_m
    out_ptrs = out_ptr + rows_out[None, :] * out_features + offs_n[:, None]
    store_rounded(out_ptrs, acc, mask_m[None, :])


@triton.jit
def activate_kernel(
    # tensors
    partials_ptr,
    pairs_ptr,
    weights_ptr,
    codes_ptr,
    scales_ptr,
    # sizes, meta-parameters
    num_rows,
    num_blocks,
    split,
    limit,
    BLOCKS: tl.constexpr,
):
    """One program, blocks of 128 of one row: weight * silu(min(a, limit)) * clip(b), quantised.

    partials: [split, num_rows, 2 * num_blocks * 128], a then b. Their sums and the product pass
    through bf16, as everything does that flows between the layers.
    """
    row = tl.program_id(0).to(tl.int64)
    offs_b = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    offs = offs_b[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask_b = offs_b < num_blocks
    width = num_blocks * 128
    a = tl.zeros([BLOCKS, 128], tl.float32)
    b = tl.zeros([BLOCKS, 128], tl.float32)
    for part in range(split):
        start = partials_ptr + (part * num_rows + row) * 2 * width
        a += tl.load(start + offs, mask=mask_b[:, None], other=0.0).to(tl.float32)
        b += tl.load(start + width + offs, mask=mask_b[:, None], other=0.0).to(tl.float32)
    # the gate is clipped from above only
    a = tl.minimum(round_to_bf16(a), limit)
    b = tl.minimum(tl.maximum(round_to_bf16(b), -limit), limit)
    weight = tl.load(weights_ptr + tl.load(pairs_ptr + row))
    product = a / (1.0 + tl.exp(-a)) * b * weight
    codes, scales = quantize_blocks(round_to_bf16(product))
    tl.store(codes_ptr + row * width + offs, codes, mask=mask_b[:, None])
    tl.store(scales_ptr + row * num_blocks + offs_b, scales, mask=mask_b)


@triton.jit
def combine_kernel(
    # tensors
    partials_ptr,
    rows_ptr,
    out_ptr,
    # sizes, meta-parameters
    num_rows,
    width,
    top_k,
    split,
    BLOCK: tl.constexpr,
):
    """One program, part of one token: the sum of its top_k rows, in the order of its choices."""
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < width
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(top_k):
        row = tl.load(rows_ptr + token * top_k + choice).to(tl.int64)
        for part in range(split):
            start = partials_ptr + (part * num_rows + row) * width
            total += tl.load(start + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + offs, total, mask=mask)


def run_fp4_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w13: Fp4Experts,
    w2: Fp4Experts,
    limit: float,
    target: Target,
) -> Tensor:
    """[num_tokens, dim] -> [num_tokens, dim] float32.

    Args:
        x: [num_tokens, dim] bfloat16.
        experts: [num_tokens, k] int64, in [0, experts); `weights`: float32.
        w13: outputs 2 * inner, gate then up.
    """
    num_tokens, top_k = experts.shape
    out = torch.empty(num_tokens, w2.out_features, dtype=torch.float32, device=x.device)
    if not num_tokens:
        return out
    num_pairs = num_tokens * top_k
    tile = pick_tile(num_pairs, w13.num_experts, target)
    groups = group_rows(experts, w13.num_experts, tile.block_m)
    x_codes, x_scales = quantize_input(x, target)
    inner = _multiply(x_codes, x_scales, w13, groups, tile, target, top_k)
    num_blocks = w2.in_features // SCALE_BLOCK
    codes = torch.empty(num_pairs, w2.in_features, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_pairs, num_blocks, dtype=torch.float32, device=x.device)
    activate_kernel[(num_pairs, triton.cdiv(num_blocks, ACTIVATE_BLOCKS))](
        inner,
        groups.pairs,
        weights.contiguous(),
        codes,
        scales,
        num_pairs,
        num_blocks,
        inner.shape[0],
        limit,
        BLOCKS=ACTIVATE_BLOCKS,
    )
    outputs = _multiply(codes, scales, w2, groups, tile, target, None)
    combine_kernel[(num_tokens, triton.cdiv(w2.out_features, COMBINE_BLOCK))](
        outputs,
        groups.rows,
        out,
        num_pairs,
        w2.out_features,
        top_k,
        outputs.shape[0],
        BLOCK=COMBINE_BLOCK,
    )
    return out


def _multiply(
    x: Tensor,
    x_scales: Tensor,
    w: Fp4Experts,
    groups: RowGroups,
    tile: Tile,
    target: Target,
    rows_per_x: int | None,
) -> Tensor:
    """Partial sums [split, rows, out]: bfloat16 where they are whole, else float32.

    Args:
        rows_per_x: pairs that share a row of x; None: row r of x belongs to row r.
    """
    num_rows = groups.pairs.shape[0]
    num_blocks = w.in_features // SCALE_BLOCK
    grid = (groups.num_blocks, w.out_features // tile.block_n)
    split = pick_split(grid[0] * grid[1], num_blocks)
    dtype = torch.bfloat16 if split == 1 else torch.float32
    out = torch.empty(split, num_rows, w.out_features, dtype=dtype, device=x.device)
    grouped_fp4_kernel[(*grid, split)](
        x,
        x_scales,
        w.codes,
        w.scales,
        groups.block_experts,
        groups.block_rows,
        groups.pairs,
        out,
        num_rows,
        w.out_features,
        num_blocks,
        triton.cdiv(num_blocks, split),
        rows_per_x or 1,
        BLOCK_N=tile.block_n,
        BLOCK_M=tile.block_m,
        HAS_PAIRS=rows_per_x is not None,
        DOT_TYPE=dot_type(target, is_quantized=True),
        HAS_PTX=target.has_ptx,
        NUM_STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )
    return out
