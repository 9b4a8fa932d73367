"""The number formats of quantised weights and activations, in plain PyTorch: the definition.

Three formats: e4m3 (FP8, largest 448), e2m1 (FP4, largest 6, two codes a byte) and ue8m0 (a power
of two as one exponent byte), the scale of the other two. A scale is always rounded up to a power of
two, from the fp32 bits: a float log2 can miss by one binade at exact powers. Blocks have fixed
sizes; the last one of a dimension may be partial. Arguments are checked in `__init__`.
"""

import struct

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_BLOCK = 128  # weights: 128 x 128 values share a scale
FP4_GROUP = 32  # weights: 32 consecutive inputs of one output row share a scale
FP8_MAX = 448.0
FP4_MAX = 6.0
DYNAMIC_AMAX_FLOOR = 1e-10  # of a block whose scale is amax / 448 as it is
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; bit 3 of a code is the sign

_EXPONENT = 0x7F800000
_MANTISSA = 0x007FFFFF
_SMALLEST_NORMAL = 2.0**-126


def _to_lowest(largest: float, smallest_normal: float) -> int:
    """Added to the fp32 bits of amax, exponent kept: scale * smallest_normal of a small format.

    The scale is amax / largest rounded up: a carry past the mantissa of `largest` is that rounding.
    """
    largest_bits, smallest_bits = struct.unpack("<ii", struct.pack("<ff", largest, smallest_normal))
    return int(_MANTISSA - largest_bits + smallest_bits)


_FP8_SMALLEST_NORMAL = 2.0**-6
_FP8_LOWEST = _to_lowest(FP8_MAX, _FP8_SMALLEST_NORMAL)
_FP4_LOWEST = _to_lowest(FP4_MAX, 1.0)


def ue8m0_to_float(codes: Tensor) -> Tensor:
    """2 ** (code - 127) in fp32; code 255 is NaN, code 0 the subnormal 2 ** -127."""
    return codes.view(torch.float8_e8m0fnu).to(torch.float32)


