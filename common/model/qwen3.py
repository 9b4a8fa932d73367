"""Qwen3, dense: a norm on every query and key head before the rotation, nothing else unusual.

Config, checkpoint and model; the forward pass reads top to bottom like the specification.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from scission.common.cache.layout import CacheLayout
from scission.common.checkpoint.table import (
    Stored,
    TensorSpec,
    TensorTable,
    dense_values,
    matrix_formats,
)
from scission.common.checkpoint.weights import Weights
from scission.common.layers.heads import HeadProjections, HeadsOutput, HeadSplit
from scission.common.layers.linear import VocabParallelEmbedding, VocabParallelHead
from scission.common.layers.mlp import GatedMLP
from scission.common.layers.norm import RMSNorm
from scission.common.layers.numerics import Numerics
from scission.common.layers.rope import YarnScaling, rope_frequencies
from scission.common.layers.row_input import RowInput
from scission.common.model.architecture import Architecture, Facts
from scission.common.model.decoder import (
    Decoder,
    ResidualLayer,
    key_value_layout,
)
from scission.common.model.dense_plan import LayerKind
from scission.common.model.dense_step import KeyValues, Step
from scission.common.model.fields import ConfigFields
from scission.common.model.rope_fields import read_rope
from scission.common.parallel.ranks import Ranks
from scission.kernels.dense_attention import Heads
from scission.kernels.linear import Rows, Sums

NAME = "Qwen3ForCausalLM"
FULL = "full"


@dataclass(frozen=True, slots=True)
class Qwen3Config:
    """The fields of config.json under their own names; lengths in tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: YarnScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int
    eos_token_ids: tuple[int, ...]


