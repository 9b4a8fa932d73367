"""Linear layers over FP8 weights in plain PyTorch: the definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from scission.kernels.quant import (
    FP8_BLOCK,
    FP8_MAX,
    dequantize_block_fp8,
    round_trip_fp8,
    ue8m0_round_up,
)


def linear_block_fp8(x: Tensor, codes: Tensor, scales: Tensor, rounds_input: bool) -> Tensor:
    if rounds_input:
        x = round_trip_fp8(x, FP8_BLOCK)
    return F.linear(x.float(), dequantize_block_fp8(codes, scales)).to(x.dtype)


def quantize_input(x: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, width = x.shape
    blocks = x.float().view(num_rows, -1, FP8_BLOCK)
    scales, _ = ue8m0_round_up(blocks.abs().amax(-1).clamp_min(1e-4) / FP8_MAX)
    codes = (blocks / scales.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return codes.view(num_rows, width), scales
