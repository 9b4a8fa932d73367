"""The bodies that clients send. null means default; unknown fields are kept aside, counted and
ignored (fields.py says which known ones are refused).

Types are strict: "1" is no number, true is no integer. What depends on the model (token ids, the
context's length) is checked where it is used, in sampling.py.
"""

from typing import Annotated, Any, Literal

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
)

MAX_STOPS = 256
MAX_STOP_CHARS = 1024
MAX_BAD_WORDS = 1024
MAX_ALLOWED_TOKENS = 1 << 18
MAX_MESSAGES = 65536
MAX_TOOLS = 4096
MAX_DOCUMENTS = 4096
INT64_MAX = 2**63 - 1

Prompt = str | list[int] | list[str] | list[list[int]]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _check_prompt(value: object) -> object:
    if isinstance(value, str) or (isinstance(value, list) and value and _is_ids(value)):
        return value
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if all(_is_ids(item) for item in value):
            return value
    raise ValueError("must be a string, a list of token ids, or a list of either, not empty")


def _check_stop(value: object) -> object:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return None
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise ValueError(f"must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters")
    return stops


def _check_content(value: object) -> object:
    if value is None or isinstance(value, str | list):
        return value
    raise ValueError("must be a string or a list of content parts")


def _arguments_text(value: object) -> object:
    """Some clients send a call's arguments back as the object instead of its JSON text."""
    if isinstance(value, dict):
        return orjson.dumps(value).decode()
    return value


_ANY_PROMPT = WithJsonSchema(
    {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}},
            {"type": "array", "items": {"type": "integer"}},
            {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
        ]
    }
)
_STRING_OR_STRINGS = WithJsonSchema(
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
)

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(_Body):
    """What both endpoints take. The ranges are OpenAI's; below them, vLLM's extensions."""

    model: str | None = None
    n: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(None, ge=-INT64_MAX - 1, le=INT64_MAX)
    stop: Annotated[list[str] | None, BeforeValidator(_check_stop), _STRING_OR_STRINGS] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: int | None = Field(None, ge=-1, lt=2**31, description="-1 or 0: off")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: list[TokenId] | None = Field(None, max_length=1024)
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: list[Annotated[str, Field(min_length=1, max_length=256)]] | None = Field(
        None, max_length=MAX_BAD_WORDS
    )
    allowed_token_ids: list[TokenId] | None = Field(None, max_length=MAX_ALLOWED_TOKENS)
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    prompt_logprobs: int | None = Field(None, ge=0)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    cache_salt: str | None = Field(None, max_length=1024)
    request_id: str | None = Field(None, max_length=256)


class CompletionBody(GenerationBody):
    prompt: Annotated[Prompt, BeforeValidator(_check_prompt), _ANY_PROMPT]
    max_tokens: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=0, description="as max_tokens")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0)
    best_of: int | None = Field(None, ge=1)
    add_special_tokens: bool | None = None


class ContentPart(_Body):
    type: str
    text: str | None = None


class CalledFunction(_Body):
    name: str
    arguments: Annotated[
        str | None,
        BeforeValidator(_arguments_text),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]}),
    ] = None


class CalledTool(_Body):
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "latest_reminder"]
    content: Annotated[str | list[ContentPart] | None, BeforeValidator(_check_content)] = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    name: str | None = None
    prefix: bool | None = Field(None, description="of a last assistant message: continue it")


class Tool(_Body):
    type: Literal["function"]
    function: dict[str, Any]


class NamedFunction(_Body):
    name: str


class NamedToolChoice(_Body):
    type: Literal["function"]
    function: NamedFunction


def _check_tool_choice(value: object) -> object:
    if value is None or isinstance(value, dict) or value in ("none", "auto", "required"):
        return value
    raise ValueError("must be none, auto, required or a named function")


class ThinkingSwitch(_Body):
    """DeepSeek's own field for it."""

    type: Literal["enabled", "disabled"]


class ChatTemplateOptions(_Body):
    """Switches of the model's chat format; a template may know others by their names."""

    thinking: bool | None = None
    enable_thinking: bool | None = None
    drop_thinking: bool | None = None
    reasoning_effort: str | None = None


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ConversationBody(_Body):
    """The part of a chat request that makes the prompt."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedToolChoice | None,
        BeforeValidator(_check_tool_choice),
    ] = None
    reasoning_effort: Effort | None = None
    thinking: ThinkingSwitch | None = None
    chat_template_kwargs: ChatTemplateOptions | None = None
    documents: list[dict[str, Any]] | None = Field(None, max_length=MAX_DOCUMENTS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class ChatBody(ConversationBody, GenerationBody):
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None


class TokenizeTextBody(_Body):
    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatBody(ConversationBody):
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


def _tokenize_form(value: object) -> str:
    is_chat = isinstance(value, dict) and value.get("messages") is not None
    return "by-messages" if is_chat else "by-prompt"


TokenizeBody = Annotated[
    Annotated[TokenizeTextBody, Tag("by-prompt")] | Annotated[TokenizeChatBody, Tag("by-messages")],
    Discriminator(_tokenize_form),
]


class DetokenizeBody(_Body):
    model: str | None = None
    tokens: list[TokenId]
    skip_special_tokens: bool | None = None
