"""Random weights in a checkpoint's own formats and shapes, made straight on the device.

For benchmarks of shapes whose weights are not at hand (`--load-format dummy`); only config.json is
read.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scission.common.checkpoint.table import TensorSpec, is_scale
from scission.common.model.registry import find_architecture
from scission.kernels.quant import FP8_MAX

# of the values that `read` draws: e4m3 codes below 2, any e2m1 code
_FP8_RMS = 0.6
_FP4_RMS = 2.9


class DummySource:
    """Random weights of any architecture; deterministic by seed, name and the part that is read."""

    def __init__(self, config: Mapping[str, Any], seed: int = 0) -> None:
        self._config = config
        self._seed = seed
        self._architecture = find_architecture(config)
        self._tensors = self._architecture.table(config, {})

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return self._tensors

    def read(self, name: str, part: tuple[slice, ...], out: Tensor) -> None:
        if not out.numel():
            return
        generator = torch.Generator(out.device)
        generator.manual_seed(seed_of(self._seed, f"{name}{part}"))
        match self._tensors[name].dtype:
            case "F8_E4M3":
                # without the top exponent bit there is no NaN, and magnitudes stay below 2
                codes = out.view(torch.uint8)
                codes.random_(0, 256, generator=generator).bitwise_and_(0xBF)
            case "I8":
                out.view(torch.uint8).random_(0, 256, generator=generator)
            case "F8_E8M0":
                low = self._scale_code(name)
                out.view(torch.uint8).random_(low, low + 2, generator=generator)
            case _ if is_scale(name):
                out.fill_(self._scale(name))
            case _:
                values = self._architecture.random_values(
                    name, tuple(out.shape), self._config, generator
                )
                out.copy_(values)

    def revision(self) -> str:
        described = sorted((name, spec.dtype, spec.shape) for name, spec in self._tensors.items())
        text = f"dummy {self._seed} {described}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _scale(self, name: str) -> float:
        """With which a matrix keeps the size of its inputs; of inputs, one for values up to 4."""
        weight = self._tensors.get(name.removesuffix(".weight_scale_inv") + ".weight")
        return 4 / FP8_MAX if weight is None else 1 / (_FP8_RMS * math.sqrt(weight.shape[-1]))

    def _scale_code(self, name: str) -> int:
        """The ue8m0 code with which a matrix keeps the size of its inputs, or half of it."""
        weight = self._tensors[name.removesuffix(".scale") + ".weight"]
        is_fp4 = weight.dtype == "I8"
        num_inputs = weight.shape[-1] * (2 if is_fp4 else 1)
        rms = _FP4_RMS if is_fp4 else _FP8_RMS
        return 126 + round(-math.log2(rms * math.sqrt(num_inputs)))


def seed_of(seed: int, text: str) -> int:
    """A 63-bit seed of its own for each text."""
    digest = hashlib.blake2b(f"{seed}/{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
