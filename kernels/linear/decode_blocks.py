"""FP8 weights of 128 x 128 blocks to bfloat16, for products that take no codes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.quant import FP8_BLOCK
from scission.kernels.rounding import store_rounded

NUM_WARPS = 8


@triton.jit
def decode_blocks_kernel(
    # tensors
    codes_ptr,
    scales_ptr,
    out_ptr,
    # sizes
    out_features,
    num_blocks,
):
    """One program, one block."""
    block = tl.program_id(0)
    offs_n = tl.program_id(1).to(tl.int64) * 128 + tl.arange(0, 128)
    offs = offs_n[:, None] * (num_blocks * 128) + block * 128 + tl.arange(0, 128)[None, :]
    mask = (offs_n < out_features)[:, None]
    scale = tl.load(scales_ptr + tl.program_id(1) * num_blocks + block)
    codes = tl.load(codes_ptr + offs, mask=mask, other=0.0)
    store_rounded(out_ptr + offs, codes.to(tl.float32) * scale, mask)


def decode_blocks(codes: Tensor, scales: Tensor) -> Tensor:
    """[out, in] -> [out, in] bfloat16, exact where scales are powers of two.

    Args:
        codes: [out, in] float8_e4m3fn, contiguous; in is a multiple of 128.
        scales: [ceil(out / 128), in / 128] float32, contiguous.
    """
    out = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
    if out.numel():
        num_blocks = codes.shape[1] // FP8_BLOCK
        decode_blocks_kernel[(num_blocks, triton.cdiv(codes.shape[0], FP8_BLOCK))](
            codes, scales, out, codes.shape[0], num_blocks, num_warps=NUM_WARPS
        )
    return out
