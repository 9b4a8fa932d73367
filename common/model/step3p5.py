"""Step-3.5-Flash: full and sliding layers of different head counts, gated heads, flat experts.

Config, checkpoint and model; the forward pass reads top to bottom like the specification. Norms are
zero-centred, rope differs by layer kind, and clamps are per layer, after silu.
"""

import re
from collections.abc import Mapping, Sequence
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
from scission.common.layers.flat_moe import FlatExperts, FlatMoE, SigmoidRouter, shared_axis
from scission.common.layers.heads import HeadProjections, HeadsOutput, HeadSplit
from scission.common.layers.linear import Linear, VocabParallelEmbedding, VocabParallelHead
from scission.common.layers.mlp import GatedMLP
from scission.common.layers.norm import RMSNorm
from scission.common.layers.numerics import Numerics
from scission.common.layers.rope import Llama3Scaling, llama3_frequencies, rope_frequencies
from scission.common.layers.row_input import RowInput, input_of
from scission.common.model.architecture import Architecture, Facts
from scission.common.model.decoder import (
    Decoder,
    FeedForward,
    ResidualLayer,
    key_value_layout,
)
from scission.common.model.dense_plan import LayerKind
from scission.common.model.dense_step import KeyValues, Step
from scission.common.model.fields import ConfigFields
from scission.common.parallel.ranks import Ranks
from scission.kernels.dense_attention import Heads
from scission.kernels.linear import Rows, Sums

NAME = "Step3p5ForCausalLM"
FULL, SLIDING = "full", "sliding"
_KINDS = {"full_attention": FULL, "sliding_attention": SLIDING}

# what the model file computes and nothing else
_FIXED: Mapping[str, object] = {
    "use_qk_norm": True,
    "zero_centered": True,
    "use_head_wise_attn_gate": True,
    "moe_router_activation": "sigmoid",
    "norm_expert_weight": True,
    "need_fp32_gate": True,
}


@dataclass(frozen=True, slots=True)
class KindConfig:
    """The layers of one attention type."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rope_dim: int  # channels that are turned, the first of a head
    rope_scaling: Llama3Scaling | None
    window: int | None  # tokens, the query's own included


@dataclass(frozen=True, slots=True)
class Step3p5Config:
    """The fields of config.json; per-layer values are those of the layers that are served."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    rms_norm_eps: float
    max_position_embeddings: int
    layer_kinds: tuple[str, ...]
    has_rope: tuple[bool, ...]  # by layer
    kinds: Mapping[str, KindConfig]
    moe_layers: frozenset[int]
    moe_num_experts: int
    moe_top_k: int
    moe_intermediate_size: int
    share_expert_dim: int
    moe_router_scaling_factor: float
    use_moe_router_bias: bool
    swiglu_limits: tuple[float | None, ...]  # of routed experts, by layer
    swiglu_limits_shared: tuple[float | None, ...]  # of shared experts and dense layers
    has_sink: bool
    bos_token_id: int
    eos_token_ids: tuple[int, ...]


def parse_config(raw: Mapping[str, Any]) -> Step3p5Config:
    """Check and take the fields of a config.json.

    Per-layer lists may go on for the MTP layers, which are not served.

    Raises:
        CheckpointError: names a field that is missing, of another type, or not ours.
    """
    fields = ConfigFields(raw, NAME)
    for name, wanted in _FIXED.items():
        fields.expect(name, wanted)
    num_layers = fields.integer("num_hidden_layers")
    types = _per_layer(fields, "layer_types", num_layers)
    unknown = {str(kind) for kind in types} - _KINDS.keys()
    if unknown:
        raise fields.error(f"layer_types holds {sorted(unknown)}; known are {sorted(_KINDS)}")
    has_rope = _per_layer(fields, "use_rope_layers", num_layers, empty=True)
    return Step3p5Config(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=num_layers,
        rms_norm_eps=fields.number("rms_norm_eps"),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        layer_kinds=tuple(_KINDS[kind] for kind in types),
        has_rope=tuple(bool(flag) for flag in has_rope),
        kinds={_KINDS[kind]: _kind(fields, kind, types) for kind in dict.fromkeys(types)},
        moe_layers=_moe_layers(fields, num_layers),
        moe_num_experts=fields.integer("moe_num_experts"),
        moe_top_k=fields.integer("moe_top_k"),
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        share_expert_dim=fields.integer(
            "share_expert_dims" if fields.has("share_expert_dims") else "share_expert_dim"
        ),
        moe_router_scaling_factor=fields.number("moe_router_scaling_factor"),
        use_moe_router_bias=fields.flag("use_moe_router_bias"),
        swiglu_limits=_limits(fields, "swiglu_limits", num_layers),
        swiglu_limits_shared=_limits(fields, "swiglu_limits_shared", num_layers),
        has_sink=_has_sink(fields),
        bos_token_id=fields.integer("bos_token_id"),
        eos_token_ids=fields.integers("eos_token_id"),
    )


