"""Tiny configs of the dense models, and their checkpoints as decoded without our loader."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

BLOCK_QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def qwen3_config(**changes: Any) -> dict[str, Any]:
    """config.json of a tiny Qwen3; no dim is a multiple of 128, heads are wider than the model."""
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": 48,
        "hidden_act": "silu",
        "hidden_size": 160,
        "intermediate_size": 200,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "num_attention_heads": 8,
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 320,
        "quantization_config": BLOCK_QUANTIZATION,
    }
    return config | changes


def ministral3_config(**text_changes: Any) -> dict[str, Any]:
    """config.json of a tiny Ministral 3; the trained context ends inside the tests' prompts."""
    text: dict[str, Any] = {
        "model_type": "ministral3",
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 160,
        "intermediate_size": 200,
        "max_position_embeddings": 1024,
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 320,
    }
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": text | text_changes,
        "vision_config": {"model_type": "pixtral", "hidden_size": 64},
        "quantization_config": {
            "quant_method": "fp8",
            "activation_scheme": "static",
            "dequantize": False,
            "modules_to_not_convert": [
                "model.vision_tower",
                "model.multi_modal_projector",
                "lm_head",
            ],
            "weight_block_size": None,
        },
    }


def step3p5_config(**changes: Any) -> dict[str, Any]:
    """config.json of a tiny Step-3.5: both head counts, dense and routed layers, every clamp.

    The per-layer lists go on for the MTP layer, which is not served.
    """
    types = ["full_attention", *["sliding_attention"] * 3, "full_attention", "sliding_attention"]
    is_full = [kind == "full_attention" for kind in types]
    config: dict[str, Any] = {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "hidden_size": 160,
        "intermediate_size": 200,
        "num_hidden_layers": 5,
        "num_nextn_predict_layers": 1,
        "vocab_size": 320,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_attention_heads": 4,
        "num_attention_groups": 2,
        "head_dim": 32,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": 6,
            "num_attention_groups": 2,
            "head_dim": 32,
            "true_head_dim": 32,
        },
        "layer_types": types,
        "sliding_window": 40,
        "rope_theta": [5e6 if full else 1e4 for full in is_full],
        "partial_rotary_factors": [0.5 if full else 1.0 for full in is_full],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 2.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
            "original_max_position_embeddings": 128,
        },
        "yarn_only_types": ["full_attention"],
        "use_qk_norm": True,
        "zero_centered": True,
        "use_head_wise_attn_gate": True,
        "sink": False,
        "use_rope_layers": [],
        "moe_layers_enum": "2,3,4",
        "moe_num_experts": 8,
        "moe_top_k": 3,
        "moe_intermediate_size": 72,
        "share_expert_dim": 96,
        "moe_router_activation": "sigmoid",
        "norm_expert_weight": True,
        "moe_router_scaling_factor": 3.0,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        # low enough to act on random weights
        "swiglu_limits": [0.0, 0.0, 0.0, 0.3, 0.3, 0.0],
        "swiglu_limits_shared": [0.0, 0.5, 0.0, 0.0, 0.4, 0.0],
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
        "quantization_config": BLOCK_QUANTIZATION,
    }
    return config | changes


def vision_decoys() -> dict[str, Tensor]:
    """Tensors of a vision tower that nothing may read: their values are no numbers."""
    return {
        "vision_tower.patch_conv.weight": torch.full((8, 3, 2, 2), torch.nan, dtype=torch.bfloat16),
        "vision_tower.transformer.layers.0.attention.q_proj.weight": torch.full((8, 8), torch.nan),
        "vision_tower.transformer.layers.0.attention.q_proj.activation_scale": torch.tensor(
            torch.nan
        ),
        "multi_modal_projector.linear_1.weight": torch.full((8, 8), torch.nan),
    }


def dequantized_state(directory: Path) -> dict[str, Tensor]:
    """Every parameter by its own name: fp32 values, no scales."""
    stored: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            stored |= {name: tensors.get_tensor(name) for name in tensors.keys()}
    scales = ("weight_scale_inv", "activation_scale")
    return {
        name: _values(tensor, stored.get(name.removesuffix("weight") + "weight_scale_inv"))
        for name, tensor in stored.items()
        if name.rpartition(".")[2] not in scales
    }


def _values(tensor: Tensor, scale: Tensor | None) -> Tensor:
    values = tensor.to(torch.float32)
    if scale is None:
        return values
    scale = scale.to(torch.float32)
    if scale.dim() < 2:
        return values * scale
    rows, columns = (torch.arange(size) // 128 for size in tensor.shape[-2:])
    return values * scale[..., rows, :][..., columns]
