"""What one step computes: a token of every running sequence, and catching up within a budget."""

from collections.abc import Callable
from dataclasses import dataclass

from scission.common.cache.block_pool import BlockPool, State
from scission.services.decode.request import Phase, RunningSequence

CATCH_UP_TOKENS = 256  # a step, over all sequences: more would stall those that run


@dataclass(frozen=True, slots=True)
class Planned:
    """The next `count` pending tokens of a sequence."""

    sequence: RunningSequence
    count: int

    @property
    def draws(self) -> bool:
        """The step brings the sequence to its end: its next token is drawn."""
        return self.count == len(self.sequence.pending)


class Scheduler:
    """The running batch, in order of entry. Blocks are taken as sequences grow into them."""

    def __init__(
        self,
        blocks: BlockPool,
        block_size: int,
        preempt_youngest: Callable[[], None],
        catch_up_tokens: int = CATCH_UP_TOKENS,
    ) -> None:
        """`preempt_youngest` ends a request that holds room and removes it from `running`."""
        self._blocks = blocks
        self._block_size = block_size
        self._preempt_youngest = preempt_youngest
        self._catch_up_tokens = catch_up_tokens
        self.running: list[RunningSequence] = []

    def plan(self) -> list[Planned]:
        """The step's batch, in order of entry, with blocks for all of it."""
        budget = self._catch_up_tokens
        planned = []
        for sequence in list(self.running):
            count = len(sequence.pending)
            if count > 1:
                count = min(count, budget)
                budget -= count
            if count and self._grow(sequence, count):
                planned.append(Planned(sequence, count))
        # Growing for a later one may have preempted an earlier one.
        return [p for p in planned if p.sequence.request.phase is Phase.RUNNING]

    def _grow(self, sequence: RunningSequence, count: int) -> bool:
        """Blocks for the next `count` tokens; False when the sequence itself had to go."""
        needed = -(-(sequence.num_computed + count) // self._block_size)
        while len(sequence.block_ids) < needed:
            if sequence.request.phase is not Phase.RUNNING:
                return False
            taken = self._blocks.allocate(needed - len(sequence.block_ids), State.ACTIVE)
            if taken is None:
                self._preempt_youngest()
            else:
                sequence.block_ids += taken
        return sequence.request.phase is Phase.RUNNING
