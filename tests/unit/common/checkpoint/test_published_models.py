"""The model and the published checkpoints, name by name: headers only, nothing is read."""

import pytest
import torch

from scission.common.checkpoint.deepseek_v4 import IGNORED
from scission.common.checkpoint.dummy import DummySource
from scission.common.checkpoint.weights import Ledger, Weights
from scission.common.errors import CheckpointError
from scission.common.layers.numerics import Numerics
from scission.common.model.config import parse_config
from scission.common.model.deepseek_v4 import DeepseekV4
from scission.common.parallel.ranks import Axis, Ranks
from tests.reference_checkpoint import published_config, tiny_config

BF16 = Numerics(torch.bfloat16, rounds=True)


@pytest.mark.parametrize("model", ["flash", "pro"])
@pytest.mark.parametrize(
    "ranks",
    [Ranks(), Ranks(tp=Axis(3, 8)), Ranks(ep=Axis(7, 8))],
    ids=["one rank", "tp 8", "ep 8"],
)
def test_the_model_takes_every_tensor_of_the_published_checkpoints(
    model: str, ranks: Ranks
) -> None:
    raw = published_config(model)
    weights = Weights(Ledger(DummySource(raw), "meta"))
    DeepseekV4(weights, parse_config(raw), ranks, BF16)
    weights.finish(IGNORED)


def test_a_model_of_another_shape_names_what_does_not_fit() -> None:
    raw = tiny_config()
    weights = Weights(Ledger(DummySource(raw), "meta"))
    other = parse_config(tiny_config(q_lora_rank=64, num_hash_layers=1))
    DeepseekV4(weights, other, Ranks(), BF16)
    with pytest.raises(CheckpointError) as raised:
        weights.finish(IGNORED)
    message = str(raised.value)
    assert "layers.0.attn.wq_a.weight is F8_E4M3 [96, 160], wanted F8_E4M3 [64, 160]" in message
