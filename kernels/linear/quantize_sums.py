"""Parts of split sums to e4m3 codes: added, rounded to bfloat16, quantised, in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.dependent_launch import await_prior, dependent, release_next
from scission.kernels.linear.rows import QuantizedRows, Scaling, SplitSums
from scission.kernels.linear.split_sums import MAX_SPLIT
from scission.kernels.quant import FP8_BLOCK
from scission.kernels.rounding import quantize_blocks_as, round_to_bf16
from scission.kernels.target import Target

BLOCKS = 4
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_rows", "split"])
def quantize_sums_kernel(
    # tensors
    parts_ptr,
    static_scale_ptr,
    codes_ptr,
    scales_ptr,
    # sizes, meta-parameters
    num_rows,
    num_blocks,
    split,
    MAX_SPLIT: tl.constexpr,
    BLOCKS: tl.constexpr,
    SCALING: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """One program, some blocks of 128 values of one row; parts: [split, num_rows, width]."""
    release_next(IS_DEPENDENT)
    await_prior(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    offs_b = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    offs_k = offs_b[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask_b = offs_b < num_blocks
    width = num_blocks * 128
    total = tl.zeros([BLOCKS, 128], tl.float32)
    # unrolled: all parts are on their way at once
    for part in tl.static_range(MAX_SPLIT):
        blocks_here = tl.where(part < split, num_blocks, 0)
        start = (part * num_rows.to(tl.int64) + row) * width
        mask = (offs_b < blocks_here)[:, None]
        total += tl.load(parts_ptr + start + offs_k, mask=mask, other=0.0)
    codes, scales = quantize_blocks_as(round_to_bf16(total), static_scale_ptr, SCALING)
    tl.store(codes_ptr + row * width + offs_k, codes, mask=mask_b[:, None])
    if SCALING != "static":
        tl.store(scales_ptr + row * num_blocks + offs_b, scales, mask=mask_b)


def quantize_sums(
    sums: SplitSums, scaling: Scaling, static_scale: Tensor | None, target: Target
) -> QuantizedRows:
    """Codes alone, of a width in multiples of 128; as `quantize_rows` of the whole sums."""
    num_rows, width = sums.num_tokens, sums.width
    device, num_blocks = sums.parts.device, width // FP8_BLOCK
    codes = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=device)
    if static_scale is None:
        scales = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=device)
    else:
        scales = static_scale
    quantize_sums_kernel[(num_rows, triton.cdiv(num_blocks, BLOCKS))](
        sums.parts,
        scales,
        codes,
        scales,
        num_rows,
        num_blocks,
        sums.parts.shape[0],
        MAX_SPLIT=MAX_SPLIT,
        BLOCKS=BLOCKS,
        SCALING=scaling,
        IS_DEPENDENT=target.has_ptx,
        num_warps=NUM_WARPS,
        **dependent(target),
    )
    return QuantizedRows(None, codes, scales)
