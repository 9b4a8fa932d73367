"""Ministral 3: the text part of a multimodal checkpoint, with YaRN and queries that grow with their
position.

Config, checkpoint and model; the forward pass reads top to bottom like the specification. With
deployed numerics activations are rounded with the checkpoint's static scales.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

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
from scission.common.model.dense_plan import LayerKind, QueryScaling
from scission.common.model.dense_step import KeyValues, Step
from scission.common.model.fields import ConfigFields
from scission.common.model.rope_fields import read_rope
from scission.common.parallel.ranks import Ranks
from scission.kernels.dense_attention import Heads
from scission.kernels.linear import Rows, Sums

NAME = "Mistral3ForConditionalGeneration"
FULL, SLIDING = "full", "sliding"

# where authors put the same tensors; the first is the published one
_MODEL_PREFIXES = (("language_model", "model"), ("model", "language_model"), ("model",))
_HEADS = ("language_model.lm_head", "lm_head")
# image content is refused, so nothing of the tower is loaded
VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..+")


@dataclass(frozen=True, slots=True)
class Ministral3Config:
    """The fields of config.json's text_config under their own names; lengths in tokens."""

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
    query_scaling: QueryScaling | None
    sliding_window: int | None  # of every layer
    max_position_embeddings: int
    tie_word_embeddings: bool  # where no tensor says otherwise
    bos_token_id: int
    eos_token_ids: tuple[int, ...]

    @property
    def layer_kinds(self) -> list[str]:
        return [FULL if self.sliding_window is None else SLIDING] * self.num_hidden_layers


def parse_config(raw: Mapping[str, Any]) -> Ministral3Config:
    """Check and take the fields of a config.json.

    Raises:
        CheckpointError: names a field that is missing, of another type, or not ours.
    """
    outer = ConfigFields(raw, NAME)
    fields = outer.section("text_config")
    fields.expect("model_type", "ministral3")
    fields.expect("hidden_act", "silu")
    theta, scaling = read_rope(fields)
    ends = fields if fields.has("eos_token_id") else outer
    is_tied = fields.has("tie_word_embeddings") and fields.flag("tie_word_embeddings")
    return Ministral3Config(
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
        query_scaling=_query_scaling(fields),
        sliding_window=fields.integer("sliding_window") if fields.has("sliding_window") else None,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=is_tied,
        bos_token_id=ends.integer("bos_token_id"),
        eos_token_ids=ends.integers("eos_token_id"),
    )


def _query_scaling(fields: ConfigFields) -> QueryScaling | None:
    """By the trained context, not the extended one: of published engines one divides by that."""
    rope = fields.section("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")
    if not rope.has("llama_4_scaling_beta"):
        return None
    return QueryScaling(
        rope.number("llama_4_scaling_beta"), rope.integer("original_max_position_embeddings")
    )


class Ministral3(Decoder):
    """The text decoder."""

    def __init__(
        self,
        w: Weights,
        config: Ministral3Config,
        ranks: Ranks,
        numerics: Numerics,
        block_size: int,
    ) -> None:
        """Pulls every tensor it needs from the weights; complete afterwards.

        Raises:
            CheckpointError: a tensor is missing or not what the config says.
            ConfigError: heads that cannot be divided over the ranks.
        """
        d, vocab = config.hidden_size, config.vocab_size
        model = w.scope(*_model_prefix(w.names))
        head = _head_name(w.names)
        embed = VocabParallelEmbedding(model, "embed_tokens", vocab, d, ranks.tp, numerics)
        is_tied = head is None and config.tie_word_embeddings
        heads = HeadSplit(ranks.tp, config.num_attention_heads, config.num_key_value_heads)
        scaling = config.rope_scaling
        kind = LayerKind(
            window=config.sliding_window,
            frequencies=rope_frequencies(config.head_dim, config.rope_theta, scaling).to(w.device),
            rotation_scale=scaling.rotation_scale if scaling is not None else 1.0,
            query_scaling=config.query_scaling,
        )
        super().__init__(
            embed,
            [
                _layer(model.scope("layers", str(i)), config, heads, numerics)
                for i in range(config.num_hidden_layers)
            ],
            RMSNorm(model, "norm", d, config.rms_norm_eps),
            VocabParallelHead(
                w, head or _HEADS[0], vocab, d, ranks.tp, tied_to=embed if is_tied else None
            ),
            dict.fromkeys(config.layer_kinds, kind),
            config.layer_kinds,
            _layout(config, heads.num_local_kv_heads, numerics, block_size),
            numerics,
        )


