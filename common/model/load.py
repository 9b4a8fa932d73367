"""From a model folder to a model that computes, with what its users must know about it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from scission.common.cache.layout import CacheLayout, digest_fields
from scission.common.cache.storage import CacheStorage
from scission.common.checkpoint import weights
from scission.common.checkpoint.deepseek_v4 import IGNORED
from scission.common.checkpoint.headers import read_json
from scission.common.checkpoint.open import open_source
from scission.common.checkpoint.source import Source
from scission.common.config import ModelOptions
from scission.common.errors import CheckpointError, ConfigError
from scission.common.layers.numerics import Numerics
from scission.common.model.batch import ForwardBatch
from scission.common.model.config import ARCHITECTURE, parse_config
from scission.common.model.deepseek_v4 import BLOCK_SIZE, DeepseekV4, OnLayers
from scission.common.parallel.ranks import Ranks, single_rank

# of what workers say to each other; a change that an older worker would misread counts it up
PROTOCOL_VERSION = 1


class Model(Protocol):
    """What engines need of a model."""

    @property
    def layout(self) -> CacheLayout:
        """The state a request has."""

    @property
    def layer_groups(self) -> tuple[tuple[int, int], ...]:
        """[first, last) model layers; after each group its paged rows of the step are final."""

    def forward(
        self, batch: ForwardBatch, storage: CacheStorage, on_layers: OnLayers | None = None
    ) -> Tensor:
        """Logits [num_logits, vocab_size] float32; writes the state in place."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model, and what goes with it: name, ends, bounds, what it must share with its peers."""

    model: Model
    layout: CacheLayout
    name: str
    eos_token_ids: frozenset[int]
    bos_token_id: int
    vocab_size: int
    max_model_len: int  # tokens, prompt and output
    digest: Mapping[str, str]  # short hash by field name: equal wherever state may be handed over


def load_model(
    options: ModelOptions, device: torch.device, block_size: int = BLOCK_SIZE
) -> LoadedModel:
    """Load the model of a folder by its architecture.

    Args:
        options: which model and how it computes; `options.device` is already `device`.
        device: where weights and state live.
        block_size: tokens; a multiple of the model's own.

    Raises:
        CheckpointError: an unknown architecture, or a folder that is not what it should be.
        ConfigError: options that do not go with the model.
    """
    raw = read_json(options.model / "config.json")
    numerics = Numerics(
        dtype=getattr(torch, options.dtype_on(device.type)), rounds=options.numerics == "deployed"
    )
    load = _ARCHITECTURES[_architecture(raw)]
    source = open_source(options.model, options.load_format, options.seed)
    return load(options, raw, source, device, numerics, single_rank(), block_size)


def _load_deepseek_v4(
    options: ModelOptions,
    raw: Mapping[str, Any],
    source: Source,
    device: torch.device,
    numerics: Numerics,
    ranks: Ranks,
    block_size: int,
) -> LoadedModel:
    config = parse_config(raw)
    max_model_len = options.max_model_len or config.max_position_embeddings
    if max_model_len > config.max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {max_model_len}; the model takes {config.max_position_embeddings}"
        )
    model = weights.load_model(
        lambda w: DeepseekV4(w, config, ranks, numerics, block_size), source, device, IGNORED
    )
    layout = model.layout
    digest = digest_fields(
        {
            "model_config": _computing_fields(raw),
            "weights_revision": source.revision(),
            "components": layout.describe(),
            "block_size": block_size,
            "kv_dtype": numerics.dtype_name,
            "numerics": [options.numerics, numerics.dtype_name],
            "rope": [
                config.rope_theta,
                config.compress_rope_theta,
                config.qk_rope_head_dim,
                asdict(config.rope_scaling),
            ],
            "tokenizer": _file_hash((options.tokenizer or options.model) / "tokenizer.json"),
            "protocol_version": PROTOCOL_VERSION,
        }
    )
    return LoadedModel(
        model=model,
        layout=layout,
        name=options.names[0],
        eos_token_ids=frozenset(config.eos_token_ids) | _generation_eos(options.model),
        bos_token_id=config.bos_token_id,
        vocab_size=config.vocab_size,
        max_model_len=max_model_len,
        digest=digest,
    )


_Loader = Callable[
    [ModelOptions, Mapping[str, Any], Source, torch.device, Numerics, Ranks, int], LoadedModel
]
_ARCHITECTURES: Mapping[str, _Loader] = {ARCHITECTURE: _load_deepseek_v4}


def _architecture(raw: Mapping[str, Any]) -> str:
    named = raw.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    if first not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise CheckpointError(f"config.json names the architecture {first!r}; served are {known}")
    return str(first)


def _computing_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what says who wrote it."""
    return {k: v for k, v in raw.items() if k not in ("transformers_version", "_name_or_path")}


def _generation_eos(directory: Path) -> frozenset[int]:
    """The end-of-sequence ids of generation_config.json, where there is one."""
    file = directory / "generation_config.json"
    if not file.exists():
        return frozenset()
    found = read_json(file).get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    return frozenset(token_id for token_id in ids if isinstance(token_id, int))


def _file_hash(file: Path) -> str:
    """Of a JSON file's content, however it is indented; empty where there is none."""
    if not file.exists():
        return ""
    content = json.dumps(read_json(file), sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()
