from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from scission.common.cache.block_pool import BlockPool, SlotPool, State
from scission.common.cache.prefix import PrefixCache, PrefixHit
from scission.common.prefix_hash import block_hashes

BLOCK = 4


class Worker:
    """Computes prompts as an engine does: shares a hit, allocates the rest, snapshots the end."""

    def __init__(self, num_blocks: int = 32, max_snapshots: int = 3, **options: bool) -> None:
        self.blocks = BlockPool(num_blocks + 1)
        self.slots = SlotPool(1 + max_snapshots)
        self.cache = PrefixCache(self.blocks, self.slots, BLOCK, max_snapshots, **options)
        self.written: dict[int, bytes] = {}  # block -> the hash of what was computed into it

    def compute(self, tokens: Sequence[int], salt: str = "") -> tuple[PrefixHit | None, list[int]]:
        hashes = block_hashes(tokens, BLOCK, salt)
        hit = self.cache.match(hashes, len(tokens))
        shared = list(hit.block_ids) if hit else []
        self.blocks.share(shared)
        needed = -(-len(tokens) // BLOCK) - len(shared)
        self.cache.evict(needed - self.blocks.num_free)
        fresh = self.blocks.allocate(needed)
        assert fresh is not None
        block_ids = shared + fresh
        for block_hash, block in zip(hashes, block_ids, strict=False):
            if block in fresh:
                self.written[block] = block_hash
            assert self.written[block] == block_hash, "a shared block holds something else"
        if hashes:
            slot = self.cache.take_snapshot_slot(hashes[-1])
            self.cache.insert(hashes, block_ids[: len(hashes)])
            if slot is not None:
                self.cache.keep_snapshot(hashes[-1], slot)
        return hit, block_ids

    def finish(self, block_ids: list[int]) -> None:
        self.blocks.release(block_ids, State.ACTIVE)

    def run(self, tokens: Sequence[int], salt: str = "") -> int:
        """Compute and finish; the number of tokens that the cache spared."""
        hit, block_ids = self.compute(tokens, salt)
        self.finish(block_ids)
        return hit.num_tokens if hit else 0


def test_a_hit_is_the_longest_prefix_with_blocks_and_a_snapshot() -> None:
    worker = Worker()
    assert worker.run(range(10)) == 0  # snapshot after 8
    assert worker.run([*range(8), 90, 91]) == 8
    assert worker.run([*range(4), 90, 91]) == 0, "blocks alone are no hit: no snapshot after 4"
    assert worker.run([*range(10), 10, 11, 12]) == 8
    assert worker.run(range(14)) == 12


def test_a_hit_leaves_at_least_one_token_to_compute() -> None:
    worker = Worker()
    worker.run(range(8))
    assert worker.run(range(8)) == 0
    assert worker.run(range(9)) == 8
    assert worker.cache.match(block_hashes(range(8), BLOCK), 0) is None


def test_another_salt_never_hits() -> None:
    worker = Worker()
    worker.run(range(9), salt="a")
    assert worker.run(range(9), salt="b") == 0
    assert worker.run(range(9), salt="a") == 8


def test_without_slot_state_every_block_end_is_a_hit() -> None:
    worker = Worker(max_snapshots=0, needs_snapshots=False)
    worker.run(range(12))
    assert worker.run([*range(4), 90]) == 4
    assert worker.slots.num_free == worker.slots.total


def test_a_disabled_cache_holds_nothing() -> None:
    for worker in (Worker(max_snapshots=0), Worker(is_enabled=False)):
        worker.run(range(12))
        assert worker.run(range(12)) == 0
        assert worker.blocks.num_free == 32


def test_the_least_recently_used_snapshot_goes_first() -> None:
    worker = Worker(max_snapshots=2)
    worker.run([1] * 5)
    worker.run([2] * 5)
    assert worker.run([1] * 5) == 4
    worker.run([3] * 5)
    assert worker.run([1] * 5) == 4
    assert worker.run([2] * 5) == 0


def test_blocks_of_a_running_request_are_not_evicted() -> None:
    worker = Worker(num_blocks=4)
    _, running = worker.compute(range(9))
    assert worker.cache.evict(4) == 0
    worker.finish(running)
    assert worker.cache.evict(4) == 2
    assert worker.blocks.num_free == 4


def test_eviction_takes_the_ends_of_chains_first() -> None:
    worker = Worker()
    worker.run(range(13))
    worker.run([*range(12), 90, 91, 92, 93, 94])
    before = worker.blocks.counts()[State.CACHED]
    assert before == 4
    assert worker.cache.evict(1) == 1
    assert worker.run([*range(12), 90, 91, 92, 93, 94]) == 12
    worker.cache.clear()
    assert worker.blocks.num_free == worker.blocks.total
    assert worker.slots.num_free == worker.slots.total


def test_changes_name_only_where_a_hit_can_end() -> None:
    worker = Worker(max_snapshots=1)
    worker.run(range(9))
    hashes = block_hashes(range(9), BLOCK)
    assert worker.cache.take_changes() == {hashes[1]: True}
    worker.run([7] * 5)
    assert worker.cache.take_changes() == {hashes[1]: False, block_hashes([7] * 5, BLOCK)[0]: True}
    assert worker.cache.take_changes() == {}
    assert worker.cache.ends == block_hashes([7] * 5, BLOCK)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=24), st.booleans()), max_size=40
    ),
    st.integers(0, 4),
    st.booleans(),
)
def test_any_order_of_prompts_keeps_what_gateways_know_and_loses_no_block(
    prompts: list[tuple[list[int], bool]], max_snapshots: int, needs_snapshots: bool
) -> None:
    worker = Worker(12, max_snapshots, needs_snapshots=needs_snapshots)
    known: set[bytes] = set()
    running: list[list[int]] = []
    for tokens, stays in prompts:
        if stays and len(running) < 1:
            running.append(worker.compute(tokens)[1])
        else:
            worker.run(tokens)
        for block_hash, is_end in worker.cache.take_changes().items():
            (known.add if is_end else known.discard)(block_hash)
        assert known == set(worker.cache.ends)
        worker.blocks.check()
        worker.slots.check()
        assert worker.blocks.counts()[State.ACTIVE] == sum(len(set(ids)) for ids in running)
    for block_ids in running:
        worker.finish(block_ids)
    worker.cache.clear()
    assert worker.blocks.num_free == worker.blocks.total
    assert worker.slots.num_free == worker.slots.total
