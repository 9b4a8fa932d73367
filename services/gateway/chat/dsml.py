"""DSML, DeepSeek-V4's markup for tool calls: written into a prompt, read from a completion.

The block, where M is the DSML token and nothing is escaped:

    <Mtool_calls>
    <Minvoke name="NAME">
    <Mparameter name="KEY" string="true|false">VALUE</Mparameter>
    </Minvoke>
    </Mtool_calls>

A blank line separates it from what comes before. A string="true" value is raw text, a
string="false" value is JSON.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence

from scission.common.errors import RequestError
from scission.services.gateway.chat.format import FunctionCall, ToolCallDelta, new_call_id
from scission.services.gateway.held_back import held_back

DSML = "｜DSML｜"

BLOCK_STARTS = tuple(f"<{DSML}{name}" for name in ("tool_calls", "toolcalls", "invoke"))
_BLOCK_ENDS = tuple(f"</{DSML}{name}>" for name in ("tool_calls", "toolcalls"))
_INVOKE, _INVOKE_END = f"<{DSML}invoke", f"</{DSML}invoke>"
_PARAMETER, _PARAMETER_END = f"<{DSML}parameter", f"</{DSML}parameter>"
MAX_TAG_CHARS = 2048  # a tag that is longer is none, and ends the block
_ATTRIBUTE = re.compile(r'([A-Za-z_]+)="(.*?)"(?=\s|$)', re.DOTALL)

Clean = Callable[[str], str]


def to_json(value: object) -> str:
    """JSON text with the separators that the model was trained on.

    Raises:
        RequestError: the value is nested deeper than can be written.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise RequestError("a JSON value in the request is nested too deeply") from None


def render_tool_calls(calls: Sequence[FunctionCall], clean: Clean) -> str:
    """The tool-call part of an assistant turn; `clean` breaks markers inside names and values."""
    invokes = "\n".join(_render_invoke(call, clean) for call in calls)
    return f"\n\n<{DSML}tool_calls>\n{invokes}\n</{DSML}tool_calls>"


def _render_invoke(call: FunctionCall, clean: Clean) -> str:
    parameters = []
    for key, value in _parse_arguments(call["arguments"]).items():
        is_string = isinstance(value, str)
        text = value if isinstance(value, str) else to_json(value)
        flag = "true" if is_string else "false"
        parameters.append(
            f'{_PARAMETER} name="{clean(key)}" string="{flag}">{clean(text)}{_PARAMETER_END}'
        )
    return f'{_INVOKE} name="{clean(call["name"])}">\n' + "\n".join(parameters) + f"\n{_INVOKE_END}"


def _parse_arguments(arguments: str) -> Mapping[str, object]:
    """The arguments' object; text that is none is passed on as one parameter named `arguments`."""
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return {"arguments": arguments}
    return parsed if isinstance(parsed, dict) else {"arguments": arguments}


