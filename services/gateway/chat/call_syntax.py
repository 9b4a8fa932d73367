"""What the parsers of tool calls have in common: they read one block of text and say what it is.

A call is given out when it is whole and valid, never before: what turns out to be none stays text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

from scission.services.gateway.chat.format import FunctionCall
from scission.services.gateway.chat.json_text import read_json, write_json

Tools = Mapping[str, Mapping[str, Any]]  # a function's name -> its schema


@dataclass(frozen=True, slots=True)
class Reading:
    """What a block is: its calls and how many characters they take, or no call at all."""

    calls: tuple[FunctionCall, ...] = ()
    length: int = 0


NO_CALL = Reading()


class CallReader(Protocol):
    """Reads one block, which grows from its start marker on."""

    def read(self, text: str, *, is_whole: bool) -> Reading | None:
        """None: more text is needed; never so when the text is whole."""
        ...


class CallSyntax(Protocol):
    @property
    def starts(self) -> tuple[str, ...]:
        """Texts that may begin a block."""
        ...

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens and are needed all the same."""
        ...

    @property
    def end(self) -> str:
        """The closing tag that may follow a call; empty: there is none."""
        ...

    @property
    def drops_newlines(self) -> bool:
        """Whether newlines before a block belong to it."""
        ...

    def open(self, tools: Tools) -> CallReader: ...

    def new_id(self) -> str: ...


def call_of(value: object) -> FunctionCall | None:
    """The call that an object {"name", "arguments"} stands for, None if it is no such object."""
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments", {})
    if isinstance(arguments, str):
        # written as JSON text inside the JSON
        try:
            arguments = read_json(arguments)
        except ValueError:
            return None
    if not isinstance(arguments, dict) or not is_name(name):
        return None
    return {"name": name, "arguments": write_json(arguments)}


def is_name(name: object) -> TypeGuard[str]:
    """Whether a function may be called so; clients see no half characters and no empty names."""
    return isinstance(name, str) and bool(name.strip()) and write_json(name).isprintable()