def _kind(fields: ConfigFields, kind: str, types: Sequence[Any]) -> KindConfig:
    other = None
    if fields.has("attention_other_setting"):
        section = fields.section("attention_other_setting")
        if section.value("attention_type", str) == kind:
            other = section
    shape = other or fields
    # never assumed: wrappers that did counted 32 or 64
    if not (shape.has("num_attention_groups") or shape.has("num_key_value_heads")):
        raise fields.error(
            "num_attention_groups (the number of key-value heads) is missing, and "
            "num_key_value_heads, too"
        )
    groups = "num_attention_groups" if shape.has("num_attention_groups") else "num_key_value_heads"
    head_dim = shape.integer("head_dim")
    partial = _of_kind(fields, "partial_rotary_factors", kind, types)
    return KindConfig(
        num_heads=shape.integer("num_attention_heads"),
        num_kv_heads=shape.integer(groups),
        head_dim=head_dim,
        rope_theta=_of_kind(fields, "rope_theta", kind, types),
        rope_dim=int(head_dim * partial),
        rope_scaling=_scaling(fields, kind),
        window=fields.integer("sliding_window") if _KINDS[kind] == SLIDING else None,
    )


def _scaling(fields: ConfigFields, kind: str) -> Llama3Scaling | None:
    """`yarn_only_types` names the types that are scaled, whatever the scaling is called."""
    if not fields.has("rope_scaling") or kind not in fields.value("yarn_only_types", list):
        return None
    section = fields.section("rope_scaling")
    section.expect("rope_type" if section.has("rope_type") else "type", "llama3")
    return Llama3Scaling(
        factor=section.number("factor"),
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
        original_max_positions=section.integer("original_max_position_embeddings"),
    )


def _of_kind(fields: ConfigFields, name: str, kind: str, types: Sequence[Any]) -> float:
    """A per-layer number that all layers of a type share, or one number for all."""
    if not isinstance(fields.value(name, list, int, float), list):
        return fields.number(name)
    values = _per_layer(fields, name, len(types))
    found = {value for value, other in zip(values, types, strict=True) if other == kind}
    if len(found) != 1:
        raise fields.error(f"{name} must be one number on all {kind} layers, got {sorted(found)}")
    return float(found.pop())


def _per_layer(
    fields: ConfigFields, name: str, num_layers: int, *, empty: object = None
) -> list[Any]:
    """The first `num_layers` entries of a list; `empty` for each where the list may be empty."""
    found = list(fields.value(name, list))
    if not found and empty is not None:
        return [empty] * num_layers
    if len(found) < num_layers:
        raise fields.error(f"{name} has {len(found)} entries for {num_layers} layers")
    return found[:num_layers]


def _limits(fields: ConfigFields, name: str, num_layers: int) -> tuple[float | None, ...]:
    """0, null and a missing list all mean: no clamp."""
    if not fields.has(name):
        return (None,) * num_layers
    return tuple(float(v) if v else None for v in _per_layer(fields, name, num_layers))


def _moe_layers(fields: ConfigFields, num_layers: int) -> frozenset[int]:
    """A comma string in the published file, a list in some copies."""
    found = fields.value("moe_layers_enum", str, list, tuple)
    items = found.split(",") if isinstance(found, str) else found
    try:
        layers = {int(item) for item in items if str(item).strip()}
    except ValueError:
        raise fields.error(f"moe_layers_enum must list layer numbers, got {found!r}") from None
    return frozenset(layer for layer in layers if layer < num_layers)


def _has_sink(fields: ConfigFields) -> bool:
    """A positive number turns sinks on; a flag is off, whatever it says."""
    if not fields.has("sink"):
        return False
    found = fields.value("sink", bool, int)
    return not isinstance(found, bool) and found > 0


