"""A weight matrix as it is stored: its formats, one rank's part of it, and its values."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from scission.kernels.quant import (
    FP4_GROUP,
    FP8_BLOCK,
    dequantize_block_fp8,
    dequantize_group_fp4,
    dequantize_tensor_fp8,
)

MatrixKind = Literal["plain", "fp8_block", "fp8_tensor", "fp4_group"]


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a dimension: contiguous, `count` equal parts of whole units of `align`.

    The last part may be shorter, and trailing ranks may hold nothing where there are fewer units
    than ranks; an empty matrix multiplies to zeros, as it must.
    """

    dim: int
    index: int
    count: int
    align: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.index < self.count and self.align > 0 and self.dim >= 0, self

    def bounds(self, size: int) -> tuple[int, int]:
        """[start, stop) of this rank's part of a dimension of `size`."""
        num_units = -(-size // self.align)
        units_each = -(-num_units // self.count)
        start = min(self.index * units_each * self.align, size)
        return start, min((self.index + 1) * units_each * self.align, size)


@dataclass(frozen=True, slots=True)
class StoredFormat:
    """How a matrix [out, in] lies on disk; dtypes are safetensors' words.

    `scale_name` and `input_scale_name` are the last components of the tensors' names; an input
    scale is the static one of activations, a scalar like the scale of a whole tensor.
    """

    kind: MatrixKind
    dtype: str
    scale_dtype: str | None = None
    scale_name: str = "scale"
    input_scale_dtype: str | None = None
    input_scale_name: str = ""

    def __str__(self) -> str:
        scales = f", scales {self.scale_dtype}" if self.scale_dtype else ""
        return f"{self.kind} ({self.dtype}{scales})"

    def code_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return out_features, in_features // 2 if self.kind == "fp4_group" else in_features

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...] | None:
        """None: no scale belongs to the matrix. Sizes are rounded up: last blocks are partial."""
        match self.kind:
            case "plain":
                return None
            case "fp8_tensor":
                return ()
            case "fp8_block":
                return -(-out_features // FP8_BLOCK), -(-in_features // FP8_BLOCK)
            case "fp4_group":
                return out_features, in_features // FP4_GROUP

    def code_part(self, rows: slice, columns: slice) -> tuple[slice, slice]:
        """The codes of some of the values."""
        if self.kind == "fp4_group":
            columns = slice(columns.start // 2, columns.stop // 2)
        return rows, columns

    def scale_part(self, rows: slice, columns: slice) -> tuple[slice, ...]:
        """The scales of some of the values: every block that they touch."""
        if self.kind == "fp8_tensor":
            return ()
        if self.kind == "fp4_group":
            return rows, slice(columns.start // FP4_GROUP, columns.stop // FP4_GROUP)
        return _blocks(rows), _blocks(columns)

    def offset(self, rows: slice, columns: slice) -> tuple[int, int]:
        """Where the part's first value lies in the first block that it touches."""
        if self.kind != "fp8_block":
            return 0, 0
        return rows.start % FP8_BLOCK, columns.start % FP8_BLOCK

    def can_cut(self, columns: slice) -> bool:
        """FP4 is cut at whole groups of inputs; the other formats anywhere."""
        if self.kind != "fp4_group" or columns.start == columns.stop:
            return True
        return not (columns.start % FP4_GROUP or columns.stop % FP4_GROUP)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [.., out, in] in its stored format, with its scales; a leading dim counts experts.

    fp8_block: codes [.., out, in] float8_e4m3fn, one scale per 128 x 128 block of the WHOLE matrix;
    `offset` is where codes[0, 0] lies in the first block held. fp8_tensor: codes likewise, one
    scale [..] for all of them. fp4_group: codes [.., out, in / 2] int8, scales [.., out, in / 32].
    ue8m0 scales are their bytes (uint8). plain: codes are the values. `input_scale` [] float32 is
    the static scale of the inputs, where the checkpoint has one.
    """

    kind: MatrixKind
    codes: Tensor
    scales: Tensor | None
    out_features: int
    in_features: int
    offset: tuple[int, int] = (0, 0)
    input_scale: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    def expert(self, number: int) -> "Matrix":
        """One of a stack: [out, in]."""
        scales = self.scales
        if scales is not None and scales.dim():
            scales = scales[number]
        return replace(self, codes=self.codes[number], scales=scales)

    def by_block(self) -> "Matrix":
        """The same values as fp8_block where it is fp8_tensor: every block has the one scale."""
        if self.kind != "fp8_tensor" or self.scales is None:
            return self
        *leading, rows, columns = self.codes.shape
        scales = self.scales.reshape(-1, 1, 1) if self.scales.numel() > 1 else self.scales
        blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
        return replace(self, kind="fp8_block", scales=scales.expand(*leading, *blocks).contiguous())

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values, [.., out, in] of `dtype` (exact in float32)."""
        match self.kind:
            case "plain":
                return self.codes.to(dtype)
            case "fp8_block":
                assert self.scales is not None
                return dequantize_block_fp8(self.codes, self.scales, self.offset).to(dtype)
            case "fp8_tensor":
                assert self.scales is not None
                return dequantize_tensor_fp8(self.codes, self.scales).to(dtype)
            case "fp4_group":
                assert self.scales is not None
                return dequantize_group_fp4(self.codes, self.scales).to(dtype)


def _blocks(part: slice) -> slice:
    """The scale blocks that a cut of a blocked dimension touches; none for an empty cut."""
    if part.start == part.stop:
        return slice(0, 0)
    return slice(part.start // FP8_BLOCK, -(-part.stop // FP8_BLOCK))
