"""Linear layers over FP8 weights that stay codes in memory."""

import torch
from torch import Tensor

from scission.kernels.linear import reference
from scission.kernels.quant import FP8_BLOCK
from scission.kernels.target import target_of

__all__ = ["can_run", "linear_block_fp8"]


def can_run(device: torch.device, dtype: torch.dtype, in_features: int) -> bool:
    """Whether there is a kernel; elsewhere a decoded matrix multiplies as well."""
    return target_of(device) is not None and dtype == torch.bfloat16 and not in_features % FP8_BLOCK


def linear_block_fp8(
    x: Tensor, codes: Tensor, scales: Tensor, *, rounds_input: bool = True
) -> Tensor:
    """y = x Wᵀ, W stored as FP8 of 128 x 128 blocks.

    Args:
        x: [n, in] float32 or bfloat16.
        codes: [out, in] float8_e4m3fn, contiguous.
        scales: [ceil(out / 128), ceil(in / 128)] float32.
        rounds_input: x takes the e4m3 round trip of blocks of 128, as the model was trained.

    Returns:
        [n, out] of x's dtype, summed in fp32.
    """
    if x.dim() != 2 or x.shape[1] != codes.shape[1]:
        raise ValueError(f"x {list(x.shape)} does not fit codes {list(codes.shape)}")
    if codes.dtype != torch.float8_e4m3fn or not codes.is_contiguous():
        raise ValueError(f"codes must be contiguous float8_e4m3fn, got {codes.dtype}")
    wanted = [-(-size // FP8_BLOCK) for size in codes.shape]
    if scales.dtype != torch.float32 or list(scales.shape) != wanted:
        raise ValueError(
            f"codes {list(codes.shape)} need float32 scales {wanted}, "
            f"got {scales.dtype} {list(scales.shape)}"
        )
    target = target_of(x.device)
    if target is None or not can_run(x.device, x.dtype, x.shape[1]):
        return reference.linear_block_fp8(x, codes, scales, rounds_input)
    # only where a kernel is launched is Triton needed
    from scission.kernels.linear import block_fp8, quantize_input

    if x.stride(1) != 1:
        x = x.contiguous()
    if not rounds_input:
        return block_fp8.linear_block_fp8(x, None, codes, scales.contiguous(), target)
    x_codes, x_scales = quantize_input.quantize_input(x, target)
    return block_fp8.linear_block_fp8(x_codes, x_scales, codes, scales.contiguous(), target)
