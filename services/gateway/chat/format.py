"""What every model's chat format offers: render a conversation, parse its completion as it streams
in.

Messages reach a format already validated and normalised by the HTTP side; a format raises
RequestError only for what its own model cannot express.
"""

import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypedDict


class ToolResultPart(TypedDict, total=False):
    type: str
    text: str


class FunctionCall(TypedDict):
    name: str
    arguments: str  # JSON text, as the model or the client wrote it


class ToolCall(TypedDict):
    id: str
    function: FunctionCall


class Message(TypedDict, total=False):
    """One message; `role` is always there, the rest where it applies."""

    role: str  # system, developer, user, assistant, tool, latest_reminder
    content: str | list[ToolResultPart]  # a list only in tool messages
    reasoning: str
    tool_calls: list[ToolCall]
    tool_call_id: str
    name: str  # of a participant or a tool, where the client says it
    tools: list[
        dict[str, Any]
    ]  # the functions' schemas, without the {"type": "function"} around them
    response_format: Any
    task: str
    wo_eos: bool


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat request asks to be rendered."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)  # functions' schemas
    thinking: bool | None = None  # None: the model's default
    effort: str | None = (
        None  # none, minimal, low, medium, high, xhigh, max; None: the model's default
    )
    template_options: dict[str, Any] = field(default_factory=dict)  # for a template, as given
    documents: list[dict[str, Any]] = field(default_factory=list)
    drop_thinking: bool = True  # leave old turns' reasoning out where the format allows it
    add_generation_prompt: bool = True
    continue_final_message: bool = False  # the last message is an assistant's, to be continued


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """The prompt, to be encoded in one piece without special tokens added; what the completion
    starts inside of, and what else its parser needs.
    """

    prompt: str
    opens_in: Literal["reasoning", "content"]
    may_reason: bool = False  # it opens in content, but may begin with reasoning
    tools: tuple[dict[str, Any], ...] = ()  # functions' schemas, which type the arguments


@dataclass(slots=True)
class ToolCallDelta:
    """A piece of one call: the first has id and name, later ones pieces of the arguments' JSON
    text.
    """

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(slots=True)
class ParsedDelta:
    """What one piece of completion text brought, in the order reasoning, content, tool calls."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.tool_calls)


class CompletionParser(Protocol):
    """Splits one choice's text. Any way of cutting the text into pieces gives the same final
    result.
    """

    @property
    def is_reasoning(self) -> bool:
        """Whether the next text is expected to be reasoning."""
        ...

    @property
    def num_tool_calls(self) -> int: ...

    def push(self, text: str) -> ParsedDelta: ...

    def finish(self) -> ParsedDelta:
        """The completion ended: what was held back, and the closing of what is open."""
        ...


class ChatFormat(Protocol):
    stop_token_ids: tuple[int, ...]  # end a completion besides end-of-sequence
    marker_token_ids: frozenset[
        int
    ]  # the parser needs their text, even where special tokens are skipped

    async def render(self, conversation: Conversation) -> RenderedChat:
        """Raises RequestError, UnsupportedError."""
        ...

    def new_parser(self, rendered: RenderedChat, *, parse_tool_calls: bool) -> CompletionParser: ...


_END = ""  # a marker may end at this branch
_Tree = dict[str, "_Tree"]


def _pattern_of(tree: _Tree) -> str:
    """A pattern for the shortest of the tree's texts, which is enough to know that there is one."""
    if _END in tree:
        return ""
    branches = [re.escape(char) + _pattern_of(rest) for char, rest in tree.items()]
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


class MarkerGuard:
    """Breaks control markers in text that comes from outside, so that no message can speak as
    another.

    A zero-width space after a marker's first character keeps it readable and makes it ordinary
    text.
    """

    def __init__(self, markers: Collection[str]) -> None:
        tree: _Tree = {}
        for marker in filter(None, markers):
            branch = tree
            for char in marker:
                branch = branch.setdefault(char, {})
            branch[_END] = {}
        # only the first character is consumed, so that overlapping markers are all found; a tree,
        # because hundreds of alternatives would be tried one by one at every "<"
        self._pattern = re.compile(
            "|".join(f"{re.escape(char)}(?={_pattern_of(rest)})" for char, rest in tree.items())
        )

    def neutralise(self, text: str) -> str:
        return self._pattern.sub("\\g<0>\u200b", text)


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
