"""Tiny DeepSeek-V4 checkpoints for tests, and their values as decoded without our loader."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def tiny_config(**changes: Any) -> dict[str, Any]:
    """config.json of a model with every kind of layer; some dims are no multiples of 128."""
    config: dict[str, Any] = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
        "vocab_size": 320,
        "hidden_size": 160,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 96,
        "o_groups": 2,
        "o_lora_rank": 48,
        "sliding_window": 16,
        "compress_ratios": [0, 128, 4, 128, 4, 0, 0],
        # with few heads many scores are zero, and transformers leaves the order of ties open
        "index_n_heads": 16,
        "index_head_dim": 32,
        "index_topk": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "moe_intermediate_size": 96,
        "num_hash_layers": 2,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "max_position_embeddings": 1048576,
        "num_nextn_predict_layers": 1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "hidden_act": "silu",
        "expert_dtype": "fp4",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
    }
    return config | changes


def published_config(model: str) -> dict[str, Any]:
    """config.json of the published `pro` or `flash`."""
    is_pro = model == "pro"
    num_layers = 61 if is_pro else 43
    first_two = [128, 128] if is_pro else [0, 0]
    return tiny_config(
        vocab_size=129280,
        hidden_size=7168 if is_pro else 4096,
        num_hidden_layers=num_layers,
        num_attention_heads=128 if is_pro else 64,
        head_dim=512,
        qk_rope_head_dim=64,
        q_lora_rank=1536 if is_pro else 1024,
        o_groups=16 if is_pro else 8,
        o_lora_rank=1024,
        sliding_window=128,
        compress_ratios=[*first_two, *([4, 128] * 30)[: num_layers - 2], 0],
        index_n_heads=64,
        index_head_dim=128,
        index_topk=1024 if is_pro else 512,
        n_routed_experts=384 if is_pro else 256,
        num_experts_per_tok=6,
        moe_intermediate_size=3072 if is_pro else 2048,
        num_hash_layers=3,
        routed_scaling_factor=2.5 if is_pro else 1.5,
    )


def dequantized_state(directory: Path) -> dict[str, Tensor]:
    """Every parameter by its own name: fp32 values (int64 for tid2eid), no scales."""
    stored: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            stored |= {name: tensors.get_tensor(name) for name in tensors.keys()}
    return {
        name: _values(name, tensor, stored)
        for name, tensor in stored.items()
        if not name.endswith(".scale")
    }


def _values(name: str, tensor: Tensor, stored: dict[str, Tensor]) -> Tensor:
    if tensor.dtype == torch.int64:
        return tensor
    scale = stored.get(name.removesuffix(".weight") + ".scale")
    if scale is None:
        return tensor.to(torch.float32)
    # ue8m0 is the exponent byte of a power of two
    scales = torch.exp2(scale.view(torch.uint8).to(torch.float64) - 127)
    if tensor.dtype == torch.int8:
        table = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)], dtype=torch.float64)
        codes = tensor.view(torch.uint8).to(torch.int64)
        values = torch.stack([table[codes & 15], table[codes >> 4]], dim=-1).flatten(-2)
        return (values * scales.repeat_interleave(32, dim=1)).to(torch.float32)
    blocks = scales.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
    rows, columns = tensor.shape
    return (tensor.to(torch.float64) * blocks[:rows, :columns]).to(torch.float32)
