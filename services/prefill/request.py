"""One attempt of one request, from its acceptance to the day its state is freed."""

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from scission.common.engine_inbox import Submit
from scission.common.errors import ContextLengthError, DeadlineError, RequestError
from scission.common.inference_messages import forced_from_proto, sampling_from_proto
from scission.common.prefix_hash import block_hashes
from scission.common.sampling import SequenceSampling, check_sampling
from scission.common.transfer.events import Destination
from scission.common.types import SamplingParams
from scission.protos import inference_pb2
from scission.services.prefill.handoff import Transfer
from scission.services.prefill.state import HeldState


class Phase(enum.Enum):
    QUEUED = enum.auto()  # holds nothing
    COMPUTING = enum.auto()  # holds all its blocks and a slot; its transfer may be open
    RETAINED = enum.auto()  # computed: waits for a grant, is shipped, or is kept under a lease


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the engine must know of the model besides how to run it."""

    vocab_size: int
    max_model_len: int  # tokens that this worker takes: the model's context, or all its blocks
    eos_token_ids: Collection[int]
    layout_digest: Mapping[str, str]


@dataclass(slots=True, eq=False)
class Request:
    """What was asked, and how far it is. Times are `time.monotonic()` seconds of this process."""

    request_id: str
    attempt: int
    gateway_epoch: int
    destination: Destination | None  # None: it ends here
    num_prompt_tokens: int
    token_ids: list[int]  # to compute: the prompt and, for n == 1, the forced tokens
    hashes: list[bytes]  # of the full blocks of token_ids
    sampling: SamplingParams
    choices: list[SequenceSampling]  # all n, forced tokens appended
    sampled_choices: list[int]  # whose next token is drawn here
    deadline: float
    received_at: float
    order: tuple[int, float]  # priority, then since when it waits: lower is sooner
    external_id: str

    phase: Phase = Phase.QUEUED
    is_ended: bool = False  # the gateway was told how this attempt ended
    is_finished: bool = False  # every choice ended at or before its first token
    num_computed: int = 0
    num_cached: int = 0
    state: HeldState | None = None
    transfer: Transfer | None = None  # the open one
    lease_until: float | None = None
    is_committed: bool = False
    cancelled_choices: set[int] = field(default_factory=set)
    scheduled_at: float | None = None
    first_token_at: float = 0.0
    # What was sampled, by choice, and what the gateway was told of it: both again on a redirect.
    first_tokens: dict[int, inference_pb2.Token] = field(default_factory=dict)
    results: list[inference_pb2.RequestEvent] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.sampling.prompt_logprobs is not None

    @property
    def due_at(self) -> float:
        """When its deadline or its lease ends, whichever is first."""
        return self.deadline if self.lease_until is None else min(self.deadline, self.lease_until)

    @property
    def has_begun(self) -> bool:
        """A chunk of it was scheduled."""
        return self.scheduled_at is not None

    @property
    def queue_s(self) -> float:
        """From its arrival to the schedule of its first chunk."""
        assert self.scheduled_at is not None
        return self.scheduled_at - self.received_at

    @property
    def held(self) -> HeldState:
        assert self.state is not None, self.request_id
        return self.state


def parse_destination(message: inference_pb2.Destination) -> Destination:
    return Destination(message.worker_id, message.epoch, message.transfer_address)


def parse_request(submit: Submit, facts: ModelFacts, block_size: int, now: float) -> Request:
    """Check a submission and lay out what is to be computed.

    Raises:
        RequestError: no prompt, token ids the model does not have, or no destination to go on at.
        ContextLengthError: more tokens than this worker takes.
        DeadlineError: it came too late.
    """
    message = submit.request
    assert isinstance(message, inference_pb2.PrefillRequest)
    if submit.deadline <= now:
        raise DeadlineError("the deadline had passed when the request arrived")
    sampling = sampling_from_proto(message.sampling)
    check_sampling(sampling, facts.vocab_size)
    prompt = list(message.prompt_token_ids)
    num_choices = max(1, message.num_choices)
    forced = forced_from_proto(message.forced, num_choices)
    if len(forced) != num_choices:
        raise RequestError(f"{len(forced)} lists of forced tokens for {num_choices} choices")
    token_ids = prompt + list(forced[0]) if num_choices == 1 else prompt
    _check_tokens(token_ids, facts)
    destination = None
    if message.HasField("destination"):
        destination = parse_destination(message.destination)
    elif sampling.max_tokens > 1 + min(len(tokens) for tokens in forced):
        raise RequestError("no destination is given to decode the tokens after the first")
    choices = []
    for choice, tokens in enumerate(forced):
        sequence = SequenceSampling(sampling, choice, prompt, facts.eos_token_ids)
        for token_id in tokens:
            sequence.append(token_id)
        choices.append(sequence)
    is_drawn_here = [num_choices == 1 or not tokens for tokens in forced]
    return Request(
        request_id=message.request_id,
        attempt=message.attempt,
        gateway_epoch=submit.gateway_epoch,
        destination=destination,
        num_prompt_tokens=len(prompt),
        token_ids=token_ids,
        hashes=block_hashes(token_ids, block_size, message.cache_salt),
        sampling=sampling,
        choices=choices,
        sampled_choices=[
            sequence.choice
            for sequence, is_drawn in zip(choices, is_drawn_here, strict=True)
            if is_drawn and sequence.num_output < sampling.max_tokens
        ],
        deadline=submit.deadline,
        received_at=submit.received_at,
        order=(message.priority, submit.received_at - message.waited_s),
        external_id=message.external_id,
    )


def _check_tokens(token_ids: list[int], facts: ModelFacts) -> None:
    if not token_ids:
        raise RequestError("the prompt is empty")
    if len(token_ids) > facts.max_model_len:
        raise ContextLengthError(
            f"{len(token_ids)} tokens are more than the {facts.max_model_len} that a prefill takes"
        )
    if max(token_ids) >= facts.vocab_size:
        raise RequestError(
            f"token {max(token_ids)} is not in the vocabulary of {facts.vocab_size} tokens"
        )
