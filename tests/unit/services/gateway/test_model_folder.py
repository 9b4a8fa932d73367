import json
from pathlib import Path
from typing import Any

import pytest

from scission.common.config import ChatOptions, ModelOptions
from scission.common.errors import CheckpointError, ConfigError, UnsupportedError
from scission.services.gateway.chat.format import Conversation
from scission.services.gateway.model_folder import read_model_folder
from tests.unit.services.gateway.chat.template_fixtures import SHAPES, write_folder
from tests.unit.services.gateway.text_fixtures import tokenizer_json

CONFIG = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "vocab_size": 300,
    "max_position_embeddings": 1000,
    "eos_token_id": 1,
}


def write(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    return folder


def test_limits_come_from_the_config_and_the_options(tmp_path: Path) -> None:
    folder = write(tmp_path)
    found = read_model_folder(ModelOptions(folder)).model
    assert (found.max_model_len, found.vocab_size, found.eos_token_ids) == (
        1000,
        300,
        frozenset({1}),
    )
    assert found.name == tmp_path.name
    options = ModelOptions(folder, served_model_name=("a", "b"), max_model_len=50)
    found = read_model_folder(options).model
    assert (found.names, found.root, found.max_model_len) == (("a", "b"), "a", 50)


def test_both_configs_name_end_of_sequence_ids(tmp_path: Path) -> None:
    folder = write(tmp_path, eos_token_id=[1, 7])
    (folder / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert read_model_folder(ModelOptions(folder)).model.eos_token_ids == frozenset({1, 7, 9})


@pytest.mark.parametrize("name", SHAPES)
async def test_a_model_with_a_template_is_read_from_its_folder(name: str, tmp_path: Path) -> None:
    folder = read_model_folder(ModelOptions(write_folder(SHAPES[name], tmp_path)))
    assert (folder.model.vocab_size, folder.model.max_model_len) == (1000, 2000)
    rendered = await folder.chat_format.render(Conversation([{"role": "user", "content": "q"}]))
    assert "q" in rendered.prompt


async def test_without_a_template_chats_are_refused_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, architectures=["OtherForCausalLM"])
    folder = read_model_folder(ModelOptions(tmp_path))
    with pytest.raises(UnsupportedError, match="has no chat template"):
        await folder.chat_format.render(Conversation([{"role": "user", "content": "q"}]))
    (tmp_path / "mine.jinja").write_text("<{{ messages[0].content }}>")
    folder = read_model_folder(
        ModelOptions(tmp_path), ChatOptions(template=tmp_path / "mine.jinja")
    )
    rendered = await folder.chat_format.render(Conversation([{"role": "user", "content": "q"}]))
    assert rendered.prompt == "<q>"


def test_a_template_that_does_not_compile_is_found_at_start(tmp_path: Path) -> None:
    write(tmp_path, architectures=["Qwen3ForCausalLM"])
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(CheckpointError, match="cannot be compiled: TemplateSyntaxError"):
        read_model_folder(ModelOptions(tmp_path))


def test_deepseek_v4_takes_no_other_parser(tmp_path: Path) -> None:
    folder = ModelOptions(write(tmp_path))
    read_model_folder(folder, ChatOptions(tool_call_parser="deepseek_v4"))
    with pytest.raises(ConfigError, match="built in"):
        read_model_folder(folder, ChatOptions(tool_call_parser="hermes"))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"vocab_size": 200}, "vocab_size is 200"),
        ({"vocab_size": "300"}, "vocab_size must be"),
        ({"max_position_embeddings": None}, "max_position_embeddings must be"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_model_folder(ModelOptions(write(tmp_path, **changes)))


def test_a_context_longer_than_the_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1001"):
        read_model_folder(ModelOptions(write(tmp_path), max_model_len=1001))
