"""Frequencies against the specification's spot values."""

import pytest
import torch

from scission.common.layers.rope import YarnScaling, rope_frequencies

YARN = YarnScaling(factor=16, original_max_positions=65536, beta_fast=32, beta_slow=1)


def test_plain_frequencies_are_powers_of_the_base() -> None:
    frequencies = rope_frequencies(64, 10000)
    assert frequencies.dtype == torch.float32
    for pair in (0, 1, 31):
        assert frequencies[pair].item() == pytest.approx(10000 ** (-2 * pair / 64), rel=1e-6)


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        (0, 1.0),
        (1, 0.687656022),
        (15, 0.00363553858),
        (16, 0.002265625),
        (20, 2.96977778e-4),
        (24, 1.953125e-5),
        (31, 5.68052904e-7),
    ],
)
def test_yarn_frequencies_of_the_published_models(pair: int, value: float) -> None:
    assert rope_frequencies(64, 160000, YARN)[pair].item() == pytest.approx(value, rel=2e-6)


def test_yarn_whose_ramp_has_no_width_is_finite() -> None:
    narrow = YarnScaling(factor=4, original_max_positions=8, beta_fast=32, beta_slow=1)
    assert rope_frequencies(4, 100, narrow).isfinite().all()
