"""Number formats: FP8 e4m3 in blocks, FP4 e2m1 in groups, ue8m0 scales, activation round trips.

Each function checks its arguments (ValueError) and runs the plain-PyTorch reference on the tensors'
device.
"""

import torch
from torch import Tensor

from scission.kernels.quant import reference
from scission.kernels.quant.reference import (
    FP4_GROUP,
    FP4_MAX,
    FP4_VALUES,
    FP8_BLOCK,
    FP8_MAX,
    scale_values,
)

__all__ = [
    "FP4_GROUP",
    "FP4_MAX",
    "FP4_VALUES",
    "FP8_BLOCK",
    "FP8_MAX",
    "dequantize_block_fp8",
    "dequantize_group_fp4",
    "dequantize_tensor_fp8",
    "quantize_block_fp8",
    "quantize_group_fp4",
    "round_trip_fp4",
    "round_trip_fp8",
    "round_trip_fp8_dynamic",
    "round_trip_fp8_static",
    "scale_values",
    "ue8m0_round_up",
    "ue8m0_to_float",
]

_SCALE_DTYPES = (torch.uint8, torch.float8_e8m0fnu, torch.float32, torch.bfloat16)


def ue8m0_to_float(codes: Tensor) -> Tensor:
    """Decode scale bytes: 2 ** (code - 127).

    Args:
        codes: [...] uint8 or float8_e8m0fnu; 255 is NaN.

    Returns:
        [...] float32.
    """
    if codes.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        raise ValueError(f"ue8m0 codes must be uint8 or float8_e8m0fnu, got {codes.dtype}")
    return reference.ue8m0_to_float(codes)


