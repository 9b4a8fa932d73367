"""POST /v1/completions: text, token ids or lists of either; echo, logprobs, best_of, streams."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import orjson

from scission.common.errors import RequestError, ScissionError
from scission.common.types import Token, TokenLogprobs
from scission.services.gateway.engine import GenerationRequest, PromptReady
from scission.services.gateway.openai.context import Caller, ServingContext
from scission.services.gateway.openai.event_stream import DONE, TextEvent, event
from scission.services.gateway.openai.generation import (
    ChoiceDelta,
    ChoiceEnd,
    TextOptions,
    generate_text,
)
from scission.services.gateway.openai.logprobs import (
    CompletionLogprobs,
    TokenNames,
    prompt_logprobs_json,
)
from scission.services.gateway.openai.sampling import (
    DEFAULT_COMPLETION_TOKENS,
    Wishes,
    build_request,
    check_body,
    check_logprobs,
    check_token_ids,
    prompt_limit,
    text_options,
)
from scission.services.gateway.openai.schemas import CompletionBody
from scission.services.gateway.openai.usage import Usage

MAX_CONCURRENT_PROMPTS = 32  # of one HTTP request; the others wait here, not in the engines' queues
MAX_MERGED_CHUNKS = 64


@dataclass(slots=True)
class _Choice:
    """One choice while it grows."""

    logprobs: CompletionLogprobs | None
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    sum_logprobs: float = 0.0
    end: ChoiceEnd | None = None

    def add(self, delta: ChoiceDelta) -> None:
        self.text.append(delta.text)
        for token in delta.tokens:
            self.token_ids.append(token.token_id)
            if token.logprobs is not None:
                self.sum_logprobs += token.logprobs.logprob
        if self.logprobs is not None:
            self.logprobs.add_all(delta.tokens)
        self.end = delta.end or self.end

    @property
    def score(self) -> float:
        """best_of's measure: the mean logprob of its tokens."""
        return self.sum_logprobs / max(1, len(self.token_ids))


@dataclass(frozen=True, slots=True)
class _Prompt:
    index: int
    text: str | None  # None unless it is echoed
    request: GenerationRequest
    options: TextOptions


