"""The published dense checkpoints, name by name: every tensor is explained, nothing is read."""

from pathlib import Path
from typing import Any

import pytest
import torch

from scission.common.checkpoint.headers import TensorHeader
from scission.common.checkpoint.inspect import Inspection, inspect_headers
from scission.common.checkpoint.table import TensorSpec
from scission.common.checkpoint.weights import Ledger, Weights
from scission.common.checkpoint.write_deepseek_v4 import write_json
from scission.common.config import ModelOptions
from scission.common.errors import CheckpointError
from scission.common.layers.numerics import Numerics
from scission.common.model.load import load_model
from scission.common.model.registry import find_architecture
from scission.common.parallel.ranks import Axis, Ranks
from tests.published_dense import (
    MINISTRAL3_8B,
    QWEN3_8B,
    STEP3P5_FLASH,
    Tensors,
    ministral3_8b_tensors,
    qwen3_8b_tensors,
    step3p5_flash_tensors,
)

BF16 = Numerics(torch.bfloat16, rounds=True)

CHECKPOINTS: dict[str, tuple[dict[str, Any], Tensors]] = {
    "qwen3": (QWEN3_8B, qwen3_8b_tensors()),
    "qwen3-fp32-scales": (QWEN3_8B, qwen3_8b_tensors("F32")),
    "ministral3": (MINISTRAL3_8B, ministral3_8b_tensors()),
    "ministral3-resaved": (
        MINISTRAL3_8B,
        ministral3_8b_tensors("model.language_model", "lm_head", "model."),
    ),
    "step3p5": (STEP3P5_FLASH, step3p5_flash_tensors()),
    "step3p5-quantised-gate": (
        STEP3P5_FLASH,
        step3p5_flash_tensors(quantised_gate=True, router="F32"),
    ),
}
RANKS = {
    "one rank": Ranks(),
    **{f"tp {size}": Ranks(tp=Axis(size - 1, size)) for size in (2, 4, 8)},
    **{f"ep {size}": Ranks(ep=Axis(size - 1, size)) for size in (2, 3, 5, 8)},
}
published = pytest.mark.parametrize("checkpoint", CHECKPOINTS)


class HeaderSource:
    """Tensors that are described and cannot be read."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = {name: TensorSpec(*described) for name, described in tensors.items()}

    def read(self, name: str, part: tuple[slice, ...], out: torch.Tensor) -> None:
        raise AssertionError(f"{name} is read")

    def revision(self) -> str:
        return ""


def _inspect(config: dict[str, Any], tensors: Tensors) -> Inspection:
    headers = {
        name: TensorHeader(dtype, shape, Path("model-00001.safetensors"), 0)
        for name, (dtype, shape) in tensors.items()
    }
    return inspect_headers(Path("published"), config, headers)


@published
def test_inspect_explains_every_tensor(checkpoint: str) -> None:
    inspection = _inspect(*CHECKPOINTS[checkpoint])
    assert inspection.problems == ()
    assert inspection.fits and inspection.states


@published
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_the_model_takes_every_tensor(checkpoint: str, ranks: Ranks) -> None:
    raw, tensors = CHECKPOINTS[checkpoint]
    architecture = find_architecture(raw)
    config = architecture.parse(raw)
    weights = Weights(Ledger(HeaderSource(tensors), "meta"))
    architecture.build(weights, config, ranks, BF16, 128)
    weights.finish(architecture.ignored(config))


@pytest.mark.parametrize(
    "raw", [QWEN3_8B, MINISTRAL3_8B, STEP3P5_FLASH], ids=lambda r: r["model_type"]
)
def test_dummy_weights_are_allocated_from_the_config_alone(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    write_json(tmp_path / "config.json", raw)
    options = ModelOptions(tmp_path, device="cpu", dtype="bfloat16", load_format="dummy")
    loaded = load_model(options, torch.device("meta"))
    text = raw.get("text_config", raw)
    assert (loaded.vocab_size, loaded.max_model_len) == (
        text["vocab_size"],
        text["max_position_embeddings"],
    )


@published
def test_a_tensor_too_many_or_too_few_is_named(checkpoint: str) -> None:
    raw, tensors = CHECKPOINTS[checkpoint]
    name = next(n for n in tensors if n.endswith("layers.1.mlp.down_proj.weight"))
    fewer = {n: t for n, t in tensors.items() if n != name}
    more = tensors | {"model.layers.1.self_attn.q_proj.bias": ("BF16", (4096,))}
    assert any(f"1 tensors are missing: {name}" in p for p in _inspect(raw, fewer).problems)
    assert any("q_proj.bias" in p for p in _inspect(raw, more).problems)


@pytest.mark.parametrize(
    ("config", "tensors", "bytes_per_token", "bytes_per_request"),
    [
        (QWEN3_8B, qwen3_8b_tensors(), 147456, 0),
        (MINISTRAL3_8B, ministral3_8b_tensors(), 139264, 0),
        # a ring holds the window, of which one token less is shipped
        (STEP3P5_FLASH, step3p5_flash_tensors(), 49152, 33 * 4096 * 512),
    ],
    ids=["qwen3", "ministral3", "step3p5"],
)
def test_state_weighs_what_the_specifications_say(
    config: dict[str, Any], tensors: Tensors, bytes_per_token: int, bytes_per_request: int
) -> None:
    state = _inspect(config, tensors).states[0]
    assert (state.bytes_per_token, state.bytes_per_request) == (bytes_per_token, bytes_per_request)
    assert state.handoff_bytes[8192] == 8192 * bytes_per_token + bytes_per_request // 512 * 511


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (QWEN3_8B, "num_key_value_heads"),
        (QWEN3_8B, "tie_word_embeddings"),
        (QWEN3_8B, "rope_theta"),
        (MINISTRAL3_8B, "text_config"),
        (STEP3P5_FLASH, "moe_layers_enum"),
        (STEP3P5_FLASH, "num_attention_groups"),
        (STEP3P5_FLASH, "partial_rotary_factors"),
        (STEP3P5_FLASH, "sliding_window"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["model_type"],
)
def test_a_missing_field_is_named_with_the_architecture(raw: dict[str, Any], field: str) -> None:
    cut = {name: value for name, value in raw.items() if name != field}
    with pytest.raises(CheckpointError) as raised:
        find_architecture(cut).parse(cut)
    assert field in str(raised.value) and raw["architectures"][0] in str(raised.value)


def test_an_unknown_architecture_is_refused_with_the_list() -> None:
    with pytest.raises(CheckpointError) as raised:
        find_architecture({"architectures": ["LlamaForCausalLM"]})
    for name in (
        "LlamaForCausalLM",
        "DeepseekV4ForCausalLM",
        "Mistral3ForConditionalGeneration",
        "Qwen3ForCausalLM",
        "Step3p5ForCausalLM",
    ):
        assert name in str(raised.value)
