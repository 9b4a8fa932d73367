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
