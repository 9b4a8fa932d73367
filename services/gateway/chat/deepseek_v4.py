"""DeepSeek-V4's chat encoding: rendering of conversations and parsing of completions.

The long fixed texts (tool preamble, effort prefixes) come from the checkpoint, see
checkpoint_texts.py; without them, chats that need none are served and the others refused.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from scission.common.errors import RequestError, UnsupportedError
from scission.services.gateway.chat.checkpoint_texts import FILE, CheckpointTexts
from scission.services.gateway.chat.dsml import (
    BLOCK_STARTS,
    DSML,
    DsmlParser,
    render_tool_calls,
    to_json,
)
from scission.services.gateway.chat.format import (
    Conversation,
    MarkerGuard,
    Message,
    ParsedDelta,
    RenderedChat,
    ToolCall,
    ToolResultPart,
)
from scission.services.gateway.held_back import held_back
from scission.services.gateway.tokenizer import Tokenizer

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
LATEST_REMINDER = "<｜latest_reminder｜>"
THINK = "<think>"
THINK_END = "</think>"
TASKS = ("action", "query", "authority", "domain", "title", "read_url")
TASK_MARKERS = {task: f"<｜{task}｜>" for task in TASKS}
MARKERS = (
    BOS,
    EOS,
    USER,
    ASSISTANT,
    LATEST_REMINDER,
    THINK,
    THINK_END,
    DSML,
    *TASK_MARKERS.values(),
)


@dataclass(frozen=True, slots=True)
class _Block:
    """One part of a user turn: the user's text, or a tool's result when there is a call id."""

    content: str | list[ToolResultPart]
    call_id: str | None = None


@dataclass(frozen=True, slots=True)
class _Turn:
    """A message as the format sees it: tool messages have become blocks of user turns."""

    role: str
    content: str = ""
    blocks: list[_Block] = field(default_factory=list)  # of user turns, instead of content
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    response_format: Any = None
    task: str | None = None
    wo_eos: bool = False


class DeepSeekV4Format:
    """The format of one checkpoint: its tokenizer's markers and its own fixed texts."""

    def __init__(self, tokenizer: Tokenizer, texts: CheckpointTexts) -> None:
        self._texts = texts
        ids = tokenizer.added_tokens
        self.stop_token_ids = tuple(ids[marker] for marker in (USER, BOS) if marker in ids)
        self.marker_token_ids = frozenset(
            ids[marker] for marker in (THINK, THINK_END, DSML) if marker in ids
        )
        self._clean = MarkerGuard({*MARKERS, *ids}).neutralise

    async def render(self, conversation: Conversation) -> RenderedChat:
        """Render the prompt text.

        Raises:
            RequestError: the messages make no conversation of this format.
            UnsupportedError: the checkpoint lacks a text that the request needs.
        """
        if conversation.documents:
            raise UnsupportedError(
                "documents cannot be used: this model's chat format has none; put them into a "
                "message",
                param="documents",
            )
        turns = _sort_tool_results(_merge_tool_messages(conversation.messages))
        turns = _attach_tools(turns, conversation.tools)
        is_thinking = conversation.thinking is not False
        if conversation.effort == "none" and conversation.thinking is None:
            is_thinking = False
        is_dropping = conversation.drop_thinking and not any(turn.tools for turn in turns)
        if is_thinking and is_dropping:
            turns = _drop_old_reasoning(turns)
        is_continued = conversation.continue_final_message
        if is_continued and (not turns or turns[-1].role != "assistant"):
            raise RequestError(
                "continue_final_message needs a last message of role assistant", param="messages"
            )
        renderer = _Renderer(self._texts, self._clean, turns, is_thinking, is_dropping)
        last = len(turns) - 1
        body = "".join(
            renderer.turn(i, is_left_open=is_continued and i == last)
            + (renderer.opening(i) if i < last or conversation.add_generation_prompt else "")
            for i in range(len(turns))
        )
        prefix = self._effort_prefix(conversation.effort) if is_thinking else ""
        prompt = BOS + prefix + body
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise RequestError("a message holds half a surrogate pair", param="messages") from None
        return RenderedChat(prompt, "reasoning" if renderer.ends_in_reasoning else "content")

    def new_parser(self, rendered: RenderedChat, *, parse_tool_calls: bool) -> "DeepSeekV4Parser":
        return DeepSeekV4Parser(opens_in=rendered.opens_in, parse_tool_calls=parse_tool_calls)

    def _effort_prefix(self, effort: str | None) -> str:
        if effort is None:
            return ""
        name = "max" if effort == "xhigh" else effort
        prefix = self._texts.effort_prefixes.get(name)
        if prefix is None and name == "max":
            raise _missing_text(self._texts, f"reasoning_effort {effort}", "reasoning_effort")
        return prefix or ""


