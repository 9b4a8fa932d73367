"""One engine request, seen as text: tokens become text deltas, stop strings end choices."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from scission.common.errors import EngineError
from scission.common.metrics import RequestMetrics
from scission.common.types import Finish, FinishReason, Token
from scission.services.gateway.engine import Engine, GenerationRequest, PromptReady, TokenBatch
from scission.services.gateway.openai.stop_strings import StopStrings
from scission.services.gateway.tokenizer import Detokenizer, Tokenizer


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become shown text."""

    end_ids: frozenset[int]  # tokens that end a choice; their text is not shown
    skip_ids: frozenset[int]  # special tokens left out of the text
    stop: tuple[str, ...] = ()
    is_stop_included: bool = False
    min_tokens: int = 0  # stop strings count from the token after these


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    reason: FinishReason
    stop_reason: str | int | None = None  # the stop string or stop token other than end-of-sequence


@dataclass(slots=True)
class ChoiceDelta:
    """What is new in one choice. `tokens` may be ahead of `text`, which holds back what is not
    certain.
    """

    choice: int
    text: str
    tokens: list[Token]
    end: ChoiceEnd | None = None


class ChoiceText:
    """The text of one choice so far, up to what may be shown."""

    def __init__(self, tokenizer: Tokenizer, options: TextOptions) -> None:
        self._options = options
        self._detokenizer = Detokenizer(tokenizer, skip_ids=options.skip_ids)
        self._stops = StopStrings(options.stop, is_included=options.is_stop_included)

    @property
    def matched_stop(self) -> str | None:
        return self._stops.matched

    def push(self, token: Token) -> str:
        options = self._options
        if token.token_id in options.end_ids and not options.is_stop_included:
            return ""
        text = self._detokenizer.push(token.token_id)
        if options.stop and token.index < options.min_tokens:
            return self._stops.flush() + text
        return self._stops.push(text)

    def flush(self) -> str:
        """The choice has ended: what was held back."""
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()


async def generate_text(
    engine: Engine,
    request: GenerationRequest,
    tokenizer: Tokenizer,
    options: TextOptions,
    metrics: RequestMetrics,
) -> AsyncGenerator[PromptReady | ChoiceDelta, None]:
    """Run the request: PromptReady first, then deltas; every choice's last delta has its `end`.

    Latencies are observed when the caller comes back for the next item, that is, when it has sent
    the last one on. Closing this generator closes the engine's.

    Raises:
        ScissionError: whatever the engine raises; EngineError when it stops too early.
    """
    texts = [ChoiceText(tokenizer, options) for _ in range(request.n)]
    running = set(range(request.n))
    timing = _Timing(request, metrics)
    async with aclosing(engine.generate(request)) as events:
        async for event in events:
            if isinstance(event, TokenBatch):
                for delta in _deltas_of(event.tokens, texts, running):
                    if delta.end is not None:
                        running.discard(delta.choice)
                    yield delta
                    timing.tokens_left(delta.choice, len(delta.tokens))
                    if delta.end is not None:
                        timing.choice_ended(delta.choice, delta.end.reason)
                        if running:
                            await engine.stop_choice(request.request_id, delta.choice)
                if not running:
                    # cut short: closing the engine's generator cancels what it still draws
                    break
            elif isinstance(event, Finish):
                if event.choice in running:
                    running.discard(event.choice)
                    end = ChoiceEnd(event.reason, event.stop_token_id)
                    yield ChoiceDelta(event.choice, texts[event.choice].flush(), [], end)
                    timing.choice_ended(event.choice, event.reason)
            else:
                timing.prompt_ready(event)
                yield event
    if running:
        raise EngineError("the engine ended the request before it was finished")
    timing.request_ended()


def _deltas_of(
    tokens: tuple[Token, ...], texts: list[ChoiceText], running: set[int]
) -> list[ChoiceDelta]:
    """One delta for each running choice; its tokens after a stop string are dropped."""
    deltas: dict[int, ChoiceDelta] = {}
    for token in tokens:
        choice = token.choice
        if choice not in running:
            continue
        delta = deltas.get(choice)
        if delta is None:
            delta = deltas[choice] = ChoiceDelta(choice, "", [])
        elif delta.end is not None:
            continue
        text = texts[choice]
        delta.text += text.push(token)
        delta.tokens.append(token)
        if text.matched_stop is not None:
            delta.end = ChoiceEnd(FinishReason.STOP, text.matched_stop)
    return list(deltas.values())


class _Timing:
    """One request's latencies and counts, as they leave the gateway."""

    def __init__(self, request: GenerationRequest, metrics: RequestMetrics) -> None:
        self._metrics = metrics
        self._arrival = request.arrival
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._counts = [0] * request.n
        metrics.prompt_tokens.inc(len(request.prompt_token_ids))
        metrics.request_prompt_tokens.observe(len(request.prompt_token_ids))

    def prompt_ready(self, event: PromptReady) -> None:
        self._metrics.cached_tokens.inc(event.cached_tokens)

    def tokens_left(self, choice: int, count: int) -> None:
        if not count:
            return
        now = time.monotonic()
        last = self._last.get(choice)
        if last is None:
            if not self._first:
                self._metrics.time_to_first_token.observe(now - self._arrival)
            self._first[choice] = now
        else:
            # tokens that came in one step share the time since the step before
            for _ in range(count):
                self._metrics.inter_token_latency.observe((now - last) / count)
        self._last[choice] = now
        self._counts[choice] += count
        self._metrics.generation_tokens.inc(count)

    def choice_ended(self, choice: int, reason: FinishReason) -> None:
        count = self._counts[choice]
        if count > 1:
            spent = self._last[choice] - self._first[choice]
            self._metrics.time_per_output_token.observe(spent / (count - 1))
        self._metrics.success(reason).inc()

    def request_ended(self) -> None:
        self._metrics.request_generation_tokens.observe(sum(self._counts))
        self._metrics.e2e_latency.observe(time.monotonic() - self._arrival)
