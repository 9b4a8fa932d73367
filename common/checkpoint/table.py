"""The table of a checkpoint's tensors: what a config says, in the formats that files have.

A loader does not consult a table (the model asks for what it needs); the writer of random
checkpoints, dummy weights and `inspect` do.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from scission.common.checkpoint.headers import DTYPE_BYTES
from scission.common.checkpoint.source import TensorDescription
from scission.kernels.quant import FP8_BLOCK

Stored = Mapping[str, TensorDescription]
# plain: no scale; fp8_block: one per 128 x 128 block; fp8_tensor: one, and one for the inputs
MatrixFormat = Literal["plain", "fp8_block", "fp8_tensor"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the table; `dtype` is safetensors' word."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class TensorTable:
    """Collects the specs of one checkpoint; where its files are at hand, in their formats.

    Nothing else of the files is believed: names and shapes are the config's.
    """

    def __init__(self, stored: Stored, default: MatrixFormat, scale_dtype: str = "BF16") -> None:
        """
        Args:
            stored: what the files hold; empty where there are none.
            default: format of matrices without files.
            scale_dtype: of scales without files.
        """
        self.specs: dict[str, TensorSpec] = {}
        self._stored = stored
        self._default = default
        self._scale_dtype = scale_dtype

    def tensor(self, name: str, *shape: int, dtype: str = "BF16", or_dtype: str = "") -> None:
        """A tensor without scales; `or_dtype` is another one that it may be stored in."""
        found = self._stored.get(name)
        is_other = found is not None and found.dtype == or_dtype
        self.specs[name] = TensorSpec(or_dtype if is_other else dtype, shape)

    def matrix(self, name: str, *shape: int, default: MatrixFormat | None = None) -> None:
        """`name`.weight [.., out, in] with the scales that go with its format."""
        fmt = self._format(name, default or self._default)
        found = self._stored.get(f"{name}.weight")
        plain = found.dtype if found is not None and found.dtype in ("F16", "F32") else "BF16"
        self.specs[f"{name}.weight"] = TensorSpec("F8_E4M3" if fmt != "plain" else plain, shape)
        *leading, rows, columns = shape
        if fmt == "fp8_block":
            blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
            self._scale(f"{name}.weight_scale_inv", (*leading, *blocks))
        elif fmt == "fp8_tensor":
            self._scale(f"{name}.weight_scale_inv", ())
            self._scale(f"{name}.activation_scale", ())

    def _format(self, name: str, default: MatrixFormat) -> MatrixFormat:
        if f"{name}.weight" not in self._stored:
            return default
        scale = self._stored.get(f"{name}.weight_scale_inv")
        if scale is None:
            return "plain"
        return "fp8_tensor" if scale.shape in ((), (1,)) else "fp8_block"

    def _scale(self, name: str, shape: tuple[int, ...]) -> None:
        found = self._stored.get(name)
        dtype = self._scale_dtype
        if found is not None and found.dtype in ("BF16", "F32"):
            dtype = found.dtype
        if found is not None and not shape and found.shape == (1,):
            shape = (1,)
        self.specs[name] = TensorSpec(dtype, shape)


def dense_values(
    name: str, shape: tuple[int, ...], generator: torch.Generator, *, is_zero_centered: bool = False
) -> Tensor:
    """Well-conditioned random float32 values for a tensor of a dense model, before quantisation.

    Norms lie near one (zero-centred: near zero), matrices keep the size of what they are given,
    and neighbouring scale blocks differ.
    """
    values = torch.randn(shape, generator=generator, device=generator.device)
    if name.endswith("embed_tokens.weight"):
        return values
    if len(shape) == 1:
        return values.mul_(0.1).add_(0 if is_zero_centered else 1)
    values.mul_(shape[-1] ** -0.5)
    if name.endswith("lm_head.weight"):
        return values.mul_(3.0)
    num_blocks = -(-shape[-2] // FP8_BLOCK)
    blocks = torch.randn((num_blocks, 1), generator=generator, device=generator.device)
    sizes = torch.exp2(blocks.mul_(0.5)).repeat_interleave(FP8_BLOCK, 0)
    return values.mul_(sizes[: shape[-2]])


def is_scale(name: str) -> bool:
    """Whether a tensor holds scales of another one."""
    return name.rpartition(".")[2] in ("weight_scale_inv", "activation_scale", "scale")


def matrix_formats(raw: Mapping[str, Any]) -> MatrixFormat:
    """The format that config.json announces for its matrices; the files decide, this is a default.

    `weight_block_size` null is a scale per tensor, [128, 128] one per block.
    """
    quantization = raw.get("quantization_config")
    if not isinstance(quantization, dict):
        return "plain"
    return "fp8_tensor" if quantization.get("weight_block_size") is None else "fp8_block"
