"""From a model folder to a model that computes, with what its users must know about it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scission.common.cache.layout import CacheLayout, digest_fields
from scission.common.checkpoint import weights
from scission.common.checkpoint.headers import read_json
from scission.common.checkpoint.open import open_source
from scission.common.config import ModelOptions
from scission.common.errors import ConfigError
from scission.common.layers.numerics import Numerics
from scission.common.model.architecture import BLOCK_SIZE, Model
from scission.common.model.registry import find_architecture
from scission.common.parallel.ranks import single_rank

__all__ = ["LoadedModel", "Model", "load_model"]

# of what workers say to each other; a change that an older worker would misread counts it up
PROTOCOL_VERSION = 1


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
        device: where weights and state live; `meta` checks everything and holds nothing.
        block_size: tokens; a multiple of the model's own.

    Raises:
        CheckpointError: an unknown architecture, or a folder that is not what it should be.
        ConfigError: options that do not go with the model.
    """
    raw = read_json(options.model / "config.json")
    architecture = find_architecture(raw)
    config = architecture.parse(raw)
    facts = architecture.facts(config)
    max_model_len = options.max_model_len or facts.max_position_embeddings
    if max_model_len > facts.max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {max_model_len}; the model takes {facts.max_position_embeddings}"
        )
    numerics = Numerics(
        dtype=getattr(torch, options.dtype_on(device.type)), rounds=options.numerics == "deployed"
    )
    ranks = single_rank()
    source = open_source(options.model, options.load_format, options.seed)
    model = weights.load_model(
        lambda w: architecture.build(w, config, ranks, numerics, block_size),
        source,
        device,
        architecture.ignored(config),
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
            "rope": facts.rope,
            "tokenizer": _file_hash((options.tokenizer or options.model) / "tokenizer.json"),
            "protocol_version": PROTOCOL_VERSION,
        }
    )
    return LoadedModel(
        model=model,
        layout=layout,
        name=options.names[0],
        eos_token_ids=frozenset(facts.eos_token_ids) | _generation_eos(options.model),
        bos_token_id=facts.bos_token_id,
        vocab_size=facts.vocab_size,
        max_model_len=max_model_len,
        digest=digest,
    )


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
