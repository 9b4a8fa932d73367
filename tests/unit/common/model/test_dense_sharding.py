"""Every rank of every split, simulated in one process, gives what one rank gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scission.common.cache.storage import CacheStorage
from scission.common.checkpoint.headers import read_json
from scission.common.checkpoint.source import FileSource
from scission.common.checkpoint.weights import Ledger, Weights, load_model
from scission.common.checkpoint.write_random import write_random_checkpoint
from scission.common.errors import ConfigError
from scission.common.layers.flat_moe import FlatExperts
from scission.common.layers.heads import HeadSplit
from scission.common.layers.linear import axis_shard
from scission.common.layers.mlp import GatedMLP
from scission.common.layers.numerics import Numerics
from scission.common.model.batch import SequenceChunk, build_batch
from scission.common.model.registry import find_architecture
from scission.common.parallel.ranks import Axis, Ranks
from tests.dense_checkpoints import ministral3_config, qwen3_config, step3p5_config
from tests.unit.common.model.thread_ranks import on_every_rank

FP32 = Numerics(torch.float32, rounds=False)
CPU = torch.device("cpu")
# the requirement for one layer is 1e-5 relative; logits of few layers stay near it
RELATIVE = 2e-5

CONFIGS: dict[str, dict[str, Any]] = {
    # 8 ranks over 2 key-value heads hold each of them 4 times
    "qwen3": qwen3_config(num_hidden_layers=2, intermediate_size=1300),
    "qwen3-tied-odd-vocabulary": qwen3_config(
        num_hidden_layers=1, num_key_value_heads=8, tie_word_embeddings=True, vocab_size=331
    ),
    "ministral3": ministral3_config(num_hidden_layers=2, num_key_value_heads=4),
    "step3p5": step3p5_config(
        num_attention_heads=8,
        attention_other_setting={
            "attention_type": "sliding_attention",
            "num_attention_heads": 16,
            "num_attention_groups": 2,
            "head_dim": 32,
        },
        # 10 scale blocks, of which none may be cut, as in the published model
        moe_intermediate_size=1280,
        share_expert_dim=1280,
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp(request.param)
    write_random_checkpoint(directory, CONFIGS[request.param], seed=3, shards=1)
    return directory


@pytest.mark.parametrize("size", [2, 4, 8])
def test_tensor_parallel_ranks_compute_the_whole_model(checkpoint: Path, size: int) -> None:
    expected = _logits(checkpoint, Ranks())
    for logits in on_every_rank(size, lambda tp: _logits(checkpoint, Ranks(tp=tp))):
        _assert_near(logits, expected)


@pytest.mark.parametrize("size", range(2, 9))
def test_expert_parallel_ranks_compute_the_whole_model(
    tmp_path_factory: pytest.TempPathFactory, size: int
) -> None:
    directory = tmp_path_factory.mktemp("experts")
    write_random_checkpoint(directory, step3p5_config(moe_num_experts=9), seed=4, shards=1)
    expected = _logits(directory, Ranks())
    for logits in on_every_rank(size, lambda ep: _logits(directory, Ranks(ep=ep))):
        _assert_near(logits, expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 16])
def test_ten_scale_blocks_are_divided_whole(tmp_path: Path, size: int) -> None:
    """A cut inside a block would read its rows with the neighbour's scale."""
    config = step3p5_config(moe_intermediate_size=1280, share_expert_dim=1280, moe_num_experts=3)
    write_random_checkpoint(tmp_path, config, seed=5, shards=1)
    x = torch.randn(4, 160)
    experts = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2]])
    weights = torch.rand(4, 2)

    def layers(axis: Axis) -> tuple[Tensor, Tensor]:
        w = Weights(Ledger(FileSource(tmp_path), "cpu")).scope("model", "layers", "2")
        routed = FlatExperts(w.scope("moe"), 3, 160, 1280, Ranks(tp=axis), FP32, None)
        shared = GatedMLP(w.scope("share_expert"), 160, 1280, axis, FP32)
        shard = axis_shard(axis, 0, 128)
        assert shard is None or all(bound % 128 == 0 for bound in shard.bounds(1280))
        return routed(x, experts, weights), shared.partial(x)

    routed, shared = layers(Axis())
    parts = [layers(Axis(rank, size)) for rank in range(size)]
    _assert_near(sum((part[0] for part in parts), torch.zeros(())), routed, 1e-5)
    _assert_near(sum((part[1] for part in parts), torch.zeros(())), shared, 1e-5)
    if size > 10:
        # more ranks than blocks: trailing ranks hold nothing and add nothing
        assert not parts[-1][0].any() and not parts[-1][1].any()


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("heads", [(32, 8), (64, 8), (96, 8), (8, 2)])
def test_every_query_head_is_computed_once_beside_its_key_head(
    heads: tuple[int, int], size: int
) -> None:
    num_heads, num_kv_heads = heads
    group = num_heads // num_kv_heads
    seen: list[int] = []
    for rank in range(size):
        split = HeadSplit(Axis(rank, size), num_heads, num_kv_heads)
        queries, keys = split.queries(1), split.keys(1)
        mine = range(*(queries.bounds(num_heads) if queries else (0, num_heads)))
        held = range(*(keys.bounds(num_kv_heads) if keys else (0, num_kv_heads)))
        assert {head // group for head in mine} == set(held)
        assert len(held) == split.num_local_kv_heads
        seen += mine
    assert seen == list(range(num_heads))


def test_ranks_that_do_not_divide_the_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match="tp_size is 6; 8 query and 4 key-value heads"):
        HeadSplit(Axis(0, 6), 8, 4)


def _logits(directory: Path, ranks: Ranks) -> Tensor:
    """Of a prompt in chunks, then single tokens, on this rank's own storage."""
    raw = read_json(directory / "config.json")
    architecture = find_architecture(raw)
    config = architecture.parse(raw)
    model = load_model(
        lambda w: architecture.build(w, config, ranks, FP32, 128),
        FileSource(directory),
        "cpu",
        architecture.ignored(config),
    )
    storage = CacheStorage(model.layout, 4, 2, CPU)
    results = []
    with torch.inference_mode():
        for start, end in ((0, 90), (90, 150), (150, 151), (151, 152)):
            tokens = [(7 * i + 3) % 320 for i in range(start, end)]
            chunk = SequenceChunk(tokens, start, [1, 2], 1)
            results.append(model.forward(build_batch([chunk], CPU), storage))
    return torch.cat(results)


def _assert_near(ours: Tensor, theirs: Tensor, relative: float = RELATIVE) -> None:
    assert (ours - theirs).norm() <= relative * theirs.norm()