class _Renderer:
    """Renders the turns of one preprocessed conversation, in order."""

    def __init__(
        self,
        texts: CheckpointTexts,
        clean: Callable[[str], str],
        turns: Sequence[_Turn],
        is_thinking: bool,
        is_dropping: bool,
    ) -> None:
        self._texts = texts
        self._clean = clean
        self._turns = turns
        self._is_thinking = is_thinking
        self._is_dropping = is_dropping
        self._last_user = _last_user(turns)
        self.ends_in_reasoning = False  # of what has been rendered so far

    def turn(self, i: int, *, is_left_open: bool) -> str:
        """The turn's own text, without the opening of the next one."""
        turn = self._turns[i]
        self.ends_in_reasoning = False
        match turn.role:
            case "system":
                return self._clean(turn.content) + self._preambles(turn)
            case "user":
                return USER + "\n\n".join(map(self._block, turn.blocks))
            case "developer":
                if not turn.content:
                    raise RequestError("a developer message needs content", param="messages")
                return USER + self._clean(turn.content) + self._preambles(turn)
            case "latest_reminder":
                return LATEST_REMINDER + self._clean(turn.content)
            case "assistant":
                return self._assistant(i, is_left_open)
        raise RequestError(
            f"messages of role {turn.role!r} are unknown to this model", param="messages"
        )

    def opening(self, i: int) -> str:
        """What follows turn i: nothing, a task's marker, or the start of an assistant turn."""
        if i + 1 < len(self._turns) and self._turns[i + 1].role not in (
            "assistant",
            "latest_reminder",
        ):
            return ""
        turn = self._turns[i]
        if turn.task is not None:
            if turn.task not in TASK_MARKERS:
                raise RequestError(
                    f"task must be one of {', '.join(TASKS)}, got {turn.task!r}", param="messages"
                )
            if turn.task != "action":
                return TASK_MARKERS[turn.task]
            return ASSISTANT + (THINK if self._is_thinking else THINK_END) + TASK_MARKERS[turn.task]
        if turn.role not in ("user", "developer"):
            return ""
        if self._is_thinking and (not self._is_dropping or i >= self._last_user):
            self.ends_in_reasoning = True
            return ASSISTANT + THINK
        return ASSISTANT + THINK_END

    def _block(self, block: _Block) -> str:
        if isinstance(block.content, str):
            text = self._clean(block.content)
        else:
            text = "\n\n".join(
                self._clean(part["text"])
                if part["type"] == "text"
                else f"[Unsupported {part['type']}]"
                for part in block.content
            )
        return text if block.call_id is None else f"<tool_result>{text}</tool_result>"

    def _preambles(self, turn: _Turn) -> str:
        """The tool preamble and the response format of a system or developer turn."""
        text = ""
        if turn.tools:
            if self._texts.tools_template is None:
                raise _missing_text(self._texts, "tools", "tools")
            text += "\n\n" + _fill(
                self._texts.tools_template,
                dsml_token=DSML,
                thinking_start_token=THINK,
                thinking_end_token=THINK_END,
                tool_schemas="\n".join(self._clean(to_json(tool)) for tool in turn.tools),
            )
        if turn.response_format:
            if self._texts.response_format_template is None:
                raise _missing_text(self._texts, "response_format", "response_format")
            schema = self._clean(to_json(turn.response_format))
            text += "\n\n" + _fill(self._texts.response_format_template, schema=schema)
        return text

    def _assistant(self, i: int, is_left_open: bool) -> str:
        turn = self._turns[i]
        text = ""
        follows_task = i > 0 and self._turns[i - 1].task is not None
        if (
            self._is_thinking
            and not follows_task
            and (not self._is_dropping or i > self._last_user)
        ):
            reasoning = self._clean(turn.reasoning)
            if is_left_open and reasoning and not turn.content and not turn.tool_calls:
                self.ends_in_reasoning = True
                return reasoning
            text = reasoning + THINK_END
        text += self._clean(turn.content)
        if turn.tool_calls:
            text += render_tool_calls([call["function"] for call in turn.tool_calls], self._clean)
        return text if is_left_open or turn.wo_eos else text + EOS


def _merge_tool_messages(messages: Iterable[Message]) -> list[_Turn]:
    """Tool and user messages in a row become one user turn; a task ends the row for user texts."""
    turns: list[_Turn] = []
    for message in messages:
        role = message["role"]
        content = message.get("content") or ""
        last = turns[-1] if turns and turns[-1].role == "user" else None
        if role == "tool":
            block = _Block(content, message.get("tool_call_id", ""))
            if last is not None:
                last.blocks.append(block)
            else:
                turns.append(_Turn("user", blocks=[block]))
            continue
        assert isinstance(content, str), "only tool messages keep a list of parts"
        if role == "user":
            if last is not None and last.task is None:
                last.blocks.append(_Block(content))
            else:
                turns.append(_Turn("user", blocks=[_Block(content)], task=message.get("task")))
            continue
        turns.append(
            _Turn(
                role,
                content,
                reasoning=message.get("reasoning") or "",
                tool_calls=tuple(message.get("tool_calls") or ()),
                tools=tuple(message.get("tools") or ()),
                response_format=message.get("response_format"),
                task=message.get("task"),
                wo_eos=message.get("wo_eos", False),
            )
        )
    return turns


