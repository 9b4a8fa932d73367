"""y = x Wᵀ over FP8 weights of 128 x 128 blocks: few rows, where the weights' bytes take the time.

Up to 32 rows the weight's tile is the left operand of the dot, so that they cost no padding to 64.
Where there are few tiles the inputs are split over programs; each writes its partial sums, and a
second kernel adds them in a fixed order (atomics would add in another order each time). More rows
than `library` begins with come here only where the library does not serve.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.dependent_launch import await_prior, dependent, release_next
from scission.kernels.linear.rows import SplitSums
from scission.kernels.linear.split_sums import add_splits, pick_split
from scission.kernels.quant import FP8_BLOCK
from scission.kernels.rounding import dot_as, store_rounded
from scission.kernels.target import Target


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes: block_n outputs of block_m rows."""

    block_n: int
    block_m: int
    num_warps: int
    is_weight_left: bool


# H200, us a call in a graph over rotating weights, against reading as many bytes in one pass:
# rows                 1     32     64    128   reading
# [6144, 4096]       9.3   10.6   11.4   14.6      7.6
# [4096, 4096]       7.1    8.2    9.1   10.9      5.6
# [24576, 4096]     25.9   27.2   28.9   33.5     25.5
# [4096, 12288]     15.4   17.5   18.7   23.3     13.7
_TILES = (
    Tile(64, 16, 4, is_weight_left=True),
    Tile(64, 32, 4, is_weight_left=True),
    Tile(64, 64, 4, is_weight_left=False),
    Tile(128, 64, 4, is_weight_left=False),
)
# of how many programs the inputs are divided over: few rows, more rows, inputs of values
_FEW_ROWS_PROGRAMS = 192
_MANY_ROWS_PROGRAMS = 128
_VALUES_PROGRAMS = 512
# of multiprocessors and shared memory, when it is decided how deep a pipeline is
_NUM_MULTIPROCESSORS = 132
_MULTIPROCESSOR_BYTES = 227 * 1024
# more rows of groups are multiplied by the library, over decoded weights
MAX_GROUPED_ROWS = 128


def tiles(target: Target) -> tuple[Tile, ...]:
    """Every tile that inputs of codes are multiplied by."""
    # two decoded multiplicands of the widest spill on gfx1201
    return _TILES[:-1] if target.name == "gfx1201" else _TILES


def values_tiles() -> tuple[Tile, ...]:
    """Every tile that inputs of values are multiplied by."""
    return _TILES[:-1]


def stages(target: Target) -> tuple[int, ...]:
    """Depths of a loop's pipeline, for inputs of codes; the deepest first."""
    return tuple(dict.fromkeys(target.num_stages(depth) for depth in (6, 4, 3)))


def values_stages(target: Target) -> int:
    return target.num_stages(3)


def pick_tile(choices: tuple[Tile, ...], num_rows: int, out_features: int, blocks: int) -> Tile:
    for tile in choices[:2]:
        if num_rows <= tile.block_m:
            return tile
    narrow, wide = choices[2], choices[-1]
    num_row_tiles = triton.cdiv(num_rows, narrow.block_m)
    num_tiles = triton.cdiv(out_features, narrow.block_n) * num_row_tiles
    # few tiles cover the chip only when they are narrow; or their long loops are divided
    return wide if num_tiles > 128 or (num_row_tiles > 1 and blocks >= 64) else narrow


def pick_stages(tile: Tile, num_programs: int, target: Target) -> int:
    """The deepest pipeline with which all programs fit on the chip at once."""
    stage_bytes = (tile.block_n + tile.block_m) * FP8_BLOCK
    for depth in stages(target):
        fitting = _MULTIPROCESSOR_BYTES // (depth * stage_bytes + 1024) * _NUM_MULTIPROCESSORS
        if num_programs <= fitting:
            return depth
    return stages(target)[-1]


def dot_type(target: Target, *, is_quantized: bool = False) -> tl.dtype:
    """In which the inputs, e4m3 codes or not, are multiplied with the weight's codes."""
    if is_quantized and target.has_fp8_dot:
        return tl.float8e4nv
    return tl.bfloat16 if target.decoded == "bfloat16" else tl.float32


def grouped_dot_type(target: Target) -> tl.dtype:
    """Of `linear_grouped`, whose inputs are outputs of attention: averages of normalised rows.

    Those lie well inside float16, which on sm_90 codes are converted to in half the time: 1 row of
    8 groups [1024, 4096] 14.5 us, as bfloat16 17.9.
    """
    return tl.float16 if target.has_ptx else dot_type(target)


