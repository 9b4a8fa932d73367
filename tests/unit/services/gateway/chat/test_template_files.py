import json
from pathlib import Path
from typing import Any

import pytest

from scission.common.config import ChatOptions
from scission.common.errors import CheckpointError, ConfigError
from scission.services.gateway.chat.chat_style import CALLS, STEP, THOUGHTS, choose_style
from scission.services.gateway.chat.template_files import ChatTemplates, read_chat_templates


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        file.write_text(text, encoding="utf-8")
    return folder


NAMED = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
CONFIG = "tokenizer_config.json"
PLACES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "a file": ({"chat_template.jinja": "f", CONFIG: {"chat_template": "c"}}, {"default": "f"}),
    "several files": (
        {"chat_template.jinja": "f", "additional_chat_templates/tool_use.jinja": "t"},
        {"default": "f", "tool_use": "t"},
    ),
    "the config": ({CONFIG: {"chat_template": "c"}}, {"default": "c"}),
    "a list in the config": ({CONFIG: {"chat_template": NAMED}}, {"default": "d", "tool_use": "t"}),
    "a processor's file": ({"chat_template.json": {"chat_template": "p"}}, {"default": "p"}),
}


@pytest.mark.parametrize("place", PLACES)
def test_templates_are_found_where_checkpoints_keep_them(tmp_path: Path, place: str) -> None:
    files, expected = PLACES[place]
    templates = read_chat_templates(write(tmp_path, files))
    assert templates is not None
    assert templates.texts == expected
    assert templates.name_for(has_tools=False) == "default"
    named = "tool_use" if "tool_use" in expected else "default"
    assert templates.name_for(has_tools=True) == named


def test_special_tokens_are_texts_or_objects(tmp_path: Path) -> None:
    files = {
        "chat_template.jinja": "x",
        "special_tokens_map.json": {"bos_token": "<old>", "unk_token": {"content": "<unk>"}},
        CONFIG: {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None},
    }
    templates = read_chat_templates(write(tmp_path, files))
    assert templates is not None
    assert templates.variables == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_a_folder_without_templates_has_none(tmp_path: Path) -> None:
    assert read_chat_templates(tmp_path) is None
    assert read_chat_templates(write(tmp_path, {CONFIG: {}})) is None


def test_a_file_that_is_given_counts_more(tmp_path: Path) -> None:
    write(tmp_path, {"chat_template.jinja": "f", "mine.jinja": "m"})
    templates = read_chat_templates(tmp_path, tmp_path / "mine.jinja")
    assert templates is not None and templates.texts == {"default": "m"}
    with pytest.raises(ConfigError, match=r"chat_template: other\.jinja cannot be read"):
        read_chat_templates(tmp_path, tmp_path / "other.jinja")


@pytest.mark.parametrize("found", [7, ["x"], [{"name": "default"}], [{"name": "rag"}], {"a": 1}])
def test_something_else_than_templates_is_an_error(tmp_path: Path, found: object) -> None:
    with pytest.raises(CheckpointError, match="chat_template must be"):
        read_chat_templates(write(tmp_path, {CONFIG: {"chat_template": found}}))


def test_of_named_templates_one_must_be_the_default(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "r"}]
    with pytest.raises(CheckpointError, match="rag"):
        read_chat_templates(write(tmp_path, {CONFIG: {"chat_template": named}}))


QWEN = "Qwen3ForCausalLM"
SHOWN: dict[str, tuple[str, str, set[str], str, str]] = {
    "hybrid Qwen3": (QWEN, "</think> <tool_call>", set(), "qwen3", "hermes"),
    "Qwen3 that only answers": (QWEN, "<tool_call>", set(), "none", "hermes"),
    "Qwen3-Coder": (QWEN, "<tool_call><function=", set(), "none", "step3p5"),
    "Step-3.5": (STEP, "</think><tool_call><function=", set(), "step3p5", "step3p5"),
    "Ministral 3": ("Mistral3", "[TOOL_CALLS]", {"[THINK]", "[/THINK]"}, "mistral", "mistral"),
    "plain": (QWEN, "x", set(), "none", "none"),
}


@pytest.mark.parametrize("case", SHOWN)
def test_the_style_is_the_one_that_the_template_shows(case: str) -> None:
    architecture, text, added, thought, calls = SHOWN[case]
    style = choose_style(architecture, ChatTemplates({"default": text}), added, ChatOptions())
    assert style.thought == THOUGHTS[thought]
    assert type(style.calls) is type(CALLS[calls])
    assert style.strips_contents == (architecture == STEP)


def test_a_parser_that_is_named_counts_more_than_what_the_template_shows() -> None:
    templates = ChatTemplates({"default": "</think> <tool_call>"})
    options = ChatOptions(tool_call_parser="mistral", reasoning_parser="none")
    style = choose_style(QWEN, templates, (), options)
    assert style.thought is None
    assert style.calls is CALLS["mistral"]
    with pytest.raises(ConfigError, match="auto, none, hermes, mistral, qwen3_coder, step3p5"):
        choose_style(QWEN, templates, (), ChatOptions(tool_call_parser="deepseek_v4"))
