import pytest
import torch
from torch import Tensor

from scission.common.cache.layout import CacheLayout, Component, Kind
from scission.common.cache.storage import CacheStorage
from scission.common.config import CacheOptions
from scission.common.errors import ConfigError
from scission.common.model.batch import ForwardBatch, SequenceChunk, Snapshot
from scission.common.runner import (
    NUM_SCRATCH,
    CacheSize,
    Runner,
    plan_cache,
    state_bytes,
    warm_up_sizes,
)

CPU = torch.device("cpu")
PAGED = Component("kv", Kind.PAGED, (0, 1), (4,), "float32")
RING = Component("window", Kind.RING, (0,), (4,), "float32", ring_size=8, initial=-1.0)
LAYOUT = CacheLayout((PAGED, RING), block_size=4)
BLOCK_BYTES = 4 * 16 * 2
SLOT_BYTES = 8 * 16


def plan(options: CacheOptions, layout: CacheLayout = LAYOUT, *, caches: bool = True) -> CacheSize:
    return plan_cache(layout, options, num_requests=4, has_prefix_cache=caches, device=CPU)


@pytest.mark.parametrize("caches", [True, False])
def test_blocks_and_slots_fill_the_budget_and_no_more(caches: bool) -> None:
    budget = 100 * BLOCK_BYTES
    size = plan(CacheOptions(memory_bytes=budget, snapshot_bytes=10 * SLOT_BYTES), caches=caches)
    used = size.num_blocks * BLOCK_BYTES + size.num_slots * SLOT_BYTES
    assert budget - BLOCK_BYTES < used <= budget
    assert size.num_snapshots == (10 if caches else 0)
    assert size.num_slots == NUM_SCRATCH + 4 + size.num_snapshots


def test_a_given_number_of_blocks_is_taken_beside_the_scratch_block() -> None:
    size = plan(CacheOptions(num_blocks=7, memory_bytes=1))
    assert size.num_blocks == 8
    assert size.num_snapshots == 7, "no more snapshots than blocks to end at"


def test_snapshots_leave_room_for_blocks() -> None:
    size = plan(CacheOptions(memory_bytes=100 * BLOCK_BYTES))
    assert size.num_snapshots <= size.num_blocks


def test_without_prefix_cache_or_slot_state_there_are_no_snapshots() -> None:
    off = CacheOptions(memory_bytes=1 << 20, enable_prefix_caching=False)
    assert plan(off).num_snapshots == 0
    dense = CacheLayout((PAGED,), block_size=4)
    assert plan(CacheOptions(memory_bytes=1 << 20), dense).num_snapshots == 0


def test_a_budget_without_room_for_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="memory_bytes"):
        plan(CacheOptions(memory_bytes=6 * SLOT_BYTES))


class Recorder:
    """Notes what a pass is given; writes into the rings that it may write."""

    layout = LAYOUT
    layer_groups = ((0, 2),)
    captures = False

    def __init__(self) -> None:
        self.batches: list[ForwardBatch] = []
        self.snapshots_seen: list[float] = []

    def forward(
        self, batch: ForwardBatch, storage: CacheStorage, on_layers: object = None
    ) -> Tensor:
        self.batches.append(batch)
        for _, slot, end in batch.writers:
            self.snapshots_seen.append(float(storage.slots["window"][0, slot, 0, 0]))
            storage.slots["window"][:, slot] = end
        return torch.zeros(len(batch.logits_at), 10)


def test_a_snapshot_starts_as_a_copy_of_its_sequence() -> None:
    model = Recorder()
    storage = CacheStorage(LAYOUT, 8, 4, CPU)
    storage.slots["window"][:, 1] = 5.0
    chunk = SequenceChunk([1, 2], 2, [1], slot=1, snapshots=(Snapshot(slot=3, end=4),))
    assert Runner(model, storage).forward([chunk]).shape == (1, 10)
    assert model.snapshots_seen == [5.0, 5.0]


@pytest.mark.parametrize(("num_tokens", "computed"), [(0, 1), (5, 5), (1000, 28)])
def test_warming_up_fits_the_storage_and_leaves_a_clean_slot(
    num_tokens: int, computed: int
) -> None:
    model = Recorder()
    storage = CacheStorage(LAYOUT, 8, 4, CPU)
    Runner(model, storage).warm_up(num_tokens)
    assert model.batches[0].num_tokens == computed
    assert (storage.slots["window"][:, 1] == -1.0).all()


def test_a_gpu_compiles_for_few_rows_and_many_before_any_request() -> None:
    sizes = warm_up_sizes(8192, torch.device("cuda"))
    assert sizes == tuple(sorted(set(sizes)))
    # one token, a few, a tile, several tiles, all
    assert sizes[:2] == (1, 2)
    assert sizes[-1] == 8192
    assert warm_up_sizes(20, torch.device("cuda")) == (1, 2, 20)
    assert warm_up_sizes(8192, CPU) == (8192,)


def test_a_gpu_is_shared_by_what_each_process_has_taken_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    total = 100 << 30
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 8 << 30)
    options = CacheOptions(memory_utilization=0.45)
    # a neighbour holds 45 of 100 GiB already: our share is none the smaller
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (47 << 30, total))
    assert state_bytes(options, torch.device("cuda")) == (45 << 30) - (8 << 30)
    # what others hold beyond their share is not there to be taken
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 << 30, total))
    assert 9 << 30 < state_bytes(options, torch.device("cuda")) < 10 << 30
