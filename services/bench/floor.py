"""The physical floor of a step: bytes that must be read, operations that must be done, and the
device's own measured rates for both. GPUs only: a CPU's figures are compared within one run.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from scission.common.cache.layout import CacheLayout
from scission.common.checkpoint.source import TensorDescription
from scission.services.bench.shape import Shape

COPY_BYTES = 1 << 30
MATRIX_SIZE = 8192
REPEATS = 20
_CODES = frozenset({"F8_E4M3", "I8"})


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """What a device does at best, measured on it."""

    copy_bytes_per_s: float  # read and written
    bf16_flops_per_s: float
    fp8_flops_per_s: float  # bf16's where the build offers no FP8 product


@dataclass(frozen=True, slots=True)
class Operations:
    """Floating-point operations of a pass, by the rate that bounds them."""

    quantised: float  # products with FP8 or FP4 codes
    other: float

    def seconds(self, rates: DeviceRates) -> float:
        return self.quantised / rates.fp8_flops_per_s + self.other / rates.bf16_flops_per_s


def measure_rates(device: torch.device) -> DeviceRates:
    """Measure a GPU; takes about a second and some GiB of its memory."""
    copy_s = _copy_seconds(device)
    flops = 2.0 * MATRIX_SIZE**3
    a = torch.randn(MATRIX_SIZE, MATRIX_SIZE, dtype=torch.bfloat16, device=device)
    b = torch.randn(MATRIX_SIZE, MATRIX_SIZE, dtype=torch.bfloat16, device=device)
    bf16 = flops / _best_seconds(lambda: a @ b.T, device)
    codes_a, codes_b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    try:
        fp8 = flops / _best_seconds(
            lambda: torch._scaled_mm(codes_a, codes_b.T, one, one, out_dtype=torch.bfloat16), device
        )
    except (RuntimeError, NotImplementedError):
        fp8 = bf16
    return DeviceRates(2 * COPY_BYTES / copy_s, bf16, fp8)


def decode_bytes(
    tensors: Mapping[str, TensorDescription],
    layout: CacheLayout,
    shape: Shape,
    batch: int,
    context: int,
) -> float:
    """Bytes that a step of `batch` sequences of `context` tokens must read: weights and state once.

    Of the routed experts, those that `batch` independent tokens are expected to pick.
    """
    weights = 0.0
    for name, tensor in tensors.items():
        if not shape.reads(name):
            continue
        if shape.tables.fullmatch(name):
            weights += tensor.num_bytes / tensor.shape[0] * batch
        elif shape.experts.fullmatch(name):
            weights += tensor.num_bytes * shape.picked(batch)
        else:
            weights += tensor.num_bytes
    return weights + batch * _state_bytes(layout, shape, context)


def prefill_operations(
    tensors: Mapping[str, TensorDescription], shape: Shape, num_tokens: int
) -> Operations:
    """Operations of a whole prompt; a multiplication and its addition are two."""
    quantised = other = 0.0
    for name, tensor in tensors.items():
        is_product = len(tensor.shape) >= 2 and name.endswith((".weight", "_fn"))
        if not shape.reads(name) or shape.tables.fullmatch(name) or not is_product:
            continue
        values = math.prod(tensor.shape) * (2 if tensor.dtype == "I8" else 1)
        rows = 1.0 if shape.head.fullmatch(name) else float(num_tokens)
        if shape.experts.fullmatch(name):
            rows *= shape.expert_share
        if tensor.dtype in _CODES:
            quantised += 2 * values * rows
        else:
            other += 2 * values * rows
    seen = np.arange(1, num_tokens + 1, dtype=np.float64)
    return Operations(quantised, other + shape.attention(seen))


def _state_bytes(layout: CacheLayout, shape: Shape, context: int) -> float:
    """What one sequence's step reads of its state."""
    total = 0.0
    for component in layout.components:
        first, last = component.shipped_rows(context)
        num_rows = min(last - first, shape.row_limits.get(component.name, last))
        total += num_rows * component.row_bytes * len(component.layers)
    return total


def _copy_seconds(device: torch.device) -> float:
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(action: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        torch.cuda.synchronize(device)
        started_at = time.perf_counter()
        action()
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started_at)
    return best
