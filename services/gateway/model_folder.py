"""What the gateway reads of a checkpoint: limits, tokenizer and chat format; no weights."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scission.common.checkpoint.headers import read_json
from scission.common.config import ChatOptions, ModelOptions
from scission.common.errors import CheckpointError, ConfigError
from scission.services.gateway.chat.chat_style import choose_style
from scission.services.gateway.chat.checkpoint_texts import read_checkpoint_texts
from scission.services.gateway.chat.deepseek_v4 import DeepSeekV4Format
from scission.services.gateway.chat.format import ChatFormat
from scission.services.gateway.chat.template_files import read_chat_templates
from scission.services.gateway.chat.template_format import NoTemplateFormat, TemplateChatFormat
from scission.services.gateway.chat.template_process import TemplateRenderer
from scission.services.gateway.served_model import ServedModel
from scission.services.gateway.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    model: ServedModel
    tokenizer: Tokenizer
    chat_format: ChatFormat


def read_model_folder(options: ModelOptions, chat: ChatOptions | None = None) -> ModelFolder:
    """Read what the HTTP side needs. Starts the processes of the chat template where there is one.

    Raises:
        CheckpointError: a file is missing or wrong, or the chat template does not compile.
        ConfigError: max_model_len is more than the model takes, or a chat option does not fit.
    """
    config = read_json(options.model / "config.json")
    # of models that see, the part that reads has a config of its own
    text_config = config.get("text_config")
    text_config = text_config if isinstance(text_config, dict) else config
    tokenizer = Tokenizer.from_folder(options.tokenizer or options.model)
    longest = _integer(text_config, "max_position_embeddings")
    max_model_len = options.max_model_len or longest
    if max_model_len > longest:
        raise ConfigError(f"max_model_len is {max_model_len}; the model takes {longest}")
    vocab_size = _integer(text_config, "vocab_size")
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
            eos_token_ids=_eos_ids(config)
            | _eos_ids(text_config)
            | _eos_ids(_generation_config(options.model)),
        ),
        tokenizer=tokenizer,
        chat_format=_chat_format(config, options, chat or ChatOptions(), tokenizer),
    )


def _chat_format(
    config: Mapping[str, object], options: ModelOptions, chat: ChatOptions, tokenizer: Tokenizer
) -> ChatFormat:
    architectures = config.get("architectures")
    architecture = (
        str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    )
    if architecture == "DeepseekV4ForCausalLM" and chat.template is None:
        if {chat.tool_call_parser, chat.reasoning_parser} - {"auto", "deepseek_v4"}:
            raise ConfigError(
                "the chat format of DeepSeek-V4 is built in: tool_call_parser and reasoning_parser "
                "must be auto or deepseek_v4"
            )
        return DeepSeekV4Format(tokenizer, read_checkpoint_texts(options.model))
    templates = read_chat_templates(options.tokenizer or options.model, chat.template)
    if templates is None:
        logger.warning("the model has no chat template: chat requests will be refused")
        return NoTemplateFormat()
    style = choose_style(architecture, templates, tokenizer.added_tokens, chat)
    renderer = TemplateRenderer(templates.texts, templates.variables)
    return TemplateChatFormat(tokenizer, templates, renderer, style)


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
