"""Products of many rows with FP8 weights by the library that torch brings (cuBLASLt on sm_90)."""

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, pad, scaled_mm

from scission.kernels.quant import FP8_BLOCK
from scission.kernels.target import Target

# H200, [rows, 4096] x [6144, 4096]: 8192 rows 1290 TFLOP/s, 2048 rows 1162, 512 rows 789; 256 rows
# 20.4 us and by `block_fp8` 22.0, of [4096, 12288] 41.8 and 38.6, of [4096, 4096] 19.3 and 14.3
_MIN_ROWS = 257
# the library takes rows in fours, and scales of a row of weight blocks from 16 bytes on
_ROW_UNIT = 4
_SCALE_UNIT = 4


def can_multiply(num_rows: int, out_features: int, target: Target) -> bool:
    """Whether there are rows enough, and the library has block-wise scales here."""
    return target.name == "sm_90" and num_rows >= _MIN_ROWS and not out_features % 16


def linear_block_fp8(x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """[n, in] -> [n, out] bfloat16.

    Args:
        x: [n, in] e4m3 codes, contiguous; in is a multiple of 128.
        x_scales: [n, in / 128] or [] float32.
        codes: [out, in] float8_e4m3fn, contiguous.
        scales: [ceil(out / 128), in / 128] float32, contiguous.
    """
    num_rows, in_features = x.shape
    num_padded = -(-num_rows // _ROW_UNIT) * _ROW_UNIT
    if num_padded > num_rows:
        # what the last rows hold is multiplied and cut off
        x = pad(x.view(torch.uint8), (0, 0, 0, num_padded - num_rows)).view(x.dtype)
    # rows lie side by side: [num_padded, in / 128], strides 1 and num_padded
    row_scales = torch.empty(in_features // FP8_BLOCK, num_padded, device=x.device).mT
    row_scales[:num_rows] = x_scales
    if scales.shape[1] % _SCALE_UNIT:
        scales = pad(scales, (0, -scales.shape[1] % _SCALE_UNIT))
    out = scaled_mm(
        x,
        codes.mT,
        row_scales,
        ScalingType.BlockWise1x128,
        scales.mT,
        ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )
    return out[:num_rows]