class Step3p5(Decoder):
    """The whole model but its MTP layers."""

    def __init__(
        self, w: Weights, config: Step3p5Config, ranks: Ranks, numerics: Numerics, block_size: int
    ) -> None:
        """Pulls every tensor it needs from the weights; complete afterwards.

        Raises:
            CheckpointError: a tensor is missing or not what the config says.
            ConfigError: heads that cannot be divided over the ranks.
        """
        d, vocab = config.hidden_size, config.vocab_size
        model = w.scope("model")
        heads = {
            name: HeadSplit(ranks.tp, kind.num_heads, kind.num_kv_heads)
            for name, kind in config.kinds.items()
        }
        super().__init__(
            VocabParallelEmbedding(model, "embed_tokens", vocab, d, ranks.tp, numerics),
            [
                _layer(model.scope("layers", str(i)), config, i, heads[kind], ranks, numerics)
                for i, kind in enumerate(config.layer_kinds)
            ],
            RMSNorm(model, "norm", d, config.rms_norm_eps, is_zero_centered=True),
            VocabParallelHead(w, "lm_head", vocab, d, ranks.tp),
            {
                name: LayerKind(kind.window, _frequencies(kind).to(w.device))
                for name, kind in config.kinds.items()
            },
            config.layer_kinds,
            _layout(
                config,
                {name: split.num_local_kv_heads for name, split in heads.items()},
                numerics,
                block_size,
            ),
            numerics,
        )


def _layer(
    w: Weights,
    config: Step3p5Config,
    layer: int,
    heads: HeadSplit,
    ranks: Ranks,
    numerics: Numerics,
) -> ResidualLayer:
    d, eps = config.hidden_size, config.rms_norm_eps
    return ResidualLayer(
        RMSNorm(w, "input_layernorm", d, eps, is_zero_centered=True),
        Attention(w.scope("self_attn"), config, layer, heads, numerics),
        RMSNorm(w, "post_attention_layernorm", d, eps, is_zero_centered=True),
        _feed_forward(w, config, layer, ranks, numerics),
    )


def _feed_forward(
    w: Weights, config: Step3p5Config, layer: int, ranks: Ranks, numerics: Numerics
) -> FeedForward:
    """Dense, or routed experts beside a shared one; their limits are different lists."""
    d, shared_limit = config.hidden_size, config.swiglu_limits_shared[layer]
    if layer not in config.moe_layers:
        inner = config.intermediate_size
        return GatedMLP(w.scope("mlp"), d, inner, ranks.tp, numerics, limit=shared_limit)
    moe, num_experts = w.scope("moe"), config.moe_num_experts
    router = SigmoidRouter(
        moe,
        d,
        num_experts,
        config.moe_top_k,
        config.moe_router_scaling_factor,
        has_bias=config.use_moe_router_bias,
    )
    inner, limit = config.moe_intermediate_size, config.swiglu_limits[layer]
    experts = FlatExperts(moe, num_experts, d, inner, ranks, numerics, limit)
    shared = GatedMLP(
        w.scope("share_expert"),
        d,
        config.share_expert_dim,
        shared_axis(ranks),
        numerics,
        limit=shared_limit,
    )
    return FlatMoE(router, experts, shared, ranks)


class Attention:
    """Normalised, turned queries and keys; every head's output is gated by the layer's input."""

    def __init__(
        self, w: Weights, config: Step3p5Config, layer: int, heads: HeadSplit, numerics: Numerics
    ) -> None:
        kind = config.kinds[config.layer_kinds[layer]]
        d, head_dim, eps = config.hidden_size, kind.head_dim, config.rms_norm_eps
        self._projections = HeadProjections(w, d, head_dim, heads, numerics)
        gate = w.matrix("g_proj", kind.num_heads, d, heads.queries(1))
        self._gate = Linear([gate], numerics)
        sink: Tensor | None = None
        if config.has_sink:
            shape, shard = (kind.num_heads,), heads.queries(1)
            sink = w.tensor("sinks", shape, torch.float32, shard, or_dtype=torch.bfloat16).float()
        self._heads = Heads(
            heads.num_local_kv_heads,
            head_dim,
            scale=head_dim**-0.5,
            window=kind.window,
            q_weight=RMSNorm(w, "q_norm", head_dim, eps, is_zero_centered=True).weight,
            k_weight=RMSNorm(w, "k_norm", head_dim, eps, is_zero_centered=True).weight,
            eps=eps,
            has_rope=config.has_rope[layer],
            sink=sink,
        )
        self._out = HeadsOutput(w, d, head_dim, heads, numerics)

    @property
    def input(self) -> RowInput:
        """How the rows are taken."""
        return input_of(self._projections.linear, self._gate)

    def __call__(self, x: Rows, step: Step, state: KeyValues) -> Sums:
        """[num_tokens, d], normalised -> [num_tokens, d]."""
        qkv, gate = self._projections(x), self._gate(x)
        return self._out(step.attend(qkv, self._heads, state, gate, self._out.input))


def _frequencies(kind: KindConfig) -> Tensor:
    frequencies = rope_frequencies(kind.rope_dim, kind.rope_theta)
    if kind.rope_scaling is None:
        return frequencies
    return llama3_frequencies(frequencies, kind.rope_scaling)


