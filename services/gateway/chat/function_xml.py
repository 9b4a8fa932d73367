"""Tool calls as Step-3.5 (and Qwen3-Coder) write them: tags, with values typed by the schema.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Nothing is escaped. The outer tags may be missing.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import regex

from scission.services.gateway.chat.call_syntax import NO_CALL, Reading, Tools, is_name
from scission.services.gateway.chat.format import new_call_id
from scission.services.gateway.chat.json_text import read_json, write_json

START = "<tool_call>"
FUNCTION = "<function="
_PYTHON_CONSTANTS = {"True": True, "False": False, "None": None}
_MAX_REFERENCES = 8  # schemas inside schemas that are looked into

# `regex` says of a text whether more of it could still match, and keeps every parameter
_BLOCK = regex.compile(
    r"""(?: <tool_call> \s*+ )?
        <function= (?P<name> [^\s<>"]{1,256}+ ) > \s*+
        (?:
            <parameter= (?P<key> [^<>\n]{1,256}+ ) >
            (?P<value> (?: [^<]++ | <(?!/parameter>) )*+ )
            </parameter> \s*+
        )*+
        </function>""",
    regex.VERBOSE,
)
# longer blocks are only looked at when a tag may have ended
_SHORT_CHARS = 1024


class FunctionXmlCalls:
    starts = (START, FUNCTION)
    end = "</tool_call>"
    markers = (START, end)
    drops_newlines = True

    def open(self, tools: Tools) -> "_Reader":
        return _Reader(tools)

    def new_id(self) -> str:
        return new_call_id()


class _Reader:
    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._num_read = 0

    def read(self, text: str, *, is_whole: bool) -> Reading | None:
        is_tag_open = len(text) > _SHORT_CHARS and ">" not in text[self._num_read :]
        self._num_read = len(text)
        if is_tag_open and not is_whole:
            return None
        block = _BLOCK.match(text, partial=not is_whole)
        if block is None:
            return NO_CALL
        if block.partial:
            return None
        if not is_name(block["name"]):
            return NO_CALL
        properties = _properties(self._tools.get(block["name"]))
        arguments: dict[str, Any] = {}
        for key, value in zip(block.captures("key"), block.captures("value"), strict=True):
            # the first of two parameters with one name counts
            arguments.setdefault(key, typed_value(_strip_newlines(value), properties.get(key)))
        return Reading(({"name": block["name"], "arguments": write_json(arguments)},), block.end())


def typed_value(text: str, schema: object) -> Any:
    """A parameter's text as the value that its schema asks for; text where it asks for another.

    A string stays one, even if it looks like a number. Without a schema it is JSON if it parses.
    """
    types = set(_types(schema))
    if "string" in types and not ("null" in types and text in ("null", "None")):
        return text
    try:
        value = _PYTHON_CONSTANTS[text] if text in _PYTHON_CONSTANTS else read_json(text)
    except ValueError:
        return text
    return value if not types or not types.isdisjoint(_types_of(value)) else text


def _properties(function: Mapping[str, Any] | None) -> Mapping[str, Any]:
    parameters = (function or {}).get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return properties if isinstance(properties, dict) else {}


def _types(schema: object, depth: int = 0) -> Iterable[str]:
    """The JSON types that a schema allows; none: it does not say."""
    if not isinstance(schema, dict) or depth > _MAX_REFERENCES:
        return
    kind = schema.get("type")
    for item in kind if isinstance(kind, list) else [kind]:
        if isinstance(item, str):
            yield item
    for name in ("anyOf", "oneOf", "allOf"):
        for branch in schema.get(name) or ():
            yield from _types(branch, depth + 1)
    if kind is None:
        for value in schema.get("enum") or ():
            yield _types_of(value)[0]


def _types_of(value: object) -> tuple[str, ...]:
    match value:
        case None:
            return ("null",)
        case bool():
            return ("boolean",)
        case int():
            return ("integer", "number")
        case float():
            return ("number", "integer") if value.is_integer() else ("number",)
        case str():
            return ("string",)
        case dict():
            return ("object",)
    return ("array",)


def _strip_newlines(value: str) -> str:
    return value.removeprefix("\n").removesuffix("\n")
