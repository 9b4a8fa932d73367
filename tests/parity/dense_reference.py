"""transformers' dense models on a checkpoint's dequantised weights, in fp32: the oracles."""

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Ministral3Config,
    Ministral3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

from scission.common.checkpoint.headers import read_json
from tests.dense_checkpoints import dequantized_state

_NOT_OURS = ("quantization_config", "architectures", "torch_dtype")


def dense_reference(directory: Path) -> torch.nn.Module:
    """The oracle of a checkpoint folder, with eager attention, by its architecture."""
    raw: dict[str, Any] = dict(read_json(directory / "config.json"))
    oracles = {
        "Qwen3ForCausalLM": _qwen3,
        "Mistral3ForConditionalGeneration": _ministral3,
        "Step3p5ForCausalLM": _step3p5,
    }
    return oracles[raw["architectures"][0]](directory, raw)


def _qwen3(directory: Path, raw: dict[str, Any]) -> torch.nn.Module:
    config = Qwen3Config(**{k: v for k, v in raw.items() if k not in _NOT_OURS})
    config._attn_implementation = "eager"
    return _filled(Qwen3ForCausalLM(config), dequantized_state(directory))


def _ministral3(directory: Path, raw: dict[str, Any]) -> torch.nn.Module:
    config = Ministral3Config(**raw["text_config"])
    config._attn_implementation = "eager"
    state = {}
    for name, tensor in dequantized_state(directory).items():
        if not re.match(r"(model\.)?(vision_tower|multi_modal_projector)\.", name):
            name = name.removeprefix("language_model.")
            state[name.replace("model.language_model.", "model.")] = tensor
    return _filled(Ministral3ForCausalLM(config), state)


class _Step(torch.nn.Module):
    """transformers has no class of the text model with a head."""

    def __init__(self, config: Step3p7TextConfig) -> None:
        super().__init__()
        self.model = Step3p7TextModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, **options: Any) -> CausalLMOutputWithPast:
        result = self.model(input_ids, **options)
        logits = self.lm_head(result.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=result.past_key_values)


def _step3p5(directory: Path, raw: dict[str, Any]) -> torch.nn.Module:
    fields = {k: v for k, v in raw.items() if k not in (*_NOT_OURS, "model_type")}
    config = Step3p7TextConfig(**copy.deepcopy(fields))
    config._attn_implementation = "eager"
    state = {
        name: tensor
        for name, tensor in dequantized_state(directory).items()
        if f"model.layers.{raw['num_hidden_layers']}." not in name
    }
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, _, part = name.partition(".moe.")
        if part == "gate_proj.weight":
            up = state[f"{layer}.moe.up_proj.weight"]
            renamed[f"{layer}.mlp.experts.gate_up_proj"] = torch.cat([tensor, up], dim=1)
        elif part == "down_proj.weight":
            renamed[f"{layer}.mlp.experts.down_proj"] = tensor
        elif part == "gate.weight":
            renamed[f"{layer}.mlp.gate.weight"] = tensor
        elif part == "router_bias":
            renamed[f"{layer}.mlp.gate.e_score_correction_bias"] = tensor
        elif not part:
            renamed[name.replace(".share_expert.", ".mlp.shared_experts.")] = tensor
    return _filled(_Step(config), renamed)


def _filled(model: torch.nn.Module, state: dict[str, Tensor]) -> torch.nn.Module:
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.train(False)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return model