def _sort_tool_results(turns: Iterable[_Turn]) -> list[_Turn]:
    """Put each turn's tool results into the order of the calls they answer; the texts between them
    stay in place.
    """
    order: dict[str, int] = {}
    result = []
    for turn in turns:
        if turn.role == "assistant" and turn.tool_calls:
            order = {call["id"]: i for i, call in enumerate(turn.tool_calls) if call["id"]}
        elif turn.role == "user" and order:
            answers = [block for block in turn.blocks if block.call_id is not None]
            answers.sort(key=lambda block: order.get(block.call_id or "", 0))
            remaining = iter(answers)
            blocks = [block if block.call_id is None else next(remaining) for block in turn.blocks]
            turn = replace(turn, blocks=blocks)
        result.append(turn)
    return result


def _attach_tools(turns: list[_Turn], tools: Sequence[dict[str, Any]]) -> list[_Turn]:
    """Give the request's tools to the first system turn, an empty one before all others if there is
    none.
    """
    if not tools:
        return turns
    for i, turn in enumerate(turns):
        if turn.role == "system":
            return [*turns[:i], replace(turn, tools=(*turn.tools, *tools)), *turns[i + 1 :]]
    return [_Turn("system", tools=tuple(tools)), *turns]


def _drop_old_reasoning(turns: Sequence[_Turn]) -> list[_Turn]:
    """Before the last user turn, assistant turns lose their reasoning and developer turns are
    removed.
    """
    last_user = _last_user(turns)
    return [
        replace(turn, reasoning="") if turn.role == "assistant" and i < last_user else turn
        for i, turn in enumerate(turns)
        if i >= last_user or turn.role != "developer"
    ]


def _last_user(turns: Sequence[_Turn]) -> int:
    return max(
        (i for i, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1
    )


def _fill(template: str, **values: str) -> str:
    """Replace each {name} of `values` once; other braces, and those inside the values, stay."""
    names = "|".join(values)
    return re.sub(rf"\{{({names})\}}", lambda match: values[match.group(1)], template)


def _missing_text(texts: CheckpointTexts, what: str, param: str) -> UnsupportedError:
    problem = "has no text for it" if texts.is_file_present else "is missing"
    return UnsupportedError(
        f"{what} cannot be used: it needs the checkpoint's {FILE}, which {problem}", param=param
    )


_TEXT_MARKERS = (THINK, THINK_END)
_TEXT_OR_CALL_MARKERS = (*_TEXT_MARKERS, *BLOCK_STARTS)
# the blank line before a block of calls belongs to the block
_HELD_WITH_CALLS = (*_TEXT_OR_CALL_MARKERS, *(f"\n\n{start}" for start in BLOCK_STARTS))


class DeepSeekV4Parser:
    """Splits a completion into reasoning, content and tool calls; lenient towards misplaced
    markers.

    Think markers never show up in the text. A block of calls ends the content (or, misplaced, the
    reasoning), and what follows it is dropped.
    """

    def __init__(
        self, *, opens_in: Literal["reasoning", "content"], parse_tool_calls: bool
    ) -> None:
        self.is_reasoning = opens_in == "reasoning"
        self._markers = _TEXT_OR_CALL_MARKERS if parse_tool_calls else _TEXT_MARKERS
        self._held_markers = _HELD_WITH_CALLS if parse_tool_calls else _TEXT_MARKERS
        self._pending = ""
        self._calls: DsmlParser | None = None

    @property
    def num_tool_calls(self) -> int:
        return 0 if self._calls is None else self._calls.num_calls

    def push(self, text: str) -> ParsedDelta:
        delta = ParsedDelta()
        if self._calls is not None:
            delta.tool_calls = self._calls.push(text)
            return delta
        if not self._pending and "<" not in text and "\n" not in text:
            self._emit(delta, text)
            return delta
        self._pending += text
        while self._calls is None and (found := self._next_marker()) is not None:
            position, marker = found
            before, self._pending = (
                self._pending[:position],
                self._pending[position + len(marker) :],
            )
            if marker in _TEXT_MARKERS:
                self._emit(delta, before)
                self.is_reasoning = self.is_reasoning and marker != THINK_END
            else:
                self._emit(delta, before.removesuffix("\n\n"))
                self.is_reasoning = False
                self._calls = DsmlParser()
                delta.tool_calls = self._calls.push(marker + self._pending)
                self._pending = ""
        if self._calls is None:
            certain = len(self._pending) - held_back(self._pending, self._held_markers)
            self._emit(delta, self._pending[:certain])
            self._pending = self._pending[certain:]
        return delta

    def finish(self) -> ParsedDelta:
        delta = ParsedDelta()
        self._emit(delta, self._pending)
        self._pending = ""
        if self._calls is not None:
            delta.tool_calls = self._calls.finish()
        return delta

    def _next_marker(self) -> tuple[int, str] | None:
        text = self._pending
        return min(
            ((at, marker) for marker in self._markers if (at := text.find(marker)) >= 0),
            default=None,
        )

    def _emit(self, delta: ParsedDelta, text: str) -> None:
        if self.is_reasoning:
            delta.reasoning += text
        else:
            delta.content += text
