"""The parsers of models with templates: what each form means, and that no cut changes it."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scission.services.gateway.chat.chat_style import CALLS, THOUGHTS
from scission.services.gateway.chat.completion_parser import Opening, TaggedCompletionParser
from scission.services.gateway.chat.function_xml import typed_value

TOOLS = {
    "f": {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {
                "s": {"type": "string"},
                "i": {"type": "integer"},
                "n": {"type": ["number", "null"]},
                "b": {"type": "boolean"},
                "o": {"anyOf": [{"type": "object"}, {"type": "array"}]},
            },
        },
    }
}
STYLES = {
    "qwen3": ("qwen3", "hermes"),
    "mistral": ("mistral", "mistral"),
    "step": ("step3p5", "step3p5"),
}
Parsed = tuple[str, str, list[tuple[str, str]]]


def parse(style: str, pieces: list[str], opening: Opening, *, has_tools: bool = True) -> Parsed:
    thought, calls = STYLES[style]
    parser = TaggedCompletionParser(
        opening, THOUGHTS[thought], CALLS[calls] if has_tools else None, TOOLS
    )
    reasoning = content = ""
    parsed: list[tuple[str, str]] = []
    for delta in (*map(parser.push, pieces), parser.finish()):
        reasoning += delta.reasoning
        content += delta.content
        for call in delta.tool_calls:
            if call.name is not None:
                assert call.index == len(parsed) and call.id and not call.arguments
                parsed.append((call.name, ""))
            else:
                name, arguments = parsed[call.index]
                parsed[call.index] = (name, arguments + call.arguments)
    assert parser.num_tool_calls == len(parsed)
    return reasoning, content, parsed


H = '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>'
A = ("f", '{"a": "x"}')
M = '[TOOL_CALLS]f[ARGS]{"a": "x"}'
X = "<tool_call>\n<function=f>\n<parameter=s>\nx\n</parameter>\n</function>\n</tool_call>"
S = ("f", '{"s": "x"}')

# style, what the completion opens in, text, result
CASES: dict[str, tuple[str, Opening, str, Parsed]] = {
    "qwen3: thought and answer": (
        *("qwen3", "undecided", "<think>\n\nhm\n\n</think>\n\nyes\n"),
        ("hm", "yes\n", []),
    ),
    "qwen3: no thought": ("qwen3", "undecided", "\nyes", ("", "\nyes", [])),
    "qwen3: a thought that was cut": ("qwen3", "undecided", "<think>\nhm\n\n", ("hm", "", [])),
    "qwen3: cut inside the end": ("qwen3", "undecided", "<think>hm</thi", ("hm</thi", "", [])),
    "qwen3: thinking is off": (
        *("qwen3", "content", "<think>x</think>y"),
        ("", "<think>x</think>y", []),
    ),
    "qwen3: opened by the prompt": ("qwen3", "thought", "hm</think>\nyes", ("hm", "yes", [])),
    "qwen3: a call in the thought is thought": (
        *("qwen3", "undecided", f"<think>{H}</think>ok"),
        (H, "ok", []),
    ),
    "hermes: text, call": ("qwen3", "undecided", f"ok\n{H}", ("", "ok", [A])),
    "hermes: thought, calls": (
        *("qwen3", "undecided", f"<think>\nr\n</think>\n\n{H}\n{H}\n"),
        ("r", "", [A, A]),
    ),
    "hermes: no closing tag": ("qwen3", "undecided", H[:-12], ("", "", [A])),
    "hermes: no closing tag, next call": (
        *("qwen3", "undecided", H[:-12] + H),
        ("", "", [A, A]),
    ),
    "hermes: text behind": ("qwen3", "undecided", f"a\n{H}\n\nb", ("", "a\n\nb", [A])),
    "hermes: arguments as text": (
        *("qwen3", "undecided", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}'),
        ("", "", [("f", '{"a": 1}')]),
    ),
    "hermes: non-ASCII is kept": (
        *("qwen3", "undecided", H.replace('"x"', '"\\u00fc é 😀"')),
        ("", "", [("f", '{"a": "ü é 😀"}')]),
    ),
    "hermes: tags and braces in strings": (
        *("qwen3", "undecided", H.replace('"x"', '"</tool_call>}{\\"<tool_call>"')),
        ("", "", [("f", '{"a": "</tool_call>}{\\"<tool_call>"}')]),
    ),
    "hermes: bad JSON is content": (
        *("qwen3", "undecided", f"a\n\n{H.replace(':', ';')}\n{H}"),
        ("", f"a\n\n{H.replace(':', ';')}", [A]),
    ),
    "hermes: cut in the JSON": ("qwen3", "undecided", f"a\n{H[:30]}", ("", f"a\n{H[:30]}", [])),
    "hermes: a tag in prose": (
        *("qwen3", "undecided", "the <tool_call> tag\n"),
        ("", "the <tool_call> tag\n", []),
    ),
    "hermes: not an object": (
        *("qwen3", "undecided", '<tool_call>{"name": "f", "arguments": [1]}'),
        ("", '<tool_call>{"name": "f", "arguments": [1]}', []),
    ),
    "hermes: NaN is no JSON": (
        *("qwen3", "undecided", '<tool_call>{"name": "f", "arguments": {"a": NaN}}'),
        ("", '<tool_call>{"name": "f", "arguments": {"a": NaN}}', []),
    ),
    "hermes: half a surrogate pair stays an escape": (
        *("qwen3", "undecided", H.replace('"x"', '"\\ud800"')),
        ("", "", [("f", '{"a": "\\ud800"}')]),
    ),
    "mistral: text, calls": ("mistral", "undecided", f"ok\n{M}{M}", ("", "ok\n", [A, A])),
    "mistral: no marker of arguments": (
        *("mistral", "undecided", M.replace("[ARGS]", " ")),
        ("", "", [A]),
    ),
    "mistral: arguments as they are written": (
        *("mistral", "undecided", '[TOOL_CALLS]f[ARGS]{ "a":"\\u00fc",\n"b":1.0 }'),
        ("", "", [("f", '{ "a":"\\u00fc",\n"b":1.0 }')]),
    ),
    "mistral: text behind": (
        *("mistral", "undecided", f"{M} late"),
        ("", "late", [A]),
    ),
    "mistral: with an id": (
        *("mistral", "undecided", M.replace("[ARGS]", "[CALL_ID]abc123xyz[ARGS]")),
        ("", "", [A]),
    ),
    "mistral: a list": (
        "mistral",
        "undecided",
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "x"}}, {"name": "g"}]',
        ("", "", [A, ("g", "{}")]),
    ),
    "mistral: bad JSON is content": (
        *("mistral", "undecided", M.replace(":", "") + M),
        ("", M.replace(":", ""), [A]),
    ),
    "mistral: cut": ("mistral", "undecided", M[:-3], ("", M[:-3], [])),
    "mistral: no name": (
        *("mistral", "undecided", "[TOOL_CALLS][ARGS]{}"),
        ("", "[TOOL_CALLS][ARGS]{}", []),
    ),
    "mistral: thought": (
        *("mistral", "undecided", f"[THINK]hm\n[/THINK]yes{M}"),
        ("hm\n", "yes", [A]),
    ),
    "step: thought and answer": ("step", "thought", "hm\n\n</think>\n\nyes", ("hm\n", "\nyes", [])),
    "step: the tag repeated": ("step", "thought", "<think>\nhm\n</think>\nyes", ("hm", "yes", [])),
    "step: no end": ("step", "thought", "hm\n", ("hm\n", "", [])),
    "step: a second end": ("step", "thought", "a\n</think>b</think>c", ("a", "bc", [])),
    "step: a call ends the thought": ("step", "thought", f"hm\n{X}", ("hm", "", [S])),
    "step: so does a broken one": (
        *("step", "thought", "hm<tool_call>x</think>"),
        ("hm", "<tool_call>x", []),
    ),
    "xml: text, calls": ("step", "thought", f"</think>ok\n{X}\n{X}", ("", "ok", [S, S])),
    "xml: without outer tags": ("step", "undecided", X[12:-13], ("", "", [S])),
    "xml: without the last tag": ("step", "undecided", X[:-13], ("", "", [S])),
    "xml: no parameters": (
        *("step", "undecided", "<function=f></function>"),
        ("", "", [("f", "{}")]),
    ),
    "xml: cut": ("step", "undecided", X[:-25], ("", X[:-25], [])),
    "xml: text between tags is no call": (
        *("step", "undecided", X.replace("</parameter>", "</parameter>?")),
        ("", X.replace("</parameter>", "</parameter>?"), []),
    ),
    "xml: one newline is stripped at each end": (
        *("step", "undecided", X.replace("\nx\n", "\n\n x<\n\n")),
        ("", "", [("f", '{"s": "\\n x<\\n"}')]),
    ),
    "xml: values as the schema says": (
        "step",
        "undecided",
        "<function=f>"
        + "".join(
            f"<parameter={key}>\n{value}\n</parameter>"
            for key, value in [
                *(("s", "12"), ("i", "12"), ("n", "None"), ("b", "True"), ("o", '{"a": [1]}')),
                *(("u", "3"), ("v", "text"), ("w", "False"), ("i", "13")),
            ]
        )
        + "</function>",
        (
            *("", ""),
            [
                (
                    "f",
                    '{"s": "12", "i": 12, "n": null, "b": true, "o": {"a": [1]}, '
                    '"u": 3, "v": "text", "w": false}',
                )
            ],
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_completions_are_split_as_specified(case: str) -> None:
    style, opening, text, expected = CASES[case]
    assert parse(style, [text], opening) == expected
    assert parse(style, list(text), opening) == expected


@pytest.mark.parametrize("style,block", [("qwen3", H), ("mistral", M), ("step", X)])
def test_without_tools_the_markup_of_calls_is_content(style: str, block: str) -> None:
    assert parse(style, [block], "undecided", has_tools=False) == ("", block, [])


def test_every_call_has_an_id_that_its_model_takes() -> None:
    parser = TaggedCompletionParser("undecided", None, CALLS["mistral"], {})
    (named, _) = parser.push(M).tool_calls
    assert named.id is not None and re.fullmatch(r"[A-Za-z0-9]{9}", named.id)


def test_content_streams_as_soon_as_it_is_certain() -> None:
    parser = TaggedCompletionParser("undecided", THOUGHTS["qwen3"], CALLS["hermes"], {})
    shown = [parser.push(piece) for piece in ("<think>", "a", "b\n", "c</", "b>", "</think>", "d")]
    assert [delta.reasoning for delta in shown] == ["", "a", "b", "\nc", "</b>", "", ""]
    assert shown[-1].content == "d"


@pytest.mark.parametrize(
    "text,schema,value",
    [
        ("12", {"type": "string"}, "12"),
        ("12", {"type": ["integer", "string"]}, "12"),
        ("null", {"type": ["string", "null"]}, None),
        ("12.0", {"type": "integer"}, 12.0),
        ("twelve", {"type": "integer"}, "twelve"),
        ("true", {"type": "boolean"}, True),
        ("1", {"type": "boolean"}, "1"),
        ("b", {"enum": ["a", "b"]}, "b"),
        ("2", {"enum": [1, 2]}, 2),
        ("[1", {"type": "array"}, "[1"),
        ("NaN", None, "NaN"),
        ("None", None, None),
        ("{}", {"$ref": "#/x"}, {}),
    ],
)
def test_values_become_what_their_schema_asks_for(text: str, schema: Any, value: Any) -> None:
    assert typed_value(text, schema) == value
    assert type(typed_value(text, schema)) is type(value)


PLAIN = [*("a", " ", "\n", "\n\n", "<", ">", "</", "[", "]", "{", "}", '"', "\\", "ü"), "x" * 9]
FRAGMENTS = {
    "qwen3": [
        *PLAIN,
        *("<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "f"', H, H[:-12]),
        *('{"name": "f", "arguments": ', '{"a": ', "}}", H[12:], "\n<tool_call>\n", H[:-20]),
    ],
    "mistral": [
        *PLAIN,
        *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "f", M, M[:-1], "{}"),
        *('[{"name": "f", "arguments": {}}', "[TOOL_CALLS] [", "[TOOL_CALLS]f", '{"a": 1}'),
    ],
    "step": [
        *PLAIN,
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>", "</function>"),
        *("<parameter=s>", "</parameter>", "<parameter=i>\n1\n</parameter>", X, X[:-13], X[12:]),
        *("<function=", "<tool_call>\n", X[:40]),
    ],
}
OPENINGS: tuple[Opening, ...] = ("thought", "undecided", "content")


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=1000, deadline=None)
@given(data=st.data(), opening=st.sampled_from(OPENINGS))
def test_any_split_gives_what_the_whole_gives(
    style: str, data: st.DataObject, opening: Opening
) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(FRAGMENTS[style]), max_size=16)))
    whole = parse(style, [text], opening)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(style, pieces, opening) == whole
    assert parse(style, list(text), opening) == whole
    for name, arguments in whole[2]:
        assert name and isinstance(json.loads(arguments), dict)
    if not whole[2]:
        # nothing but the thought's tags, and whitespace, is ever left out
        assert sorted(bare(whole[0]) + bare(whole[1])) == sorted(bare(text))


def bare(text: str) -> str:
    return re.sub(r"\s|</?think>|\[/?THINK\]", "", text)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(alphabet=st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner),
    max_leaves=6,
)
argument_objects = st.dictionaries(st.text(min_size=1), json_values, max_size=4)


@pytest.mark.parametrize("style", ["qwen3", "mistral"])
@settings(max_examples=200, deadline=None)
@given(calls=st.lists(argument_objects, min_size=1, max_size=3), data=st.data())
def test_any_json_arguments_come_out_as_they_were(
    style: str, calls: list[dict[str, Any]], data: st.DataObject
) -> None:
    wraps = {"qwen3": '<tool_call>{"name": "f", "arguments": %s}</tool_call>'}
    wrap = wraps.get(style, "[TOOL_CALLS]f[ARGS]%s")
    text = "ok" + "".join(
        wrap % json.dumps(call, ensure_ascii=data.draw(st.booleans())) for call in calls
    )
    reasoning, content, parsed = parse(style, list(text), "undecided")
    assert (reasoning, content) == ("", "ok")
    assert [json.loads(arguments) for _, arguments in parsed] == calls
