import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scission.common.cache.block_pool import BlockPool, SlotPool, State

HELD = [state for state in State if state is not State.FREE]


class PoolMachine(RuleBasedStateMachine):
    """A pool against a plain list of holders (block ids, state): the model of what must be true."""

    def __init__(self) -> None:
        super().__init__()
        self.holders: list[tuple[list[int], State]] = []

    @initialize(num_blocks=st.integers(1, 12))
    def make(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)

    @rule(count=st.integers(0, 8), state=st.sampled_from(HELD))
    def allocate(self, count: int, state: State) -> None:
        free = self.pool.num_free
        ids = self.pool.allocate(count, state)
        if count > free:
            assert ids is None
            return
        assert ids is not None and len(set(ids)) == count
        assert not set(ids) & {block for held, _ in self.holders for block in held}
        self.holders.append((ids, state))

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), state=st.sampled_from(HELD))
    def share(self, data: st.DataObject, state: State) -> None:
        ids, _ = data.draw(st.sampled_from(self.holders))
        self.pool.share(ids, state)
        self.holders.append((list(ids), state))

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), after=st.sampled_from(HELD))
    def move(self, data: st.DataObject, after: State) -> None:
        at = data.draw(st.integers(0, len(self.holders) - 1))
        ids, source = self.holders[at]
        self.pool.move(ids, source, after)
        self.holders[at] = (ids, after)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        ids, state = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        freed = self.pool.release(ids, state)
        assert freed == [b for b in ids if not any(b in held for held, _ in self.holders)]

    @invariant()
    def every_block_is_in_the_strongest_state_of_its_holders(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        counts = self.pool.counts()
        assert sum(counts.values()) == self.pool.total
        for block in range(1, self.pool.total + 1):
            states = [state for held, state in self.holders if block in held]
            assert self.pool.state_of(block) == min(states, default=State.FREE)
            assert self.pool.num_holders(block) == len(states)


TestPoolNeitherLosesNorDoublesABlock = PoolMachine.TestCase


def test_scratch_is_never_handed_out() -> None:
    pool = BlockPool(4)
    assert pool.total == 3
    assert pool.allocate(3) == [1, 2, 3]
    assert pool.allocate(1) is None
    assert SlotPool(1).take() is None


def test_releasing_what_nobody_holds_is_caught() -> None:
    pool = BlockPool(4)
    ids = pool.allocate(2)
    assert ids is not None
    with pytest.raises(AssertionError):
        pool.release(ids, State.RETAINED)
    pool.release(ids, State.ACTIVE)
    with pytest.raises(AssertionError):
        pool.release(ids, State.ACTIVE)
    with pytest.raises(AssertionError):
        pool.share(ids)


def test_a_cached_block_outlives_the_requests_that_share_it() -> None:
    pool = BlockPool(3)
    ids = pool.allocate(1)
    assert ids is not None
    pool.share(ids, State.CACHED)
    assert pool.state_of(ids[0]) is State.ACTIVE
    assert pool.release(ids, State.ACTIVE) == []
    assert pool.state_of(ids[0]) is State.CACHED
    assert pool.release(ids, State.CACHED) == ids


def test_slots_are_taken_one_at_a_time() -> None:
    slots = SlotPool(3)
    assert [slots.take(), slots.take(State.CACHED), slots.take()] == [1, 2, None]
    slots.release([2], State.CACHED)
    assert slots.take() == 2
