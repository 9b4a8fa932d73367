"""Who owns which block (and which state slot): one state each, never lost and never doubled.

Holders come and go: a request that computes, a transfer that still reads, the prefix cache. Every
holder holds its blocks in one state, and a block's own state is the strongest of its holders': a
cached block that a running request shares is active. No tensors here; `storage` has them. One
thread owns a pool: there are no locks.
"""

import enum
from collections import Counter
from collections.abc import Iterable

from scission.common.cache.storage import SCRATCH


class State(enum.IntEnum):
    """What a block is held for, strongest first; FREE is what a block without a holder is."""

    ACTIVE = 0  # a sequence that computes reads or writes it
    RESERVED = 1  # granted to state that is still arriving
    RETAINED = 2  # computed, kept for a decode that may ask for it
    QUARANTINED = 3  # of an ended request, while a peer or a copy may still touch it
    CACHED = 4  # held by the prefix cache
    FREE = 5


_NUM_HELD = int(State.FREE)


class BlockPool:
    """The blocks 1 .. num_blocks - 1 of a storage; 0 is scratch: never handed out or counted."""

    def __init__(self, num_blocks: int) -> None:
        """`num_blocks` is the storage's, the scratch block included."""
        assert num_blocks >= 1
        self.total = num_blocks - SCRATCH - 1
        # ascending ids go first; what is released last is reused first, while its rows are warm
        self._free = list(range(num_blocks - 1, SCRATCH, -1))
        self._holders = [[0] * _NUM_HELD for _ in range(num_blocks)]
        self._in_state = [0] * _NUM_HELD + [self.total]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int, state: State = State.ACTIVE) -> list[int] | None:
        """Take `count` free blocks, one holder each; None, and none taken, when fewer are free."""
        assert count >= 0 and state is not State.FREE
        if count > len(self._free):
            return None
        ids = [self._free.pop() for _ in range(count)]
        for block in ids:
            self._holders[block][state] = 1
        self._in_state[State.FREE] -= count
        self._in_state[state] += count
        return ids

    def share(self, ids: Iterable[int], state: State = State.ACTIVE) -> None:
        """Add a holder to blocks that have one already."""
        assert state is not State.FREE
        for block in ids:
            before = self.state_of(block)
            assert before is not State.FREE, f"block {block} is free: nobody to share it with"
            self._holders[block][state] += 1
            self._count(before, self.state_of(block))

    def move(self, ids: Iterable[int], source: State, target: State) -> None:
        """One holder of each block, which holds it in `source`, now holds it in `target`."""
        assert target is not State.FREE
        for block in ids:
            before = self.state_of(block)
            self._drop(block, source)
            self._holders[block][target] += 1
            self._count(before, self.state_of(block))

    def release(self, ids: Iterable[int], state: State) -> list[int]:
        """One holder of each block, which held it in `state`, is gone. Returns what became free."""
        freed = []
        for block in ids:
            before = self.state_of(block)
            self._drop(block, state)
            after = self.state_of(block)
            self._count(before, after)
            if after is State.FREE:
                freed.append(block)
        self._free.extend(reversed(freed))
        return freed

    def state_of(self, block: int) -> State:
        assert SCRATCH < block < len(self._holders), block
        holders = self._holders[block]
        return next((State(state) for state in range(_NUM_HELD) if holders[state]), State.FREE)

    def num_holders(self, block: int, state: State | None = None) -> int:
        """The block's reference count; with `state`, of the holders in that state alone."""
        holders = self._holders[block]
        return sum(holders) if state is None else holders[state]

    def counts(self) -> dict[State, int]:
        """Blocks by state; they sum to `total`."""
        return {state: self._in_state[state] for state in State}

    def check(self) -> None:
        """Assert the conservation equation, from the holders and not from the running counts."""
        blocks = range(SCRATCH + 1, len(self._holders))
        found = Counter(self.state_of(block) for block in blocks)
        assert self.counts() == {state: found[state] for state in State}, (self.counts(), found)
        assert sum(found.values()) == self.total
        assert sorted(self._free) == [b for b in blocks if self.state_of(b) is State.FREE]
        assert not any(self._holders[SCRATCH])

    def _drop(self, block: int, state: State) -> None:
        assert self._holders[block][state] > 0, f"block {block} has no {state.name} holder"
        self._holders[block][state] -= 1

    def _count(self, before: State, after: State) -> None:
        self._in_state[before] -= 1
        self._in_state[after] += 1


class SlotPool(BlockPool):
    """The state slots 1 .. num_slots - 1 of a storage, in the same states; slot 0 is scratch."""

    def take(self, state: State = State.ACTIVE) -> int | None:
        """One free slot, or None."""
        slots = self.allocate(1, state)
        return slots[0] if slots else None
