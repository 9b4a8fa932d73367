"""FP4 experts over many rows: a weight's codes are decoded once for as many rows as a tile has."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.linear.block_fp8 import dot_type
from scission.kernels.linear.rows import QuantizedRows
from scission.kernels.moe.fp4_layout import TILE, Fp4Experts
from scission.kernels.moe.grouped_experts import (
    Activation,
    activate_rows,
    decode_fp4,
    row_scales,
)
from scission.kernels.moe.outputs import ExpertOutputs
from scission.kernels.moe.row_groups import RowGroups
from scission.kernels.rounding import dot_as, store_rounded
from scission.kernels.target import Target


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes: block_n outputs of block_m rows of one expert."""

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int


def tile_of(target: Target) -> Tile:
    """The tile that is launched."""
    if target.name != "sm_90":
        # on gfx1201, whose warps have 32 lanes, four of them spill
        return Tile(64, 64, 8 if target.warp_size == 32 else 4, target.num_stages(3))
    # H200, 6 of 256 experts of 2048 tokens, us of w1 and w3 (4096 x 4096): 1220, with 8 warps 2459,
    # 256 x 64 1605, 64 x 64 1625, 128 x 128 3855. Two programs share a multiprocessor: one decodes
    # while the other one multiplies
    return Tile(128, 64, 4, 3)


def order_inputs(codes: Tensor) -> Tensor:
    """[n, in] e4m3 codes, each 128 in the order in which a tile's decoded codes meet them.

    A word's first four inputs by word and group, then its last four.
    """
    words = codes.view(torch.int32).view(codes.shape[0], -1, 4, 4, 2)
    return words.permute(0, 1, 4, 3, 2).reshape(codes.shape[0], -1).view(codes.dtype)


@triton.jit
def many_fp4_kernel(
    # tensors
    x_ptr,
    x_scales_ptr,
    codes_ptr,
    scales_ptr,
    block_experts_ptr,
    block_rows_ptr,
    row_tokens_ptr,
    out_ptr,
    # sizes, meta-parameters
    out_features,
    num_blocks,
    BY_TOKEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    HAS_PTX: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program, BLOCK_N outputs of one block of one expert's rows, over all inputs.

    x: [tokens or rows, num_blocks * 128], in the tiles' order; BY_TOKEN: a row's input is its
    token's, else its own. out: [num_rows, out_features].
    """
    block_of_rows = tl.program_id(0)
    pid_n = tl.program_id(1)
    expert = tl.load(block_experts_ptr + block_of_rows).to(tl.int64)
    if expert >= 0:
        offs_n = tl.arange(0, BLOCK_N)
        slots = tl.arange(0, 64)
        rows = tl.load(block_rows_ptr + block_of_rows * 2) + tl.arange(0, BLOCK_M)
        mask_m = rows < tl.load(block_rows_ptr + block_of_rows * 2 + 1)
        rows_x = tl.where(mask_m, rows, 0)
        if BY_TOKEN:
            rows_x = tl.load(row_tokens_ptr + rows_x, mask=mask_m, other=0)
        rows_x = rows_x.to(tl.int64)
        outputs = pid_n * BLOCK_N
        tile = expert * (out_features // 128) + outputs // 128
        codes_ptr += tile * num_blocks * 8192 + (outputs % 128) * 64
        # of a pointer's elements from tile to tile, and between the tiles of 128 outputs
        STEP: tl.constexpr = 8192 if HAS_PTX else 2048
        row_in_tile = offs_n % 128
        next_tile = (offs_n // 128) * num_blocks
        if HAS_PTX:
            rows_ptrs = codes_ptr + next_tile * 8192 + row_in_tile * 64
            codes_ptrs = rows_ptrs[:, None] + tl.arange(0, 64)[None, :]
        else:
            words_ptr = codes_ptr.to(tl.pointer_type(tl.int32))
            rows_ptrs = words_ptr + next_tile * 2048 + row_in_tile * 16
            codes_ptrs = rows_ptrs[:, None] + tl.arange(0, 16)[None, :]
        scales_ptrs = scales_ptr + expert * num_blocks * out_features + outputs + offs_n
        x_ptrs = x_ptr + rows_x[None, :] * (num_blocks * 128) + slots[:, None]
        x_scales_ptrs = x_scales_ptr + rows_x * num_blocks
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for block in tl.range(0, num_blocks, num_stages=NUM_STAGES):
            words = tl.load(scales_ptrs + block * out_features)
            # decoded codes are of values 2 ** 6 times as large
            x_scales = tl.load(x_scales_ptrs + block) * 0.015625
            codes = tl.load(codes_ptrs + block * STEP)
            low_x = tl.load(x_ptrs + block * 128)
            high_x = tl.load(x_ptrs + block * 128 + 64)
            low, high = decode_fp4(codes, words, BLOCK_N, HAS_PTX)
            part = dot_as(low, low_x, DOT_TYPE)
            part = tl.dot(high.to(DOT_TYPE), high_x.to(DOT_TYPE), part, input_precision="ieee")
            acc += part * row_scales(words, BLOCK_N)[:, None] * x_scales[None, :]
        out_ptrs = out_ptr + rows.to(tl.int64)[None, :] * out_features + (outputs + offs_n)[:, None]
        store_rounded(out_ptrs, acc, mask_m[None, :])


def run_many(
    x: QuantizedRows,
    groups: RowGroups,
    w13: Fp4Experts,
    w2: Fp4Experts,
    activation: Activation,
    target: Target,
) -> ExpertOutputs:
    """Four launches, of any number of rows: whole sums in bfloat16.

    Args:
        x: [num_tokens, dim], quantised.
        groups: in blocks of `tile_of(target).block_m` rows.
        w13: outputs 2 * inner, gate then up.
    """
    gate_up = _multiply(order_inputs(x.codes), x.scales, groups, w13, target, by_token=True)
    inner = activate_rows(gate_up, groups, activation, is_ordered=True)
    out = _multiply(inner.codes, inner.scales, groups, w2, target, by_token=False)
    return ExpertOutputs(out.unsqueeze(0), groups.row_of)


def _multiply(
    x: Tensor,
    x_scales: Tensor,
    groups: RowGroups,
    w: Fp4Experts,
    target: Target,
    *,
    by_token: bool,
) -> Tensor:
    """[num_pairs, out] bfloat16."""
    tile = tile_of(target)
    out = torch.empty(groups.num_pairs, w.out_features, dtype=torch.bfloat16, device=x.device)
    many_fp4_kernel[(groups.num_blocks, w.out_features // tile.block_n)](
        x,
        x_scales,
        w.codes,
        w.scales,
        groups.block_experts,
        groups.block_rows,
        groups.row_tokens,
        out,
        w.out_features,
        w.in_features // TILE,
        BY_TOKEN=by_token,
        BLOCK_N=tile.block_n,
        BLOCK_M=tile.block_m,
        DOT_TYPE=dot_type(target, is_quantized=True),
        HAS_PTX=target.has_ptx,
        NUM_STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )
    return out
