"""POST /v1/chat/completions: reasoning, content and tool calls, whole or streamed."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import orjson

from scission.common.errors import RequestError
from scission.common.types import FinishReason, Token
from scission.services.gateway.chat.format import (
    CompletionParser,
    ParsedDelta,
    RenderedChat,
    ToolCallDelta,
)
from scission.services.gateway.engine import GenerationRequest, PromptReady
from scission.services.gateway.openai.context import Caller, ServingContext
from scission.services.gateway.openai.conversation import read_conversation
from scission.services.gateway.openai.event_stream import DONE, TextEvent, event
from scission.services.gateway.openai.generation import (
    ChoiceDelta,
    ChoiceEnd,
    TextOptions,
    generate_text,
)
from scission.services.gateway.openai.logprobs import (
    TokenNames,
    chat_logprobs,
    prompt_logprobs_json,
)
from scission.services.gateway.openai.sampling import (
    Wishes,
    build_request,
    check_body,
    check_logprobs,
    prompt_limit,
    text_options,
)
from scission.services.gateway.openai.schemas import ChatBody
from scission.services.gateway.openai.usage import Usage


@dataclass(slots=True)
class _Choice:
    """One choice while it grows: its parser, and what a whole answer collects."""

    parser: CompletionParser
    is_parallel: bool  # more than one tool call may come out
    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    end: ChoiceEnd | None = None

    def parse(self, delta: ChoiceDelta) -> ParsedDelta:
        parsed = self.parser.push(delta.text)
        if delta.end is not None:
            last = self.parser.finish()
            parsed.reasoning += last.reasoning
            parsed.content += last.content
            parsed.tool_calls += last.tool_calls
        if not self.is_parallel:
            parsed.tool_calls = [call for call in parsed.tool_calls if call.index == 0]
        return parsed

    def collect(self, delta: ChoiceDelta, parsed: ParsedDelta) -> None:
        self.reasoning.append(parsed.reasoning)
        self.content.append(parsed.content)
        for call in parsed.tool_calls:
            if call.name is not None:
                self.calls.append(_call_json(call))
            else:
                self.calls[call.index]["function"]["arguments"] += call.arguments
        self.tokens += delta.tokens
        self.end = delta.end or self.end

    def finish_reason(self, end: ChoiceEnd) -> str:
        if end.reason == FinishReason.STOP and self.parser.num_tool_calls:
            return "tool_calls"
        return end.reason


class ChatJob:
    """One HTTP request's work: one rendered prompt, n choices."""

    def __init__(
        self,
        body: ChatBody,
        rendered: RenderedChat,
        request: GenerationRequest,
        options: TextOptions,
        context: ServingContext,
    ) -> None:
        self._body = body
        self._request = request
        self._options = options
        self._context = context
        self._id = f"chatcmpl-{request.request_id}"
        self._created = int(time.time())
        self._names = TokenNames(context.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        self._shows_reasoning = body.include_reasoning is not False
        parses_calls = bool(body.tools) and body.tool_choice != "none"
        self._choices = [
            _Choice(
                context.chat_format.new_parser(rendered, parse_tool_calls=parses_calls),
                is_parallel=body.parallel_tool_calls is not False,
            )
            for _ in range(request.n)
        ]
        self._usage = Usage(reasoning_tokens=0)

    @classmethod
    async def prepare(cls, body: ChatBody, caller: Caller, context: ServingContext) -> "ChatJob":
        """Check, render and tokenise, before any token is generated.

        Raises:
            RequestError: names the field at fault.
        """
        context.model.check_name(body.model)
        check_body(body, context)
        check_logprobs("top_logprobs", body.top_logprobs, context)
        if body.top_logprobs and not body.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        rendered = await context.chat_format.render(read_conversation(body))
        token_ids = await context.encoder.encode(
            rendered.prompt, add_special_tokens=False, max_tokens=prompt_limit(body, context)
        )
        wishes = Wishes(
            max_tokens=body.max_tokens
            if body.max_completion_tokens is None
            else body.max_completion_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
            stop_token_ids=context.chat_format.stop_token_ids,
            keep_ids=context.chat_format.marker_token_ids,
        )
        request = build_request(body, wishes, token_ids, body.n or 1, context, caller)
        options = text_options(body, wishes, request.sampling, context)
        return cls(body, rendered, request, options, context)

    async def collect(self) -> bytes:
        """The JSON text of the whole answer. Raises ScissionError."""
        prompt_logprobs = None
        async with aclosing(self._generate()) as items:
            async for item in items:
                if isinstance(item, PromptReady):
                    prompt_logprobs = item.prompt_logprobs
                    continue
                choice = self._choices[item.choice]
                choice.collect(item, self._parse(choice, item))
        answer = {
            **self._head("chat.completion"),
            "choices": [self._choice_json(i, choice) for i, choice in enumerate(self._choices)],
            "usage": self._usage.to_json(),
        }
        prompt = self._request.prompt_token_ids
        if prompt_logprobs is not None and self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs_json(
                prompt, prompt_logprobs, self._body.prompt_logprobs, self._names
            )
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = prompt
        return orjson.dumps(answer)

    def _choice_json(self, index: int, choice: _Choice) -> dict[str, Any]:
        assert choice.end is not None
        content = "".join(choice.content)
        reasoning = "".join(choice.reasoning) or None
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if choice.calls and not content else content,
            "refusal": None,
        }
        if self._shows_reasoning:
            message["reasoning_content"] = message["reasoning"] = reasoning
        if choice.calls:
            message["tool_calls"] = choice.calls
        answer: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.finish_reason(choice.end),
            "stop_reason": choice.end.stop_reason,
        }
        if self._body.return_token_ids:
            answer["token_ids"] = [token.token_id for token in choice.tokens]
        return answer

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events. Raises ScissionError."""
        body = self._body
        n = self._request.n
        content_events = [self._text_event(i, "content") for i in range(n)]
        reasoning_events = [self._text_event(i, "reasoning_content", "reasoning") for i in range(n)]
        is_plain = not (body.return_token_ids or body.logprobs or self._counts_usage)
        # tokens whose text is held back travel with the next chunk
        waiting: list[list[Token]] = [[] for _ in range(n)]
        async with aclosing(self._generate()) as items:
            async for item in items:
                if isinstance(item, PromptReady):
                    for i in range(n):
                        chunk = self._chunk(i, {"role": "assistant", "content": ""})
                        if body.return_token_ids:
                            chunk["prompt_token_ids"] = self._request.prompt_token_ids
                        yield event(chunk)
                    continue
                index = item.choice
                choice = self._choices[index]
                parsed = self._parse(choice, item)
                if is_plain:
                    if parsed.reasoning:
                        yield reasoning_events[index](parsed.reasoning)
                    if parsed.content:
                        yield content_events[index](parsed.content)
                    for call in parsed.tool_calls:
                        yield event(self._chunk(index, _call_delta(call)))
                    if item.end is not None:
                        yield event(self._last_chunk(index, choice, item.end, []))
                    continue
                waiting[index] += item.tokens
                for delta in _deltas(parsed):
                    tokens, waiting[index] = waiting[index], []
                    yield event(self._chunk(index, delta, tokens=tokens))
                if item.end is not None:
                    yield event(self._last_chunk(index, choice, item.end, waiting[index]))
        if self._includes_usage:
            head = self._head("chat.completion.chunk")
            yield event({**head, "choices": [], "usage": self._usage.to_json()})
        yield DONE

    async def _generate(self) -> AsyncGenerator[PromptReady | ChoiceDelta, None]:
        """The request's items, counted for the usage as they pass."""
        context = self._context
        items = generate_text(
            context.engine, self._request, context.tokenizer, self._options, context.metrics
        )
        async with aclosing(items):
            async for item in items:
                if isinstance(item, PromptReady):
                    self._usage.prompt_tokens += len(self._request.prompt_token_ids)
                    self._usage.cached_tokens += item.cached_tokens
                else:
                    self._usage.completion_tokens += len(item.tokens)
                yield item

    def _parse(self, choice: _Choice, delta: ChoiceDelta) -> ParsedDelta:
        """Parse the delta's text, and count its reasoning tokens."""
        was_reasoning = choice.parser.is_reasoning
        parsed = choice.parse(delta)
        if was_reasoning:
            assert self._usage.reasoning_tokens is not None
            markers = self._context.chat_format.marker_token_ids
            count = len(delta.tokens)
            if not choice.parser.is_reasoning:
                # the marker that ended it is no reasoning, nor is what follows
                ids = [token.token_id for token in delta.tokens]
                count = next((i for i, token_id in enumerate(ids) if token_id in markers), count)
            self._usage.reasoning_tokens += count
        if not self._shows_reasoning:
            parsed.reasoning = ""
        return parsed

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._context.model.name,
        }

    def _chunk(
        self, index: int, delta: dict[str, Any], *, tokens: Sequence[Token] = ()
    ) -> dict[str, Any]:
        answer: dict[str, Any] = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(tokens) if tokens else None,
            "finish_reason": None,
        }
        if self._body.return_token_ids:
            answer["token_ids"] = [token.token_id for token in tokens]
        chunk = {**self._head("chat.completion.chunk"), "choices": [answer]}
        if self._counts_usage:
            chunk["usage"] = self._usage.to_json()
        elif self._includes_usage:
            chunk["usage"] = None
        return chunk

    def _last_chunk(
        self, index: int, choice: _Choice, end: ChoiceEnd, tokens: Sequence[Token]
    ) -> dict[str, Any]:
        chunk = self._chunk(index, {}, tokens=tokens)
        answer = chunk["choices"][0]
        answer["finish_reason"] = choice.finish_reason(end)
        answer["stop_reason"] = end.stop_reason
        return chunk

    def _text_event(self, index: int, *names: str) -> TextEvent:
        return TextEvent(self._chunk(index, dict.fromkeys(names, TextEvent.TEXT)))

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self._top_logprobs is None:
            return None
        return chat_logprobs(tokens, self._names, self._top_logprobs)

    @property
    def _includes_usage(self) -> bool:
        options = self._body.stream_options
        return options is not None and bool(options.include_usage)

    @property
    def _counts_usage(self) -> bool:
        options = self._body.stream_options
        return self._includes_usage and options is not None and bool(options.continuous_usage_stats)


def _deltas(parsed: ParsedDelta) -> list[dict[str, Any]]:
    """The chunks' deltas that a parsed delta makes, in order."""
    deltas: list[dict[str, Any]] = []
    if parsed.reasoning:
        deltas.append({"reasoning_content": parsed.reasoning, "reasoning": parsed.reasoning})
    if parsed.content:
        deltas.append({"content": parsed.content})
    deltas += map(_call_delta, parsed.tool_calls)
    return deltas


def _call_json(call: ToolCallDelta) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    if call.name is not None:
        return {"tool_calls": [{"index": call.index, **_call_json(call)}]}
    return {"tool_calls": [{"index": call.index, "function": {"arguments": call.arguments}}]}