class CompletionJob:
    """One HTTP request's work: a list of prompts, n choices each."""

    def __init__(
        self, body: CompletionBody, prompts: Sequence[_Prompt], context: ServingContext
    ) -> None:
        self._body = body
        self._prompts = prompts
        self._context = context
        self._n = body.n or 1
        self._id = f"cmpl-{prompts[0].request.request_id}"
        self._created = int(time.time())
        self._names = TokenNames(context.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._usage = Usage()

    @classmethod
    async def prepare(
        cls, body: CompletionBody, caller: Caller, context: ServingContext
    ) -> "CompletionJob":
        """Check and tokenise everything, before any token is generated.

        Raises:
            RequestError: names the field at fault.
        """
        context.model.check_name(body.model)
        check_body(body, context)
        check_logprobs("logprobs", body.logprobs, context)
        num_drawn = _check_best_of(body, context)
        max_tokens = body.max_tokens
        if max_tokens is None:
            max_tokens = body.max_completion_tokens
        if max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
            raise RequestError(
                "max_tokens 0 asks for nothing unless echo or prompt_logprobs is set",
                param="max_tokens",
            )
        echoed_logprobs = body.logprobs if body.echo else None
        wishes = Wishes(
            max_tokens=max_tokens,
            default_max_tokens=DEFAULT_COMPLETION_TOKENS,
            logprobs=0 if body.logprobs is None and num_drawn > (body.n or 1) else body.logprobs,
            prompt_logprobs=max(
                (top for top in (body.prompt_logprobs, echoed_logprobs) if top is not None),
                default=None,
            ),
        )
        prompts = []
        for index, prompt in enumerate(_prompt_list(body, context)):
            if isinstance(prompt, str):
                token_ids = await context.encoder.encode(
                    prompt,
                    add_special_tokens=body.add_special_tokens is not False,
                    max_tokens=prompt_limit(body, context),
                )
            else:
                check_token_ids("prompt", prompt, context.model.vocab_size)
                token_ids = prompt
            request = build_request(body, wishes, token_ids, num_drawn, context, caller)
            options = text_options(body, wishes, request.sampling, context)
            text = None
            if body.echo:
                is_whole = isinstance(prompt, str) and request.prompt_token_ids is token_ids
                text = (
                    prompt
                    if isinstance(prompt, str) and is_whole
                    else context.tokenizer.decode(
                        request.prompt_token_ids, skip_special_tokens=False
                    )
                )
            prompts.append(_Prompt(index, text, request, options))
        return cls(body, prompts, context)

    # ---------------------------------------------------------------------------- whole answers

    async def collect(self) -> bytes:
        """The JSON text of the whole answer.

        Raises:
            ScissionError: one of the prompts failed; the others have been cancelled.
        """
        if len(self._prompts) == 1:
            choices = await self._collect_prompt(self._prompts[0])
        else:
            room = asyncio.Semaphore(MAX_CONCURRENT_PROMPTS)

            async def collect_when_room(prompt: _Prompt) -> list[dict[str, Any]]:
                async with room:
                    return await self._collect_prompt(prompt)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(collect_when_room(prompt)) for prompt in self._prompts
                    ]
            except BaseExceptionGroup as errors:
                raise _first_error(errors) from errors
            choices = [choice for task in tasks for choice in task.result()]
        return orjson.dumps({**self._head(), "choices": choices, "usage": self._usage.to_json()})

    async def _collect_prompt(self, prompt: _Prompt) -> list[dict[str, Any]]:
        body = self._body
        drawn = [_Choice(self._new_logprobs(prompt)) for _ in range(prompt.request.n)]
        ready = PromptReady()
        async with aclosing(self._generate(prompt)) as items:
            async for item in items:
                if isinstance(item, PromptReady):
                    ready = item
                    self._echo_logprobs(prompt, ready, drawn)
                else:
                    drawn[item.choice].add(item)
        best = (
            sorted(drawn, key=lambda choice: choice.score, reverse=True) if self._ranks else drawn
        )
        choices = []
        for i, choice in enumerate(best[: self._n]):
            assert choice.end is not None
            answer = {
                "index": prompt.index * self._n + i,
                "text": (prompt.text or "") + "".join(choice.text),
                "logprobs": None if choice.logprobs is None else choice.logprobs.take(),
                "finish_reason": choice.end.reason,
                "stop_reason": choice.end.stop_reason,
            }
            if body.return_token_ids:
                answer["token_ids"] = choice.token_ids
                answer["prompt_token_ids"] = prompt.request.prompt_token_ids
            if body.prompt_logprobs is not None and ready.prompt_logprobs is not None:
                answer["prompt_logprobs"] = prompt_logprobs_json(
                    prompt.request.prompt_token_ids,
                    ready.prompt_logprobs,
                    body.prompt_logprobs,
                    self._names,
                )
            choices.append(answer)
        return choices

    @property
    def _ranks(self) -> bool:
        return self._prompts[0].request.n > self._n

    # ---------------------------------------------------------------------------------- streams

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events.

        Raises:
            ScissionError: one of the prompts failed; the others have been cancelled.
        """
        if len(self._prompts) == 1:
            chunks = self._stream_prompt(self._prompts[0])
        else:
            chunks = self._stream_merged()
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk
        if self._includes_usage:
            yield event({**self._head(), "choices": [], "usage": self._usage.to_json()})
        yield DONE

    async def _stream_merged(self) -> AsyncGenerator[bytes, None]:
        """All prompts' chunks, as they come."""
        merged: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_MERGED_CHUNKS)
        room = asyncio.Semaphore(MAX_CONCURRENT_PROMPTS)

        async def pump(prompt: _Prompt) -> None:
            async with room, aclosing(self._stream_prompt(prompt)) as chunks:
                async for chunk in chunks:
                    await merged.put(chunk)

        async def pump_all() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    for prompt in self._prompts:
                        group.create_task(pump(prompt))
            finally:
                await merged.put(None)

        pumping = asyncio.create_task(pump_all())
        try:
            while (chunk := await merged.get()) is not None:
                yield chunk
            await pumping
        except BaseExceptionGroup as errors:
            raise _first_error(errors) from errors
        finally:
            pumping.cancel()
            # the end mark may wait for room in the queue
            while not merged.empty():
                merged.get_nowait()
            await asyncio.gather(pumping, return_exceptions=True)

    async def _stream_prompt(self, prompt: _Prompt) -> AsyncGenerator[bytes, None]:
        body = self._body
        first_index = prompt.index * self._n
        logprobs = [self._new_logprobs(prompt) for _ in range(self._n)]
        plain = [
            TextEvent(self._chunk(first_index + i, TextEvent.TEXT, usage=None))
            for i in range(self._n)
        ]
        is_plain = not (body.return_token_ids or body.logprobs is not None or self._counts_usage)
        # tokens whose text is held back travel with the next chunk
        waiting: list[list[Token]] = [[] for _ in range(self._n)]
        num_tokens = 0
        async with aclosing(self._generate(prompt)) as items:
            async for item in items:
                if isinstance(item, PromptReady):
                    for i in range(self._n):
                        if chunk := self._opening_chunk(prompt, first_index + i, logprobs[i], item):
                            yield chunk
                    continue
                choice = item.choice
                if is_plain and item.end is None:
                    if item.text:
                        yield plain[choice](item.text)
                    continue
                waiting[choice] += item.tokens
                num_tokens += len(item.tokens)
                if item.end is None and not item.text:
                    continue
                tokens, waiting[choice] = waiting[choice], []
                columns = logprobs[choice]
                if columns is not None:
                    columns.add_all(tokens)
                usage = Usage(len(prompt.request.prompt_token_ids), num_tokens)
                chunk_json = self._chunk(first_index + choice, item.text, usage=usage)
                answer = chunk_json["choices"][0]
                answer["logprobs"] = None if columns is None else columns.take()
                if item.end is not None:
                    answer["finish_reason"] = item.end.reason
                    answer["stop_reason"] = item.end.stop_reason
                if body.return_token_ids:
                    answer["token_ids"] = [token.token_id for token in tokens]
                yield event(chunk_json)

    def _opening_chunk(
        self, prompt: _Prompt, index: int, logprobs: CompletionLogprobs | None, ready: PromptReady
    ) -> bytes | None:
        """What comes before the first token: the echoed prompt, its token ids."""
        if prompt.text is None and not self._body.return_token_ids:
            return None
        usage = Usage(len(prompt.request.prompt_token_ids), 0)
        chunk = self._chunk(index, prompt.text or "", usage=usage)
        answer = chunk["choices"][0]
        if logprobs is not None and ready.prompt_logprobs is not None and prompt.text is not None:
            _add_prompt(logprobs, prompt.request.prompt_token_ids, ready.prompt_logprobs)
            answer["logprobs"] = logprobs.take()
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = prompt.request.prompt_token_ids
            answer["token_ids"] = []
        return event(chunk)

    # ----------------------------------------------------------------------------------- shared

    async def _generate(self, prompt: _Prompt) -> AsyncGenerator[PromptReady | ChoiceDelta, None]:
        """The prompt's items, counted for the usage as they pass."""
        context = self._context
        usage = self._usage
        items = generate_text(
            context.engine, prompt.request, context.tokenizer, prompt.options, context.metrics
        )
        async with aclosing(items):
            async for item in items:
                if isinstance(item, PromptReady):
                    usage.prompt_tokens += len(prompt.request.prompt_token_ids)
                    usage.cached_tokens += item.cached_tokens
                else:
                    usage.completion_tokens += len(item.tokens)
                yield item

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._context.model.name,
        }

    def _chunk(self, index: int, text: str, *, usage: Usage | None) -> dict[str, Any]:
        answer = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }
        chunk = {**self._head(), "choices": [answer]}
        if self._counts_usage and usage is not None:
            chunk["usage"] = usage.to_json()
        elif self._includes_usage:
            chunk["usage"] = None
        return chunk

    @property
    def _includes_usage(self) -> bool:
        options = self._body.stream_options
        return options is not None and bool(options.include_usage)

    @property
    def _counts_usage(self) -> bool:
        options = self._body.stream_options
        return self._includes_usage and options is not None and bool(options.continuous_usage_stats)

    def _new_logprobs(self, prompt: _Prompt) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        return CompletionLogprobs(
            self._names, self._context.tokenizer, prompt.options.skip_ids, self._body.logprobs
        )

    def _echo_logprobs(
        self, prompt: _Prompt, ready: PromptReady, choices: Sequence[_Choice]
    ) -> None:
        if not self._body.echo or ready.prompt_logprobs is None:
            return
        for choice in choices:
            if choice.logprobs is not None:
                _add_prompt(choice.logprobs, prompt.request.prompt_token_ids, ready.prompt_logprobs)


