"""Number formats: spot values of the model's specification, then properties."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scission.kernels.quant import (
    FP4_VALUES,
    dequantize_block_fp8,
    dequantize_group_fp4,
    quantize_block_fp8,
    quantize_group_fp4,
    round_trip_fp4,
    round_trip_fp8,
    ue8m0_round_up,
    ue8m0_to_float,
)


def _random(*shape: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    """Normal values whose magnitude varies over many binades from block to block."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randn(*shape[:-1], 1, generator=generator) * spread
    return torch.randn(*shape, generator=generator) * torch.exp2(exponents)


@pytest.mark.parametrize(
    ("amax", "code"),
    [(448.0, 127), (448.01, 128), (1e-4, 105), (math.nextafter(448.0, 449.0) + 1e-4, 128)],
)
def test_fp8_scale_spot_values(amax: float, code: int) -> None:
    scale, codes = ue8m0_round_up(torch.tensor([amax]) / 448)
    assert codes.item() == code
    assert scale.item() == 2.0 ** (code - 127)


def test_every_ue8m0_code_decodes_to_its_power_of_two() -> None:
    values = ue8m0_to_float(torch.arange(256, dtype=torch.uint8))
    assert values[:255].tolist() == [2.0 ** (code - 127) for code in range(255)]
    assert values[255].isnan()


def test_every_power_of_two_rounds_up_to_itself_and_its_successor_to_the_next() -> None:
    powers = ue8m0_to_float(torch.arange(1, 254, dtype=torch.uint8))
    assert torch.equal(ue8m0_round_up(powers)[0], powers)
    above = (powers.view(torch.int32) + 1).view(torch.float32)
    assert torch.equal(ue8m0_round_up(above)[0], powers * 2)


@given(st.floats(min_value=2.0**-126, max_value=2.0**126, width=32))
def test_scale_is_the_smallest_power_of_two_not_below(x: float) -> None:
    scale = ue8m0_round_up(torch.tensor([x]))[0].item()
    assert scale / 2 < x <= scale


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (0.25, 0),
        (0.75, 1),
        (1.25, 1),
        (1.75, 2),
        (2.5, 2),
        (3.5, 4),
        (5, 4),
        (0.26, 0.5),
        (5.01, 6),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_fp4_rounds_to_nearest_with_ties_to_the_even_code(
    value: float, rounded: float, sign: int
) -> None:
    row = torch.zeros(1, 32)
    row[0, 0] = 6.0  # so that the scale is 1
    row[0, 1] = sign * value
    codes, scales = quantize_group_fp4(row)
    assert scales.tolist() == [[127]]
    assert dequantize_group_fp4(codes, scales)[0, 1].item() == sign * rounded
    assert round_trip_fp4(row)[0, 1].item() == sign * rounded


def test_low_nibble_is_the_even_element() -> None:
    values = dequantize_group_fp4(
        torch.tensor([[0x21] + [0] * 14 + [-0x71]], dtype=torch.int8),  # -0x71 is the byte 0x8f
        torch.tensor([[128]], dtype=torch.uint8),
    )
    assert values[0, :2].tolist() == [1.0, 2.0]
    assert values[0, 30:].tolist() == [-12.0, 0.0]


def test_every_fp4_code_survives_decoding_and_encoding() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.int8).view(16, 16)
    codes[:, 0] = 0x77  # a 6 in every group keeps the scale
    scales = torch.full((16, 1), 120, dtype=torch.uint8)
    values = dequantize_group_fp4(codes, scales)
    assert set(values.abs().flatten().tolist()) == {v * 2.0**-7 for v in FP4_VALUES}
    encoded, encoded_scales = quantize_group_fp4(values)
    assert torch.equal(encoded, codes)
    assert torch.equal(encoded_scales, scales)


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 257), (3, 64, 200), (2, 2, 129, 128)])
def test_fp8_weights_survive_encoding_once_decoded(shape: tuple[int, ...]) -> None:
    codes, scales = quantize_block_fp8(_random(*shape))
    values = dequantize_block_fp8(codes, scales)
    again, again_scales = quantize_block_fp8(values)
    assert torch.equal(dequantize_block_fp8(again, again_scales), values)
    assert torch.equal(values.to(torch.bfloat16).to(torch.float32), values)


