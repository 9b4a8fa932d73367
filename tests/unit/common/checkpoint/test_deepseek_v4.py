"""The table of DeepSeek-V4's tensors, against what is known of the published files."""

import pytest
import torch

from scission.common.checkpoint.deepseek_v4 import random_values, tensor_table
from scission.common.errors import CheckpointError
from tests.reference_checkpoint import published_config, tiny_config


def _is_routed(name: str) -> bool:
    return name.startswith("layers.") and ".ffn.experts." in name


@pytest.mark.parametrize(("model", "num_tensors"), [("pro", 145116), ("flash", 69187)])
def test_the_published_models_have_this_many_tensors(model: str, num_tensors: int) -> None:
    assert len(tensor_table(published_config(model))) == num_tensors


def test_the_routed_experts_of_the_published_models_have_their_sizes() -> None:
    for model, codes_gb, scales_gb in (("pro", 774, 48), ("flash", 139, 9)):
        table = tensor_table(published_config(model))
        experts = {name: spec for name, spec in table.items() if _is_routed(name)}
        codes = sum(s.num_bytes for name, s in experts.items() if name.endswith(".weight"))
        scales = sum(s.num_bytes for name, s in experts.items() if name.endswith(".scale"))
        assert (round(codes / 1e9), round(scales / 1e9)) == (codes_gb, scales_gb)


def test_router_tables_name_different_experts_in_each_row() -> None:
    generator = torch.Generator().manual_seed(0)
    config = tiny_config()
    table = random_values("layers.0.ffn.gate.tid2eid", (320, 3), config, generator)
    assert table.dtype == torch.int64
    assert 0 <= table.min() <= table.max() < 8
    assert all(len(set(row)) == 3 for row in table.tolist())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"compress_ratios": [0, 4]}, "2 compress_ratios for 6 layers"),
        ({"expert_dtype": "int3"}, "int3"),
        ({"moe_intermediate_size": 100}, "multiples of 32, got 100"),
    ],
)
def test_a_config_that_cannot_be_is_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        tensor_table(tiny_config(**changes))


def test_a_missing_field_is_named() -> None:
    config = tiny_config()
    del config["o_lora_rank"]
    with pytest.raises(CheckpointError, match=r"config\.json lacks o_lora_rank"):
        tensor_table(config)