def parse_config(raw: Mapping[str, Any]) -> Qwen3Config:
    """Check and take the fields of a config.json.

    Raises:
        CheckpointError: names a field that is missing, of another type, or not ours.
    """
    fields = ConfigFields(raw, NAME)
    for name, wanted in (("hidden_act", "silu"), ("attention_bias", False)):
        fields.expect(name, wanted)
    if fields.has("use_sliding_window"):
        fields.expect("use_sliding_window", False)
    theta, scaling = read_rope(fields)
    return Qwen3Config(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=fields.integer("num_attention_heads"),
        num_key_value_heads=fields.integer("num_key_value_heads"),
        head_dim=fields.integer("head_dim"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        bos_token_id=fields.integer("bos_token_id"),
        eos_token_ids=fields.integers("eos_token_id"),
    )


class Qwen3(Decoder):
    """The whole model."""

    def __init__(
        self, w: Weights, config: Qwen3Config, ranks: Ranks, numerics: Numerics, block_size: int
    ) -> None:
        """Pulls every tensor it needs from the weights; complete afterwards.

        Raises:
            CheckpointError: a tensor is missing or not what the config says.
            ConfigError: heads that cannot be divided over the ranks.
        """
        d, vocab, layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
        model = w.scope("model")
        embed = VocabParallelEmbedding(model, "embed_tokens", vocab, d, ranks.tp, numerics)
        is_tied = config.tie_word_embeddings and not w.has("lm_head.weight")
        heads = HeadSplit(ranks.tp, config.num_attention_heads, config.num_key_value_heads)
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        scaling = config.rope_scaling
        kind = LayerKind(
            window=None,
            frequencies=frequencies.to(w.device),
            rotation_scale=scaling.rotation_scale if scaling is not None else 1.0,
        )
        super().__init__(
            embed,
            [_layer(model.scope("layers", str(i)), config, heads, numerics) for i in range(layers)],
            RMSNorm(model, "norm", d, config.rms_norm_eps),
            VocabParallelHead(w, "lm_head", vocab, d, ranks.tp, tied_to=embed if is_tied else None),
            {FULL: kind},
            [FULL] * layers,
            _layout(config, heads.num_local_kv_heads, numerics, block_size),
            numerics,
        )


def _layer(w: Weights, config: Qwen3Config, heads: HeadSplit, numerics: Numerics) -> ResidualLayer:
    d, eps = config.hidden_size, config.rms_norm_eps
    return ResidualLayer(
        RMSNorm(w, "input_layernorm", d, eps),
        Attention(w.scope("self_attn"), config, heads, numerics),
        RMSNorm(w, "post_attention_layernorm", d, eps),
        GatedMLP(w.scope("mlp"), d, config.intermediate_size, heads.axis, numerics),
    )


class Attention:
    """Query and key heads are normalised, then turned; K is kept turned."""

    def __init__(
        self, w: Weights, config: Qwen3Config, heads: HeadSplit, numerics: Numerics
    ) -> None:
        d, head_dim, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        self._projections = HeadProjections(w, d, head_dim, heads, numerics)
        self._heads = Heads(
            heads.num_local_kv_heads,
            head_dim,
            scale=head_dim**-0.5,
            q_weight=RMSNorm(w, "q_norm", head_dim, eps).weight,
            k_weight=RMSNorm(w, "k_norm", head_dim, eps).weight,
            eps=eps,
        )
        self._out = HeadsOutput(w, d, head_dim, heads, numerics)

    @property
    def input(self) -> RowInput:
        """How the rows are taken."""
        return self._projections.input

    def __call__(self, x: Rows, step: Step, state: KeyValues) -> Sums:
        """[num_tokens, d], normalised -> [num_tokens, d]."""
        qkv = self._projections(x)
        return self._out(step.attend(qkv, self._heads, state, None, self._out.input))


def cache_layout(config: Qwen3Config, numerics: Numerics, block_size: int) -> CacheLayout:
    """K and V of every token in every layer."""
    return _layout(config, config.num_key_value_heads, numerics, block_size)


def _layout(
    config: Qwen3Config, num_kv_heads: int, numerics: Numerics, block_size: int
) -> CacheLayout:
    kinds = [FULL] * config.num_hidden_layers
    rows = {FULL: (num_kv_heads, config.head_dim)}
    return key_value_layout(kinds, {FULL: None}, rows, numerics, block_size)


def _tensor_table(raw: Mapping[str, Any], stored: Stored) -> dict[str, TensorSpec]:
    config = parse_config(raw)
    table = TensorTable(stored, matrix_formats(raw))
    d, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_dim, kv_dim = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    table.tensor("model.embed_tokens.weight", config.vocab_size, d)
    table.tensor("model.norm.weight", d)
    if not config.tie_word_embeddings or "lm_head.weight" in stored:
        table.tensor("lm_head.weight", config.vocab_size, d)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            table.tensor(f"{layer}{name}.weight", d)
        for name in ("q_norm", "k_norm"):
            table.tensor(f"{layer}self_attn.{name}.weight", head_dim)
        table.matrix(f"{layer}self_attn.q_proj", q_dim, d)
        table.matrix(f"{layer}self_attn.k_proj", kv_dim, d)
        table.matrix(f"{layer}self_attn.v_proj", kv_dim, d)
        table.matrix(f"{layer}self_attn.o_proj", d, q_dim)
        table.matrix(f"{layer}mlp.gate_proj", inner, d)
        table.matrix(f"{layer}mlp.up_proj", inner, d)
        table.matrix(f"{layer}mlp.down_proj", d, inner)
    return table.specs


def _facts(config: Qwen3Config) -> Facts:
    scaling = asdict(config.rope_scaling) if config.rope_scaling is not None else None
    return Facts(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
        rope=[config.rope_theta, config.head_dim, scaling],
        layers={"full attention": config.num_hidden_layers},
    )


QWEN3 = Architecture(
    name=NAME,
    parse=parse_config,
    facts=_facts,
    layout=cache_layout,
    build=Qwen3,
    table=_tensor_table,
    random_values=lambda name, shape, raw, generator: dense_values(name, shape, generator),
)
