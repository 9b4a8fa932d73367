"""What leaves for one request's caller, in order: the prompt, its tokens and finishes, an error.

Delivery (delivery.py) orders tokens; here they also wait until the prompt may leave, and for the
caller to take them.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence

from scission.common.errors import ScissionError
from scission.common.types import Finish, Token, TokenLogprobs
from scission.services.gateway.delivery import Delivery
from scission.services.gateway.engine import (
    EngineEvent,
    GenerationRequest,
    PromptReady,
    TokenBatch,
)


class Answer:
    def __init__(self, request: GenerationRequest) -> None:
        self.delivery = Delivery(request.n)
        self.is_prompt_ready = False
        self._outputs: deque[EngineEvent | ScissionError] = deque()
        self._early: list[EngineEvent] = []  # arrived before the prompt could leave
        self._wakened = asyncio.Event()
        self._is_ended = False
        self._cached_tokens: int | None = None  # None: the prompt is not computed yet
        self._is_scored = request.sampling.prompt_logprobs is not None
        num_scored = max(0, len(request.prompt_token_ids) - 1) if self._is_scored else 0
        # The first token of a prompt has no logprob.
        self._prompt_logprobs: list[TokenLogprobs | None] = [None] * (1 + num_scored)
        self._num_unscored = num_scored

    @property
    def is_complete(self) -> bool:
        """The prompt and every choice, to its finish, have been put out."""
        return self.is_prompt_ready and self.delivery.is_done

    @property
    def lacks_prompt_logprobs(self) -> bool:
        return self._num_unscored > 0

    def add_prompt_logprobs(self, start: int, entries: Sequence[TokenLogprobs]) -> None:
        """Logprobs of the prompt positions from `start` on; those known already are ignored."""
        for position, entry in enumerate(entries, start):
            if position < len(self._prompt_logprobs) and self._prompt_logprobs[position] is None:
                self._prompt_logprobs[position] = entry
                self._num_unscored -= 1
        self._check_prompt()

    def set_computed(self, cached_tokens: int) -> None:
        """The prompt is computed; it leaves once every logprob wanted of it is there."""
        self._cached_tokens = cached_tokens
        self._check_prompt()

    def add(self, tokens: Iterable[Token], finishes: Iterable[Finish]) -> None:
        """What one step brought, in whatever order."""
        ready, finished = self.delivery.add(tokens, finishes)
        if ready:
            self._put(TokenBatch(tuple(ready)))
        for finish in finished:
            self._put(finish)

    def end(self, error: ScissionError | None = None) -> None:
        """Nothing comes after what has been put out, but the error."""
        if error is not None:
            self._outputs.append(error)
        self._is_ended = True
        self._wakened.set()

    async def next(self) -> EngineEvent | None:
        """The next event, awaited; None after the last.

        Tokens of several steps come as one event when the caller has fallen behind.

        Raises:
            ScissionError: what ended the request.
        """
        while not self._outputs:
            if self._is_ended:
                return None
            self._wakened.clear()
            await self._wakened.wait()
        event = self._outputs.popleft()
        if isinstance(event, ScissionError):
            raise event
        if isinstance(event, TokenBatch):
            return TokenBatch(event.tokens + self._following_tokens())
        return event

    def _following_tokens(self) -> tuple[Token, ...]:
        tokens: list[Token] = []
        while self._outputs and isinstance(batch := self._outputs[0], TokenBatch):
            tokens += batch.tokens
            self._outputs.popleft()
        return tuple(tokens)

    def _check_prompt(self) -> None:
        if self.is_prompt_ready or self._cached_tokens is None or self._num_unscored > 0:
            return
        self.is_prompt_ready = True
        logprobs = tuple(self._prompt_logprobs) if self._is_scored else None
        self._put(PromptReady(self._cached_tokens, logprobs))
        early, self._early = self._early, []
        for event in early:
            self._put(event)

    def _put(self, event: EngineEvent) -> None:
        if not self.is_prompt_ready:
            self._early.append(event)
            return
        self._outputs.append(event)
        self._wakened.set()
