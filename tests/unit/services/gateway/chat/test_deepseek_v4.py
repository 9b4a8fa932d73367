import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scission.common.errors import RequestError, UnsupportedError
from scission.services.gateway.chat.checkpoint_texts import CheckpointTexts
from scission.services.gateway.chat.deepseek_v4 import (
    ASSISTANT,
    BOS,
    EOS,
    LATEST_REMINDER,
    MARKERS,
    THINK,
    THINK_END,
    USER,
    DeepSeekV4Format,
    DeepSeekV4Parser,
)
from scission.services.gateway.chat.dsml import DSML, render_tool_calls
from scission.services.gateway.chat.format import Conversation, FunctionCall, Message, RenderedChat
from tests.unit.services.gateway.text_fixtures import TEXTS, make_format

FORMAT = make_format()
WEATHER = {"name": "weather", "parameters": {"type": "object"}}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, reasoning: str = "") -> Message:
    return {"role": "assistant", "content": text, "reasoning": reasoning}


def calling(*calls: tuple[str, str]) -> Message:
    return {
        "role": "assistant",
        "tool_calls": [
            {"id": call_id, "function": {"name": "weather", "arguments": arguments}}
            for call_id, arguments in calls
        ],
    }


def render(conversation: Conversation, chat_format: DeepSeekV4Format = FORMAT) -> RenderedChat:
    return asyncio.run(chat_format.render(conversation))


def prompt(messages: list[Message], **options: Any) -> str:
    return render(Conversation(messages, **options)).prompt


# ------------------------------------------------------------------------------------ rendering

TWO_TURNS = [system("S"), user("q1"), assistant("a1", "r1"), user("q2")]


def test_old_turns_lose_their_reasoning_and_the_new_one_starts_thinking() -> None:
    rendered = render(Conversation(TWO_TURNS))
    assert rendered.prompt == (
        f"{BOS}S{USER}q1{ASSISTANT}{THINK_END}a1{EOS}{USER}q2{ASSISTANT}{THINK}"
    )
    assert rendered.opens_in == "reasoning"


def test_chat_mode_always_opens_with_a_closed_think_block() -> None:
    expected = f"{BOS}S{USER}q1{ASSISTANT}{THINK_END}a1{EOS}{USER}q2{ASSISTANT}{THINK_END}"
    for mode in ({"thinking": False}, {"effort": "none"}):
        rendered = render(Conversation(TWO_TURNS, **mode))
        assert rendered.prompt == expected
        assert rendered.opens_in == "content"


def test_tools_keep_every_turns_reasoning_and_join_the_first_system_message() -> None:
    schema = json.dumps(WEATHER)
    preamble = TEXTS.tools_template
    assert preamble is not None
    filled = (
        preamble.replace("{dsml_token}", DSML)
        .replace("{thinking_start_token}", THINK)
        .replace("{thinking_end_token}", THINK_END)
        .replace("{tool_schemas}", schema)
    )
    assert prompt(TWO_TURNS, tools=[WEATHER]) == (
        f"{BOS}S\n\n{filled}{USER}q1{ASSISTANT}{THINK}r1{THINK_END}a1{EOS}"
        f"{USER}q2{ASSISTANT}{THINK}"
    )
    assert prompt([user("q")], tools=[WEATHER]).startswith(f"{BOS}\n\n{filled}{USER}q")


def test_tool_results_join_the_user_turn_in_the_order_of_the_calls() -> None:
    messages: list[Message] = [
        user("q"),
        calling(("c1", '{"a": "x"}'), ("c2", '{"n": 1}')),
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
        {
            "role": "tool",
            "tool_call_id": "c1",
            "content": [
                {"type": "text", "text": "o"},
                {"type": "text", "text": "ne"},
                {"type": "image_url", "text": ""},
            ],
        },
        user("and?"),
    ]
    text = prompt(messages, thinking=False)
    assert text.endswith(
        f"{EOS}{USER}<tool_result>o\n\nne\n\n[Unsupported image_url]</tool_result>\n\n"
        f"<tool_result>two</tool_result>\n\nand?{ASSISTANT}{THINK_END}"
    )
    assert (
        f"\n\n<{DSML}tool_calls>\n"
        f'<{DSML}invoke name="weather">\n'
        f'<{DSML}parameter name="a" string="true">x</{DSML}parameter>\n'
        f"</{DSML}invoke>\n"
        f'<{DSML}invoke name="weather">\n'
        f'<{DSML}parameter name="n" string="false">1</{DSML}parameter>\n'
        f"</{DSML}invoke>\n"
        f"</{DSML}tool_calls>{EOS}"
    ) in text


