"""A step by addresses on the device computes what a step by the host's row lists does."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from scission.common.cache.storage import CacheStorage
from scission.common.checkpoint import weights
from scission.common.checkpoint.open import open_source
from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from scission.common.layers.numerics import Numerics
from scission.common.model.batch import SequenceChunk, Snapshot, build_batch
from scission.common.model.config import read_config
from scission.common.model.deepseek_v4 import DeepseekV4
from scission.common.parallel.ranks import single_rank
from tests.reference_checkpoint import tiny_config

CPU = torch.device("cpu")
EXACT, DEPLOYED = (Numerics(torch.float32, rounds=rounds) for rounds in (False, True))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("placed")
    write_random_deepseek_v4(directory, tiny_config(), seed=3)
    return directory


def _load(checkpoint: Path, numerics: Numerics, *, is_placed: bool) -> DeepseekV4:
    config = read_config(checkpoint)
    return weights.load_model(
        lambda w: DeepseekV4(w, config, single_rank(), numerics, is_placed=is_placed),
        open_source(checkpoint, "auto", 0),
        CPU,
        (),
    )


# (sequence, tokens) of every pass: prompts whole and in chunks, single tokens, padding, mixtures
SCHEDULE = (
    ((0, 300),),
    ((1, 5), (0, 1)),
    ((1, 130), (2, 1), (0, 7)),
    ((0, 1), (1, 1), (2, 1)),
    ((2, 127), (0, 3)),
    *(((0, 1), (1, 1), (2, 1)),) * 5,
    ((0, 129), (2, 64)),
    *(((2, 1), (0, 1)),) * 4,
)


@torch.inference_mode()
def _run(model: DeepseekV4, num_passes: int) -> tuple[list[Tensor], CacheStorage]:
    """Each pass's logits, over poisoned storage, with a snapshot and a padded row among them."""
    storage = CacheStorage(model.layout, 24, 6, CPU)
    for tensor in storage.paged.values():
        tensor.fill_(float("nan"))
    for slot in range(1, 5):
        storage.reset_slot(slot)
    tokens = torch.randint(256, (4, 1024), generator=torch.Generator().manual_seed(5)).tolist()
    starts = [0, 0, 0]
    logits = []
    for number, fed in enumerate(SCHEDULE[:num_passes]):
        chunks = []
        for sequence, count in fed:
            start, end = starts[sequence], starts[sequence] + count
            snapshots = ()
            if number == 2 and sequence == 1:
                storage.copy_slot(2, 4)
                snapshots = (Snapshot(4, 128),)
            blocks = range(1 + 5 * sequence, 1 + 5 * sequence + -(-end // 128))
            chunks.append(
                SequenceChunk(
                    tokens[sequence][start:end],
                    start,
                    list(blocks),
                    sequence + 1,
                    "all",
                    snapshots,
                )
            )
            starts[sequence] = end
        if number % 3 == 0:
            chunks.insert(1, SequenceChunk([0], -1, [0], 0, "none"))
        logits.append(model.forward(build_batch(chunks, CPU), storage))
    return logits, storage


@pytest.mark.parametrize(
    ("numerics", "num_passes"),
    # roundings amplify what another order of a sum changes: they are held as long as all is equal
    [(EXACT, len(SCHEDULE)), (DEPLOYED, 10)],
    ids=["exact", "deployed"],
)
def test_logits_and_state_are_those_of_the_planned_rows(
    checkpoint: Path, numerics: Numerics, num_passes: int
) -> None:
    planned, of_planned = _run(_load(checkpoint, numerics, is_placed=False), num_passes)
    placed, of_placed = _run(_load(checkpoint, numerics, is_placed=True), num_passes)
    for number, (a, b) in enumerate(zip(planned, placed, strict=True)):
        difference = (a.log_softmax(-1) - b.log_softmax(-1)).abs().max()
        assert difference < 2e-4, f"pass {number}: {difference}"
    for expected, found in (
        (of_planned.slots, of_placed.slots),
        (of_planned.paged, of_placed.paged),
    ):
        for name, tensor in expected.items():
            torch.testing.assert_close(
                found[name][:, 1:], tensor[:, 1:], rtol=1e-4, atol=1e-4, equal_nan=True
            )
