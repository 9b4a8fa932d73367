"""JSON inside a completion: where a value ends while its text still grows, and what it says."""

import json
import re
from typing import Any

_IN_STRING = re.compile(r'["\\]')
_BETWEEN = re.compile(r'["{}\[\]]')


class JsonEnd:
    """Finds the end of the object or array that starts at `start`, however the text comes.

    Only brackets and strings are looked at; whether it is JSON is for read_json to say.
    """

    def __init__(self, start: int) -> None:
        self._at = start
        self._depth = 0
        self._is_in_string = False

    def find(self, text: str) -> int | None:
        """The position after its last bracket, None while that has not come; `text` only grows."""
        while True:
            pattern = _IN_STRING if self._is_in_string else _BETWEEN
            found = pattern.search(text, self._at)
            if found is None:
                self._at = len(text)
                return None
            char = found.group()
            if char == "\\":
                if found.end() == len(text):
                    self._at = found.start()
                    return None
                self._at = found.end() + 1
                continue
            self._at = found.end()
            if char == '"':
                self._is_in_string = not self._is_in_string
            elif char in "{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth == 0:
                    return self._at


def read_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none; NaN and Infinity, which Python would take, are none.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_json(value: Any) -> str:
    """JSON text with other than ASCII characters kept, where they are whole."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
