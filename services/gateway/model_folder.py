"""What the gateway reads of a checkpoint: limits, tokenizer and chat format; no weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scission.common.checkpoint.headers import read_json
from scission.common.config import ModelOptions
from scission.common.errors import CheckpointError, ConfigError
from scission.services.gateway.chat.checkpoint_texts import read_checkpoint_texts
from scission.services.gateway.chat.deepseek_v4 import DeepSeekV4Format
from scission.services.gateway.chat.format import ChatFormat
from scission.services.gateway.served_model import ServedModel
from scission.services.gateway.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelFolder:
    model: ServedModel
    tokenizer: Tokenizer
    chat_format: ChatFormat


def read_model_folder(options: ModelOptions) -> ModelFolder:
    """Read what the HTTP side needs.

    Raises:
        CheckpointError: a file is missing or wrong, or the architecture has no chat format.
        ConfigError: max_model_len is more than the model takes.
    """
    config = read_json(options.model / "config.json")
    tokenizer = Tokenizer.from_folder(options.tokenizer or options.model)
    longest = _integer(config, "max_position_embeddings")
    max_model_len = options.max_model_len or longest
    if max_model_len > longest:
        raise ConfigError(f"max_model_len is {max_model_len}; the model takes {longest}")
    vocab_size = _integer(config, "vocab_size")
    if tokenizer.num_tokens > vocab_size:
        raise CheckpointError(
            f"tokenizer.json has ids up to {tokenizer.num_tokens - 1}, config.json's vocab_size "
            f"is {vocab_size}"
        )
    return ModelFolder(
        model=ServedModel(
            names=options.names,
            root=options.names[0],
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            eos_token_ids=_eos_ids(config) | _eos_ids(_generation_config(options.model)),
        ),
        tokenizer=tokenizer,
        chat_format=_chat_format(config, options.model, tokenizer),
    )


def _chat_format(config: Mapping[str, object], folder: Path, tokenizer: Tokenizer) -> ChatFormat:
    architectures = config.get("architectures")
    if architectures == ["DeepseekV4ForCausalLM"]:
        return DeepSeekV4Format(tokenizer, read_checkpoint_texts(folder))
    raise CheckpointError(f"config.json: there is no chat format for architectures {architectures}")


def _generation_config(folder: Path) -> Mapping[str, object]:
    file = folder / "generation_config.json"
    return read_json(file) if file.exists() else {}


def _eos_ids(config: Mapping[str, object]) -> frozenset[int]:
    found = config.get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    return frozenset(token_id for token_id in ids if isinstance(token_id, int))


def _integer(config: Mapping[str, object], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {name} must be a positive number, got {value!r}")
    return value