def test_developer_turns_before_the_last_user_are_removed_when_thinking() -> None:
    messages: list[Message] = [{"role": "developer", "content": "D"}, *TWO_TURNS]
    assert f"{USER}D" not in prompt(messages)
    assert f"{BOS}{USER}D" in prompt(messages, thinking=False)
    with pytest.raises(RequestError, match="developer"):
        prompt([{"role": "developer", "content": ""}])


def test_reminders_and_tasks_are_rendered_with_their_markers() -> None:
    text = prompt([user("q"), {"role": "latest_reminder", "content": "today"}, assistant("a")])
    expected = f"{USER}q{ASSISTANT}{THINK}{LATEST_REMINDER}today{THINK_END}a{EOS}"
    assert text == BOS + expected
    assert prompt([{**user("q"), "task": "title"}]) == f"{BOS}{USER}q<｜title｜>"
    action = render(Conversation([{**user("q"), "task": "action"}]))
    assert action.prompt == f"{BOS}{USER}q{ASSISTANT}{THINK}<｜action｜>"
    with pytest.raises(RequestError, match="task"):
        prompt([{**user("q"), "task": "dance"}])


def test_effort_prefix_stands_right_after_bos_and_only_when_thinking() -> None:
    for effort in ("max", "xhigh"):
        assert prompt([system("S"), user("q")], effort=effort).startswith(f"{BOS}Think hard.\n\nS")
    for options in ({"effort": "high"}, {"effort": "max", "thinking": False}, {}):
        assert "Think hard" not in prompt([user("q")], **options)


def test_a_checkpoint_without_texts_serves_plain_chats_and_names_what_is_missing() -> None:
    bare = make_format(CheckpointTexts())
    assert render(Conversation([user("q")], effort="high"), bare).prompt.startswith(BOS)
    for options in ({"tools": [WEATHER]}, {"effort": "max"}):
        with pytest.raises(UnsupportedError, match=r"encoding_dsv4\.py, which is missing"):
            render(Conversation([user("q")], **options), bare)


def test_the_july_texts_give_high_and_max_a_prefix_and_low_none() -> None:
    july = make_format(CheckpointTexts(effort_prefixes={"high": "H", "max": "M"}))
    for effort, prefix in (("low", ""), ("high", "H"), ("max", "M"), (None, "")):
        rendered = render(Conversation([user("q")], effort=effort), july)
        assert rendered.prompt == f"{BOS}{prefix}{USER}q{ASSISTANT}{THINK}"


def test_a_final_assistant_message_can_be_continued() -> None:
    messages = [user("q"), assistant("So far", "hm")]
    going_on = render(Conversation(messages, continue_final_message=True))
    assert going_on.prompt == f"{BOS}{USER}q{ASSISTANT}{THINK}hm{THINK_END}So far"
    assert going_on.opens_in == "content"
    thinking = render(Conversation([user("q"), assistant("", "hm")], continue_final_message=True))
    assert thinking.prompt.endswith(f"{THINK}hm")
    assert thinking.opens_in == "reasoning"
    with pytest.raises(RequestError, match="assistant"):
        render(Conversation([user("q")], continue_final_message=True))


def test_without_a_generation_prompt_nothing_follows_the_last_message() -> None:
    assert prompt([user("q")], add_generation_prompt=False) == f"{BOS}{USER}q"


def test_documents_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="documents"):
        prompt([user("q")], documents=[{"text": "d"}])


@given(st.lists(st.sampled_from([*MARKERS, "<", "｜", "a", "DSML", " "]), max_size=8))
def test_markers_in_messages_are_broken_up(parts: list[str]) -> None:
    text = "".join(parts)
    rendered = prompt(
        [system(text), user(text), assistant(text, text), user(text)], tools=[{"name": text}]
    )
    plain = prompt([system(""), user(""), assistant(""), user("")], tools=[{"name": ""}])
    for marker in MARKERS:
        assert rendered.count(marker) == plain.count(marker)


# -------------------------------------------------------------------------------------- parsing

Parsed = tuple[str, str, list[tuple[str, str]]]


def parse(pieces: list[str], *, thinking: bool, tools: bool = True) -> Parsed:
    parser = DeepSeekV4Parser(
        opens_in="reasoning" if thinking else "content", parse_tool_calls=tools
    )
    reasoning = content = ""
    calls: list[tuple[str, str]] = []
    for delta in (*map(parser.push, pieces), parser.finish()):
        reasoning += delta.reasoning
        content += delta.content
        for call in delta.tool_calls:
            if call.name is not None:
                assert call.index == len(calls) and call.id and not call.arguments
                calls.append((call.name, ""))
            else:
                name, arguments = calls[call.index]
                calls[call.index] = (name, arguments + call.arguments)
    assert parser.num_tool_calls == len(calls)
    return reasoning, content, calls


BLOCK = render_tool_calls([{"name": "f", "arguments": '{"a": "x", "n": [1]}'}], str)
CALL = ("f", '{"a": "x", "n": [1]}')

