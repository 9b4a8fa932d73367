"""Linear layers over FP8 weights in plain PyTorch: the definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from scission.kernels.linear.rows import Scaling
from scission.kernels.quant import (
    FP8_BLOCK,
    FP8_MAX,
    dequantize_block_fp8,
    round_trip_fp8,
    round_trip_fp8_dynamic,
    round_trip_fp8_static,
    ue8m0_round_up,
)
from scission.kernels.quant.reference import dynamic_scales


def linear_block_fp8(x: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return F.linear(x.float(), dequantize_block_fp8(codes, scales)).to(dtype)


def linear_grouped(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    num_groups, group_dim = x.shape[1:]
    w = dequantize_block_fp8(codes, scales).view(num_groups, -1, group_dim)
    return torch.einsum("tgk,grk->tgr", x.float(), w).to(x.dtype)


def linear_bf16(x: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    return F.linear(x.float(), w.float()).to(dtype)


def quantize_input(
    x: Tensor, scaling: Scaling = "ue8m0", static_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    num_rows, width = x.shape
    if scaling == "static":
        assert static_scale is not None
        quotient = (x.float() / static_scale).clamp_(-FP8_MAX, FP8_MAX)
        return quotient.to(torch.float8_e4m3fn), static_scale
    padded = F.pad(x.float(), (0, -width % FP8_BLOCK))
    blocks = padded.view(num_rows, padded.shape[1] // FP8_BLOCK, FP8_BLOCK)
    if scaling == "dynamic":
        scales = dynamic_scales(blocks)
    else:
        scales, _ = ue8m0_round_up(blocks.abs().amax(-1, keepdim=True).clamp_min(1e-4) / FP8_MAX)
    codes = (blocks / scales).to(torch.float8_e4m3fn).view(padded.shape)[:, :width]
    return codes.contiguous(), scales.squeeze(-1)


def round_trip(x: Tensor, scaling: Scaling, static_scale: Tensor | None) -> Tensor:
    if scaling == "static":
        assert static_scale is not None
        return round_trip_fp8_static(x, static_scale)
    if scaling == "dynamic":
        return round_trip_fp8_dynamic(x, FP8_BLOCK)
    return round_trip_fp8(x, FP8_BLOCK)
