"""What the gateway needs of a checkpoint's config files; the workers read the rest."""

import json
from pathlib import Path
from typing import Any

from scission.common.config import ModelOptions
from scission.common.errors import CheckpointError, ConfigError
from scission.services.gateway.served_model import ServedModel


def read_served_model(options: ModelOptions) -> ServedModel:
    """Names, bounds and end-of-sequence ids, from config.json and generation_config.json.

    Raises:
        CheckpointError: config.json is missing, unreadable or lacks a field.
        ConfigError: max_model_len is more than the model takes.
    """
    config = _read(options.model / "config.json")
    most = _integer(config, "max_position_embeddings")
    max_model_len = options.max_model_len or most
    if max_model_len > most:
        raise ConfigError(f"max_model_len is {max_model_len}; the model takes {most}")
    eos_token_ids = _ids(config.get("eos_token_id"))
    generation = options.model / "generation_config.json"
    if generation.exists():
        eos_token_ids |= _ids(_read(generation).get("eos_token_id"))
    return ServedModel(
        names=options.names,
        root=options.names[0],
        max_model_len=max_model_len,
        vocab_size=_integer(config, "vocab_size"),
        eos_token_ids=eos_token_ids,
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file.name} is no JSON object")
    return content


def _integer(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"config.json: {name} must be a positive integer, got {value!r}")
    return value


def _ids(value: object) -> frozenset[int]:
    ids = value if isinstance(value, list) else [value]
    return frozenset(token_id for token_id in ids if isinstance(token_id, int))