def cache_layout(config: Step3p5Config, numerics: Numerics, block_size: int) -> CacheLayout:
    """K and V of every token in full layers, of the window in sliding ones."""
    num_kv_heads = {name: kind.num_kv_heads for name, kind in config.kinds.items()}
    return _layout(config, num_kv_heads, numerics, block_size)


def _layout(
    config: Step3p5Config, num_kv_heads: Mapping[str, int], numerics: Numerics, block_size: int
) -> CacheLayout:
    return key_value_layout(
        config.layer_kinds,
        {name: kind.window for name, kind in config.kinds.items()},
        {name: (num_kv_heads[name], kind.head_dim) for name, kind in config.kinds.items()},
        numerics,
        block_size,
    )


def _tensor_table(raw: Mapping[str, Any], stored: Stored) -> dict[str, TensorSpec]:
    config = parse_config(raw)
    table = TensorTable(stored, matrix_formats(raw), scale_dtype="F32")
    d = config.hidden_size
    table.tensor("model.embed_tokens.weight", config.vocab_size, d)
    table.tensor("model.norm.weight", d)
    table.tensor("lm_head.weight", config.vocab_size, d)
    for i, kind in enumerate(config.layer_kinds):
        layer = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            table.tensor(f"{layer}{name}.weight", d)
        _attention_table(table, f"{layer}self_attn.", d, config.kinds[kind], config.has_sink)
        if i not in config.moe_layers:
            _feed_forward_table(table, f"{layer}mlp.", d, config.intermediate_size)
            continue
        num_experts = config.moe_num_experts
        table.tensor(f"{layer}moe.gate.weight", num_experts, d, or_dtype="F32")
        if config.use_moe_router_bias:
            table.tensor(f"{layer}moe.router_bias", num_experts, dtype="F32")
        _feed_forward_table(table, f"{layer}moe.", d, config.moe_intermediate_size, num_experts)
        _feed_forward_table(table, f"{layer}share_expert.", d, config.share_expert_dim)
    return table.specs


def _attention_table(
    table: TensorTable, prefix: str, d: int, kind: KindConfig, has_sink: bool
) -> None:
    q_dim, kv_dim = kind.num_heads * kind.head_dim, kind.num_kv_heads * kind.head_dim
    for name in ("q_norm", "k_norm"):
        table.tensor(f"{prefix}{name}.weight", kind.head_dim)
    table.matrix(f"{prefix}q_proj", q_dim, d)
    table.matrix(f"{prefix}k_proj", kv_dim, d)
    table.matrix(f"{prefix}v_proj", kv_dim, d)
    table.matrix(f"{prefix}o_proj", d, q_dim)
    table.matrix(f"{prefix}g_proj", kind.num_heads, d, default="plain")
    if has_sink:
        table.tensor(f"{prefix}sinks", kind.num_heads, dtype="F32", or_dtype="BF16")


def _feed_forward_table(
    table: TensorTable, prefix: str, d: int, inner: int, *num_experts: int
) -> None:
    table.matrix(f"{prefix}gate_proj", *num_experts, inner, d)
    table.matrix(f"{prefix}up_proj", *num_experts, inner, d)
    table.matrix(f"{prefix}down_proj", *num_experts, d, inner)


def _facts(config: Step3p5Config) -> Facts:
    scalings = {name: kind.rope_scaling for name, kind in config.kinds.items()}
    num_moe = len(config.moe_layers)
    layers = {f"{name} attention": config.layer_kinds.count(name) for name in config.kinds}
    layers |= {"dense feed-forward": config.num_hidden_layers - num_moe, "experts": num_moe}
    return Facts(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
        rope=[
            [name, kind.rope_theta, kind.rope_dim, asdict(scaling) if scaling else None]
            for (name, kind), scaling in zip(config.kinds.items(), scalings.values(), strict=True)
        ],
        layers={kind: count for kind, count in layers.items() if count},
    )


def _random_values(
    name: str, shape: tuple[int, ...], raw: Mapping[str, Any], generator: torch.Generator
) -> Tensor:
    values = dense_values(name, shape, generator, is_zero_centered=True)
    if name.endswith(".moe.gate.weight"):
        return values.mul_(1.5)
    return values


def _ignored(config: Step3p5Config) -> tuple[re.Pattern[str], ...]:
    """The MTP layers: those behind the last one that is served."""
    served = "|".join(map(str, range(config.num_hidden_layers)))
    return (re.compile(rf"model\.layers\.(?!(?:{served})\.)\d+\..+"),)


STEP3P5 = Architecture(
    name=NAME,
    parse=parse_config,
    facts=_facts,
    layout=cache_layout,
    build=Step3p5,
    table=_tensor_table,
    random_values=_random_values,
    ignored=_ignored,
)