def _layer(
    w: Weights, config: Ministral3Config, heads: HeadSplit, numerics: Numerics
) -> ResidualLayer:
    d, eps = config.hidden_size, config.rms_norm_eps
    return ResidualLayer(
        RMSNorm(w, "input_layernorm", d, eps),
        Attention(w.scope("self_attn"), config, heads, numerics),
        RMSNorm(w, "post_attention_layernorm", d, eps),
        GatedMLP(w.scope("mlp"), d, config.intermediate_size, heads.axis, numerics),
    )


class Attention:
    """Queries are turned, then scaled by their position; K is kept turned and never scaled."""

    def __init__(
        self, w: Weights, config: Ministral3Config, heads: HeadSplit, numerics: Numerics
    ) -> None:
        d, head_dim = config.hidden_size, config.head_dim
        self._projections = HeadProjections(w, d, head_dim, heads, numerics)
        self._heads = Heads(
            heads.num_local_kv_heads,
            head_dim,
            scale=head_dim**-0.5,
            window=config.sliding_window,
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


def cache_layout(config: Ministral3Config, numerics: Numerics, block_size: int) -> CacheLayout:
    """K and V of every token in every layer, or of a window where there is one."""
    return _layout(config, config.num_key_value_heads, numerics, block_size)


def _layout(
    config: Ministral3Config, num_kv_heads: int, numerics: Numerics, block_size: int
) -> CacheLayout:
    kind = config.layer_kinds[0]
    return key_value_layout(
        config.layer_kinds,
        {kind: config.sliding_window},
        {kind: (num_kv_heads, config.head_dim)},
        numerics,
        block_size,
    )


def _model_prefix(names: Collection[str]) -> tuple[str, ...]:
    """The name components before the decoder's own."""
    found = (p for p in _MODEL_PREFIXES if ".".join((*p, "embed_tokens.weight")) in names)
    return next(found, _MODEL_PREFIXES[0])


def _head_name(names: Collection[str]) -> str | None:
    return next((name for name in _HEADS if f"{name}.weight" in names), None)


def _tensor_table(raw: Mapping[str, Any], stored: Stored) -> dict[str, TensorSpec]:
    config = parse_config(raw)
    table = TensorTable(stored, matrix_formats(raw))
    d, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_dim, kv_dim = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    model = ".".join(_model_prefix(stored))
    head = _head_name(stored)
    table.tensor(f"{model}.embed_tokens.weight", config.vocab_size, d)
    table.tensor(f"{model}.norm.weight", d)
    if head is not None or not config.tie_word_embeddings:
        table.tensor(f"{head or _HEADS[0]}.weight", config.vocab_size, d)
    for i in range(config.num_hidden_layers):
        layer = f"{model}.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            table.tensor(f"{layer}{name}.weight", d)
        table.matrix(f"{layer}self_attn.q_proj", q_dim, d)
        table.matrix(f"{layer}self_attn.k_proj", kv_dim, d)
        table.matrix(f"{layer}self_attn.v_proj", kv_dim, d)
        table.matrix(f"{layer}self_attn.o_proj", d, q_dim)
        table.matrix(f"{layer}mlp.gate_proj", inner, d)
        table.matrix(f"{layer}mlp.up_proj", inner, d)
        table.matrix(f"{layer}mlp.down_proj", d, inner)
    return table.specs


def _facts(config: Ministral3Config) -> Facts:
    scalings = (config.rope_scaling, config.query_scaling)
    kind = "full attention" if config.sliding_window is None else "sliding attention"
    return Facts(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
        rope=[
            config.rope_theta,
            config.head_dim,
            *(asdict(scaling) if scaling is not None else None for scaling in scalings),
        ],
        layers={kind: config.num_hidden_layers},
    )


def _random_values(
    name: str, shape: tuple[int, ...], raw: Mapping[str, Any], generator: torch.Generator
) -> Tensor:
    return dense_values(name, shape, generator)


MINISTRAL3 = Architecture(
    name=NAME,
    parse=parse_config,
    facts=_facts,
    layout=cache_layout,
    build=Ministral3,
    table=_tensor_table,
    random_values=_random_values,
    ignored=lambda config: (VISION,),
)