def ue8m0_round_up(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round up to a power of two: the scale of a block whose amax / largest value is x.

    Args:
        x: [...] float32, >= 0.

    Returns:
        [...] float32, the smallest power of two >= x (at least 2 ** -126 for x > 0), and its [...]
        uint8 code.
    """
    if x.dtype != torch.float32:
        raise ValueError(f"ue8m0 scales are rounded from float32, got {x.dtype}")
    return reference.ue8m0_round_up(x)


def dequantize_block_fp8(codes: Tensor, scales: Tensor, offset: tuple[int, int] = (0, 0)) -> Tensor:
    """Decode FP8 weights of 128 x 128 blocks.

    Args:
        codes: [.., out, in] float8_e4m3fn.
        scales: [.., row blocks, column blocks], one a block the codes touch; ue8m0 (uint8 or
            float8_e8m0fnu), float32 or bfloat16.
        offset: row and column of codes[0, 0] inside the first block, where a matrix was cut inside
            a block.

    Returns:
        [.., out, in] float32.
    """
    if codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"FP8 codes must be float8_e4m3fn, got {codes.dtype}")
    if not all(0 <= start < FP8_BLOCK for start in offset):
        raise ValueError(f"offset must lie inside a block of {FP8_BLOCK}, got {offset}")
    blocks = [
        -(-(start + size) // FP8_BLOCK) if size else 0
        for start, size in zip(offset, codes.shape[-2:], strict=True)
    ]
    _check_scales(codes, scales, blocks)
    return reference.dequantize_block_fp8(codes, scales, offset)


def dequantize_tensor_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    """Decode FP8 weights that share one scale a matrix.

    Args:
        codes: [.., out, in] float8_e4m3fn.
        scale: [..], or one for all; float32 or bfloat16.

    Returns:
        [.., out, in] float32.
    """
    if codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"FP8 codes must be float8_e4m3fn, got {codes.dtype}")
    if scale.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"the scale of a tensor must be float32 or bfloat16, got {scale.dtype}")
    if scale.numel() != 1 and scale.shape != codes.shape[:-2]:
        raise ValueError(f"codes {list(codes.shape)} do not fit scales {list(scale.shape)}")
    return reference.dequantize_tensor_fp8(codes, scale)


def quantize_block_fp8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Encode weights as FP8 of 128 x 128 blocks; the last block of a dimension may be partial.

    Args:
        w: [.., out, in] of any float dtype.

    Returns:
        Codes [.., out, in] float8_e4m3fn and ue8m0 scales [.., ceil(out / 128), ceil(in / 128)]
        uint8.
    """
    return reference.quantize_block_fp8(w)


def dequantize_group_fp4(codes: Tensor, scales: Tensor) -> Tensor:
    """Decode packed FP4 weights: low nibble of byte j is input 2j, high nibble input 2j + 1.

    Args:
        codes: [.., out, in / 2] int8 (or uint8).
        scales: [.., out, in / 32]; ue8m0 (uint8 or float8_e8m0fnu), float32 or bfloat16.

    Returns:
        [.., out, in] float32.
    """
    if codes.dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"packed FP4 codes must be int8 or uint8, got {codes.dtype}")
    num_inputs = codes.shape[-1] * 2
    if num_inputs % FP4_GROUP:
        raise ValueError(
            f"inputs of FP4 weights must be a multiple of {FP4_GROUP}, got {num_inputs}"
        )
    _check_scales(codes, scales, [codes.shape[-2], num_inputs // FP4_GROUP])
    return reference.dequantize_group_fp4(codes, scales)


def quantize_group_fp4(w: Tensor) -> tuple[Tensor, Tensor]:
    """Encode weights as packed FP4, nearest value, ties to the even code.

    Args:
        w: [.., out, in] of any float dtype; in is a multiple of 32.

    Returns:
        Codes [.., out, in / 2] int8 and ue8m0 scales [.., out, in / 32] uint8.
    """
    if w.shape[-1] % FP4_GROUP:
        raise ValueError(
            f"inputs of FP4 weights must be a multiple of {FP4_GROUP}, got {w.shape[-1]}"
        )
    return reference.quantize_group_fp4(w)


def round_trip_fp8(x: Tensor, block: int, amax_floor: float = 1e-4) -> Tensor:
    """Round activations to e4m3 with a ue8m0 scale per `block` values of the last dim, and back.

    Args:
        x: [.., n] float32 or bfloat16; the last block may be partial.
        block: values that share a scale.
        amax_floor: lower bound of a block's largest magnitude when its scale is chosen.

    Returns:
        [.., n] of x's dtype: exactly the values that codes and scales would hold. A zero may lose
        its sign.
    """
    if block < 1:
        raise ValueError(f"block must be positive, got {block}")
    return reference.round_trip_fp8(x, block, amax_floor)


def round_trip_fp8_dynamic(x: Tensor, block: int = FP8_BLOCK) -> Tensor:
    """Round activations to e4m3 with a scale amax / 448 per `block` values of the last dim, and
    back.

    Args:
        x: [.., n] float32 or bfloat16; the last block may be partial.
        block: values that share a scale, which is float32 and not rounded.

    Returns:
        [.., n] of x's dtype; in bfloat16 the products of codes and scales are rounded once more.
    """
    if block < 1:
        raise ValueError(f"block must be positive, got {block}")
    return reference.round_trip_fp8_dynamic(x, block)


def round_trip_fp8_static(x: Tensor, scale: Tensor) -> Tensor:
    """Round activations to e4m3 with the one scale given, saturating, and back.

    Args:
        x: [.., n] float32 or bfloat16.
        scale: [] float32, positive.

    Returns:
        [.., n] of x's dtype; in bfloat16 the products of codes and the scale are rounded once more.
    """
    if scale.dim() or scale.dtype != torch.float32:
        raise ValueError(f"a static scale is a float32 scalar, got {scale.dtype} {scale.shape}")
    return reference.round_trip_fp8_static(x, scale)


def round_trip_fp4(x: Tensor, block: int = FP4_GROUP) -> Tensor:
    """Round activations to e2m1 with a ue8m0 scale per `block` values of the last dim, and back.

    Args:
        x: [.., n] float32 or bfloat16; the last block may be partial.
        block: values that share a scale.

    Returns:
        [.., n] of x's dtype: exactly the values that codes and scales would hold. A zero may lose
        its sign.
    """
    if block < 1:
        raise ValueError(f"block must be positive, got {block}")
    return reference.round_trip_fp4(x, block)


def _check_scales(codes: Tensor, scales: Tensor, blocks: list[int]) -> None:
    if scales.dtype not in _SCALE_DTYPES:
        raise ValueError(f"scales must be one of {_SCALE_DTYPES}, got {scales.dtype}")
    wanted = [*codes.shape[:-2], *blocks]
    if list(scales.shape) != wanted:
        raise ValueError(
            f"codes {list(codes.shape)} need scales {wanted}, got {list(scales.shape)}"
        )
