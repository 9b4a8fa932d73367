"""config.json is taken whole or refused by the name of the field."""

from typing import Any

import pytest

from scission.common.errors import CheckpointError
from scission.common.model.config import parse_config
from tests.reference_checkpoint import tiny_config

REQUIRED = sorted(
    set(tiny_config()) - {"architectures", "model_type", "torch_dtype", "expert_dtype"}
    - {"quantization_config"}
)  # fmt: skip


def test_a_published_config_is_taken() -> None:
    config = parse_config(tiny_config())
    assert config.layer_ratios == (0, 128, 4, 128, 4, 0)
    assert config.heads_dim == 4 * 64
    assert config.eos_token_ids == (1,)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_field_is_named_with_the_architecture(name: str) -> None:
    raw = tiny_config()
    del raw[name]
    with pytest.raises(CheckpointError, match=rf"{name}.*DeepseekV4ForCausalLM"):
        parse_config(raw)


@pytest.mark.parametrize("name", ["factor", "original_max_position_embeddings", "beta_fast"])
def test_a_missing_rope_field_is_named(name: str) -> None:
    raw = tiny_config()
    del raw["rope_scaling"][name]
    with pytest.raises(CheckpointError, match=rf"rope_scaling\.{name}"):
        parse_config(raw)


def test_a_missing_scale_format_means_ue8m0() -> None:
    raw = tiny_config()
    del raw["quantization_config"]["scale_fmt"]
    parse_config(raw)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"compress_ratios": [0, 128, 4, 128, 4, 0]}, "compress_ratios has 6"),
        ({"compress_ratios": [0, 128, 8, 128, 4, 0, 0]}, "compress_ratios holds"),
        ({"compress_ratios": [0, 128, 4, 128, 4, 0, 4]}, "MTP"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"n_shared_experts": 2}, "n_shared_experts"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_size": "160"}, "hidden_size must be int"),
        ({"hidden_size": True}, "hidden_size must be int"),
        ({"o_groups": 3}, "o_groups"),
        ({"index_head_dim": 48}, "index_head_dim"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"num_hash_layers": 7}, "num_hash_layers"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, "weight_block_size"),
    ],
)
def test_what_the_model_does_not_compute_is_refused_by_name(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=named):
        parse_config(tiny_config(**changes))


def test_other_scale_formats_are_refused() -> None:
    raw = tiny_config()
    raw["quantization_config"]["scale_fmt"] = "fp32"
    with pytest.raises(CheckpointError, match="scale_fmt"):
        parse_config(raw)


def test_several_ends_of_sequence_are_taken() -> None:
    assert parse_config(tiny_config(eos_token_id=[1, 5])).eos_token_ids == (1, 5)
