"""Tool calls as Mistral's models write them.

    [TOOL_CALLS]NAME[ARGS]{...}[TOOL_CALLS]NAME[ARGS]{...}
    [TOOL_CALLS]NAME[CALL_ID]ID[ARGS]{...}
    [TOOL_CALLS]NAME{...}
    [TOOL_CALLS] [{"name": "NAME", "arguments": {...}}, ...]

Newer ones the first, older ones the others. The markers are special tokens.
"""

import secrets
import string

import regex

from scission.services.gateway.chat.call_syntax import NO_CALL, Reading, Tools, call_of
from scission.services.gateway.chat.json_text import JsonEnd, read_json

START = "[TOOL_CALLS]"
_ID_CHARS = string.ascii_letters + string.digits

# `regex` says of a text whether more of it could still match
_OPENING = regex.compile(
    r"""\[TOOL_CALLS\]\s*+
        (?: (?=\[\s*+\{)
          | (?P<name> [^\s\[\]{}]{1,256}+ )\s*+
            (?: \[CALL_ID\] [^\s\[\]{}]{0,256}+ \s*+ )?
            (?: \[ARGS\] \s*+ )?
            (?=\{)
        )""",
    regex.VERBOSE,
)


class MistralCalls:
    starts = (START,)
    markers = (START, "[ARGS]", "[CALL_ID]")
    end = ""
    drops_newlines = False

    def open(self, tools: Tools) -> "_Reader":
        return _Reader()

    def new_id(self) -> str:
        """Nine letters or digits: Mistral's own validators take no other."""
        return "".join(secrets.choice(_ID_CHARS) for _ in range(9))


class _Reader:
    def __init__(self) -> None:
        self._start = 0  # of the JSON; 0: not seen yet
        self._name: str | None = None  # None: a list of calls with their names
        self._end = JsonEnd(0)

    def read(self, text: str, *, is_whole: bool) -> Reading | None:
        if not self._start:
            opening = _OPENING.match(text, partial=not is_whole)
            if opening is None:
                return NO_CALL
            if opening.partial:
                return None
            self._start, self._name = opening.end(), opening["name"]
            self._end = JsonEnd(self._start)
        end = self._end.find(text)
        if end is None:
            return NO_CALL if is_whole else None
        written = text[self._start : end]
        try:
            value = read_json(written)
        except ValueError:
            return NO_CALL
        if self._name is not None:
            call = call_of({"name": self._name, "arguments": value})
            # the arguments go on as the model wrote them
            return NO_CALL if call is None else Reading(({**call, "arguments": written},), end)
        calls = [call for call in map(call_of, value) if call is not None]
        return Reading(tuple(calls), end) if len(calls) == len(value) else NO_CALL
