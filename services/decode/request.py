"""A request as decode knows it, from its announcement to its end, and the sequences it runs."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from scission.common.engine_inbox import Submit
from scission.common.errors import ContextLengthError, RequestError
from scission.common.inference_messages import forced_from_proto, sampling_from_proto
from scission.common.sampling import SequenceSampling, check_sampling
from scission.common.stepping.sequences import DecodeSequence
from scission.common.transfer.events import TransferHandle
from scission.protos import inference_pb2


class Phase(enum.Enum):
    ANNOUNCED = enum.auto()  # holds nothing
    WAITING = enum.auto()  # its prefill has asked for room; holds nothing
    ARRIVING = enum.auto()  # holds room, its state is on the way
    RUNNING = enum.auto()
    ENDED = enum.auto()


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the engine must know of the model besides how to run it."""

    vocab_size: int
    max_model_len: int  # tokens
    eos_token_ids: frozenset[int]
    layout_digest: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Room:
    """What is granted to a request: the first choice's part takes the state in, the others' are
    forked from it.

    Every choice has a slot and blocks of its own; those of the later choices follow the first
    `num_shared` blocks of the first one.
    """

    block_ids: list[list[int]]  # by position in `choices`
    slots: list[int]
    choices: list[int]
    num_shared: int


class RunningSequence(DecodeSequence):
    """One choice of a request in the running batch. It owns a holder of each of its blocks, until
    no step may write them any more.
    """

    __slots__ = ("is_released", "num_steps", "request")

    def __init__(
        self,
        request: "Request",
        sampling: SequenceSampling,
        block_ids: list[int],
        slot: int,
        num_computed: int,
        pending: list[int],
    ) -> None:
        super().__init__(sampling, block_ids, slot, num_computed, pending)
        self.request = request
        self.num_steps = 0  # submitted ones that are not collected
        self.is_released = False


class Request:
    """One attempt of a request. What it holds is in `room` (arriving) or in `sequences`."""

    def __init__(self, submit: Submit, vocab_size: int, max_model_len: int) -> None:
        """Raises RequestError for what no decode of this model could serve."""
        message = submit.request
        assert isinstance(message, inference_pb2.DecodeRequest)
        self.request_id = message.request_id
        self.attempt = message.attempt
        self.gateway_epoch = submit.gateway_epoch
        self.deadline = submit.deadline
        self.received_at = submit.received_at
        # Seniority survives attempts: who was admitted at the gateway first goes first here.
        self.priority = message.priority
        self.admitted_at = submit.received_at - message.waited_s
        self.external_id = message.external_id
        self.prompt_token_ids = list(message.prompt_token_ids)
        self.params = sampling_from_proto(message.sampling)
        self.num_choices = message.num_choices
        self.forced = forced_from_proto(message.forced, message.num_choices)
        self.live_choices = set(range(message.num_choices))
        self.phase = Phase.ANNOUNCED
        self.handle: TransferHandle | None = None
        self.room: Room | None = None
        self.num_tokens = 0  # positions that the prefill ships
        self.num_drawn = 0  # tokens, by this attempt
        self.sequences: list[RunningSequence] = []
        self._check(vocab_size, max_model_len)

    @property
    def seniority(self) -> tuple[int, float]:
        """Smaller is more senior: runs first, is preempted last."""
        return self.priority, self.admitted_at

    def num_known(self, choice: int) -> int:
        """Tokens of the choice that need not be drawn: prompt and forced ones."""
        return len(self.prompt_token_ids) + len(self.forced[choice])

    def _check(self, vocab_size: int, max_model_len: int) -> None:
        if not self.num_choices or not self.prompt_token_ids or not self.params.max_tokens:
            raise RequestError("a decode needs a prompt, at least one choice and max_tokens >= 1")
        if len(self.forced) != self.num_choices:
            raise RequestError(
                f"forced tokens are given for {len(self.forced)} of {self.num_choices} choices"
            )
        longest = max(self.num_known(choice) for choice in range(self.num_choices))
        if longest >= max_model_len:
            raise ContextLengthError(
                f"{longest} tokens are given, this decode's context is {max_model_len}"
            )
        known = (*self.prompt_token_ids, *(t for forced in self.forced for t in forced))
        if max(known) >= vocab_size:
            raise RequestError(f"token {max(known)} is outside the vocabulary of {vocab_size}")
        check_sampling(self.params, vocab_size)
