"""Splits a completion into thought, content and tool calls, by tags and a syntax of calls."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from scission.services.gateway.chat.call_syntax import CallReader, CallSyntax, Tools
from scission.services.gateway.chat.format import ParsedDelta, ToolCallDelta
from scission.services.gateway.held_back import held_back

ALL = sys.maxsize


@dataclass(frozen=True, slots=True)
class ThoughtTags:
    """How a model marks its reasoning."""

    start: str
    end: str
    newlines: int = ALL  # dropped next to a tag, at most
    is_ended_by_calls: bool = False


# undecided: the model may begin with a thought; content: it may not, tags are text
Opening = Literal["thought", "undecided", "content"]


class TaggedCompletionParser:
    """One choice's parser. Its result does not depend on how the text is cut into pieces.

    No text is lost: what begins like a call and is none becomes content, tag and all. Of a call's
    surroundings only whitespace is dropped, of a thought's only newlines.
    """

    def __init__(
        self, opening: Opening, thought: ThoughtTags | None, calls: CallSyntax | None, tools: Tools
    ) -> None:
        """`thought`, `calls`: what to look for; None: nothing."""
        self._thought = None if opening == "content" else thought
        self._calls = calls
        self._tools = tools
        self.num_tool_calls = 0
        self._pending = ""
        self._is_whole = False
        self._delta = ParsedDelta()
        self._reader: CallReader | None = None
        self._gap = ""  # whitespace before the block, content if it is no call
        self._may_close = False  # a call has ended, its closing tag may come
        self._may_think = self._thought is not None
        self._has_content = False
        self._newlines_left = 0  # to be dropped, at most
        self._after_newlines: Callable[[], bool] = self._read_content
        self._step: Callable[[], bool] = self._read_content
        if self._thought is not None:
            is_thinking = opening == "thought"
            self._step = self._read_repeated_tag if is_thinking else self._read_opening
        self.is_reasoning = self._thought is not None and opening == "thought"
        starts = calls.starts if calls is not None else ()
        self._call_starts = starts
        tags = () if self._thought is None else (self._thought.start, self._thought.end)
        self._first_chars = {tag[0] for tag in (*starts, *tags)}

    def push(self, text: str) -> ParsedDelta:
        if not self._pending and self._is_plain(text):
            self._emit(text)
        else:
            self._pending += text
            self._advance()
        return self._take()

    def finish(self) -> ParsedDelta:
        self._is_whole = True
        self._advance()
        return self._take()

    def _is_plain(self, text: str) -> bool:
        """Whether the text can be passed on as it is: the everyday case, and the fast one."""
        if self._step not in (self._read_thought, self._read_content) or "\n" in text:
            return False
        return self._first_chars.isdisjoint(text)

    def _advance(self) -> None:
        while self._step():
            pass

    def _take(self) -> ParsedDelta:
        delta, self._delta = self._delta, ParsedDelta()
        return delta

    # Each step consumes what it can of `_pending`; it returns whether the next one may go on.

    def _read_opening(self) -> bool:
        """Before anything else: blanks, then the thought's tag or content."""
        assert self._thought is not None
        text = self._pending.lstrip()
        start = self._thought.start
        if text.startswith(start):
            self._begin_thought(text, 0)
        elif start.startswith(text) and not self._is_whole:
            return False
        else:
            self._step = self._read_content
        return True

    def _begin_thought(self, text: str, at: int) -> None:
        """The thought's tag stands in `text` at `at`."""
        assert self._thought is not None
        self._pending = text[at + len(self._thought.start) :]
        self._may_think = False
        self.is_reasoning = True
        self._drop_newlines(self._thought.newlines, self._read_thought)

    def _read_repeated_tag(self) -> bool:
        """The prompt opened the thought; the model may do it again."""
        assert self._thought is not None
        start = self._thought.start
        if self._pending.startswith(start):
            self._begin_thought(self._pending, 0)
            return True
        if start.startswith(self._pending) and not self._is_whole:
            return False
        self._may_think = False
        # one newline stands in the prompt already
        self._drop_newlines(max(0, self._thought.newlines - 1), self._read_thought)
        return True

    def _drop_newlines(self, most: int, then: Callable[[], bool]) -> None:
        self._newlines_left = most
        self._after_newlines = then
        self._step = self._read_newlines

    def _read_newlines(self) -> bool:
        text = self._pending
        count = min(len(text) - len(text.lstrip("\n")), self._newlines_left)
        self._pending = text[count:]
        self._newlines_left -= count
        if self._newlines_left and not self._pending and not self._is_whole:
            return False
        self._step = self._after_newlines
        return True

    def _read_thought(self) -> bool:
        tags = self._thought
        assert tags is not None
        ends = (tags.end, *(self._call_starts[:1] if tags.is_ended_by_calls else ()))
        found = _first_of(self._pending, ends)
        if found is not None:
            at, tag = found
            self._emit(_without_last_newlines(self._pending[:at], tags.newlines))
            self.is_reasoning = False
            if tag == tags.end:
                self._pending = self._pending[at + len(tag) :]
                self._drop_newlines(tags.newlines, self._read_content)
            else:
                self._pending = self._pending[at:]
                self._step = self._read_content
            return True
        if self._is_whole:
            certain = len(self._pending)
            if tags.newlines == ALL:
                self._pending = self._pending.rstrip("\n")
        else:
            certain = len(self._pending) - held_back(self._pending, ends)
            certain = len(_without_last_newlines(self._pending[:certain], tags.newlines))
        self._emit(self._pending[:certain])
        self._pending = self._pending[certain:]
        return False

    def _read_content(self) -> bool:
        tags = self._thought
        starts = self._call_starts
        markers = starts
        if tags is not None:
            markers = (*starts, tags.end, *((tags.start,) if self._may_think else ()))
        found = _first_of(self._pending, markers)
        if found is None:
            certain = len(self._pending)
            if not self._is_whole:
                certain -= held_back(self._pending, markers)
                certain = len(self._before_block(self._pending[:certain]))
            self._emit(self._pending[:certain])
            self._pending = self._pending[certain:]
            return False
        at, marker = found
        before = self._pending[:at]
        if marker in starts:
            text = self._before_block(before)
            self._emit(text)
            self._open_block(before[len(text) :], at)
        else:
            assert tags is not None
            self._emit(before)
            if marker == tags.start:
                self._begin_thought(self._pending, at)
            else:
                # a second end of the thought
                self._pending = self._pending[at + len(marker) :]
        return True

    def _before_block(self, text: str) -> str:
        is_dropping = self._calls is not None and self._calls.drops_newlines
        return text.rstrip("\n") if is_dropping else text

    def _open_block(self, gap: str, at: int) -> None:
        assert self._calls is not None
        self._gap = gap
        self._pending = self._pending[at:]
        self._reader = self._calls.open(self._tools)
        self._step = self._read_block

    def _read_block(self) -> bool:
        assert self._reader is not None and self._calls is not None
        reading = self._reader.read(self._pending, is_whole=self._is_whole)
        if reading is None:
            return False
        if not reading.calls:
            start = next(start for start in self._call_starts if self._pending.startswith(start))
            self._emit(self._gap + start)
            self._pending = self._pending[len(start) :]
            self._step = self._read_content
            return True
        for call in reading.calls:
            index = self.num_tool_calls
            # the name travels alone: clients expect it in a delta with empty arguments
            named = ToolCallDelta(index, id=self._calls.new_id(), name=call["name"])
            self._delta.tool_calls += (named, ToolCallDelta(index, call["arguments"]))
            self.num_tool_calls += 1
        self._pending = self._pending[reading.length :]
        self._may_close = bool(self._calls.end)
        self._step = self._read_after_call
        return True

    def _read_after_call(self) -> bool:
        """Whitespace, and the closing tag, belong to the call if another one or nothing follows."""
        assert self._calls is not None
        text = self._pending.lstrip()
        gap = self._pending[: len(self._pending) - len(text)]
        if not text:
            if self._is_whole:
                self._pending = ""
            return False
        tags = [*self._call_starts, *([self._calls.end] if self._may_close else [])]
        tag = next((tag for tag in tags if text.startswith(tag)), None)
        if tag is None:
            if not self._is_whole and any(tag.startswith(text) for tag in tags):
                return False
            self._pending = gap + text if self._has_content else text
            self._step = self._read_content
        elif tag in self._call_starts:
            self._open_block(gap, len(gap))
        else:
            self._pending = text[len(tag) :]
            self._may_close = False
        return True

    def _emit(self, text: str) -> None:
        if self.is_reasoning:
            self._delta.reasoning += text
        else:
            self._delta.content += text
            self._has_content = self._has_content or bool(text)


def _without_last_newlines(text: str, most: int) -> str:
    count = min(len(text) - len(text.rstrip("\n")), most)
    return text[: len(text) - count]


def _first_of(text: str, tags: tuple[str, ...]) -> tuple[int, str] | None:
    return min(((at, tag) for tag in tags if (at := text.find(tag)) >= 0), default=None)
