"""What the HTTP side of the gateway asks of its cluster side: one request in, one ordered stream of
events out.

The HTTP side (openai/, chat/, app.py) knows text, choices and SSE; the cluster side (attempts.py,
router.py) knows workers, attempts and deadlines. They meet here and nowhere else.
"""

import enum
import itertools
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from scission.common.types import Epoch, Finish, RequestId, SamplingParams, Token, TokenLogprobs


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One validated, tokenised request: `len(prompt_token_ids) + sampling.max_tokens` fits the
    model's context.

    `arrival` and `deadline` are `time.monotonic()` seconds of this process: when the HTTP request's
    first byte was seen, and when it must be over. `external_id` is the caller's X-Request-Id, for
    logs only.
    """

    request_id: RequestId
    prompt_token_ids: list[int]
    sampling: SamplingParams
    deadline: float
    arrival: float
    n: int = 1
    cache_salt: str = ""
    external_id: str = ""
    priority: int = 0  # lower is sooner


@dataclass(frozen=True, slots=True)
class PromptReady:
    """The prompt is computed; exactly once, before any token (after a new attempt it is not
    repeated).

    `prompt_logprobs` has one entry per prompt token, the first None; None when the request asked
    for none.
    """

    cached_tokens: int = 0  # prompt tokens that were taken from a prefix cache
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """What one step brought: per choice, indices are consecutive and each is delivered once, over
    all attempts.
    """

    tokens: tuple[Token, ...]


# `Finish` ends one choice: its tokens have all been delivered, the stop token (if one was drawn)
# included.
EngineEvent = PromptReady | TokenBatch | Finish


class ReadyState(enum.StrEnum):
    READY = "ready"  # a prefill and a decode with equal layouts both answer
    STARTING = "starting"  # no such pair yet
    DRAINING = "draining"  # shutting down: nothing new is admitted


@dataclass(frozen=True, slots=True)
class Readiness:
    state: ReadyState
    reason: str = ""  # a sentence for the caller; names the layout field when pairs differ
    workers: dict[str, int] = field(default_factory=dict)  # role -> workers that answer


class Engine(Protocol):
    """The cluster, as one engine. All methods belong to the event loop's thread."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[EngineEvent, None]:
        """Run the request: PromptReady, then TokenBatch and one Finish per choice; ends after the
        last Finish.

        With `sampling.max_tokens == 0` only PromptReady comes and a Finish (length) per choice.
        Closing the generator (`aclose`, or cancelling the task that awaits it) cancels on both
        workers and frees them. Attempts, retries and the deadline are the engine's.

        Raises:
            ScissionError: CapacityError, UnavailableError, DeadlineError, ContextLengthError (can
            never fit the
                workers' caches), EngineError, ... at any point; after an event was delivered it
                ends the request.
        """
        ...

    async def stop_choice(self, request_id: RequestId, choice: int) -> None:
        """A stop string ended this choice at the gateway: draw no more for it, the other choices go
        on.

        Further events of the choice are dropped by the caller; the generator ends when every choice
        is finished or stopped. Unknown ids are ignored. For n == 1 the caller closes the generator
        instead.
        """
        ...

    def readiness(self) -> Readiness:
        """Cheap; called by /ready and before a request is admitted."""
        ...

    def load(self) -> dict[str, int | float]:
        """Figures for /load: running and waiting requests, used cache share and the like."""
        ...


class RequestIds:
    """Ids "<gateway epoch in hex>-<counter>": unique across gateways and their restarts."""

    def __init__(self, epoch: Epoch) -> None:
        self._prefix = f"{epoch:x}-"
        self._counter = itertools.count()

    def next(self) -> RequestId:
        return RequestId(f"{self._prefix}{next(self._counter)}")
