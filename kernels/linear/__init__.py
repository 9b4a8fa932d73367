"""Linear layers over weights that stay as they are stored: FP8 codes in blocks, or bfloat16."""

import torch
from torch import Tensor

from scission.kernels.linear import reference
from scission.kernels.linear.rows import QuantizedRows, Rows, Scaling, SplitSums, Sums
from scission.kernels.quant import FP8_BLOCK
from scission.kernels.target import target_of

__all__ = [
    "QuantizedRows",
    "Rows",
    "Scaling",
    "SplitSums",
    "Sums",
    "can_run",
    "linear_bf16",
    "linear_block_fp8",
    "linear_block_fp8_parts",
    "linear_grouped",
    "linear_grouped_parts",
    "quantize_rows",
    "round_trip_rows",
    "whole_sums",
]


def can_run(device: torch.device, dtype: torch.dtype, in_features: int) -> bool:
    """Whether there is a kernel; elsewhere a decoded matrix multiplies as well."""
    return target_of(device) is not None and dtype == torch.bfloat16 and not in_features % FP8_BLOCK


def quantize_rows(
    x: Tensor | SplitSums, scaling: Scaling, static_scale: Tensor | None = None
) -> QuantizedRows:
    """Rows to e4m3 codes and scales, as a linear layer that rounds its input takes them.

    Args:
        x: [num_tokens, d] bfloat16 or float32; kept as the `values`. Parts of sums are added on the
            way, and their values not kept.
        static_scale: [] float32, with "static" and only there.
    """
    _check_scaling(scaling, static_scale)
    if isinstance(x, SplitSums):
        # they come from a kernel: there is a target
        from scission.kernels.linear.quantize_sums import quantize_sums

        sums_target = target_of(x.parts.device)
        assert sums_target is not None
        return quantize_sums(x, scaling, static_scale, sums_target)
    if x.dim() != 2:
        raise ValueError(f"rows are [num_tokens, d], got {list(x.shape)}")
    target = target_of(x.device)
    if target is None or not can_run(x.device, x.dtype, x.shape[1]):
        codes, scales = reference.quantize_input(x, scaling, static_scale)
    else:
        # only where a kernel is launched is Triton needed
        from scission.kernels.linear.quantize_input import quantize_input

        codes, scales = quantize_input(_with_unit_stride(x), target, scaling, static_scale)
    return QuantizedRows(x, codes, scales)


def round_trip_rows(x: Tensor, scaling: Scaling, static_scale: Tensor | None = None) -> Tensor:
    """What `quantize_rows(..).dequantize(x.dtype)` gives, computed where x stands."""
    _check_scaling(scaling, static_scale)
    return reference.round_trip(x, scaling, static_scale)


def linear_block_fp8(x: Tensor | QuantizedRows, codes: Tensor, scales: Tensor) -> Tensor:
    """y = x Wᵀ, W stored as FP8 of 128 x 128 blocks.

    Args:
        x: [n, in] float32 or bfloat16, multiplied as it is; or rows that were quantised.
        codes: [out, in] float8_e4m3fn, contiguous.
        scales: [ceil(out / 128), ceil(in / 128)] float32.

    Returns:
        [n, out] of x's dtype (of quantised rows: of their values, else bfloat16), summed in fp32.
    """
    return whole_sums(linear_block_fp8_parts(x, codes, scales))


def linear_block_fp8_parts(
    x: Tensor | QuantizedRows, codes: Tensor, scales: Tensor
) -> Tensor | SplitSums:
    """`linear_block_fp8`; where a kernel splits the inputs, the parts of the sums as they are."""
    rows = x if isinstance(x, QuantizedRows) else None
    values = rows.codes if rows is not None else x
    assert isinstance(values, Tensor)
    if values.dim() != 2 or values.shape[1] != codes.shape[1]:
        raise ValueError(f"x {list(values.shape)} does not fit codes {list(codes.shape)}")
    _check_codes(codes, scales)
    dtype = values.dtype if rows is None else _dtype_of(rows)
    target = target_of(values.device)
    if target is None or not can_run(values.device, dtype, values.shape[1]):
        if rows is not None:
            values = rows.dequantize(torch.float32)
        return reference.linear_block_fp8(values, codes, scales, dtype)
    from scission.kernels.linear import block_fp8, library

    scales = scales.contiguous()
    if rows is not None and library.can_multiply(values.shape[0], codes.shape[0], target):
        return library.linear_block_fp8(values, rows.scales, codes, scales)
    if rows is not None:
        return block_fp8.linear_block_fp8_parts(rows.codes, rows.scales, codes, scales, target)
    return block_fp8.linear_block_fp8_parts(_with_unit_stride(values), None, codes, scales, target)


