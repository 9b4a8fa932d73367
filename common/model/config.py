"""DeepSeek-V4's config.json as a checked value: every field that the model needs, none guessed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scission.common.checkpoint.headers import read_json
from scission.common.errors import CheckpointError
from scission.common.layers.rope import YarnScaling
from scission.common.model.fields import ConfigFields

ARCHITECTURE = "DeepseekV4ForCausalLM"

DENSE, CSA, HCA = 0, 4, 128  # tokens per compressed entry; 0: sliding window only

# what the model file computes and nothing else; a checkpoint that says otherwise is another model
_FIXED: Mapping[str, object] = {
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
_FIXED_QUANTIZATION: Mapping[str, object] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    # some releases lack it
    "scale_fmt": "ue8m0",
}


@dataclass(frozen=True, slots=True)
class DeepseekV4Config:
    """The fields of config.json under their own names; lengths in tokens."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]  # a layer each, MTP layers last
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    rope_scaling: YarnScaling
    max_position_embeddings: int
    num_nextn_predict_layers: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        layers, stages = self.num_hidden_layers, self.num_nextn_predict_layers
        ratios = self.compress_ratios
        checks = (
            (len(ratios) == layers + stages, f"compress_ratios has {len(ratios)} entries for "
             f"{layers} layers and {stages} MTP layers"),
            (set(ratios) <= {DENSE, CSA, HCA}, f"compress_ratios holds {sorted(set(ratios))}; "
             f"known are {DENSE}, {CSA} and {HCA}"),
            (set(ratios[layers:]) <= {DENSE}, "the MTP layers' compress_ratios must be 0"),
            (self.head_dim >= self.qk_rope_head_dim and self.qk_rope_head_dim % 2 == 0,
             f"qk_rope_head_dim {self.qk_rope_head_dim} does not fit head_dim {self.head_dim}"),
            (self.index_head_dim >= self.qk_rope_head_dim
             and self.index_head_dim & (self.index_head_dim - 1) == 0,
             f"index_head_dim {self.index_head_dim} must be a power of two and at least "
             f"qk_rope_head_dim {self.qk_rope_head_dim}"),
            (self.num_attention_heads % self.o_groups == 0, f"num_attention_heads "
             f"{self.num_attention_heads} must be a multiple of o_groups {self.o_groups}"),
            (self.num_experts_per_tok <= self.n_routed_experts, f"num_experts_per_tok "
             f"{self.num_experts_per_tok} exceeds n_routed_experts {self.n_routed_experts}"),
            (self.num_hash_layers <= layers, f"num_hash_layers {self.num_hash_layers} exceeds "
             f"num_hidden_layers {layers}"),
            (self.index_topk > 0 and self.sliding_window > 0 and self.hc_sinkhorn_iters > 0,
             "index_topk, sliding_window and hc_sinkhorn_iters must be positive"),
        )  # fmt: skip
        for holds, message in checks:
            if not holds:
                raise CheckpointError(f"config.json ({ARCHITECTURE}): {message}")

    @property
    def layer_ratios(self) -> tuple[int, ...]:
        """compress_ratios without the MTP layers."""
        return self.compress_ratios[: self.num_hidden_layers]

    @property
    def heads_dim(self) -> int:
        return self.num_attention_heads * self.head_dim


def read_config(directory: Path) -> DeepseekV4Config:
    """The config.json of a model folder.

    Raises:
        CheckpointError: names a field that is missing, of another type, or not ours.
    """
    return parse_config(read_json(directory / "config.json"))


def parse_config(raw: Mapping[str, Any]) -> DeepseekV4Config:
    """Check and take the fields of a config.json.

    Raises:
        CheckpointError: names a field that is missing, of another type, or not ours.
    """
    fields = ConfigFields(raw, ARCHITECTURE)
    for name, wanted in _FIXED.items():
        fields.expect(name, wanted)
    if "quantization_config" in raw:
        quantization = fields.section("quantization_config")
        for name, wanted in _FIXED_QUANTIZATION.items():
            if name != "scale_fmt" or name in raw["quantization_config"]:
                quantization.expect(name, wanted)
    rope = fields.section("rope_scaling")
    rope.expect("rope_type" if "rope_type" in raw["rope_scaling"] else "type", "yarn")
    eos = raw.get("eos_token_id")
    ratios = fields.value("compress_ratios", list)
    return DeepseekV4Config(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=fields.integer("num_attention_heads"),
        head_dim=fields.integer("head_dim"),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim"),
        q_lora_rank=fields.integer("q_lora_rank"),
        o_groups=fields.integer("o_groups"),
        o_lora_rank=fields.integer("o_lora_rank"),
        sliding_window=fields.integer("sliding_window"),
        compress_ratios=tuple(ratios),
        index_n_heads=fields.integer("index_n_heads"),
        index_head_dim=fields.integer("index_head_dim"),
        index_topk=fields.integer("index_topk"),
        n_routed_experts=fields.integer("n_routed_experts"),
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        num_hash_layers=fields.integer("num_hash_layers"),
        routed_scaling_factor=fields.number("routed_scaling_factor"),
        swiglu_limit=fields.number("swiglu_limit"),
        hc_mult=fields.integer("hc_mult"),
        hc_sinkhorn_iters=fields.integer("hc_sinkhorn_iters"),
        hc_eps=fields.number("hc_eps"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=fields.number("rope_theta"),
        compress_rope_theta=fields.number("compress_rope_theta"),
        rope_scaling=YarnScaling(
            factor=rope.number("factor"),
            original_max_positions=rope.integer("original_max_position_embeddings"),
            beta_fast=rope.number("beta_fast"),
            beta_slow=rope.number("beta_slow"),
        ),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        num_nextn_predict_layers=fields.integer("num_nextn_predict_layers"),
        bos_token_id=fields.integer("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (fields.integer("eos_token_id"),),
    )
