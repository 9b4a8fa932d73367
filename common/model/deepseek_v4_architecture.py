"""DeepSeek-V4 as one of the architectures that are served."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

from scission.common.checkpoint.deepseek_v4 import (
    IGNORED,
    MatrixFormat,
    random_values,
    tensor_table,
)
from scission.common.checkpoint.table import Stored, TensorSpec
from scission.common.model.architecture import Architecture, Facts
from scission.common.model.config import (
    ARCHITECTURE,
    CSA,
    DENSE,
    HCA,
    DeepseekV4Config,
    parse_config,
)
from scission.common.model.deepseek_v4 import DeepseekV4
from scission.common.model.deepseek_v4_state import cache_layout

_LAYERS = {
    DENSE: "sliding window only",
    CSA: "CSA (one entry per 4 tokens, indexed)",
    HCA: "HCA (one entry per 128 tokens)",
}
_FORMATS = {"I8": "fp4", "F8_E4M3": "fp8", "BF16": "bf16"}


def _facts(config: DeepseekV4Config) -> Facts:
    layers = {word: config.layer_ratios.count(ratio) for ratio, word in _LAYERS.items()}
    layers["routed by token id"] = config.num_hash_layers
    layers["routed by score"] = config.num_hidden_layers - config.num_hash_layers
    layers["MTP"] = config.num_nextn_predict_layers
    return Facts(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
        rope=[
            config.rope_theta,
            config.compress_rope_theta,
            config.qk_rope_head_dim,
            asdict(config.rope_scaling),
        ],
        layers={kind: count for kind, count in layers.items() if count},
    )


def _table(raw: Mapping[str, Any], stored: Stored) -> dict[str, TensorSpec]:
    """The published table, in the formats that the files have themselves."""
    wo_a = _format_of(stored, "layers.0.attn.wo_a.weight")
    experts = _format_of(stored, "layers.0.ffn.experts.0.w1.weight")
    return tensor_table(raw, experts=experts, wo_a=wo_a or "fp8")


def _format_of(stored: Stored, name: str) -> MatrixFormat | None:
    found = stored.get(name)
    return cast(MatrixFormat | None, _FORMATS.get(found.dtype)) if found is not None else None


DEEPSEEK_V4 = Architecture(
    name=ARCHITECTURE,
    parse=parse_config,
    facts=_facts,
    layout=cache_layout,
    build=DeepseekV4,
    table=_table,
    random_values=random_values,
    ignored=lambda config: IGNORED,
)
