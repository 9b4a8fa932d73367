"""config.json and the tensors of the published dense checkpoints, written out by hand.

Names, shapes and dtypes as the index files and headers have them, from the specifications and not
from our tables: what these say, the models and `inspect` must account for to the last tensor.
"""

from typing import Any

Tensors = dict[str, tuple[str, tuple[int, ...]]]

QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

MINISTRAL3_8B: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "dtype": "bfloat16",
    "image_token_index": 10,
    "model_type": "mistral3",
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "quantization_config": {
        "activation_scheme": "static",
        "dequantize": False,
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        "quant_method": "fp8",
        "weight_block_size": None,
    },
    "spatial_merge_size": 2,
    "text_config": {
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 262144,
        "model_type": "ministral3",
        "num_attention_heads": 32,
        "num_hidden_layers": 34,
        "num_key_value_heads": 8,
        "pad_token_id": 11,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16384,
            "rope_theta": 1000000.0,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 131072,
    },
    "vision_config": {
        "head_dim": 64,
        "hidden_size": 1024,
        "image_size": 1540,
        "model_type": "pixtral",
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
    "vision_feature_layer": -1,
}

_STEP_TYPES = [
    "full_attention" if i % 4 == 0 and i < 45 else "sliding_attention" for i in range(48)
]
STEP3P5_FLASH: dict[str, Any] = {
    "architectures": ["Step3p5ForCausalLM"],
    "att_impl_type": "GQA",
    "attention_other_setting": {
        "attention_type": "sliding_attention",
        "head_dim": 128,
        "num_attention_groups": 8,
        "num_attention_heads": 96,
        "true_head_dim": 128,
    },
    "auto_map": {"AutoConfig": "configuration_step3p5.Step3p5Config"},
    "bos_token_id": 0,
    "eos_token_id": [1, 2, 128007],
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 11264,
    "layer_types": _STEP_TYPES,
    "max_position_embeddings": 262144,
    "model_type": "step3p5",
    "moe_intermediate_size": 1280,
    "moe_layers_enum": ",".join(str(i) for i in range(3, 45)),
    "moe_num_experts": 288,
    "moe_router_activation": "sigmoid",
    "moe_router_scaling_factor": 3.0,
    "moe_top_k": 8,
    "need_fp32_gate": True,
    "norm_expert_weight": True,
    "num_attention_groups": 8,
    "num_attention_heads": 64,
    "num_hidden_layers": 45,
    "num_nextn_predict_layers": 3,
    "partial_rotary_factors": [0.5 if t == "full_attention" else 1.0 for t in _STEP_TYPES],
    "quantization_config": {
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head", "model.embed_tokens"],
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 2.0,
        "high_freq_factor": 32.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 131072,
        "rope_type": "llama3",
    },
    "rope_theta": [5000000.0 if t == "full_attention" else 10000.0 for t in _STEP_TYPES],
    "share_expert_dim": 1280,
    "sink": False,
    "sliding_window": 512,
    "swiglu_limits": [7.0 if i in (43, 44) else 0.0 for i in range(48)],
    "swiglu_limits_shared": [16.0 if i == 44 else 0.0 for i in range(48)],
    "use_head_wise_attn_gate": True,
    "use_moe": True,
    "use_moe_router_bias": True,
    "use_qk_norm": True,
    "use_rope_layers": [],
    "vocab_size": 128896,
    "yarn_only_types": ["full_attention"],
    "zero_centered": True,
}


def qwen3_8b_tensors(scale_dtype: str = "BF16") -> Tensors:
    tensors: Tensors = {
        "lm_head.weight": ("BF16", (151936, 4096)),
        "model.embed_tokens.weight": ("BF16", (151936, 4096)),
        "model.norm.weight": ("BF16", (4096,)),
    }
    linears = {
        "self_attn.q_proj": (4096, 4096, 32, 32),
        "self_attn.k_proj": (1024, 4096, 8, 32),
        "self_attn.v_proj": (1024, 4096, 8, 32),
        "self_attn.o_proj": (4096, 4096, 32, 32),
        "mlp.gate_proj": (12288, 4096, 96, 32),
        "mlp.up_proj": (12288, 4096, 96, 32),
        "mlp.down_proj": (4096, 12288, 32, 96),
    }
    for i in range(36):
        layer = f"model.layers.{i}."
        tensors[layer + "input_layernorm.weight"] = ("BF16", (4096,))
        tensors[layer + "post_attention_layernorm.weight"] = ("BF16", (4096,))
        tensors[layer + "self_attn.q_norm.weight"] = ("BF16", (128,))
        tensors[layer + "self_attn.k_norm.weight"] = ("BF16", (128,))
        for name, (rows, columns, *blocks) in linears.items():
            tensors[f"{layer}{name}.weight"] = ("F8_E4M3", (rows, columns))
            tensors[f"{layer}{name}.weight_scale_inv"] = (scale_dtype, tuple(blocks))
    return tensors


