"""A checkpoint's chat templates, found where checkpoints keep them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scission.common.checkpoint.headers import read_json
from scission.common.errors import CheckpointError, ConfigError

DEFAULT = "default"
FOR_TOOLS = "tool_use"
FILE = "chat_template.jinja"
FOLDER = "additional_chat_templates"
OLD_FILE = "chat_template.json"  # of processors
MAX_FILE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class ChatTemplates:
    """Templates by name, and the special tokens that they may print."""

    texts: Mapping[str, str]
    variables: Mapping[str, str] = field(default_factory=dict)  # bos_token, eos_token, ...

    def name_for(self, *, has_tools: bool) -> str:
        """The template of a conversation; of several, one may be made for tools."""
        if has_tools and FOR_TOOLS in self.texts:
            return FOR_TOOLS
        return DEFAULT

    def mention(self, word: str) -> bool:
        return any(word in text for text in self.texts.values())


def read_chat_templates(folder: Path, file: Path | None = None) -> ChatTemplates | None:
    """The templates of a tokenizer's folder, or the one in `file`; None when there is none.

    The newer place counts: chat_template.jinja (and additional_chat_templates/), then
    tokenizer_config.json, then the chat_template.json of processors.

    Raises:
        CheckpointError: a file cannot be read or holds something else.
        ConfigError: `file` cannot be read.
    """
    config = _optional_json(folder / "tokenizer_config.json")
    if file is not None:
        try:
            texts = {DEFAULT: _read(file)}
        except CheckpointError as error:
            raise ConfigError(f"chat_template: {error}") from error
    else:
        texts = _find(folder, config)
    if not texts:
        return None
    if DEFAULT not in texts:
        names = ", ".join(sorted(texts))
        raise CheckpointError(f"of the chat templates ({names}) none is named {DEFAULT!r}")
    old_tokens = _optional_json(folder / "special_tokens_map.json")
    return ChatTemplates(texts, {**_special_tokens(old_tokens), **_special_tokens(config)})


def _find(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    if (folder / FILE).is_file():
        others = sorted((folder / FOLDER).glob("*.jinja"))
        return {DEFAULT: _read(folder / FILE), **{path.stem: _read(path) for path in others}}
    found = config.get("chat_template")
    if found is None:
        found = _optional_json(folder / OLD_FILE).get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        return {DEFAULT: found}
    try:
        texts = {entry["name"]: entry["template"] for entry in found}
    except (TypeError, KeyError, AttributeError):
        texts = {"": None}
    if not all(isinstance(text, str) for pair in texts.items() for text in pair):
        raise CheckpointError(
            "chat_template must be a text or a list of {name, template}, "
            f"got {json.dumps(found)[:80]}"
        )
    return texts


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like: their text, or an object with `content`."""
    tokens = {}
    for name, entry in config.items():
        text = entry.get("content") if isinstance(entry, dict) else entry
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _optional_json(file: Path) -> Mapping[str, Any]:
    return read_json(file) if file.is_file() else {}


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise CheckpointError(f"{file.name} is larger than {MAX_FILE_BYTES} bytes")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file.name} cannot be read: {error}") from error
