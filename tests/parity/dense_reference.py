"""transformers' dense models on a checkpoint's dequantised weights, in fp32: the oracles."""

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from scission.common.checkpoint.headers import read_json
from tests.dense_checkpoints import dequantized_state

_NOT_OURS = ("quantization_config", "architectures", "torch_dtype")


def dense_reference(directory: Path) -> torch.nn.Module:
    """The oracle of a checkpoint folder, with eager attention, by its architecture."""
    raw: dict[str, Any] = dict(read_json(directory / "config.json"))
    return {"Qwen3ForCausalLM": _qwen3}[raw["architectures"][0]](directory, raw)


def _qwen3(directory: Path, raw: dict[str, Any]) -> torch.nn.Module:
    config = Qwen3Config(**{k: v for k, v in raw.items() if k not in _NOT_OURS})
    config._attn_implementation = "eager"
    model = Qwen3ForCausalLM(config)
    model.train(False)
    state = dequantized_state(directory)
    if raw["tie_word_embeddings"]:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return model