class DsmlParser:
    """Reads one block of calls from its start marker on, in pieces of any size.

    The name of a call comes first; the pieces of its arguments concatenate to one JSON object, in
    the order the parameters came. String values stream, other values come whole, because their JSON
    must be checked first. A call that the completion cut off keeps its complete parameters and the
    string it was in, closed to valid JSON.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._pending = ""
        self._step: Callable[[], bool] = self._read_block
        self._deltas: list[ToolCallDelta] = []
        self._keys: set[str] = set()
        self._key = ""
        self._searched = 0  # so far the value's end is not in `_pending`
        self._is_invoke_open = False
        self._is_string_open = False  # the JSON string of a value is being written
        self._is_ignored = False  # the value repeats a parameter

    def push(self, text: str) -> list[ToolCallDelta]:
        """What this text brought; neighbouring pieces of one call's arguments are joined."""
        self._pending += text
        while self._step():
            pass
        return self._take()

    def finish(self) -> list[ToolCallDelta]:
        """The completion ended here."""
        if self._is_string_open:
            # what is held back can only have been the start of the closing tag; it is part of the
            # value now
            self._argue(_json_escape(self._pending) + '"')
        self._pending = ""
        self._close_invoke()
        self._step = self._drop
        return self._take()

    # Every step consumes what it can from the front of `_pending`; False means: more text is
    # needed.

    def _read_block(self) -> bool:
        """Between calls: the next invoke, or the block's end, after which everything is dropped."""
        found = _first_of(self._pending, (_INVOKE, *_BLOCK_ENDS))
        if found is None:
            self._pending = self._pending[-_LONGEST_TAG:]
            return False
        position, tag = found
        self._pending = self._pending[position + len(tag) :]
        self._step = self._read_invoke_tag if tag == _INVOKE else self._drop
        return True

    def _read_invoke_tag(self) -> bool:
        attributes = self._take_tag()
        if attributes is None:
            return False
        self._deltas.append(
            ToolCallDelta(self.num_calls, id=new_call_id(), name=attributes.get("name", ""))
        )
        self.num_calls += 1
        self._keys = set()
        self._is_invoke_open = True
        self._step = self._read_invoke
        return True

    def _read_invoke(self) -> bool:
        """Inside a call, between parameters; leniently, the next invoke or the block's end close
        it, too.
        """
        found = _first_of(self._pending, (_PARAMETER, _INVOKE_END, _INVOKE, *_BLOCK_ENDS))
        if found is None:
            self._pending = self._pending[-_LONGEST_TAG:]
            return False
        position, tag = found
        if tag == _PARAMETER:
            self._pending = self._pending[position + len(tag) :]
            self._step = self._read_parameter_tag
            return True
        self._close_invoke()
        self._pending = self._pending[position + (len(tag) if tag == _INVOKE_END else 0) :]
        self._step = self._read_block
        return True

    def _read_parameter_tag(self) -> bool:
        attributes = self._take_tag()
        if attributes is None:
            return False
        key = attributes.get("name", "")
        self._is_ignored = key in self._keys
        self._key = key
        if attributes.get("string") == "true":
            if not self._is_ignored:
                self._argue(self._key_text() + '"')
                self._is_string_open = True
            self._step = self._read_string
        else:
            self._step = self._read_json
        return True

    def _read_string(self) -> bool:
        position = self._pending.find(_PARAMETER_END)
        is_complete = position >= 0
        if not is_complete:
            position = len(self._pending) - held_back(self._pending, (_PARAMETER_END,))
        if self._is_string_open:
            self._argue(_json_escape(self._pending[:position]))
        self._pending = self._pending[position:]
        if not is_complete:
            return False
        if self._is_string_open:
            self._argue('"')
            self._is_string_open = False
        self._pending = self._pending[len(_PARAMETER_END) :]
        self._step = self._read_invoke
        return True

    def _read_json(self) -> bool:
        position = self._pending.find(_PARAMETER_END, self._searched)
        if position < 0:
            self._searched = max(0, len(self._pending) - len(_PARAMETER_END))
            return False
        self._searched = 0
        value = self._pending[:position]
        self._pending = self._pending[position + len(_PARAMETER_END) :]
        if not self._is_ignored:
            self._argue(self._key_text() + (value if _is_json(value) else to_json(value)))
        self._step = self._read_invoke
        return True

    def _drop(self) -> bool:
        self._pending = ""
        return False

    def _take_tag(self) -> dict[str, str] | None:
        """Consume up to the first `>` outside quotes; None while it has not come, or never does."""
        match = _TAG_REST.match(self._pending[:MAX_TAG_CHARS])
        if match is None:
            if len(self._pending) >= MAX_TAG_CHARS:
                self._pending = ""
                self._step = self._drop
            return None
        self._pending = self._pending[match.end() :]
        return dict(_ATTRIBUTE.findall(match.group(1)))

    def _key_text(self) -> str:
        start = ", " if self._keys else "{"
        self._keys.add(self._key)
        return f"{start}{to_json(self._key)}: "

    def _close_invoke(self) -> None:
        if self._is_invoke_open:
            self._argue("}" if self._keys else "{}")
            self._is_invoke_open = self._is_string_open = False

    def _argue(self, arguments: str) -> None:
        if not arguments:
            return
        index = self.num_calls - 1
        # the name travels alone: clients expect it in a delta with empty arguments
        if self._deltas and self._deltas[-1].index == index and self._deltas[-1].name is None:
            self._deltas[-1].arguments += arguments
        else:
            self._deltas.append(ToolCallDelta(index, arguments))

    def _take(self) -> list[ToolCallDelta]:
        deltas, self._deltas = self._deltas, []
        return deltas


_TAG_REST = re.compile(r'((?:[^">]|"[^"]*")*)>')
_LONGEST_TAG = max(map(len, (_INVOKE, _INVOKE_END, _PARAMETER, *_BLOCK_ENDS))) - 1


def _first_of(text: str, tags: Sequence[str]) -> tuple[int, str] | None:
    found = [(position, tag) for tag in tags if (position := text.find(tag)) >= 0]
    return min(found, default=None)


def _json_escape(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
