"""transformers' DeepSeek-V4 on a checkpoint's dequantised weights, in fp32: the oracle."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from scission.common.checkpoint.headers import read_json
from tests.reference_checkpoint import dequantized_state

# the published component names, outermost first, as transformers spells them
_COMPONENTS: tuple[tuple[str, str], ...] = (
    (r"embed\.weight", "model.embed_tokens.weight"),
    (r"head\.weight", "lm_head.weight"),
    (r"norm\.weight", "model.norm.weight"),
    (r"hc_head_(fn|base|scale)", r"model.hc_head.hc_\1"),
    (r"(layers\.\d+\.)attn_norm\.weight", r"model.\1input_layernorm.weight"),
    (r"(layers\.\d+\.)ffn_norm\.weight", r"model.\1post_attention_layernorm.weight"),
    (r"(layers\.\d+\.)hc_(attn|ffn)_(fn|base|scale)", r"model.\1\2_hc.\3"),
    (r"(layers\.\d+\.)attn\.attn_sink", r"model.\1self_attn.sinks"),
    (r"(layers\.\d+\.)attn\.wq_a\.weight", r"model.\1self_attn.q_a_proj.weight"),
    (r"(layers\.\d+\.)attn\.wq_b\.weight", r"model.\1self_attn.q_b_proj.weight"),
    (r"(layers\.\d+\.)attn\.q_norm\.weight", r"model.\1self_attn.q_a_norm.weight"),
    (r"(layers\.\d+\.)attn\.wkv\.weight", r"model.\1self_attn.kv_proj.weight"),
    (r"(layers\.\d+\.)attn\.kv_norm\.weight", r"model.\1self_attn.kv_norm.weight"),
    (r"(layers\.\d+\.)attn\.wo_a\.weight", r"model.\1self_attn.o_a_proj.weight"),
    (r"(layers\.\d+\.)attn\.wo_b\.weight", r"model.\1self_attn.o_b_proj.weight"),
    (
        r"(layers\.\d+\.)attn\.indexer\.weights_proj\.weight",
        r"model.\1self_attn.compressor.indexer.scorer.weights_proj.weight",
    ),
    (
        r"(layers\.\d+\.)attn\.indexer\.wq_b\.weight",
        r"model.\1self_attn.compressor.indexer.q_b_proj.weight",
    ),
    (r"(layers\.\d+\.)ffn\.gate\.weight", r"model.\1mlp.gate.weight"),
    (r"(layers\.\d+\.)ffn\.gate\.bias", r"model.\1mlp.gate.e_score_correction_bias"),
    (r"(layers\.\d+\.)ffn\.gate\.tid2eid", r"model.\1mlp.gate.tid2eid"),
    (
        r"(layers\.\d+\.)ffn\.shared_experts\.w1\.weight",
        r"model.\1mlp.shared_experts.gate_proj.weight",
    ),
    (
        r"(layers\.\d+\.)ffn\.shared_experts\.w2\.weight",
        r"model.\1mlp.shared_experts.down_proj.weight",
    ),
    (
        r"(layers\.\d+\.)ffn\.shared_experts\.w3\.weight",
        r"model.\1mlp.shared_experts.up_proj.weight",
    ),
)
_COMPRESSOR = {
    "ape": "position_bias",
    "wkv.weight": "kv_proj.weight",
    "wgate.weight": "gate_proj.weight",
    "norm.weight": "kv_norm.weight",
}


def reference_model(directory: Path) -> DeepseekV4ForCausalLM:
    """The oracle on the weights of a checkpoint folder, with eager attention."""
    raw = read_json(directory / "config.json")
    model = DeepseekV4ForCausalLM(reference_config(raw))
    model.train(False)
    state = _renamed(dequantized_state(directory), int(raw["n_routed_experts"]))  # type: ignore[call-overload]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not missing, (missing, unexpected)
    return model


def reference_config(raw: Mapping[str, Any]) -> DeepseekV4Config:
    fields = {k: v for k, v in raw.items() if k not in ("quantization_config", "architectures")}
    config = DeepseekV4Config(**fields)
    config._attn_implementation = "eager"
    return config


def _renamed(state: Mapping[str, Tensor], num_experts: int) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith("mtp.") and ".ffn.experts." not in name:
            named[_rename(name)] = tensor
    layers = sorted({int(n.split(".")[1]) for n in state if n.startswith("layers.")})
    for layer in layers:
        w1, w2, w3 = (
            torch.stack(
                [state[f"layers.{layer}.ffn.experts.{e}.w{i}.weight"] for e in range(num_experts)]
            )
            for i in (1, 2, 3)
        )
        named[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        named[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    return named


def _rename(name: str) -> str:
    compressor = re.fullmatch(r"(layers\.\d+\.)attn\.(indexer\.)?compressor\.(.+)", name)
    if compressor:
        layer, index, parameter = compressor.groups()
        inner = "indexer." if index else ""
        return f"model.{layer}self_attn.compressor.{inner}{_COMPRESSOR[parameter]}"
    for pattern, target in _COMPONENTS:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(target)
    raise AssertionError(f"no transformers name for {name}")
