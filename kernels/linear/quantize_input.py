"""Activations to e4m3 codes with their scales: the first half of the round trip."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.dependent_launch import await_prior, dependent, release_next
from scission.kernels.linear.rows import Scaling
from scission.kernels.quant import FP8_BLOCK
from scission.kernels.rounding import quantize_blocks_as
from scission.kernels.target import Target

# 8 blocks a program: 16 bytes a thread of one warp-quad for 1024 bf16 values
BLOCKS = 8
NUM_WARPS = 4


@triton.jit
def quantize_input_kernel(
    # tensors
    x_ptr,
    static_scale_ptr,
    codes_ptr,
    scales_ptr,
    # sizes, strides in elements, meta-parameters
    num_blocks,
    stride_x_row,
    BLOCKS: tl.constexpr,
    SCALING: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """One program, some blocks of 128 values of one row."""
    release_next(IS_DEPENDENT)
    await_prior(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    offs_b = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    offs_k = offs_b[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask_b = offs_b < num_blocks
    x = tl.load(x_ptr + row * stride_x_row + offs_k, mask=mask_b[:, None], other=0.0)
    codes, scales = quantize_blocks_as(x.to(tl.float32), static_scale_ptr, SCALING)
    tl.store(codes_ptr + row * num_blocks * 128 + offs_k, codes, mask=mask_b[:, None])
    if SCALING != "static":
        tl.store(scales_ptr + row * num_blocks + offs_b, scales, mask=mask_b)


def quantize_input(
    x: Tensor,
    target: Target,
    scaling: Scaling = "ue8m0",
    static_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """[n, in] -> codes [n, in] float8_e4m3fn and scales [n, in / 128] float32.

    Args:
        static_scale: [] float32, with "static"; it is returned as the scales.
    """
    num_rows, width = x.shape
    num_blocks = width // FP8_BLOCK
    codes = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    if static_scale is None:
        scales = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=x.device)
    else:
        scales = static_scale
    if num_rows:
        grid = (num_rows, triton.cdiv(num_blocks, BLOCKS))
        quantize_input_kernel[grid](
            x,
            scales,
            codes,
            scales,
            num_blocks,
            x.stride(0),
            BLOCKS=BLOCKS,
            SCALING=scaling,
            IS_DEPENDENT=target.has_ptx,
            num_warps=NUM_WARPS,
            **dependent(target),
        )
    return codes, scales
