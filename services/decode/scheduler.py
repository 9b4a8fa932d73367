"""What one step computes: a token of every running sequence, and catching up within a budget."""

from collections.abc import Callable

from scission.common.cache.block_pool import BlockPool, State
from scission.common.stepping.sequences import Planned
from scission.services.decode.request import Phase, RunningSequence

CATCH_UP_TOKENS = 256  # a step, over all sequences: more would stall those that run


class Scheduler:
    """The running batch, in order of entry. Blocks are taken as sequences grow into them."""

    def __init__(
        self,
        blocks: BlockPool,
        block_size: int,
        preempt_youngest: Callable[[], None],
        max_model_len: int,
        catch_up_tokens: int = CATCH_UP_TOKENS,
    ) -> None:
        """`preempt_youngest` ends a request that holds room and removes it from `running`."""
        self._blocks = blocks
        self._block_size = block_size
        self._preempt_youngest = preempt_youngest
        self._max_model_len = max_model_len
        self._catch_up_tokens = catch_up_tokens
        self.running: list[RunningSequence] = []

    @property
    def is_short(self) -> bool:
        """The next step may need more blocks than are free."""
        num_growing = sum(
            max(0, self._blocks_for(s, self._next_count(s)) - len(s.block_ids))
            for s in self.running
        )
        return num_growing > self._blocks.num_free

    def plan(self) -> list[Planned[RunningSequence]]:
        """The step's batch, in order of entry, with blocks for all of it."""
        budget = self._catch_up_tokens
        planned = []
        for sequence in list(self.running):
            count = self._next_count(sequence)
            if count > 1:
                count = min(count, budget)
                budget -= count
            if count and self._grow(sequence, count):
                planned.append(Planned(sequence, count))
        # Growing for a later one may have preempted an earlier one.
        return [p for p in planned if p.sequence.request.phase is Phase.RUNNING]

    def _grow(self, sequence: RunningSequence, count: int) -> bool:
        """Blocks for the next `count` tokens; False when the sequence itself had to go."""
        needed = self._blocks_for(sequence, count)
        while len(sequence.block_ids) < needed:
            if sequence.request.phase is not Phase.RUNNING:
                return False
            taken = self._blocks.allocate(needed - len(sequence.block_ids), State.ACTIVE)
            if taken is None:
                self._preempt_youngest()
            else:
                sequence.block_ids += taken
        return sequence.request.phase is Phase.RUNNING

    def _next_count(self, sequence: RunningSequence) -> int:
        """Tokens to compute: the pending ones, or one under way unless it is known to be the
        last.
        """
        if sequence.pending or not sequence.num_under_way:
            return len(sequence.pending)
        num_output = sequence.sampling.num_output + sequence.num_under_way
        goes_on = num_output < sequence.sampling.params.max_tokens
        return int(goes_on and sequence.num_computed + 1 < self._max_model_len)

    def _blocks_for(self, sequence: RunningSequence, count: int) -> int:
        return -(-(sequence.num_computed + count) // self._block_size)
