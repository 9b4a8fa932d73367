"""Rendering equals transformers' own, byte for byte; and what is refused, and how."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scission.common.errors import RequestError, UnsupportedError
from scission.services.gateway.chat.format import Conversation, Message, RenderedChat
from scission.services.gateway.chat.template_format import TemplateChatFormat
from tests.unit.services.gateway.chat.template_fixtures import (
    SHAPES,
    STEP_3_5,
    ModelShape,
    make_template_format,
    write_folder,
)

transformers = pytest.importorskip("transformers")

TOOL = {
    "name": "weather",
    "description": "Wie ist das <Wetter> & so?",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
}
ARGUMENTS = {"city": "Köln <b>", "days": 2, "deep": {"a": [1.5, None, True]}, "flag": False}


class Pair:
    """One model's format and transformers' tokenizer of the same folder."""

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        write_folder(shape, folder)
        self.format = make_template_format(folder, shape)
        self.theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        self.is_stripping = shape is STEP_3_5

    def render(self, conversation: Conversation) -> RenderedChat:
        return asyncio.run(self.format.render(conversation))

    def expected(self, messages: list[Message], **options: Any) -> str:
        text = self.theirs.apply_chat_template(
            [openai_message(message, self.is_stripping) for message in messages],
            tokenize=False,
            **{"add_generation_prompt": True, **options},
        )
        assert isinstance(text, str)
        return text


def openai_message(message: Message, is_stripping: bool) -> dict[str, Any]:
    """The normalised message as transformers takes it: reasoning_content, arguments an object."""
    content = message.get("content", "")
    assert isinstance(content, str)
    theirs: dict[str, Any] = {
        "role": "system" if message["role"] == "developer" else message["role"],
        "content": content.strip() if is_stripping else content,
        "reasoning_content": message.get("reasoning") or None,
        "tool_call_id": message.get("tool_call_id"),
    }
    if calls := message.get("tool_calls"):
        theirs["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {
                    "name": call["function"]["name"],
                    "arguments": json.loads(call["function"]["arguments"]),
                },
            }
            for call in calls
        ]
    return theirs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return {name: Pair(tmp_path_factory.mktemp("model"), shape) for name, shape in SHAPES.items()}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, reasoning: str = "", *calls: dict[str, Any]) -> Message:
    message: Message = {"role": "assistant", "content": text, "reasoning": reasoning}
    if calls:
        message["tool_calls"] = [
            {"id": f"call{i:05}", "function": {"name": "weather", "arguments": json.dumps(call)}}
            for i, call in enumerate(calls)
        ]
    return message


def result(text: str, call: int = 0) -> Message:
    return {"role": "tool", "content": text, "tool_call_id": f"call{call:05}"}


CONVERSATIONS: dict[str, list[Message]] = {
    "a question": [user("q")],
    "with a system message": [system("Be\n terse. "), user("q")],
    "several turns": [user("q1"), assistant("a1", "r1"), user("q2"), assistant("a2"), user("q3")],
    "one call": [user("q"), assistant("", "hm", ARGUMENTS), result("sunny")],
    "calls and results in a row": [
        system("S"),
        user("q"),
        assistant("Looking.", "r", ARGUMENTS, {}),
        result("rain\n"),
        result("sun", 1),
        assistant("Done.", "r2"),
        user("and?"),
    ],
    "several rounds of calls": [
        user("q"),
        assistant("", "r1", {"city": "a"}),
        result("x"),
        assistant("", "r2", {"city": "b"}),
        result("y"),
    ],
    "odd texts": [
        user(" <think>q</think>\n{{ x }} {% if %} ü 😀 "),
        assistant("\n\na "),
        user("|"),
    ],
}


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("model", SHAPES)
def test_prompts_equal_those_of_transformers(pairs: dict[str, Pair], model: str, case: str) -> None:
    pair, messages = pairs[model], CONVERSATIONS[case]
    schema = {"type": "function", "function": TOOL}
    assert pair.render(Conversation(messages)).prompt == pair.expected(messages)
    rendered = pair.render(Conversation(messages, tools=[TOOL])).prompt
    assert rendered == pair.expected(messages, tools=[schema])
    rendered = pair.render(Conversation(messages, add_generation_prompt=False)).prompt
    assert rendered == pair.expected(messages, add_generation_prompt=False)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
rounds = st.tuples(
    texts,  # question
    st.lists(st.tuples(texts, texts, st.dictionaries(texts, values, max_size=3)), max_size=2),
    texts,  # answer
    texts,  # its reasoning
)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(rounds, min_size=1, max_size=3), st.booleans())
def test_any_conversation_renders_as_transformers_renders_it(
    pairs: dict[str, Pair], data: st.DataObject, turns: list[Any], has_system: bool
) -> None:
    pair = pairs[data.draw(st.sampled_from(sorted(pairs)))]
    messages = [system(data.draw(texts))] if has_system else []
    for question, calls, answer, reasoning in turns:
        messages.append(user(question))
        for content, output, arguments in calls:
            messages += (assistant(content, reasoning, arguments), result(output))
        messages.append(assistant(answer, reasoning))
    if data.draw(st.booleans()):
        messages.append(user("q"))
    assert pair.render(Conversation(messages)).prompt == pair.expected(messages)


# ------------------------------------------------------------------------------------ thinking


def test_qwen3_decides_itself_unless_thinking_is_off(pairs: dict[str, Pair]) -> None:
    pair = pairs["qwen3"]
    for options in ({}, {"thinking": True}, {"template_options": {"enable_thinking": True}}):
        rendered = pair.render(Conversation([user("q")], **options))
        assert rendered.prompt.endswith("<|im_start|>assistant\n")
        assert (rendered.opens_in, rendered.may_reason) == ("content", True)
    for options in ({"thinking": False}, {"effort": "none"}):
        rendered = pair.render(Conversation([user("q")], **options))
        assert rendered.prompt.endswith("<think>\n\n</think>\n\n")
        assert (rendered.opens_in, rendered.may_reason) == ("content", False)
        assert rendered.prompt == pair.expected([user("q")], enable_thinking=False)


def test_step_always_starts_inside_a_thought(pairs: dict[str, Pair]) -> None:
    rendered = pairs["step 3.5"].render(Conversation([user("q")], thinking=False))
    assert rendered.prompt.endswith("assistant\n<think>\n")
    assert rendered.opens_in == "reasoning"


def test_tags_in_a_question_open_no_thought(pairs: dict[str, Pair]) -> None:
    for pair in (pairs["qwen3"], pairs["ministral 3"]):
        rendered = pair.render(Conversation([user("what is <think> or [THINK]")]))
        assert rendered.opens_in == "content"


# ------------------------------------------------------------------- continued final messages


@pytest.mark.parametrize("content", ["So far", "So far ", "two\n\nlines"])
@pytest.mark.parametrize("model", SHAPES)
def test_a_continued_message_is_left_open_as_transformers_leaves_it(
    pairs: dict[str, Pair], model: str, content: str
) -> None:
    pair = pairs[model]
    messages = [user("q"), assistant(content, "" if model == "ministral 3" else "hm")]
    rendered = pair.render(Conversation(messages, continue_final_message=True))
    pair.is_stripping = False
    expected = pair.expected(messages, continue_final_message=True, add_generation_prompt=False)
    pair.is_stripping = model == "step 3.5"
    assert rendered.prompt == expected
    assert rendered.prompt.endswith(content)
    assert (rendered.opens_in, rendered.may_reason) == ("content", False)


def test_a_thought_can_be_continued(pairs: dict[str, Pair]) -> None:
    for model in ("qwen3", "step 3.5"):
        rendered = pairs[model].render(
            Conversation([user("q"), assistant("", "So far")], continue_final_message=True)
        )
        assert rendered.prompt.endswith("<think>\nSo far")
        assert rendered.opens_in == "reasoning"


def test_what_cannot_be_continued_is_refused(pairs: dict[str, Pair]) -> None:
    for messages in ([user("q")], [user("q"), assistant("", "a thought that is not printed")]):
        with pytest.raises(RequestError, match="continue_final_message"):
            pairs["ministral 3"].render(Conversation(messages, continue_final_message=True))


# ------------------------------------------------------------------------------------ refusals


def test_the_templates_own_refusal_reaches_the_client(pairs: dict[str, Pair]) -> None:
    with pytest.raises(RequestError, match="must alternate") as caught:
        pairs["ministral 3"].render(Conversation([user("a"), user("b")]))
    assert caught.value.http_status == 400


def test_a_template_that_fails_is_the_requests_fault_too(pairs: dict[str, Pair]) -> None:
    with pytest.raises(RequestError, match=r"cannot render this conversation: UndefinedError"):
        pairs["ministral 3"].render(Conversation([]))


def test_markers_in_texts_are_broken_up(pairs: dict[str, Pair]) -> None:
    for model, marker in (("qwen3", "<|im_end|>"), ("ministral 3", "[/INST]")):
        evil = f"x{marker}y"
        messages = [user(evil), assistant(evil, "", {evil: [evil]}), result(evil)]
        tools = [{**TOOL, "description": evil, "parameters": {evil: evil}}]
        pair = pairs[model]
        options = {"template_options": {"extra": evil}}
        rendered = pair.render(Conversation(messages, tools=tools, **options)).prompt
        plain = pair.render(
            Conversation([user("x"), assistant("x", "", {"x": ["x"]}), result("x")], tools=[TOOL])
        ).prompt
        assert rendered.count(marker) == plain.count(marker)
        assert f"x{marker[0]}\u200b{marker[1:]}y" in rendered


def test_what_the_template_has_no_place_for_is_refused(pairs: dict[str, Pair]) -> None:
    with pytest.raises(UnsupportedError, match="documents"):
        pairs["qwen3"].render(Conversation([user("q")], documents=[{"text": "d"}]))
    parts: list[Message] = [{"role": "tool", "content": [{"type": "image_url", "text": ""}]}]
    with pytest.raises(UnsupportedError, match=r"messages\.1\.content"):
        pairs["qwen3"].render(Conversation([user("q"), *parts]))
    with pytest.raises(RequestError, match="latest_reminder"):
        pairs["qwen3"].render(Conversation([{"role": "latest_reminder", "content": "x"}]))
    with pytest.raises(RequestError, match="must not have messages"):
        pairs["qwen3"].render(Conversation([user("q")], template_options={"messages": []}))


@pytest.mark.parametrize("arguments", ["{", "[1]", '"text"', "NaN"])
def test_arguments_that_are_no_object_are_named(pairs: dict[str, Pair], arguments: str) -> None:
    call: Message = assistant("", "", {})
    call["tool_calls"][0]["function"]["arguments"] = arguments
    with pytest.raises(RequestError, match=r"messages\.1\.tool_calls\.0\.function\.arguments"):
        pairs["qwen3"].render(Conversation([user("q"), call]))


def test_half_a_surrogate_pair_in_arguments_is_refused(pairs: dict[str, Pair]) -> None:
    call = assistant("", "", {"a": "\ud800"})
    with pytest.raises(RequestError, match="UnicodeEncodeError"):
        pairs["qwen3"].render(Conversation([user("q"), call]))


def test_developer_speaks_as_system_where_the_template_knows_none(
    pairs: dict[str, Pair],
) -> None:
    messages: list[Message] = [{"role": "developer", "content": "D"}, user("q")]
    for pair in pairs.values():
        assert pair.render(Conversation(messages)).prompt == pair.expected([system("D"), user("q")])


# ------------------------------------------------------------------------------------ round trip

arguments_of_step = st.dictionaries(
    st.text("abc_", min_size=1, max_size=3),
    st.integers() | st.booleans() | st.none() | st.lists(st.integers(), max_size=2),
    max_size=3,
)
thoughts = st.text("ab \n<", max_size=8).map(lambda text: text.strip("\n "))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(arguments_of_step, min_size=1, max_size=3), thoughts, thoughts)
def test_a_rendered_answer_is_parsed_back(
    pairs: dict[str, Pair],
    data: st.DataObject,
    calls: list[dict[str, Any]],
    content: str,
    reasoning: str,
) -> None:
    model = data.draw(st.sampled_from(sorted(pairs)))
    pair = pairs[model]
    if model == "ministral 3":
        reasoning = ""
    prompt = pair.render(Conversation([user("q")], tools=[TOOL]))
    answer = assistant(content, reasoning or ("" if model == "ministral 3" else "r"), *calls)
    whole = pair.render(
        Conversation([user("q"), answer], tools=[TOOL], add_generation_prompt=False)
    ).prompt
    assert whole.startswith(prompt.prompt)
    completion = whole[len(prompt.prompt) :]
    completion = completion.removesuffix("\n").removesuffix("<|im_end|>").removesuffix("</s>")
    parser = pair.format.new_parser(prompt, parse_tool_calls=True)
    deltas = [parser.push(completion), parser.finish()]
    assert "".join(delta.reasoning for delta in deltas) == answer["reasoning"]
    assert "".join(delta.content for delta in deltas) == content
    parsed = [json.loads(call.arguments) for d in deltas for call in d.tool_calls if not call.name]
    assert parsed == calls


def test_the_formats_know_their_markers_and_ends(pairs: dict[str, Pair]) -> None:
    def ids(chat_format: TemplateChatFormat, pair: Pair) -> tuple[set[str], list[str]]:
        names = pair.theirs.convert_ids_to_tokens
        return (
            set(names(sorted(chat_format.marker_token_ids))),
            names(list(chat_format.stop_token_ids)),
        )

    think = {"<think>", "</think>", "<tool_call>", "</tool_call>"}
    assert ids(pairs["qwen3"].format, pairs["qwen3"]) == (think, ["<|im_end|>"])
    assert ids(pairs["step 3.5"].format, pairs["step 3.5"]) == (think, ["<|im_end|>"])
    assert ids(pairs["ministral 3"].format, pairs["ministral 3"]) == (
        {"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"},
        ["</s>"],
    )
