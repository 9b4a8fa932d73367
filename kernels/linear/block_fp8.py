"""y = x Wᵀ over FP8 weights of 128 x 128 blocks, from one row to thousands.

The weight's tile is the left operand of the dot, so that few rows cost no padding to 64. Few rows
are a matter of streaming the weights: the inputs are split over programs until the chip is busy,
each writes its partial sums, and a second kernel adds them in a fixed order (atomics would add in
another order each time).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.quant import FP8_BLOCK
from scission.kernels.rounding import dot_as, store_rounded
from scission.kernels.target import Target

REDUCE_BLOCK = 1024
_MAX_SPLIT = 8


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes: block_n outputs of block_m rows."""

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int


# Up to 64 rows; H200, FP8 x FP8, us a call against the time of reading the weights (4.5 TB/s):
# [6144, 4096] 1 row 8.1 / 5.6, 32 rows 8.7 / 5.6; [24576, 4096] 1 row 25.7 / 22.4; [4096, 4096]
# 1 row 5.9 / 3.7. Tiles of 128 outputs are within 5 % of these.
_STREAM_BLOCK_N = 64
_STREAM_ROWS = (16, 32, 64)
# of two multiplicands in registers, 128 x 128 spill on gfx1201
_TILE_ROWS = {"gfx1201": 64}


def tiles(target: Target) -> tuple[Tile, ...]:
    """Every tile that `linear_block_fp8` launches, by rows."""
    few = [Tile(_STREAM_BLOCK_N, rows, 4, target.num_stages(4)) for rows in _STREAM_ROWS]
    return (*few, Tile(128, _TILE_ROWS.get(target.name, 128), 8, target.num_stages(3)))


def pick_tile(num_rows: int, target: Target) -> Tile:
    choices = tiles(target)
    return next((tile for tile in choices[:-1] if num_rows <= tile.block_m), choices[-1])


def pick_split(num_programs: int, num_blocks: int) -> int:
    """Over how many programs the inputs are divided: 256 programs keep 132 multiprocessors busy."""
    split = 1
    while split < _MAX_SPLIT and num_programs * split < 256 and num_blocks >= 4 * split:
        split *= 2
    return split


def dot_type(target: Target, *, is_quantized: bool) -> tl.dtype:
    """In which the inputs, e4m3 codes or not, are multiplied with the weight's codes."""
    if is_quantized and target.has_fp8_dot:
        return tl.float8e4nv
    return tl.bfloat16 if target.decoded == "bfloat16" else tl.float32


