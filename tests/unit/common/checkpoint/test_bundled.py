"""The bundled model: written once, whole, loadable, and with a tokenizer that loses nothing."""

import ast
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from scission.common.checkpoint.bundled import BUNDLED_CONFIG, bundled_checkpoint
from scission.common.checkpoint.byte_tokenizer import build_tokenizer, readable_ids
from scission.common.checkpoint.deepseek_v4 import tensor_table
from scission.common.checkpoint.headers import read_headers
from scission.common.checkpoint.inspect import inspect_checkpoint
from scission.common.errors import CheckpointError


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundled_checkpoint(tmp_path_factory.mktemp("cache"))


def test_the_bundled_model_is_a_whole_checkpoint(bundled: Path) -> None:
    assert read_headers(bundled).keys() == tensor_table(BUNDLED_CONFIG).keys()
    assert inspect_checkpoint(bundled).problems == ()
    for name in (
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "encoding/encoding_dsv4.py",
    ):
        assert (bundled / name).is_file()


def test_the_bundled_model_has_every_kind_of_layer(bundled: Path) -> None:
    assert set(BUNDLED_CONFIG["compress_ratios"][:6]) == {0, 4, 128}
    assert len(inspect_checkpoint(bundled).layers) == 6


def test_a_second_start_writes_nothing(bundled: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in bundled.rglob("*")}
    assert bundled_checkpoint(bundled.parent) == bundled
    assert {file: file.stat().st_mtime_ns for file in bundled.rglob("*")} == before


def test_starts_that_race_leave_one_whole_folder(tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(bundled_checkpoint(tmp_path)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert list(tmp_path.iterdir()) == [found[0]]
    assert inspect_checkpoint(found[0]).problems == ()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match="XDG_CACHE_HOME"):
        bundled_checkpoint(blocked / "cache")


def test_the_chat_texts_are_constants_with_their_placeholders(bundled: Path) -> None:
    tree = ast.parse((bundled / "encoding" / "encoding_dsv4.py").read_text(encoding="utf-8"))
    texts = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert texts.keys() == {"TOOLS_TEMPLATE", "response_format_template", "REASONING_EFFORT_MAX"}
    for placeholder in ("dsml_token", "thinking_start_token", "thinking_end_token", "tool_schemas"):
        assert "{" + placeholder + "}" in texts["TOOLS_TEMPLATE"]
    assert "{schema}" in texts["response_format_template"]


def test_special_tokens_are_single_and_the_first_three_have_their_ids(bundled: Path) -> None:
    tokenizer = Tokenizer.from_file(str(bundled / "tokenizer.json"))
    for text, wanted in (
        ("<｜begin▁of▁sentence｜>", 0),
        ("<｜end▁of▁sentence｜>", 1),
        ("<｜▁pad▁｜>", 2),
    ):
        assert tokenizer.token_to_id(text) == wanted
    markers = ["<think>", "</think>", "｜DSML｜", "<｜User｜>", "<｜Assistant｜>", "<｜action｜>"]
    markers += ["<｜latest_reminder｜>", "<｜query｜>", "<｜authority｜>", "<｜domain｜>"]
    markers += ["<｜title｜>", "<｜read_url｜>"]
    for marker in markers:
        encoded = tokenizer.encode(f"a{marker}b", add_special_tokens=False)
        assert encoded.tokens == ["a", marker, "b"]
    assert tokenizer.get_vocab_size() <= BUNDLED_CONFIG["vocab_size"]


def test_think_and_dsml_markers_survive_decoding() -> None:
    tokenizer = build_tokenizer()
    text = "<｜User｜>a<think>b</think><｜DSML｜invoke><｜end▁of▁sentence｜>"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == "a<think>b</think><｜DSML｜invoke>"


@given(st.text())
@settings(max_examples=200)
def test_every_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_merges_join_common_pieces() -> None:
    assert build_tokenizer().encode("on the\n\n").tokens == ["on", "Ġthe", "ĊĊ"]


def test_readable_ids_are_what_can_be_read() -> None:
    tokenizer = build_tokenizer()
    ids = readable_ids(tokenizer)
    assert len(set(ids)) == len(ids)
    texts = [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
    assert all(text.isprintable() or not text.strip() or "▁" in text for text in texts)


def test_the_weights_do_not_change_unnoticed(bundled: Path) -> None:
    """Another machine's prefill must get the same bytes: a sum over all of them."""
    from scission.common.checkpoint.source import weights_revision

    again = bundled_checkpoint(bundled.parent / "again")
    assert weights_revision(again) == weights_revision(bundled)
    for file in sorted(bundled.glob("*.safetensors")):
        content = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
        other = (again / file.name).read_bytes()
        assert content.numpy().tobytes() == other
