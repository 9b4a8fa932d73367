"""The spellings of rope in config.json, and the factor of cos and sin that each means."""

import math
from typing import Any

import pytest

from scission.common.errors import CheckpointError
from scission.common.model.fields import ConfigFields
from scission.common.model.rope_fields import read_rope

YARN: dict[str, Any] = {"factor": 16, "original_max_position_embeddings": 16384}


def _read(**raw: Any) -> Any:
    return read_rope(ConfigFields(raw, "SomeModel"))


@pytest.mark.parametrize(
    "raw",
    [
        {"rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default"}},
    ],
)
def test_plain_rope_has_a_base_alone(raw: dict[str, Any]) -> None:
    assert _read(**raw) == (1e6, None)


@pytest.mark.parametrize(
    "raw",
    [
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", **YARN}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
    ],
)
def test_older_and_newer_files_say_the_same(raw: dict[str, Any]) -> None:
    theta, scaling = _read(**raw)
    assert theta == 1e6 and scaling.factor == 16 and scaling.original_max_positions == 16384
    assert (scaling.beta_fast, scaling.beta_slow) == (32, 1)
    assert scaling.rotation_scale == pytest.approx(0.1 * math.log(16) + 1)


@pytest.mark.parametrize(
    ("keys", "scale"),
    [
        ({"mscale": 1, "mscale_all_dim": 1}, 1.0),
        ({"mscale": 1}, 0.1 * math.log(16) + 1),
        ({"mscale": 1, "mscale_all_dim": 0}, 0.1 * math.log(16) + 1),
        ({"mscale": 2, "mscale_all_dim": 1}, (0.2 * math.log(16) + 1) / (0.1 * math.log(16) + 1)),
        ({"attention_factor": 1.25}, 1.25),
    ],
)
def test_cos_and_sin_are_scaled_by_both_mscales(keys: dict[str, float], scale: float) -> None:
    _, scaling = _read(rope_theta=1e6, rope_scaling={"type": "yarn", **YARN, **keys})
    assert scaling.rotation_scale == pytest.approx(scale)


def test_other_scalings_and_missing_fields_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"SomeModel.*'longrope' is not served"):
        _read(rope_theta=1e6, rope_scaling={"type": "longrope"})
    with pytest.raises(CheckpointError, match=r"rope_scaling\.factor, which SomeModel needs"):
        _read(rope_theta=1e6, rope_scaling={"type": "yarn"})
    with pytest.raises(CheckpointError, match="lacks rope_theta"):
        _read()
