"""Shards, their headers and index; writing and telling checkpoints apart."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scission.common.checkpoint.headers import INDEX_NAME, read_headers
from scission.common.checkpoint.source import weights_revision
from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from scission.common.errors import CheckpointError
from tests.reference_checkpoint import tiny_config
from tests.unit.common.checkpoint.small_checkpoints import (
    open_weights,
    write_tensors,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_random_deepseek_v4(directory, tiny_config(), seed=1)
    return directory


def test_a_tensor_at_an_odd_byte_is_read_right(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        }
    ).encode()
    values = torch.tensor([1.5, -2.5])
    content = len(header).to_bytes(8, "little") + header + b"abc" + values.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(content)
    assert torch.equal(open_weights(tmp_path).tensor("b", [2], torch.float32), values)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "cut short"),
        (b"\xff" * 8, "cut short"),
        (b"\x02\0\0\0\0\0\0\0[]", "broken safetensors header"),
        (b"\x02\0\0\0\0\0\0\0{}", None),
    ],
)
def test_a_broken_shard_is_named(tmp_path: Path, content: bytes, named: str | None) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    if named is None:
        assert read_headers(tmp_path) == {}
        return
    with pytest.raises(CheckpointError, match=f"model.safetensors.*{named}"):
        read_headers(tmp_path)


def test_a_shard_cut_short_is_named(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    last = max(tmp_path.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{last.name} is cut short"):
        read_headers(tmp_path)


def test_a_missing_shard_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_bytes((checkpoint / INDEX_NAME).read_bytes())
    with pytest.raises(CheckpointError, match=r"lacks 3 of the 3 shards .*00001-of-00003"):
        read_headers(tmp_path)


def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(CheckpointError, match="no file name"):
        read_headers(tmp_path)


@given(content=st.binary(max_size=200))
@settings(max_examples=200)
def test_no_bytes_crash_the_header_parser(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    directory = tmp_path_factory.getbasetemp() / "fuzz"
    directory.mkdir(exist_ok=True)
    header = len(content).to_bytes(8, "little") + content
    (directory / "model.safetensors").write_bytes(header)
    try:
        read_headers(directory)
    except CheckpointError:
        pass


def test_the_revision_sees_names_shapes_and_values(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=1, compress_ratios=[0, 0])
    revisions = []
    for i, (seed, shards) in enumerate([(1, 3), (1, 2), (2, 3)]):
        write_random_deepseek_v4(tmp_path / str(i), config, seed=seed, shards=shards)
        revisions.append(weights_revision(tmp_path / str(i)))
    first, other_shards, other_seed = revisions
    assert first == other_shards
    assert first != other_seed
    write_tensors(tmp_path / "0", norm__weight=torch.ones(4))
    assert weights_revision(tmp_path / "0") != first


def test_the_writer_is_deterministic(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_random_deepseek_v4(tmp_path / name, tiny_config(), seed=5)
    files = [file for file in (tmp_path / "a").rglob("*") if file.is_file()]
    assert len(files) == 9
    for file in files:
        other = tmp_path / "b" / file.relative_to(tmp_path / "a")
        assert file.read_bytes() == other.read_bytes(), file.name


def test_a_vocabulary_too_small_for_the_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="vocab_size is 300; the tokenizer has 308 tokens"):
        write_random_deepseek_v4(tmp_path, tiny_config(vocab_size=300), seed=1)
