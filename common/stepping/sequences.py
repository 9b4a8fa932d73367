"""A sequence that is being decoded, what a step takes of it, and what a step gives back.

A step is submitted and collected later: a sequence whose last token is not known to the host yet
can be in the next step already, where the device feeds the token itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from scission.common.sampling import SequenceSampling
from scission.common.types import TokenLogprobs


class DecodeSequence:
    """One sequence of the running batch, as the steps know it."""

    __slots__ = ("block_ids", "num_computed", "num_under_way", "pending", "sampling", "slot")

    def __init__(
        self,
        sampling: SequenceSampling,
        block_ids: list[int],
        slot: int,
        num_computed: int,
        pending: list[int],
    ) -> None:
        """
        Args:
            num_computed: tokens whose state is in place, or will be after the submitted steps.
            pending: the tokens after those that are known, at least one.
        """
        self.sampling = sampling
        self.block_ids = block_ids
        self.slot = slot
        self.num_computed = num_computed
        self.pending = pending
        self.num_under_way = 0  # submitted draws whose tokens are not collected yet

    @property
    def choice(self) -> int:
        return self.sampling.choice


S = TypeVar("S", bound=DecodeSequence)


@dataclass(frozen=True, slots=True)
class Planned(Generic[S]):
    """The next `count` tokens of a sequence: pending ones, or the one that is under way."""

    sequence: S
    count: int

    @property
    def draws(self) -> bool:
        """The step brings the sequence to its end: its next token is drawn."""
        return self.count >= len(self.sequence.pending)


@dataclass(frozen=True, slots=True)
class Drawn(Generic[S]):
    """One drawn token; `context_len` counts the sequence's tokens, this one included."""

    sequence: S
    token_id: int
    logprobs: TokenLogprobs | None
    context_len: int


class Submitted(Protocol[S]):
    """A step that the device has been given."""

    @property
    def sequences(self) -> Sequence[S]:
        """Those whose state it may write."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def is_awaited(self) -> bool:
        """The next step depends on what the host does with this one's tokens."""

    def collect(self) -> list[Drawn[S]]:
        """Wait for the step; its tokens in the order of the plan."""


class Steps(Protocol[S]):
    """What computes steps. It belongs to the engine thread."""

    @property
    def depth(self) -> int:
        """How many submitted steps may wait to be collected while the next one is planned."""

    def submit(self, planned: Sequence[Planned[S]]) -> Submitted[S]:
        """Start a step; the sequences stand at its end from here on."""


def advance(planned: Planned[S]) -> int:
    """Move a sequence to the end of its planned tokens; its context length with the drawn one."""
    sequence = planned.sequence
    if planned.draws:
        sequence.num_under_way += 1
    sequence.num_computed += planned.count
    del sequence.pending[: planned.count]
    return sequence.num_computed + 1


def append(drawn: Drawn[S]) -> None:
    """Tell a sequence its next token; it is pending unless a later step has been given it."""
    sequence = drawn.sequence
    sequence.num_under_way -= 1
    sequence.sampling.append(drawn.token_id)
    if sequence.num_computed < drawn.context_len:
        sequence.pending.append(drawn.token_id)
