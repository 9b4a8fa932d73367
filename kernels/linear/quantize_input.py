"""Activations to e4m3 codes with a power-of-two scale per 128 values: the round trip's halves."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.quant import FP8_BLOCK
from scission.kernels.rounding import quantize_blocks
from scission.kernels.target import Target

# 8 blocks a program: 16 bytes a thread of one warp-quad for 1024 bf16 values
BLOCKS = 8
NUM_WARPS = 4


@triton.jit
def quantize_input_kernel(
    # tensors
    x_ptr,
    codes_ptr,
    scales_ptr,
    # sizes, strides in elements, meta-parameters
    num_blocks,
    stride_x_row,
    BLOCKS: tl.constexpr,
):
    """One program, some blocks of 128 values of one row."""
    row = tl.program_id(0).to(tl.int64)
    offs_b = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    offs_k = offs_b[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask_b = offs_b < num_blocks
    x = tl.load(x_ptr + row * stride_x_row + offs_k, mask=mask_b[:, None], other=0.0)
    codes, scales = quantize_blocks(x.to(tl.float32))
    tl.store(codes_ptr + row * num_blocks * 128 + offs_k, codes, mask=mask_b[:, None])
    tl.store(scales_ptr + row * num_blocks + offs_b, scales, mask=mask_b)


def quantize_input(x: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """[n, in] -> codes [n, in] float8_e4m3fn and scales [n, in / 128] float32."""
    num_rows, width = x.shape
    num_blocks = width // FP8_BLOCK
    codes = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=x.device)
    if num_rows:
        grid = (num_rows, triton.cdiv(num_blocks, BLOCKS))
        quantize_input_kernel[grid](
            x, codes, scales, num_blocks, x.stride(0), BLOCKS=BLOCKS, num_warps=NUM_WARPS
        )
    return codes, scales