def ministral3_8b_tensors(
    model: str = "language_model.model", head: str = "language_model.lm_head", vision: str = ""
) -> Tensors:
    """`model`, `head` and `vision` are the prefixes that authors put before the same tensors."""
    tensors: Tensors = {
        f"{head}.weight": ("BF16", (131072, 4096)),
        f"{model}.embed_tokens.weight": ("BF16", (131072, 4096)),
        f"{model}.norm.weight": ("BF16", (4096,)),
    }
    linears = {
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    }
    for i in range(34):
        layer = f"{model}.layers.{i}."
        tensors[layer + "input_layernorm.weight"] = ("BF16", (4096,))
        tensors[layer + "post_attention_layernorm.weight"] = ("BF16", (4096,))
        for name, shape in linears.items():
            tensors[f"{layer}{name}.weight"] = ("F8_E4M3", shape)
            tensors[f"{layer}{name}.weight_scale_inv"] = ("BF16", ())
            tensors[f"{layer}{name}.activation_scale"] = ("BF16", ())
    tower = f"{vision}vision_tower."
    tensors[tower + "ln_pre.weight"] = ("BF16", (1024,))
    tensors[tower + "patch_conv.weight"] = ("BF16", (1024, 3, 14, 14))
    for i in range(24):
        layer = f"{tower}transformer.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{layer}attention.{name}.weight"] = ("BF16", (1024, 1024))
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape = (1024, 4096) if name == "down_proj" else (4096, 1024)
            tensors[f"{layer}feed_forward.{name}.weight"] = ("BF16", shape)
        for name in ("attention_norm", "ffn_norm"):
            tensors[f"{layer}{name}.weight"] = ("BF16", (1024,))
    projector = f"{vision}multi_modal_projector."
    tensors[projector + "linear_1.weight"] = ("BF16", (4096, 1024))
    tensors[projector + "linear_2.weight"] = ("BF16", (4096, 4096))
    tensors[projector + "norm.weight"] = ("BF16", (1024,))
    tensors[projector + "patch_merger.merging_layer.weight"] = ("BF16", (1024, 4096))
    return tensors


def step3p5_flash_tensors(*, quantised_gate: bool = False, router: str = "BF16") -> Tensors:
    """`quantised_gate`: of heads; `router`: dtype of the experts' gate."""
    tensors: Tensors = {
        "lm_head.weight": ("BF16", (128896, 4096)),
        "model.embed_tokens.weight": ("BF16", (128896, 4096)),
        "model.norm.weight": ("BF16", (4096,)),
    }

    def quantised(name: str, shape: tuple[int, ...], blocks: tuple[int, ...]) -> None:
        tensors[f"{name}.weight"] = ("F8_E4M3", shape)
        tensors[f"{name}.weight_scale_inv"] = ("F32", blocks)

    for i in range(45):
        layer = f"model.layers.{i}."
        heads = 64 if i % 4 == 0 else 96
        attention = f"{layer}self_attn."
        tensors[layer + "input_layernorm.weight"] = ("BF16", (4096,))
        tensors[layer + "post_attention_layernorm.weight"] = ("BF16", (4096,))
        tensors[attention + "q_norm.weight"] = ("BF16", (128,))
        tensors[attention + "k_norm.weight"] = ("BF16", (128,))
        quantised(attention + "q_proj", (heads * 128, 4096), (heads, 32))
        quantised(attention + "k_proj", (1024, 4096), (8, 32))
        quantised(attention + "v_proj", (1024, 4096), (8, 32))
        quantised(attention + "o_proj", (4096, heads * 128), (32, heads))
        if quantised_gate:
            quantised(attention + "g_proj", (heads, 4096), (1, 32))
        else:
            tensors[attention + "g_proj.weight"] = ("BF16", (heads, 4096))
        if i < 3:
            quantised(layer + "mlp.gate_proj", (11264, 4096), (88, 32))
            quantised(layer + "mlp.up_proj", (11264, 4096), (88, 32))
            quantised(layer + "mlp.down_proj", (4096, 11264), (32, 88))
            continue
        tensors[layer + "moe.gate.weight"] = (router, (288, 4096))
        tensors[layer + "moe.router_bias"] = ("F32", (288,))
        quantised(layer + "moe.gate_proj", (288, 1280, 4096), (288, 10, 32))
        quantised(layer + "moe.up_proj", (288, 1280, 4096), (288, 10, 32))
        quantised(layer + "moe.down_proj", (288, 4096, 1280), (288, 32, 10))
        quantised(layer + "share_expert.gate_proj", (1280, 4096), (10, 32))
        quantised(layer + "share_expert.up_proj", (1280, 4096), (10, 32))
        quantised(layer + "share_expert.down_proj", (4096, 1280), (32, 10))
    for i in range(45, 48):
        layer = f"model.layers.{i}."
        for name in ("enorm", "hnorm", "input_layernorm", "transformer.shared_head.norm"):
            tensors[f"{layer}{name}.weight"] = ("BF16", (4096,))
        tensors[layer + "eh_proj.weight"] = ("BF16", (4096, 8192))
        tensors[layer + "transformer.shared_head.output.weight"] = ("BF16", (128896, 4096))
        quantised(layer + "mlp.down_proj", (4096, 11264), (32, 88))
    return tensors
