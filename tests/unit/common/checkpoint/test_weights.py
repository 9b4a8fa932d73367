"""Reading a checkpoint: both ways, by name, whole and in shards."""

import logging
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scission.common.checkpoint import deepseek_v4
from scission.common.checkpoint.source import FileSource
from scission.common.checkpoint.weights import Matrix, Shard, Weights, load_model
from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from scission.common.errors import CheckpointError
from tests.reference_checkpoint import dequantized_state, tiny_config
from tests.unit.common.checkpoint.small_checkpoints import (
    open_weights,
    take_everything,
    write_tensors,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_random_deepseek_v4(directory, tiny_config(), seed=1)
    return directory


def test_every_parameter_equals_its_dequantised_value(checkpoint: Path) -> None:
    parameters = load_model(take_everything(tiny_config()), FileSource(checkpoint), "cpu")
    expected = dequantized_state(checkpoint)
    assert parameters.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(parameters[name].to(value.dtype), value), name


def test_a_long_list_of_left_tensors_is_cut_and_counted(tmp_path: Path) -> None:
    write_tensors(tmp_path, **{f"t__{i}": torch.ones(1) for i in range(30)})
    with pytest.raises(CheckpointError, match=r"30 tensors .*t\.19, and 10 more"):
        open_weights(tmp_path).finish()


def test_a_tensor_cannot_be_taken_twice(checkpoint: Path) -> None:
    weights = open_weights(checkpoint)
    weights.tensor("norm.weight", [160], torch.bfloat16)
    with pytest.raises(AssertionError, match=r"norm\.weight is taken twice"):
        weights.tensor("norm.weight", [160], torch.bfloat16)


def test_names_match_by_whole_components_only(tmp_path: Path) -> None:
    write_tensors(
        tmp_path,
        experts__1__w1__weight=torch.full((2, 2), 1.0),
        experts__11__w1__weight=torch.full((2, 2), 11.0),
        shared_experts__1__w1__weight=torch.full((2, 2), 21.0),
        gate__weight=torch.full((2, 2), 31.0),
        wgate__weight=torch.full((2, 2), 41.0),
    )
    weights = open_weights(tmp_path)
    assert not weights.has("experts.1.w")
    assert not weights.scope("expert").has("s.1.w1.weight")
    assert weights.scope("experts", "1").matrix("w1", 2, 2).codes.flatten().tolist() == [1.0] * 4
    assert weights.matrix("gate", 2, 2).codes.flatten().tolist() == [31.0] * 4
    with pytest.raises(CheckpointError, match=r"shared_experts\.1\.w1\.weight, wgate\.weight"):
        weights.finish([re.compile(r"experts\.11\..*")])


def test_ignored_names_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config()
    extra = {
        "mtp.0.embed.weight": torch.zeros(2),
        "mtp.0.head.weight": torch.zeros(2),
        "mtp.0.draft.gate": torch.zeros(2),
        "mtp.1.attn.wq_a.weight": torch.zeros(2),
        "mtp.2.norm.weight": torch.zeros(2),
    }
    write_random_deepseek_v4(tmp_path, config, seed=1, extra_tensors=extra)
    with caplog.at_level(logging.INFO):
        build = take_everything(config)
        load_model(build, FileSource(tmp_path), "cpu", deepseek_v4.IGNORED)
    said = [r.getMessage() for r in caplog.records if "ignored" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("ignored 5 tensors: mtp.0.draft.gate, mtp.0.embed.weight")


def test_no_known_tensor_is_ever_ignored() -> None:
    table = deepseek_v4.tensor_table(tiny_config())
    assert not [n for n in table if any(rule.fullmatch(n) for rule in deepseek_v4.IGNORED)]


@given(size=st.integers(0, 500), count=st.integers(1, 16), align=st.sampled_from([1, 32, 128]))
def test_shards_cover_a_dimension_once_in_order(size: int, count: int, align: int) -> None:
    end = 0
    for index in range(count):
        start, stop = Shard(0, index, count, align).bounds(size)
        assert start == end <= stop
        assert start % align == 0 or start == size
        end = stop
    assert end == size


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_experts_are_cut_by_expert_by_rows_and_by_columns(checkpoint: Path, dim: int) -> None:
    names = [f"layers.2.ffn.experts.{e}.w2" for e in range(8)]
    state = dequantized_state(checkpoint)
    whole = torch.stack([state[f"{name}.weight"] for name in names])
    align = 32 if dim == 2 else 1
    for index in range(3):
        shard = Shard(dim, index, 3, align)
        weights = open_weights(checkpoint)
        experts = weights.experts(names, 160, 96, shard)
        start, stop = shard.bounds(whole.shape[dim])
        expected = whole.narrow(dim, start, stop - start)
        assert torch.equal(experts.dequantize(torch.float32), expected)
        # the other ranks' experts count as taken
        with pytest.raises(CheckpointError) as raised:
            weights.finish()
        assert "experts.7.w2" not in str(raised.value)


def test_tensors_are_cut_like_matrices(checkpoint: Path) -> None:
    whole = open_weights(checkpoint).tensor("embed.weight", [320, 160], torch.bfloat16)
    parts = [
        open_weights(checkpoint).tensor("embed.weight", [320, 160], torch.bfloat16, Shard(0, i, 3))
        for i in range(3)
    ]
    assert [len(part) for part in parts] == [107, 107, 106]
    assert torch.equal(torch.cat(parts), whole)


def test_loaded_tensors_own_their_memory(checkpoint: Path) -> None:
    weights = open_weights(checkpoint)
    norm = weights.tensor("norm.weight", [160], torch.bfloat16)
    norm.zero_()
    assert open_weights(checkpoint).tensor("norm.weight", [160], torch.bfloat16).any()


def test_a_checkpoint_on_the_meta_device_reads_nothing(checkpoint: Path) -> None:
    weights = open_weights(checkpoint, "meta")
    matrix = weights.matrix("layers.0.attn.wq_a", 96, 160)
    assert matrix.codes.is_meta
    assert matrix.dequantize(torch.float32).shape == (96, 160)


def test_matrix_counts_its_bytes() -> None:
    codes = torch.zeros(2, 4, 16, dtype=torch.int8)
    matrix = Matrix("fp4_group", codes, torch.zeros(2, 4, 1, dtype=torch.uint8), 4, 32)
    assert matrix.num_bytes == 2 * 4 * 17


def test_a_constructor_that_stops_early_does_not_hide_the_cause(tmp_path: Path) -> None:
    write_tensors(tmp_path, w=torch.ones(4))

    def build(weights: Weights) -> None:
        weights.tensor("v", [4], torch.float32)
        raise CheckpointError("this model needs more")

    with pytest.raises(CheckpointError, match=r"tensor v is missing .*; this model needs more"):
        load_model(build, FileSource(tmp_path), "cpu")