def _add_prompt(
    logprobs: CompletionLogprobs,
    prompt: Sequence[int],
    entries: Sequence[TokenLogprobs | None],
) -> None:
    for token_id, entry in zip(prompt, entries, strict=True):
        logprobs.add(token_id, entry, is_prompt=True)


def _prompt_list(body: CompletionBody, context: ServingContext) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    if len(prompt) > context.options.max_choices:
        raise RequestError(
            f"prompt: at most {context.options.max_choices} prompts a request, got {len(prompt)}",
            param="prompt",
        )
    return list(prompt)


def _check_best_of(body: CompletionBody, context: ServingContext) -> int:
    """How many choices are to be drawn for each prompt."""
    n = body.n or 1
    if body.best_of is None or body.best_of == n:
        return n
    if body.best_of < n:
        raise RequestError(f"best_of must be at least n ({n}), got {body.best_of}", param="best_of")
    if body.stream:
        raise RequestError("best_of cannot be streamed", param="best_of")
    if body.best_of > context.options.max_choices:
        raise RequestError(
            f"best_of must be at most {context.options.max_choices}, got {body.best_of}",
            param="best_of",
        )
    return body.best_of


def _first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one to tell: one of ours if there is any."""
    ours, others = errors.split(ScissionError)
    group = ours or others
    assert group is not None
    first: BaseException = group.exceptions[0]
    return _first_error(first) if isinstance(first, BaseExceptionGroup) else first
