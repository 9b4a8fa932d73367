"""The state that requests compute into: blocks and a slot each, taken whole and given back whole.

A request gets room for all its tokens before its first chunk, so that computing never needs room
that retained state has taken. What is cached of its prefix it shares. Belongs to the engine thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scission.common.cache.block_pool import BlockPool, SlotPool, State
from scission.common.cache.prefix import PrefixCache
from scission.common.cache.storage import CacheStorage
from scission.common.model.batch import Snapshot


class HeldState:
    """One request's blocks and slot: active, then retained, then gone as soon as nobody reads it.

    Transfers read it after the request has let go; until the last of them is closed, what was
    offered to them is quarantined. What was not offered is free at once.
    """

    def __init__(
        self, blocks: BlockPool, slots: SlotPool, block_size: int, block_ids: list[int], slot: int
    ) -> None:
        """Both are held in state ACTIVE by the caller, who hands them over."""
        self._blocks = blocks
        self._slots = slots
        self._block_size = block_size
        self.block_ids = block_ids
        self.slot = slot
        self._state = State.ACTIVE
        self._num_readers = 0
        self._num_offered_blocks = 0
        self._is_slot_offered = False

    def add_reader(self) -> None:
        self._num_readers += 1

    def offer_tokens(self, num_tokens: int) -> None:
        """A reader may read the rows of the first `num_tokens` tokens from now on."""
        num_blocks = -(-num_tokens // self._block_size)
        self._num_offered_blocks = max(self._num_offered_blocks, num_blocks)

    def offer_slot(self) -> None:
        self._is_slot_offered = True

    def retain(self) -> None:
        """Computed: nothing writes it any more."""
        self._move(State.RETAINED)

    def let_go(self) -> None:
        """The request is over: free what no reader can touch, quarantine the rest."""
        assert self._state in (State.ACTIVE, State.RETAINED)
        if self._num_readers == 0:
            self._free()
            return
        self._blocks.release(self.block_ids[self._num_offered_blocks :], self._state)
        del self.block_ids[self._num_offered_blocks :]
        if not self._is_slot_offered:
            self._slots.release([self.slot], self._state)
            self.slot = 0
        self._move(State.QUARANTINED)

    def drop_reader(self) -> None:
        """A transfer is closed: its last read is done."""
        assert self._num_readers > 0
        self._num_readers -= 1
        if self._num_readers == 0 and self._state is State.QUARANTINED:
            self._free()

    def _move(self, state: State) -> None:
        self._blocks.move(self.block_ids, self._state, state)
        if self.slot:
            self._slots.move([self.slot], self._state, state)
        self._state = state

    def _free(self) -> None:
        self._blocks.release(self.block_ids, self._state)
        if self.slot:
            self._slots.release([self.slot], self._state)
        self._state = State.FREE
        self.block_ids, self.slot = [], 0


@dataclass(frozen=True, slots=True)
class Room:
    """What a request was given: its state, of which `num_cached` tokens are computed already."""

    state: HeldState
    num_cached: int


class StateStore:
    """All blocks and slots of one prefill worker, and the prefix cache that fills what is idle."""

    def __init__(self, storage: CacheStorage, max_snapshots: int, has_prefix_cache: bool) -> None:
        self.storage = storage
        self.block_size = storage.layout.block_size
        self.blocks = BlockPool(storage.num_blocks)
        self.slots = SlotPool(storage.num_slots)
        self.prefixes = PrefixCache(
            self.blocks,
            self.slots,
            self.block_size,
            max_snapshots,
            needs_snapshots=bool(storage.layout.per_slot),
            is_enabled=has_prefix_cache,
        )

    def acquire(
        self, num_tokens: int, hashes: Sequence[bytes], *, reads_cache: bool
    ) -> Room | None:
        """Room for `num_tokens` tokens, the longest cached prefix shared; None when there is none.

        Cached blocks that nobody else holds are given up for it. The slot is clean, or holds what
        the rings held at the end of the cached prefix.
        """
        if self.slots.num_free == 0:
            return None
        hit = self.prefixes.match(hashes, num_tokens) if reads_cache else None
        shared = list(hit.block_ids) if hit else []
        # first of all: what is shared is not evicted for the rest
        self.blocks.share(shared)
        fresh = self._allocate(self.storage.layout.num_blocks(num_tokens) - len(shared))
        if fresh is None:
            self.blocks.release(shared, State.ACTIVE)
            return None
        slot = self.slots.take()
        assert slot is not None
        # at once, before the snapshot can make room for another
        if hit is not None and hit.snapshot is not None:
            self.storage.copy_slot(hit.snapshot, slot)
        else:
            self.storage.reset_slot(slot)
        state = HeldState(self.blocks, self.slots, self.block_size, shared + fresh, slot)
        return Room(state, hit.num_tokens if hit else 0)

    def snapshots(
        self, hashes: Sequence[bytes], start: int, end: int, num_tokens: int
    ) -> tuple[Snapshot, ...]:
        """Slots to fill while the tokens [start, end) of `num_tokens` are computed.

        At the chunk's end where that is the end of a block, and at the last full block; that block
        being the whole prompt, also one block before, where the same prompt can hit.
        """
        last, before = num_tokens // self.block_size, (num_tokens - 1) // self.block_size
        ends = {last * self.block_size, before * self.block_size}
        if end % self.block_size == 0:
            ends.add(end)
        found = []
        for snapshot_end in sorted(ends):
            if not start < snapshot_end <= end:
                continue
            slot = self.prefixes.take_snapshot_slot(hashes[snapshot_end // self.block_size - 1])
            if slot is not None:
                found.append(Snapshot(slot, snapshot_end))
        return tuple(found)

    def keep(
        self,
        state: HeldState,
        hashes: Sequence[bytes],
        num_computed: int,
        snapshots: Sequence[Snapshot],
    ) -> None:
        """`num_computed` tokens are computed: cache their full blocks and the snapshots."""
        num_full = num_computed // self.block_size
        self.prefixes.insert(hashes[:num_full], state.block_ids[:num_full])
        for snapshot in snapshots:
            block_hash = hashes[snapshot.end // self.block_size - 1]
            self.prefixes.keep_snapshot(block_hash, snapshot.slot)

    def drop_snapshots(self, snapshots: Sequence[Snapshot]) -> None:
        """The pass that was to fill them failed."""
        for snapshot in snapshots:
            self.prefixes.drop_snapshot(snapshot.slot)

    def check(self) -> None:
        """Assert that every block and slot is accounted for."""
        self.blocks.check()
        self.slots.check()

    def _allocate(self, num_blocks: int) -> list[int] | None:
        missing = num_blocks - self.blocks.num_free
        # nothing is evicted in vain
        if missing > self.blocks.counts()[State.CACHED]:
            return None
        self.prefixes.evict(missing)
        return self.blocks.allocate(num_blocks)
