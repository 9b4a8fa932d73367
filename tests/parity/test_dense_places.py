"""Dense models by addresses on the device equal those by rows that the host has listed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scission.common.cache.storage import CacheStorage
from scission.common.checkpoint.write_random import write_random_checkpoint
from scission.common.model.batch import SequenceChunk, Snapshot, build_batch
from scission.common.model.load import LoadedModel
from tests.dense_checkpoints import ministral3_config, qwen3_config, step3p5_config
from tests.one_process import CPU, load_exact
from tests.parity.state_rows import assert_close, everything, poison

CONFIGS = {
    "qwen3": qwen3_config(num_hidden_layers=2),
    "ministral3": ministral3_config(num_hidden_layers=2),
    "ministral3-sliding": ministral3_config(num_hidden_layers=2, sliding_window=40),
    "step3p5": step3p5_config(),
}
PADDING = SequenceChunk([0], start=-1, block_ids=[0], slot=0, logits="none")
# (sequence, number of tokens) of every step: prompts, chunks, mixes, single tokens
STEPS = [
    [(0, 1), (1, 150)],
    [(0, 39), (2, 130), (1, 1)],
    [(0, 1), (1, 1), (2, 1)],
    [(2, 200), (0, 129)],
    [(1, 1), (0, 1)],
]
NUM_BLOCKS = 4  # of a sequence


@pytest.fixture(scope="module", params=CONFIGS)
def exact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory: Path = tmp_path_factory.mktemp(request.param)
    write_random_checkpoint(directory, CONFIGS[request.param], seed=2)
    return load_exact(directory)


@torch.inference_mode()
def _run(
    exact: LoadedModel, is_placed: bool, num_padding: int, snapshot_end: int | None = None
) -> tuple[list[Tensor], CacheStorage]:
    """All steps' logits, and what state they leave."""
    generator = torch.Generator().manual_seed(3)
    storage = CacheStorage(exact.layout, 1 + 3 * NUM_BLOCKS, 5, CPU)
    poison(storage)
    lengths, results = [0, 0, 0], []
    for step in STEPS:
        chunks = []
        for i, count in step:
            start, lengths[i] = lengths[i], lengths[i] + count
            tokens = torch.randint(exact.vocab_size, (count,), generator=generator).tolist()
            blocks = range(1 + i * NUM_BLOCKS, 1 + (i + 1) * NUM_BLOCKS)
            snapshots: Sequence[Snapshot] = ()
            if i == 0 and snapshot_end is not None and start < snapshot_end <= lengths[i]:
                snapshots = [Snapshot(4, snapshot_end)]
                storage.copy_slot(1 + i, 4)
            chunks.append(
                SequenceChunk(tokens, start, blocks, 1 + i, "all", snapshots=tuple(snapshots))
            )
        batch = build_batch([*chunks, *[PADDING] * num_padding], CPU, exact.layout.block_size)
        if is_placed:
            batch = replace(batch, starts=(), ends=(), writers=())
        results.append(exact.model.forward(batch, storage))
    return results, storage


@pytest.mark.parametrize("num_padding", [0, 2])
def test_addresses_and_listed_rows_give_the_same_logits_and_state(
    exact: LoadedModel, num_padding: int
) -> None:
    listed, listed_storage = _run(exact, False, num_padding)
    placed, placed_storage = _run(exact, True, num_padding)
    for ours, theirs in zip(placed, listed, strict=True):
        assert not ours.isnan().any()
        assert_close(ours, theirs)
    for ours, theirs in zip(everything(placed_storage), everything(listed_storage), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_snapshots_by_addresses_hold_the_state_at_their_end(exact: LoadedModel) -> None:
    for end in (40, 128):
        _, listed = _run(exact, False, 0, end)
        _, placed = _run(exact, True, 0, end)
        for ours, theirs in zip(everything(placed), everything(listed), strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)
