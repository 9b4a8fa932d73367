"""Rows between dense layers, sums with their norms and gates, against their definitions."""

import pytest
import torch
from torch import Tensor

from scission.kernels.activation import reference as gates
from scission.kernels.activation import silu_rows
from scission.kernels.linear import QuantizedRows, SplitSums, quantize_rows
from scission.kernels.linear.rows import Scaling
from scission.kernels.norm import add_rows
from scission.kernels.norm import reference as norms
from scission.kernels.target import TARGETS, target_of
from scission.kernels.testing import relative_error

# fp32 sums in another order move a few values to the next bf16
TOLERANCE = 1e-3
# and to the next code
CODE_TOLERANCE = 0.01
SCALINGS: list[Scaling | None] = [None, "dynamic", "static", "ue8m0"]


def _rows(num_rows: int, width: int, device: torch.device) -> Tensor:
    return (torch.randn(num_rows, width) * 3).to(torch.bfloat16).to(device)


def _static(scaling: Scaling | None, device: torch.device) -> Tensor | None:
    return torch.tensor(0.02, device=device) if scaling == "static" else None


def _check(
    actual: Tensor | QuantizedRows,
    expected: Tensor,
    scaling: Scaling | None,
    static_scale: Tensor | None,
) -> None:
    if scaling is None:
        assert isinstance(actual, Tensor) and actual.dtype == torch.bfloat16
        assert relative_error(actual, expected) <= TOLERANCE
        return
    assert isinstance(actual, QuantizedRows)
    rounded = quantize_rows(expected, scaling, static_scale)
    assert actual.scales.shape == rounded.scales.shape
    error = relative_error(actual.dequantize(torch.float32), rounded.dequantize(torch.float32))
    assert error <= CODE_TOLERANCE


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("has_sum", [False, True], ids=["norm", "sum and norm"])
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 128), (3, 640), (260, 256)], ids=str)
def test_sums_and_norms_are_the_references(
    num_rows: int, width: int, scaling: Scaling | None, has_sum: bool, kernel_device: torch.device
) -> None:
    x = _rows(num_rows, width, kernel_device)
    y = _rows(num_rows, width, kernel_device) if has_sum else None
    weight = (torch.rand(width) + 0.5).to(kernel_device)
    static_scale = _static(scaling, kernel_device)
    target = target_of(kernel_device) or TARGETS[1]
    total, rows = add_rows.add_norm(x, y, weight, 1e-6, scaling, static_scale, True, target)
    expected = x if y is None else x + y
    assert torch.equal(total, expected)
    normed = norms.rms_norm(expected, weight, 1e-6)
    _check(rows, normed, scaling, static_scale)
    if isinstance(rows, QuantizedRows):
        assert rows.values is not None
        assert relative_error(rows.values, normed) <= TOLERANCE


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("num_parts", [2, 3, 8])
def test_sums_in_parts_are_added_first(num_parts: int, kernel_device: torch.device) -> None:
    x = _rows(3, 256, kernel_device)
    parts = torch.randn(num_parts, 3, 256).to(kernel_device)
    weight = (torch.rand(256) + 0.5).to(kernel_device)
    target = target_of(kernel_device) or TARGETS[1]
    total, rows = add_rows.add_norm(x, SplitSums(parts), weight, 1e-6, None, None, False, target)
    expected = x + parts.sum(0).to(torch.bfloat16)
    assert relative_error(total, expected) <= TOLERANCE
    _check(rows, norms.rms_norm(expected, weight, 1e-6), None, None)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("limit", "clamps_first"), [(None, False), (1.5, False), (1.5, True)], ids=str
)
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 128), (3, 1280)], ids=str)
def test_gates_are_the_references(
    num_rows: int,
    width: int,
    scaling: Scaling | None,
    limit: float | None,
    clamps_first: bool,
    kernel_device: torch.device,
) -> None:
    gate_up = _rows(num_rows, 2 * width, kernel_device)
    static_scale = _static(scaling, kernel_device)
    target = target_of(kernel_device) or TARGETS[1]
    rows = silu_rows.silu_mul(gate_up, limit, clamps_first, scaling, static_scale, target)
    if clamps_first and limit is not None:
        expected = gates.clamped_silu_mul(gate_up, limit)
    else:
        expected = gates.silu_mul(gate_up, limit)
    _check(rows, expected, scaling, static_scale)