@triton.jit(do_not_specialize=["num_rows", "blocks_per_split"])
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
    IS_WEIGHT_LEFT: tl.constexpr,
    INPUT: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
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
    row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_m = row.to(tl.int64)
    offs_k = tl.arange(0, 128)
    mask_n = offs_n < out_features
    mask_m = offs_m < num_rows
    # outputs past the end read the last row of weights and are never stored
    rows_n = tl.where(mask_n, offs_n, out_features - 1)
    # so do rows past the end, but spread: one row read by all would be waited for (and 64-bit
    # division would take half a microsecond)
    rows_m = (row % num_rows).to(tl.int64)
    codes_ptrs = codes_ptr + rows_n[:, None] * (num_blocks * 128) + offs_k[None, :]
    x_ptr += (pid_n * BLOCK_N // group_size).to(tl.int64) * stride_x_group
    x_ptrs = x_ptr + rows_m[:, None] * stride_x_row + offs_k[None, :]
    # a tile of at most 128 outputs lies in one row of scales
    scale_row_ptr = scales_ptr + (pid_n * BLOCK_N // 128) * num_blocks
    first = split.to(tl.int32) * blocks_per_split
    last = tl.minimum(first + blocks_per_split, num_blocks)
    await_prior(IS_DEPENDENT)
    if IS_WEIGHT_LEFT:
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in tl.range(first, last, num_stages=NUM_STAGES):
        codes = tl.load(codes_ptrs + block * 128)
        scale = tl.load(scale_row_ptr + block)
        if IS_WEIGHT_LEFT:
            # few rows: those past the end are not read at all
            x = tl.load(x_ptrs + block * 128, mask=mask_m[:, None], other=0.0)
        else:
            x = tl.load(x_ptrs + block * 128)
        if INPUT == "blocks":
            factor = tl.load(x_scales_ptr + rows_m * num_blocks + block) * scale
        else:
            factor = tl.full([BLOCK_M], 1.0, tl.float32) * scale
        if IS_WEIGHT_LEFT:
            acc += dot_as(codes, x.T, DOT_TYPE) * factor[None, :]
        else:
            acc += dot_as(x, codes.T, DOT_TYPE) * factor[:, None]
    release_next(IS_DEPENDENT)
    if INPUT == "static":
        acc *= tl.load(x_scales_ptr)
    out_ptr += split * num_rows * out_features
    if IS_WEIGHT_LEFT:
        out_ptrs = out_ptr + offs_m[None, :] * out_features + offs_n[:, None]
        store_rounded(out_ptrs, acc, mask_n[:, None] & mask_m[None, :])
    else:
        out_ptrs = out_ptr + offs_m[:, None] * out_features + offs_n[None, :]
        store_rounded(out_ptrs, acc, mask_m[:, None] & mask_n[None, :])


def linear_block_fp8(
    x: Tensor, x_scales: Tensor | None, codes: Tensor, scales: Tensor, target: Target
) -> Tensor:
    """[n, in] -> [n, out] bfloat16.

    Args:
        x: [n, in] bfloat16, or e4m3 codes with x_scales [n, in / 128] or [] float32.
        codes: [out, in] float8_e4m3fn, contiguous; in is a multiple of 128.
        scales: [ceil(out / 128), in / 128] float32.
    """
    return _whole(linear_block_fp8_parts(x, x_scales, codes, scales, target), target)


def linear_block_fp8_parts(
    x: Tensor, x_scales: Tensor | None, codes: Tensor, scales: Tensor, target: Target
) -> Tensor | SplitSums:
    """`linear_block_fp8`; where inputs are split, the parts of the sums as they are."""
    kind = dot_type(target, is_quantized=x_scales is not None)
    return _launch(x.unsqueeze(1), x_scales, codes, scales, kind, target)


def linear_grouped(x: Tensor, codes: Tensor, scales: Tensor, target: Target) -> Tensor:
    """[n, groups, in] -> [n, groups, out] bfloat16.

    Args:
        codes: [groups * out, in] float8_e4m3fn, contiguous; out and in are multiples of 128.
        scales: [groups * out / 128, in / 128] float32.
    """
    out = _whole(linear_grouped_parts(x, codes, scales, target), target)
    return out.view(*x.shape[:2], codes.shape[0] // x.shape[1])


def linear_grouped_parts(
    x: Tensor, codes: Tensor, scales: Tensor, target: Target
) -> Tensor | SplitSums:
    """`linear_grouped` as [n, groups * out]; where inputs are split, the parts of the sums."""
    return _launch(x, None, codes, scales, grouped_dot_type(target), target)


def _whole(sums: Tensor | SplitSums, target: Target) -> Tensor:
    if isinstance(sums, Tensor):
        return sums
    shape = (sums.num_tokens, sums.width)
    out = torch.empty(shape, dtype=torch.bfloat16, device=sums.parts.device)
    return add_splits(sums.parts, out, target)


def _launch(
    x: Tensor,
    x_scales: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    dot_type: tl.dtype,
    target: Target,
) -> Tensor | SplitSums:
    num_rows, num_groups, in_features = x.shape
    out_features = codes.shape[0]
    out = torch.empty(num_rows, out_features, dtype=torch.bfloat16, device=x.device)
    if not out.numel():
        return out
    num_blocks = in_features // FP8_BLOCK
    choices = tiles(target) if x_scales is not None else values_tiles()
    tile = pick_tile(choices, num_rows, out_features, num_blocks)
    grid = (triton.cdiv(num_rows, tile.block_m), triton.cdiv(out_features, tile.block_n))
    num_tiles = grid[0] * grid[1]
    wanted = _FEW_ROWS_PROGRAMS if tile.is_weight_left else _MANY_ROWS_PROGRAMS
    if x_scales is None:
        wanted = _VALUES_PROGRAMS
    split = pick_split(num_tiles, num_blocks, wanted)
    num_stages = pick_stages(tile, num_tiles * split, target)
    if x_scales is None:
        num_stages = values_stages(target)
    # float32
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
        IS_WEIGHT_LEFT=tile.is_weight_left,
        INPUT=input_kind(x_scales),
        DOT_TYPE=dot_type,
        NUM_STAGES=num_stages,
        IS_DEPENDENT=target.has_ptx,
        num_warps=tile.num_warps,
        **dependent(target),
    )
    return out if split == 1 else SplitSums(partials)


def input_kind(x_scales: Tensor | None) -> str:
    if x_scales is None:
        return "values"
    return "blocks" if x_scales.dim() else "static"