COMPLETIONS = {
    "thinking": ("hm</think>yes", True, ("hm", "yes", [])),
    "unfinished thinking is all reasoning": ("hm\n\n<", True, ("hm\n\n<", "", [])),
    "chat": ("yes", False, ("", "yes", [])),
    "a stray end of thinking is dropped": ("ye</think>s", False, ("", "yes", [])),
    "calls only": (f"hm</think>{BLOCK}", True, ("hm", "", [CALL])),
    "content, then calls": (f"hm</think>ok{BLOCK} late", True, ("hm", "ok", [CALL])),
    "more blank lines are content": (f"ok\n\n{BLOCK}", False, ("", "ok\n\n", [CALL])),
    "a block inside reasoning ends it": (f"hm{BLOCK}", True, ("hm", "", [CALL])),
    "the other spelling": (BLOCK.replace("tool_calls", "toolcalls"), False, ("", "", [CALL])),
    "a bare invoke": (BLOCK.split("\n", 3)[3].rsplit("\n", 1)[0], False, ("", "", [CALL])),
    "no string flag": (BLOCK.replace(' string="true"', ""), False, ("", "", [CALL])),
    "bad JSON is a string": (
        BLOCK.replace("[1]", "NaN"),
        False,
        ("", "", [("f", '{"a": "x", "n": "NaN"}')]),
    ),
    "a repeated parameter": (
        BLOCK.replace('"n" string="false"', '"a" string="true"'),
        False,
        ("", "", [("f", '{"a": "x"}')]),
    ),
    "cut off in a string": (BLOCK[: BLOCK.index("x") + 1], False, ("", "", [("f", '{"a": "x"}')])),
    "cut off in JSON": (BLOCK[: BLOCK.index("[1") + 1], False, ("", "", [("f", '{"a": "x"}')])),
    "cut off in a name": (BLOCK[: BLOCK.index('"f')], False, ("", "", [])),
    "angles and newlines in values": (
        BLOCK.replace(">x<", '>a<b\n</c>"<'),
        False,
        ("", "", [("f", '{"a": "a<b\\n</c>\\"", "n": [1]}')]),
    ),
}


@pytest.mark.parametrize("case", COMPLETIONS)
def test_completions_are_split_as_specified(case: str) -> None:
    text, thinking, expected = COMPLETIONS[case]
    assert parse([text], thinking=thinking) == expected
    assert parse(list(text), thinking=thinking) == expected


def test_a_tag_that_never_ends_ends_the_block() -> None:
    text = f'ok\n\n<{DSML}tool_calls>\n<{DSML}invoke name="' + "x" * 5000 + f'">{BLOCK}'
    assert parse([text], thinking=False) == parse(list(text), thinking=False) == ("", "ok", [])


def test_without_tools_the_markup_of_calls_is_content() -> None:
    assert parse([BLOCK], thinking=False, tools=False) == ("", BLOCK, [])


FRAGMENTS = [
    *("a", " ", "\n", "\n\n", "<", ">", "/", '"', "｜", "</", "x" * 9),
    *(THINK, THINK_END, DSML, f"<{DSML}tool_calls>", f"</{DSML}tool_calls>", f"<{DSML}invoke"),
    *(f'<{DSML}invoke name="f">', f"</{DSML}invoke>", f"</{DSML}parameter>", "1", "null", "ü"),
    *(f'<{DSML}parameter name="a" string="true">', f'<{DSML}parameter name="b" string="false">'),
    *(f'<{DSML}parameter name="c">', BLOCK),
]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=25), st.booleans(), st.data())
def test_any_split_gives_what_the_whole_gives(
    fragments: list[str], thinking: bool, data: st.DataObject
) -> None:
    text = "".join(fragments)
    whole = parse([text], thinking=thinking)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=30)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(pieces, thinking=thinking) == whole
    assert parse(list(text), thinking=thinking) == whole
    for _, arguments in whole[2]:
        assert isinstance(json.loads(arguments), dict)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(alphabet=st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner),
    max_leaves=6,
)
argument_objects = st.dictionaries(st.text("abcxyz_", min_size=1), json_values, max_size=4)


@given(st.lists(argument_objects, min_size=1, max_size=3))
def test_rendered_calls_are_parsed_back(calls: list[dict[str, Any]]) -> None:
    written: list[FunctionCall] = [
        {"name": f"f{i}", "arguments": json.dumps(call)} for i, call in enumerate(calls)
    ]
    _, content, parsed = parse([f"ok{render_tool_calls(written, str)}"], thinking=False)
    assert content == "ok"
    assert [(name, json.loads(arguments)) for name, arguments in parsed] == [
        (f"f{i}", call) for i, call in enumerate(calls)
    ]
