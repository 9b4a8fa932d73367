"""Tool calls as JSON in tags, as Qwen3 writes them: the Hermes form.

    <tool_call>
    {"name": "NAME", "arguments": {...}}
    </tool_call>

The closing tag may be missing.
"""

from scission.services.gateway.chat.call_syntax import NO_CALL, Reading, Tools, call_of
from scission.services.gateway.chat.format import new_call_id
from scission.services.gateway.chat.json_text import JsonEnd, read_json

START = "<tool_call>"


class HermesCalls:
    starts = (START,)
    end = "</tool_call>"
    markers = (START, end)
    drops_newlines = True

    def open(self, tools: Tools) -> "_Reader":
        return _Reader()

    def new_id(self) -> str:
        return new_call_id()


class _Reader:
    def __init__(self) -> None:
        self._end: JsonEnd | None = None

    def read(self, text: str, *, is_whole: bool) -> Reading | None:
        unfinished = NO_CALL if is_whole else None
        start = len(text) - len(text[len(START) :].lstrip())
        if start == len(text):
            return unfinished
        if text[start] != "{":
            return NO_CALL
        if self._end is None:
            self._end = JsonEnd(start)
        end = self._end.find(text)
        if end is None:
            return unfinished
        try:
            call = call_of(read_json(text[start:end]))
        except ValueError:
            return NO_CALL
        return NO_CALL if call is None else Reading((call,), end)
