"""The running batch: what each step takes of it, and the steps that are under way.

A step may be submitted while the one before it still runs. A sequence that ends meanwhile leaves
the batch at once; what a later step draws for it is dropped, and its blocks and its slot are free
only when no step can write them any more.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from scission.common.cache.block_pool import BlockPool, SlotPool, State
from scission.common.stepping.sequences import Drawn, Steps, Submitted, append
from scission.services.decode.request import RunningSequence
from scission.services.decode.scheduler import Scheduler


class RunningBatch:
    """See the module. Owned by the engine thread."""

    def __init__(
        self,
        steps: Steps[RunningSequence],
        blocks: BlockPool,
        slots: SlotPool,
        *,
        block_size: int,
        max_model_len: int,
        preempt_youngest: Callable[[], None],
    ) -> None:
        """`preempt_youngest` ends a request that holds room: it releases its sequences here."""
        self._steps = steps
        self._blocks = blocks
        self._slots = slots
        self._scheduler = Scheduler(blocks, block_size, preempt_youngest, max_model_len)
        self._under_way: deque[Submitted[RunningSequence]] = deque()
        self.num_tokens = 0  # that the last step computes

    @property
    def is_idle(self) -> bool:
        """No sequence runs, and no step is under way."""
        return not self._scheduler.running and not self._under_way

    @property
    def sequences(self) -> Sequence[RunningSequence]:
        return self._scheduler.running

    def add(self, sequences: Iterable[RunningSequence]) -> None:
        self._scheduler.running += sequences

    def release(self, sequence: RunningSequence) -> None:
        """The sequence draws no more."""
        self._scheduler.running.remove(sequence)
        sequence.is_released = True
        if not sequence.num_steps:
            self._free(sequence)

    def step(self) -> Iterator[Drawn[RunningSequence]]:
        """Submit the next step, and give the tokens of the one before it, or of itself.

        The caller says of each token what it ends before it asks for the next one.
        """
        if self._under_way and self._scheduler.is_short:
            # what ends now frees blocks, and what is preempted then frees them at once
            yield from self._collect(0)
        planned = self._scheduler.plan()
        depth = self.num_tokens = 0
        if planned:
            step = self._steps.submit(planned)
            self.num_tokens = step.num_tokens
            self._under_way.append(step)
            for sequence in step.sequences:
                sequence.num_steps += 1
            depth = 0 if step.is_awaited else self._steps.depth
        yield from self._collect(depth)

    def abandon(self) -> None:
        """Drop the steps under way, once the device is done with them or has failed."""
        while self._under_way:
            step = self._under_way.popleft()
            with contextlib.suppress(Exception):
                step.collect()
            self._end(step)

    def _collect(self, depth: int) -> Iterator[Drawn[RunningSequence]]:
        while len(self._under_way) > depth:
            step = self._under_way.popleft()
            try:
                for drawn in step.collect():
                    if not drawn.sequence.is_released:
                        append(drawn)
                        yield drawn
            finally:
                self._end(step)

    def _end(self, step: Submitted[RunningSequence]) -> None:
        for sequence in step.sequences:
            sequence.num_steps -= 1
            if sequence.is_released and not sequence.num_steps:
                self._free(sequence)

    def _free(self, sequence: RunningSequence) -> None:
        self._blocks.release(sequence.block_ids, State.ACTIVE)
        self._slots.release([sequence.slot], State.ACTIVE)