def ue8m0_round_up(x: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest power of two >= x (fp32 subnormals: 2 ** -126, zero: 2 ** -127) and its code."""
    # adding all mantissa bits carries into the exponent exactly when one of them is set
    codes = ((x.view(torch.int32) + _MANTISSA) >> 23).to(torch.uint8)
    return ue8m0_to_float(codes), codes


def dequantize_block_fp8(codes: Tensor, scales: Tensor, offset: tuple[int, int]) -> Tensor:
    """value = code * scale of its block; `offset` is where codes[0, 0] lies in the first block."""
    rows = (torch.arange(codes.shape[-2], device=codes.device) + offset[0]) // FP8_BLOCK
    columns = (torch.arange(codes.shape[-1], device=codes.device) + offset[1]) // FP8_BLOCK
    # [.., out, in]
    scale = scale_values(scales).index_select(-1, columns).index_select(-2, rows)
    return scale.mul_(codes.to(torch.float32))


def dequantize_tensor_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    """value = code * the scale of its matrix."""
    scale = scale.to(torch.float32)
    if scale.numel() > 1:
        scale = scale.view(*scale.shape, 1, 1)
    return codes.to(torch.float32) * scale


def quantize_block_fp8(w: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, num_columns = w.shape[-2:]
    padded = F.pad(w.to(torch.float32), (0, -num_columns % FP8_BLOCK, 0, -num_rows % FP8_BLOCK))
    # [.., row block, row, column block, column]
    blocks = torch.unflatten(padded, -1, (-1, FP8_BLOCK))
    blocks = torch.unflatten(blocks, -3, (-1, FP8_BLOCK))
    amax = blocks.abs().amax((-3, -1), keepdim=True).clamp_min(FP8_MAX * _SMALLEST_NORMAL)
    scales, scale_codes = ue8m0_round_up(amax / FP8_MAX)
    codes = (blocks / scales).flatten(-4, -3).flatten(-2)[..., :num_rows, :num_columns]
    return codes.contiguous().to(torch.float8_e4m3fn), scale_codes.squeeze(-1).squeeze(-2)


def dequantize_group_fp4(codes: Tensor, scales: Tensor) -> Tensor:
    values = torch.tensor(FP4_VALUES, device=codes.device)
    values = torch.cat([values, -values])
    # [256, 2]: both values of every byte, the low nibble first
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=-1)
    values = pairs[codes.view(torch.uint8).to(torch.int64)].flatten(-2)
    # [.., out, in / 32, 32]
    groups = torch.unflatten(values, -1, (-1, FP4_GROUP))
    return groups.mul_(scale_values(scales).unsqueeze(-1)).flatten(-2)


def quantize_group_fp4(w: Tensor) -> tuple[Tensor, Tensor]:
    # [.., out, in / 32, 32]
    groups = torch.unflatten(w.to(torch.float32), -1, (-1, FP4_GROUP))
    amax = groups.abs().amax(-1, keepdim=True).clamp_min(FP4_MAX * _SMALLEST_NORMAL)
    scales, scale_codes = ue8m0_round_up(amax / FP4_MAX)
    magnitudes = (groups / scales).abs_()
    magnitudes = _round_to_grid(magnitudes, magnitudes.clamp_min(1.0), mantissa_bits=1)
    # magnitudes are multiples of 0.5, so twice a magnitude indexes its code
    codes_by_twice = torch.zeros(13, dtype=torch.uint8, device=w.device)
    codes_by_twice[[0, 1, 2, 3, 4, 6, 8, 12]] = torch.arange(8, dtype=torch.uint8, device=w.device)
    codes = codes_by_twice[(magnitudes * 2).to(torch.int64)] | (
        torch.signbit(groups).to(torch.uint8) << 3
    )
    codes = codes.flatten(-2)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed.view(torch.int8), scale_codes.squeeze(-1)


def round_trip_fp8(x: Tensor, block: int, amax_floor: float) -> Tensor:
    return _round_trip(x, block, amax_floor, _FP8_LOWEST, mantissa_bits=3)


def round_trip_fp8_dynamic(x: Tensor, block: int) -> Tensor:
    *leading, width = x.shape
    padded = F.pad(x, (0, -width % block)) if width % block else x
    blocks = padded.to(torch.float32).view(*leading, padded.shape[-1] // block, block)
    scales = dynamic_scales(blocks)
    rounded = _round_to_e4m3(blocks / scales).mul_(scales).view(padded.shape).to(x.dtype)
    return rounded[..., :width] if padded is not x else rounded


def dynamic_scales(blocks: Tensor) -> Tensor:
    """[.., n] float32 -> [.., 1]: amax / 448, of zeros still positive."""
    return blocks.abs().amax(-1, keepdim=True).clamp_min_(DYNAMIC_AMAX_FLOOR).div_(FP8_MAX)


def round_trip_fp8_static(x: Tensor, scale: Tensor) -> Tensor:
    quotient = (x.to(torch.float32) / scale).clamp_(-FP8_MAX, FP8_MAX)
    return _round_to_e4m3(quotient).mul_(scale).to(x.dtype)


def round_trip_fp4(x: Tensor, block: int) -> Tensor:
    return _round_trip(x, block, FP4_MAX * _SMALLEST_NORMAL, _FP4_LOWEST, mantissa_bits=1)


def scale_values(scales: Tensor) -> Tensor:
    """Scales as fp32: ue8m0 codes are decoded, fp32 and bf16 taken as they are."""
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return ue8m0_to_float(scales)
    return scales.to(torch.float32)


def _round_trip(
    x: Tensor, block: int, amax_floor: float, amax_to_lowest: int, mantissa_bits: int
) -> Tensor:
    """Scale each block of the last dim, cast it to the small format, cast and scale back.

    Dividing by a power of two moves no mantissa bit, so the values are rounded where they stand. On
    the hot path of a CPU the number of operations counts, hence the work in place.

    Args:
        amax_to_lowest: what takes the bits of amax to those of scale * smallest normal value.
    """
    *leading, width = x.shape
    padded = F.pad(x, (0, -width % block)) if width % block else x
    blocks = padded.to(torch.float32).view(*leading, padded.shape[-1] // block, block)
    magnitudes = blocks.abs()
    lowest = magnitudes.amax(-1, keepdim=True).clamp_min_(amax_floor)
    lowest.view(torch.int32).add_(amax_to_lowest).bitwise_and_(_EXPONENT)
    rounded = _round_to_grid(blocks, magnitudes.clamp_min_(lowest), mantissa_bits)
    rounded = rounded.view(padded.shape).to(x.dtype)
    return rounded[..., :width] if padded is not x else rounded


def _round_to_e4m3(x: Tensor) -> Tensor:
    """To the nearest value of e4m3; |x| within 464."""
    return _round_to_grid(x, x.abs().clamp_min_(_FP8_SMALLEST_NORMAL), mantissa_bits=3)


def _round_to_grid(x: Tensor, binades: Tensor, mantissa_bits: int) -> Tensor:
    """Round to nearest, ties to the even code, in a float format of few mantissa bits.

    Adding and taking away 1.5 * 2 ** 23 grid steps leaves x at a multiple of the step: the fp32
    adder does the rounding. (Several times faster on a CPU than a cast to float8 and back, and it
    exists for e2m1 too.)

    Args:
        binades: |x|, but at least the format's smallest normal, below which the step stays;
            overwritten.
    """
    bits = binades.view(torch.int32)
    bits.bitwise_and_(_EXPONENT).add_(((23 - mantissa_bits) << 23) + (1 << 22))
    return (x + binades).sub_(binades)
