"""Which inputs are rounded, and what a device keeps."""

import pytest
import torch

from scission.common.checkpoint.weights import Matrix
from scission.common.errors import CheckpointError, ConfigError
from scission.common.layers.linear import Linear
from scission.common.layers.numerics import Numerics
from scission.kernels.quant import quantize_block_fp8, round_trip_fp8

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
