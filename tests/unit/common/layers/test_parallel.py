"""Every parallel layer, cut over ranks and put together again, equals the whole one."""

from pathlib import Path

import pytest
import torch

from scission.common.checkpoint.source import FileSource
from scission.common.checkpoint.weights import Ledger, Weights
from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from scission.common.errors import ConfigError
from scission.common.layers.attention import GroupedOutput
from scission.common.layers.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from scission.common.layers.moe import MoE, ScoreRouter
from scission.common.layers.numerics import Numerics
from scission.common.parallel.ranks import Axis, single_rank
from tests.reference_checkpoint import tiny_config

FP32 = Numerics(torch.float32, rounds=False)
ONE = Axis()
PAIR = (Axis(0, 2), Axis(1, 2))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_random_deepseek_v4(directory, tiny_config(), seed=4)
    return directory


def _weights(checkpoint: Path, *scope: str) -> Weights:
    return Weights(Ledger(FileSource(checkpoint), "cpu")).scope(*scope)


def test_columns_side_by_side_are_the_whole(checkpoint: Path) -> None:
    x = torch.randn(3, 96)

    def heads(axis: Axis) -> torch.Tensor:
        w = _weights(checkpoint, "layers", "0", "attn")
        return ColumnParallelLinear(w, "wq_b", 256, 96, axis, FP32, align=64)(x)

    torch.testing.assert_close(torch.cat([heads(axis) for axis in PAIR], -1), heads(ONE))


def test_rows_add_up_to_the_whole(checkpoint: Path) -> None:
    x = torch.randn(3, 96)
    w = _weights(checkpoint, "layers", "0", "attn")
    whole = RowParallelLinear(w, "wo_b", 160, 96, ONE, FP32)(x)
    parts = [
        RowParallelLinear(_weights(checkpoint, "layers", "0", "attn"), "wo_b", 160, 96, axis, FP32)
        for axis in PAIR
    ]
    halves = x.chunk(2, dim=-1)
    torch.testing.assert_close(sum(p(h) for p, h in zip(parts, halves, strict=True)), whole)


def test_groups_add_up_to_the_whole_output(checkpoint: Path) -> None:
    heads = torch.randn(3, 4, 64)

    def output(axis: Axis, own: torch.Tensor) -> torch.Tensor:
        w = _weights(checkpoint, "layers", "2", "attn")
        return GroupedOutput(w, 160, 256, 2, 48, axis, FP32)(own)

    parts = [output(axis, own) for axis, own in zip(PAIR, heads.chunk(2, dim=1), strict=True)]
    torch.testing.assert_close(parts[0] + parts[1], output(ONE, heads))


def test_vocabulary_halves_are_the_whole(checkpoint: Path) -> None:
    ids, x = torch.tensor([0, 159, 160, 319]), torch.randn(2, 160)

    def embed(axis: Axis) -> torch.Tensor:
        return VocabParallelEmbedding(_weights(checkpoint), "embed", 320, 160, axis, FP32)(ids)

    def head(axis: Axis) -> torch.Tensor:
        return VocabParallelHead(_weights(checkpoint), "head", 320, 160, axis)(x)

    torch.testing.assert_close(embed(PAIR[0]) + embed(PAIR[1]), embed(ONE))
    torch.testing.assert_close(torch.cat([head(axis) for axis in PAIR], -1), head(ONE))


def test_experts_of_all_ranks_add_up_with_the_shared_one_counted_once(checkpoint: Path) -> None:
    x, ids = torch.randn(5, 160), torch.zeros(5, dtype=torch.int64)

    def moe(axis: Axis) -> tuple[torch.Tensor, torch.Tensor]:
        w = _weights(checkpoint, "layers", "3", "ffn")
        router = ScoreRouter(w.scope("gate"), 160, 8, 3, 1.5)
        mixture = MoE(w, router, 160, 96, 8, 10.0, axis, FP32)
        shared = mixture._shared
        alone = torch.zeros_like(x)
        if shared is not None:
            one = torch.ones(5, 1)
            alone = shared(x, torch.zeros(5, 1, dtype=torch.int64), one)
        return mixture(x, ids), alone

    (first, shared), (second, _), (whole, _) = moe(PAIR[0]), moe(PAIR[1]), moe(ONE)
    torch.testing.assert_close(first + second - shared, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tp_size", "ep_size", "dp_size"])
def test_more_than_one_rank_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is 2"):
        single_rank(**{name: 2})


def test_rank_outside_its_axis_is_refused() -> None:
    with pytest.raises(ConfigError, match="outside"):
        Axis(2, 2)