def whole_sums(sums: Tensor | SplitSums) -> Tensor:
    """[num_tokens, d] bfloat16 of the parts of sums; what is whole stays as it is."""
    if isinstance(sums, Tensor):
        return sums
    # only where a kernel was launched is Triton needed
    from scission.kernels.linear.split_sums import add_parts

    return add_parts(sums)


def linear_grouped(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """y_g = x_g W_gᵀ of every group, W stored as FP8 of 128 x 128 blocks; x is not rounded.

    Args:
        x: [num_tokens, groups, in] float32 or bfloat16.
        codes: [groups * out, in] float8_e4m3fn, contiguous.
        scales: [ceil(groups * out / 128), ceil(in / 128)] float32.

    Returns:
        [num_tokens, groups, out] of x's dtype, summed in fp32.
    """
    sums = linear_grouped_parts(x, codes, scales)
    if isinstance(sums, SplitSums):
        from scission.kernels.linear.split_sums import add_parts

        sums = add_parts(sums)
    return sums.view(*x.shape[:2], codes.shape[0] // x.shape[1])


def linear_grouped_parts(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor | SplitSums:
    """`linear_grouped`, the groups side by side: [num_tokens, groups * out]; where a kernel splits
    the inputs, the parts of the sums as they are.
    """
    if x.dim() != 3 or x.shape[2] != codes.shape[1] or codes.shape[0] % x.shape[1]:
        raise ValueError(f"x {list(x.shape)} does not fit codes {list(codes.shape)}")
    _check_codes(codes, scales)
    target = target_of(x.device)
    # a program's outputs lie in one group
    fits = not (codes.shape[0] // x.shape[1]) % FP8_BLOCK
    if target is None or not fits or not can_run(x.device, x.dtype, x.shape[2]):
        return reference.linear_grouped(x, codes, scales).flatten(1)
    from scission.kernels.linear import block_fp8, decode_blocks

    scales = scales.contiguous()
    if x.shape[0] <= block_fp8.MAX_GROUPED_ROWS:
        return block_fp8.linear_grouped_parts(_with_unit_stride(x), codes, scales, target)
    # what rounds no input takes no codes: bfloat16 at the library's rate
    num_groups, group_dim = x.shape[1:]
    w = decode_blocks.decode_blocks(codes, scales).view(num_groups, -1, group_dim)
    out = torch.empty(*x.shape[:2], w.shape[1], dtype=x.dtype, device=x.device)
    torch.bmm(x.transpose(0, 1), w.mT, out=out.transpose(0, 1))
    return out.flatten(1)


def linear_bf16(x: Tensor, w: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """y = x Wᵀ of a matrix stored in bfloat16, summed in fp32.

    Args:
        x: [n, in] bfloat16 (float32 runs the reference).
        w: [out, in] bfloat16.
        out_dtype: float32 or bfloat16.

    Returns:
        [n, out] of out_dtype.
    """
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1] or w.dtype != torch.bfloat16:
        raise ValueError(f"x {list(x.shape)} does not fit {w.dtype} w {list(w.shape)}")
    if out_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"out_dtype must be float32 or bfloat16, got {out_dtype}")
    target = target_of(x.device)
    if target is None or x.dtype != torch.bfloat16:
        return reference.linear_bf16(x, w, out_dtype)
    from scission.kernels.linear import stream_bf16

    is_whole = not x.shape[1] % stream_bf16.BLOCK_K and w.is_contiguous()
    if is_whole and x.shape[0] <= stream_bf16.MAX_ROWS:
        return stream_bf16.stream_bf16(_with_unit_stride(x), w, out_dtype, target)
    return torch.mm(x, w.mT, out_dtype=out_dtype)


def _check_codes(codes: Tensor, scales: Tensor) -> None:
    if codes.dtype != torch.float8_e4m3fn or not codes.is_contiguous():
        raise ValueError(f"codes must be contiguous float8_e4m3fn, got {codes.dtype}")
    wanted = [-(-size // FP8_BLOCK) for size in codes.shape]
    if scales.dtype != torch.float32 or list(scales.shape) != wanted:
        raise ValueError(
            f"codes {list(codes.shape)} need float32 scales {wanted}, "
            f"got {scales.dtype} {list(scales.shape)}"
        )


def _check_scaling(scaling: Scaling, static_scale: Tensor | None) -> None:
    if (scaling == "static") != (static_scale is not None):
        raise ValueError(f"scaling {scaling} and a static scale {static_scale} do not go together")
    if static_scale is not None and (static_scale.dim() or static_scale.dtype != torch.float32):
        raise ValueError(f"a static scale is a float32 scalar, got {static_scale.dtype}")


def _dtype_of(rows: QuantizedRows) -> torch.dtype:
    return rows.values.dtype if rows.values is not None else torch.bfloat16


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