@pytest.mark.parametrize("shape", [(130, 257), (2, 129, 300)])
def test_fp8_scales_apply_to_fixed_blocks_of_128(shape: tuple[int, ...]) -> None:
    w = _random(*shape)
    codes, scales = quantize_block_fp8(w)
    expected = torch.empty_like(w)
    for i in range(shape[-2]):
        for j in range(0, shape[-1], 128):
            scale = ue8m0_to_float(scales)[..., i // 128, j // 128, None]
            expected[..., i, j : j + 128] = codes[..., i, j : j + 128].float() * scale
    assert torch.equal(dequantize_block_fp8(codes, scales), expected)
    assert torch.equal(dequantize_block_fp8(codes, scales.view(torch.float8_e8m0fnu)), expected)
    assert torch.equal(dequantize_block_fp8(codes, ue8m0_to_float(scales)), expected)
    # 3 mantissa bits: half a step is 1/16 of the binade, plus half the subnormal step of the block
    error = (expected - w).abs()
    assert (error <= w.abs() / 16 + ue8m0_to_float(scales).max() * 2.0**-10).all()


@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    data=st.data(),
)
@settings(max_examples=30, deadline=None)
def test_a_cut_inside_a_block_decodes_like_the_cut_of_the_decoded(
    rows: int, columns: int, data: st.DataObject
) -> None:
    codes, scales = quantize_block_fp8(_random(rows, columns))
    whole = dequantize_block_fp8(codes, scales)
    top = data.draw(st.integers(0, rows - 1))
    left = data.draw(st.integers(0, columns - 1))
    bottom = data.draw(st.integers(top + 1, rows))
    right = data.draw(st.integers(left + 1, columns))
    cut = dequantize_block_fp8(
        codes[top:bottom, left:right],
        scales[top // 128 : -(-bottom // 128), left // 128 : -(-right // 128)],
        offset=(top % 128, left % 128),
    )
    assert torch.equal(cut, whole[top:bottom, left:right])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "block"), [(448, 64), (7168, 128), (200, 128), (1, 128)])
def test_fp8_round_trip_is_the_value_that_codes_and_scale_hold(
    dtype: torch.dtype, width: int, block: int
) -> None:
    x = _random(7, width).to(dtype)
    x[0] = 0
    x[1] = 1e-9
    x[2, 0] = 448
    expected = torch.empty(7, width)
    for start in range(0, width, block):
        part = x[:, start : start + block].float()
        scale, _ = ue8m0_round_up(part.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448)
        codes = (part / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        expected[:, start : start + block] = codes.float() * scale
    result = round_trip_fp8(x, block)
    assert result.dtype == dtype
    # bf16 holds every value exactly
    assert torch.equal(result.float(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp4_round_trip_is_the_value_that_codes_and_scales_hold(dtype: torch.dtype) -> None:
    x = _random(5, 3, 128).to(dtype)
    x[0, 0] = 0
    result = round_trip_fp4(x)
    assert result.dtype == dtype
    assert torch.equal(result.float(), dequantize_group_fp4(*quantize_group_fp4(x)))


@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=200))
def test_round_trips_are_idempotent_and_bounded(values: list[float]) -> None:
    x = torch.tensor(values)
    for round_trip, half_step in (
        (lambda v: round_trip_fp8(v, 64), 1 / 16),
        (round_trip_fp4, 1 / 4),
    ):
        once = round_trip(x)
        assert torch.equal(round_trip(once), once)
        assert (once.abs().max() >= x.abs().max() * (1 - half_step)) or x.abs().max() < 1e-4
        assert (once * x >= 0).all()


def test_the_argument_is_not_written_to() -> None:
    x = _random(3, 130)
    before = x.clone()
    round_trip_fp8(x, 64)
    round_trip_fp4(x)
    quantize_block_fp8(x)
    quantize_group_fp4(x[:, :128])
    assert torch.equal(x, before)


@pytest.mark.parametrize("width", [128, 130])
def test_strides_do_not_matter(width: int) -> None:
    wide = _random(5, 3, width + 64)
    for x in (wide[..., :width], wide[:, :, 1 : width + 1], wide.transpose(0, 1)[..., :width]):
        assert torch.equal(round_trip_fp8(x, 64), round_trip_fp8(x.contiguous(), 64))
        assert torch.equal(round_trip_fp4(x), round_trip_fp4(x.contiguous()))
    x = _random(width, 6).T
    assert torch.equal(round_trip_fp8(x, 64), round_trip_fp8(x.contiguous(), 64))


def test_empty_tensors_pass() -> None:
    assert round_trip_fp8(torch.empty(0, 448), 64).shape == (0, 448)
    assert round_trip_fp4(torch.empty(0, 64, 128)).shape == (0, 64, 128)
    codes = torch.empty(0, 256, dtype=torch.float8_e4m3fn)
    assert dequantize_block_fp8(codes, torch.empty(0, 2)).shape == (0, 256)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: ue8m0_to_float(torch.zeros(2)), "float32"),
        (lambda: ue8m0_round_up(torch.zeros(2, dtype=torch.bfloat16)), "bfloat16"),
        (
            lambda: dequantize_block_fp8(
                torch.zeros(129, 128, dtype=torch.float8_e4m3fn), torch.zeros(1, 1)
            ),
            r"\[2, 1\]",
        ),
        (
            lambda: dequantize_group_fp4(torch.zeros(2, 8, dtype=torch.int8), torch.zeros(2, 1)),
            "32",
        ),
        (lambda: quantize_group_fp4(torch.zeros(2, 33)), "33"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], Tensor], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()
