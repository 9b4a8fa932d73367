"""Steps as chunks that the host lays out, computed and drawn before `submit` returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

from scission.common.model.batch import SequenceChunk
from scission.common.runner import Runner
from scission.common.sampling import sample
from scission.common.stepping.sequences import Drawn, Planned, S, advance


@dataclass(frozen=True, slots=True)
class DoneStep(Generic[S]):
    """A step whose tokens are known."""

    sequences: Sequence[S]
    num_tokens: int
    drawn: list[Drawn[S]]

    @property
    def is_awaited(self) -> bool:
        return True

    def collect(self) -> list[Drawn[S]]:
        return self.drawn


class ChunkedSteps(Generic[S]):
    """Every step is one eager pass."""

    depth = 0

    def __init__(
        self, runner: Runner, on_batch: Callable[[Sequence[SequenceChunk]], None] | None = None
    ) -> None:
        """`on_batch` is shown each step's batch before it is computed, for a replay."""
        self._runner = runner
        self._on_batch = on_batch

    def submit(self, planned: Sequence[Planned[S]]) -> DoneStep[S]:
        chunks = [chunk_of(p, p.count, "last" if p.draws else "none") for p in planned]
        if self._on_batch is not None:
            self._on_batch(chunks)
        logits = self._runner.forward(chunks)
        tokens = iter(sample(logits, [p.sequence.sampling for p in planned if p.draws]))
        drawn = []
        for p in planned:
            draws = p.draws
            context_len = advance(p)
            if draws:
                drawn.append(Drawn(p.sequence, *next(tokens), context_len))
        num_tokens = sum(p.count for p in planned)
        return DoneStep([p.sequence for p in planned], num_tokens, drawn)


def chunk_of(planned: Planned[S], count: int, logits: str) -> SequenceChunk:
    """The first `count` pending tokens of a sequence."""
    sequence = planned.sequence
    return SequenceChunk(
        token_ids=sequence.pending[:count],
        start=sequence.num_computed,
        block_ids=sequence.block_ids,
        slot=sequence.slot,
        logits=logits,
    )
