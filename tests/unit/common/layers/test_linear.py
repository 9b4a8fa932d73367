"""Which inputs are rounded, and what a device keeps."""

from dataclasses import replace

import pytest
import torch

from scission.common.checkpoint.weights import Matrix
from scission.common.errors import CheckpointError, ConfigError
from scission.common.layers.linear import Linear
from scission.common.layers.numerics import Numerics
from scission.kernels.linear import quantize_rows
from scission.kernels.quant import (
    quantize_block_fp8,
    round_trip_fp8,
    round_trip_fp8_dynamic,
    round_trip_fp8_static,
    ue8m0_to_float,
)

EXACT = Numerics(torch.float32, rounds=False)
DEPLOYED = Numerics(torch.float32, rounds=True)


def _quantised(out_features: int = 130, in_features: int = 200) -> Matrix:
    codes, scales = quantize_block_fp8(torch.randn(out_features, in_features))
    return Matrix("fp8_block", codes, scales, out_features, in_features)


def _plain() -> Matrix:
    return Matrix("plain", torch.randn(8, 200).to(torch.bfloat16), None, 8, 200)


def test_deployed_numerics_round_the_input_of_a_quantised_matrix() -> None:
    matrix, x = _quantised(), torch.randn(3, 200)
    weight = matrix.dequantize(torch.float32)
    assert torch.equal(Linear([matrix], DEPLOYED)(x), round_trip_fp8(x, 128) @ weight.mT)
    assert torch.equal(Linear([matrix], EXACT)(x), x @ weight.mT)


def test_neither_a_plain_matrix_nor_an_excepted_one_has_its_input_rounded() -> None:
    x = torch.randn(3, 200)
    plain, excepted = _plain(), _quantised()
    assert torch.equal(Linear([plain], DEPLOYED)(x), x @ plain.dequantize(torch.float32).mT)
    linear = Linear([excepted], DEPLOYED, rounds_input=False)
    assert torch.equal(linear(x), x @ excepted.dequantize(torch.float32).mT)


def _with_float_scales() -> Matrix:
    matrix = _quantised()
    assert matrix.scales is not None
    return replace(matrix, scales=ue8m0_to_float(matrix.scales) * 1.25)


def _with_one_scale(input_scale: float | None) -> Matrix:
    codes = torch.randn(64, 200).to(torch.float8_e4m3fn)
    static = None if input_scale is None else torch.tensor(input_scale)
    return Matrix("fp8_tensor", codes, torch.tensor(0.3), 64, 200, input_scale=static)


def test_float_scales_of_weights_go_with_float_scales_of_inputs() -> None:
    x = torch.randn(3, 200)
    for matrix in (_with_float_scales(), _with_one_scale(None)):
        linear = Linear([matrix], DEPLOYED)
        assert (linear.scaling, linear.static_scale) == ("dynamic", None)
        expected = round_trip_fp8_dynamic(x) @ matrix.dequantize(torch.float32).mT
        assert torch.equal(linear(x), expected)
        assert not torch.equal(linear(x), round_trip_fp8(x, 128) @ linear.weight.mT)


def test_a_static_scale_rounds_and_saturates() -> None:
    x = torch.randn(3, 200)
    matrix = _with_one_scale(0.004)
    linear = Linear([matrix], DEPLOYED)
    assert linear.scaling == "static"
    rounded = round_trip_fp8_static(x, torch.tensor(0.004))
    assert rounded.abs().max() == torch.tensor(448 * 0.004) < x.abs().max()
    assert torch.equal(linear(x), rounded @ matrix.dequantize(torch.float32).mT)
    exact = Linear([matrix], EXACT)
    assert exact.scaling is None and torch.equal(exact(x), x @ exact.weight.mT)


def test_of_static_scales_over_one_input_the_largest_counts() -> None:
    linear = Linear([_with_one_scale(0.01), _with_one_scale(0.03)], DEPLOYED)
    assert linear.static_scale is not None and linear.static_scale == torch.tensor(0.03)


@pytest.mark.parametrize("kind", ["ue8m0", "dynamic", "static"])
def test_rows_quantised_before_multiply_as_those_quantised_here(kind: str) -> None:
    matrix = {
        "ue8m0": _quantised(),
        "dynamic": _with_float_scales(),
        "static": _with_one_scale(0.01),
    }[kind]
    linear, x = Linear([matrix], DEPLOYED), torch.randn(3, 200)
    assert linear.scaling == kind
    rows = quantize_rows(x, linear.scaling, linear.static_scale)
    assert torch.equal(linear(rows), linear(x))
    # a layer that rounds nothing takes the values beside the codes
    assert torch.equal(Linear([matrix], EXACT)(rows), x @ linear.weight.mT)
    with pytest.raises(ValueError, match="only their codes"):
        Linear([matrix], EXACT)(replace(rows, values=None))


def test_matrices_of_one_input_lie_side_by_side() -> None:
    a, b, x = _quantised(), _quantised(64), torch.randn(2, 200)
    both = Linear([a, b], DEPLOYED)(x)
    assert both.shape == (2, 194)
    torch.testing.assert_close(both[:, :130], Linear([a], DEPLOYED)(x))
    torch.testing.assert_close(both[:, 130:], Linear([b], DEPLOYED)(x))


def test_plain_and_quantised_matrices_are_not_mixed() -> None:
    with pytest.raises(CheckpointError, match="all quantised or none"):
        Linear([_plain(), _quantised()], DEPLOYED)


def test_weights_in_bfloat16_are_exact() -> None:
    matrix = _quantised()
    weight = Linear([matrix], Numerics(torch.bfloat16, rounds=True)).weight
    assert torch.equal(weight.float(), matrix.dequantize(torch.float32))


def test_exact_numerics_require_float32() -> None:
    with pytest.raises(ConfigError, match="exact requires dtype float32"):
        Numerics(torch.bfloat16, rounds=False)
    with pytest.raises(ConfigError, match="float16"):
        Numerics(torch.float16, rounds=True)