@triton.jit
def block_fp8_kernel(
    # tensors
    x_ptr,
    x_scales_ptr,
    codes_ptr,
    scales_ptr,
    out_ptr,
    # sizes, strides in elements, meta-parameters
    num_rows,
    out_features,
    num_blocks,
    blocks_per_split,
    group_size,
    stride_x_row,
    stride_x_group,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    INPUT: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program, BLOCK_N outputs of BLOCK_M rows over blocks_per_split blocks of 128 inputs.

    out: [split, num_rows, out_features]. Each block's dot is scaled as it is added up. Every
    group_size outputs, a multiple of BLOCK_N, have inputs of their own, stride_x_group apart.
    INPUT: "values", or codes with a scale per "blocks" of 128, or with one "static" scale.
    """
    # rows first: neighbours in time share the weight's tile in the cache
    pid_m = tl.program_id(0)
    pid_n = tl.program_id(1)
    split = tl.program_id(2).to(tl.int64)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, 128)
    mask_n = offs_n < out_features
    mask_m = offs_m < num_rows
    # what lies past the end is read as the last row and never stored
    rows_n = tl.where(mask_n, offs_n, out_features - 1)
    rows_m = tl.where(mask_m, offs_m, num_rows - 1)
    codes_ptrs = codes_ptr + rows_n[:, None] * (num_blocks * 128) + offs_k[None, :]
    x_ptr += (pid_n * BLOCK_N // group_size).to(tl.int64) * stride_x_group
    x_ptrs = x_ptr + rows_m[None, :] * stride_x_row + offs_k[:, None]
    # a tile of at most 128 outputs lies in one row of scales
    scale_row_ptr = scales_ptr + (pid_n * BLOCK_N // 128) * num_blocks
    first = split.to(tl.int32) * blocks_per_split
    last = tl.minimum(first + blocks_per_split, num_blocks)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in tl.range(first, last, num_stages=NUM_STAGES):
        codes = tl.load(codes_ptrs + block * 128)
        x = tl.load(x_ptrs + block * 128)
        scale = tl.load(scale_row_ptr + block)
        if INPUT == "blocks":
            x_scales = tl.load(x_scales_ptr + rows_m * num_blocks + block)
            acc += dot_as(codes, x, DOT_TYPE) * (x_scales * scale)[None, :]
        else:
            acc += dot_as(codes, x, DOT_TYPE) * scale
    if INPUT == "static":
        acc *= tl.load(x_scales_ptr)
    out_ptrs = out_ptr + (split * num_rows + offs_m[None, :]) * out_features + offs_n[:, None]
    mask = mask_n[:, None] & mask_m[None, :]
    store_rounded(out_ptrs, acc, mask)


@triton.jit
def reduce_splits_kernel(
    # tensors
    partials_ptr,
    out_ptr,
    # sizes, meta-parameters
    num_values,
    split,
    BLOCK: tl.constexpr,
):
    """out[i] = sum of partials[:, i], always in the same order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_values
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(split):
        total += tl.load(partials_ptr + part * num_values.to(tl.int64) + offs, mask=mask, other=0.0)
    store_rounded(out_ptr + offs, total, mask)


def linear_block_fp8(
    x: Tensor, x_scales: Tensor | None, codes: Tensor, scales: Tensor, target: Target
) -> Tensor:
    """[n, in] -> [n, out] bfloat16.

    Args:
        x: [n, in] bfloat16, or e4m3 codes with x_scales [n, in / 128] or [] float32.
        codes: [out, in] float8_e4m3fn, contiguous; in is a multiple of 128.
        scales: [ceil(out / 128), in / 128] float32.
    """
    return _launch(x.unsqueeze(1), x_scales, codes, scales, target)


def linear_grouped(x: Tensor, codes: Tensor, scales: Tensor, target: Target) -> Tensor:
    """[n, groups, in] -> [n, groups, out] bfloat16.

    Args:
        codes: [groups * out, in] float8_e4m3fn, contiguous; out and in are multiples of 128.
        scales: [groups * out / 128, in / 128] float32.
    """
    return _launch(x, None, codes, scales, target).view(*x.shape[:2], -1)


def _launch(
    x: Tensor, x_scales: Tensor | None, codes: Tensor, scales: Tensor, target: Target
) -> Tensor:
    num_rows, num_groups, in_features = x.shape
    out_features = codes.shape[0]
    out = torch.empty(num_rows, out_features, dtype=torch.bfloat16, device=x.device)
    if not out.numel():
        return out
    num_blocks = in_features // FP8_BLOCK
    tile = pick_tile(num_rows, target)
    grid = (triton.cdiv(num_rows, tile.block_m), triton.cdiv(out_features, tile.block_n))
    split = pick_split(grid[0] * grid[1], num_blocks)
    partials = out if split == 1 else torch.empty(split, *out.shape, device=x.device)
    block_fp8_kernel[(*grid, split)](
        x,
        x_scales if x_scales is not None else scales,
        codes,
        scales,
        partials,
        num_rows,
        out_features,
        num_blocks,
        triton.cdiv(num_blocks, split),
        out_features // num_groups,
        x.stride(0),
        x.stride(1),
        BLOCK_N=tile.block_n,
        BLOCK_M=tile.block_m,
        INPUT=input_kind(x_scales),
        DOT_TYPE=dot_type(target, is_quantized=x_scales is not None),
        NUM_STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )
    if split > 1:
        reduce_splits_kernel[(triton.cdiv(out.numel(), REDUCE_BLOCK),)](
            partials, out, out.numel(), split, BLOCK=REDUCE_BLOCK
        )
    return out


def input_kind(x_scales: Tensor | None) -> str:
    if x_scales is None:
        return "values"
    return "blocks" if x_scales.dim() else "static"
