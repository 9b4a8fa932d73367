"""A deterministic engine for the HTTP side's tests, and the app around it."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
from fastapi import FastAPI

from scission.common.config import HttpOptions
from scission.common.metrics import Metrics
from scission.common.types import (
    Epoch,
    Finish,
    FinishReason,
    RequestId,
    Role,
    Token,
    TokenLogprobs,
)
from scission.services.gateway.app import AppDependencies, create_app
from scission.services.gateway.engine import (
    EngineEvent,
    GenerationRequest,
    PromptReady,
    Readiness,
    ReadyState,
    RequestIds,
    TokenBatch,
)
from scission.services.gateway.served_model import ServedModel
from tests.unit.services.gateway.text_fixtures import make_format, make_tokenizer

TOKENIZER = make_tokenizer()
EOS_ID = TOKENIZER.eos_id
assert EOS_ID is not None
VOCAB_SIZE = TOKENIZER.num_tokens + 3  # padded, as real ones are
MAX_MODEL_LEN = 1000
MODEL = "scission/tiny-v4"


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


Script = Callable[[GenerationRequest, int], Sequence[int]]


def echo_prompt(request: GenerationRequest, choice: int) -> list[int]:
    """The prompt's tokens again, then end-of-sequence."""
    assert EOS_ID is not None
    return [*request.prompt_token_ids, EOS_ID]


def say(*texts: str) -> Script:
    """One text a choice (the last one for all further choices), then end-of-sequence."""

    def script(request: GenerationRequest, choice: int) -> list[int]:
        assert EOS_ID is not None
        return [*ids_of(texts[min(choice, len(texts) - 1)]), EOS_ID]

    return script


def logprobs_of(token_id: int, top: int | None) -> TokenLogprobs | None:
    """Made up, but a function of the token alone: -0.5 - id / 1000, alternatives id+1, id+2, ..."""
    if top is None:
        return None
    ids = [(token_id + i) % VOCAB_SIZE for i in range(top)]
    return TokenLogprobs(
        logprob=-0.5 - token_id / 1000,
        rank=1,
        top_ids=tuple(ids),
        top_logprobs=tuple(-0.5 - token_id / 1000 - i for i in range(top)),
    )


@dataclass
class FakeEngine:
    """Plays a script; one token a choice and step, unless `tokens_per_step` says otherwise."""

    script: Script = echo_prompt
    tokens_per_step: int = 1
    cached_tokens: int = 0
    error: Exception | None = None  # raised ...
    error_after: int = 0  # ... after this many events
    hang_after: int | None = None  # events after which nothing more comes
    state: ReadyState = ReadyState.READY
    requests: list[GenerationRequest] = field(default_factory=list)
    stopped: list[tuple[RequestId, int]] = field(default_factory=list)
    num_closed: int = 0  # generators that have ended, for whatever reason
    num_hanging: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[EngineEvent, None]:
        self.requests.append(request)
        try:
            for i, event in enumerate(self._events(request)):
                if self.error is not None and i >= self.error_after:
                    raise self.error
                if self.hang_after is not None and i >= self.hang_after:
                    self.num_hanging.release()
                    await asyncio.Event().wait()
                await asyncio.sleep(0)
                yield event
        finally:
            self.num_closed += 1

    def _events(self, request: GenerationRequest) -> list[EngineEvent]:
        sampling = request.sampling
        scored = sampling.prompt_logprobs
        prompt_logprobs = None
        if scored is not None:
            prompt_logprobs = (
                None,
                *(logprobs_of(i, scored) for i in request.prompt_token_ids[1:]),
            )
        events: list[EngineEvent] = [PromptReady(self.cached_tokens, prompt_logprobs)]
        outputs = [self._output(request, choice) for choice in range(request.n)]
        longest = max(len(tokens) for tokens, _ in outputs)
        for start in range(0, longest, self.tokens_per_step):
            end = start + self.tokens_per_step
            batch = [
                Token(choice, i, tokens[i], logprobs_of(tokens[i], sampling.logprobs))
                for choice, (tokens, _) in enumerate(outputs)
                for i in range(start, min(end, len(tokens)))
            ]
            events.append(TokenBatch(tuple(batch)))
            for tokens, finish in outputs:
                if start < len(tokens) <= end:
                    events.append(finish)
        return events + [finish for tokens, finish in outputs if not tokens]

    def _output(self, request: GenerationRequest, choice: int) -> tuple[list[int], Finish]:
        sampling = request.sampling
        tokens: list[int] = []
        ends = {*sampling.stop_token_ids, *([] if sampling.ignore_eos else [EOS_ID])}
        for token_id in self.script(request, choice)[: sampling.max_tokens]:
            tokens.append(token_id)
            if token_id in ends and len(tokens) > sampling.min_tokens:
                stop_id = None if token_id == EOS_ID else token_id
                return tokens, Finish(choice, FinishReason.STOP, stop_id, len(tokens))
        return tokens, Finish(choice, FinishReason.LENGTH, None, len(tokens))

    async def stop_choice(self, request_id: RequestId, choice: int) -> None:
        self.stopped.append((request_id, choice))

    def readiness(self) -> Readiness:
        ready = self.state is ReadyState.READY
        return Readiness(self.state, "" if ready else "no decode yet", {"prefill": 1, "decode": 1})

    def load(self) -> dict[str, int | float]:
        return {"num_requests_running": len(self.requests) - self.num_closed}


def make_app(engine: FakeEngine, **options: Any) -> FastAPI:
    return create_app(
        AppDependencies(
            engine=engine,
            model=ServedModel(
                names=(MODEL, "alias"),
                root=MODEL,
                max_model_len=MAX_MODEL_LEN,
                vocab_size=VOCAB_SIZE,
                eos_token_ids=frozenset({EOS_ID} if EOS_ID is not None else ()),
                created=1,
            ),
            tokenizer=TOKENIZER,
            chat_format=make_format(),
            request_ids=RequestIds(Epoch(0xABC)),
            metrics=Metrics(Role.GATEWAY, MODEL, "0.0.0"),
            version="0.0.0",
            options=replace(HttpOptions(), **options),
        )
    )


def make_client(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://gateway")
