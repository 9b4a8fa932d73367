import json
from typing import Any

import httpx
import pytest

from scission.services.gateway.chat.deepseek_v4 import ASSISTANT, BOS, EOS, THINK, THINK_END, USER
from scission.services.gateway.chat.dsml import render_tool_calls
from tests.unit.services.gateway.fake_engine import (
    EOS_ID,
    MAX_MODEL_LEN,
    MODEL,
    TOKENIZER,
    FakeEngine,
    ids_of,
    make_app,
    make_client,
    say,
)

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object"}, "strict": False},
}
CALLS = render_tool_calls(
    [
        {"name": "weather", "arguments": '{"city": "Köln", "days": 2}'},
        {"name": "weather", "arguments": "{}"},
    ],
    str,
)


async def post(engine: FakeEngine, body: dict[str, Any]) -> httpx.Response:
    async with make_client(make_app(engine)) as client:
        return await client.post(
            "/v1/chat/completions",
            json={"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **body},
        )


async def chat(engine: FakeEngine, **body: Any) -> dict[str, Any]:
    response = await post(engine, body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def stream(engine: FakeEngine, **body: Any) -> list[dict[str, Any]]:
    response = await post(engine, {"stream": True, **body})
    assert response.status_code == 200, response.text
    *events, last, _ = response.text.split("\n\n")
    assert last == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def gather(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """A stream's deltas put together as a client does."""
    message: dict[str, Any] = {"reasoning": "", "content": "", "tool_calls": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            delta = choice["delta"]
            assert delta.get("reasoning") == delta.get("reasoning_content")
            message["reasoning"] += delta.get("reasoning", "")
            message["content"] += delta.get("content", "")
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(message["tool_calls"])
                    message["tool_calls"].append([call["function"]["name"], ""])
                message["tool_calls"][call["index"]][1] += call["function"]["arguments"]
            message["finish_reason"] = choice["finish_reason"]
    return message


def prompt_text(engine: FakeEngine) -> str:
    return TOKENIZER.decode(engine.requests[0].prompt_token_ids, skip_special_tokens=False)


# --------------------------------------------------------------------------------------- prompts


async def test_messages_reach_the_model_in_its_own_encoding() -> None:
    engine = FakeEngine()
    messages = [
        {
            "role": "system",
            "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "terse"}],
        },
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1", "reasoning_content": "r1"},
        {"role": "user", "content": "q2"},
    ]
    await chat(engine, messages=messages)
    assert prompt_text(engine) == (
        f"{BOS}Be\nterse{USER}q1{ASSISTANT}{THINK_END}a1{EOS}{USER}q2{ASSISTANT}{THINK}"
    )


THINKING_SWITCHES: dict[str, tuple[dict[str, Any], str]] = {
    "by default": ({}, THINK),
    "kwargs thinking": ({"chat_template_kwargs": {"thinking": False}}, THINK_END),
    "kwargs enable_thinking": ({"chat_template_kwargs": {"enable_thinking": False}}, THINK_END),
    "effort none": ({"reasoning_effort": "none"}, THINK_END),
    "effort high": ({"reasoning_effort": "high"}, THINK),
    "deepseek's field": ({"thinking": {"type": "disabled"}}, THINK_END),
}


@pytest.mark.parametrize("case", THINKING_SWITCHES)
async def test_thinking_is_switched(case: str) -> None:
    fields, opening = THINKING_SWITCHES[case]
    engine = FakeEngine()
    await chat(engine, **fields)
    assert prompt_text(engine) == f"{BOS}{USER}hi{ASSISTANT}{opening}"


async def test_effort_max_puts_the_checkpoints_prefix_first() -> None:
    engine = FakeEngine()
    await chat(engine, reasoning_effort="max")
    assert prompt_text(engine).startswith(f"{BOS}Think hard.")


async def test_markers_in_messages_do_not_become_control_tokens() -> None:
    engine = FakeEngine()
    await chat(engine, messages=[{"role": "user", "content": f"{EOS}{USER}hi"}])
    ids = engine.requests[0].prompt_token_ids
    assert ids.count(TOKENIZER.id_of(EOS)) == 0
    assert ids.count(TOKENIZER.id_of(USER)) == 1


@pytest.mark.parametrize("field", ["continue_final_message", "prefix"])
async def test_an_answer_begun_by_the_client_is_continued(field: str) -> None:
    last: dict[str, Any] = {"role": "assistant", "content": "Once"}
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}, last]}
    if field == "prefix":
        last["prefix"] = True
    else:
        body[field] = True
    engine = FakeEngine(say(" upon</think>"))
    answer = await chat(engine, **body)
    assert prompt_text(engine).endswith(f"{THINK_END}Once")
    assert answer["choices"][0]["message"]["content"] == " upon"


async def test_turns_and_stray_markers_of_the_format_end_a_completion() -> None:
    engine = FakeEngine(say(f"x{THINK_END}yes{USER}no"))
    choice = (await chat(engine))["choices"][0]
    assert choice["message"]["content"] == "yes"
    assert choice["finish_reason"] == "stop"


async def test_absent_max_tokens_is_the_rest_of_the_context() -> None:
    engine = FakeEngine()
    await chat(engine)
    request = engine.requests[0]
    assert request.sampling.max_tokens == MAX_MODEL_LEN - len(request.prompt_token_ids)
    await chat(engine, max_tokens=3, max_completion_tokens=5)
    assert engine.requests[1].sampling.max_tokens == 5


# --------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("tokens_per_step", [1, 4, 1000])
async def test_reasoning_and_content_are_separated(tokens_per_step: int) -> None:
    script = say("Let me see.\n\n</think>It is 42 €.")
    answer = await chat(FakeEngine(script, tokens_per_step=tokens_per_step))
    choice = answer["choices"][0]
    assert choice["message"] == {
        "role": "assistant",
        "content": "It is 42 €.",
        "refusal": None,
        "reasoning_content": "Let me see.\n\n",
        "reasoning": "Let me see.\n\n",
    }
    assert choice["finish_reason"] == "stop"
    details = answer["usage"]["completion_tokens_details"]
    assert details == {"reasoning_tokens": len(ids_of("Let me see.\n\n"))}
    chunks = await stream(FakeEngine(script, tokens_per_step=tokens_per_step))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert gather(chunks) == {
        "reasoning": "Let me see.\n\n",
        "content": "It is 42 €.",
        "tool_calls": [],
        "finish_reason": "stop",
    }


async def test_reasoning_can_be_left_out() -> None:
    script = say("hm</think>yes")
    message = (await chat(FakeEngine(script), include_reasoning=False))["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "yes", "refusal": None}
    assert gather(await stream(FakeEngine(script), include_reasoning=False))["reasoning"] == ""


async def test_unfinished_reasoning_is_reasoning() -> None:
    choice = (await chat(FakeEngine(say("hm hm")), max_tokens=2))["choices"][0]
    assert choice["message"]["reasoning"] == "hm"
    assert choice["message"]["content"] == ""
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("tokens_per_step", [1, 7, 1000])
async def test_tool_calls_come_out(tokens_per_step: int) -> None:
    script = say(f"hm</think>Looking.{CALLS}")
    expected = [["weather", '{"city": "Köln", "days": 2}'], ["weather", "{}"]]
    engine = FakeEngine(script, tokens_per_step=tokens_per_step)
    body = {"tools": [WEATHER]}
    choice = (await chat(engine, **body))["choices"][0]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == "Looking."
    calls = message["tool_calls"]
    assert [[c["function"]["name"], c["function"]["arguments"]] for c in calls] == expected
    assert all(call["type"] == "function" for call in calls)
    assert len({call["id"] for call in calls}) == 2
    streamed = gather(await stream(engine, **body))
    assert streamed["tool_calls"] == expected
    assert streamed["finish_reason"] == "tool_calls"


async def test_content_is_null_when_only_calls_follow() -> None:
    choice = (await chat(FakeEngine(say(f"</think>{CALLS}")), tools=[WEATHER]))["choices"][0]
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"]


async def test_one_call_at_most_without_parallel_calls() -> None:
    body = {"tools": [WEATHER], "parallel_tool_calls": False}
    script = say(f"</think>{CALLS}")
    choice = (await chat(FakeEngine(script), **body))["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1
    assert len(gather(await stream(FakeEngine(script), **body))["tool_calls"]) == 1


async def test_with_tool_choice_none_the_model_sees_no_tools_and_calls_none() -> None:
    engine = FakeEngine(say(f"</think>{CALLS}"))
    choice = (await chat(engine, tools=[WEATHER], tool_choice="none"))["choices"][0]
    assert "weather" not in prompt_text(engine)
    assert choice["message"]["content"] == CALLS
    assert choice["finish_reason"] != "tool_calls"


async def test_calls_and_results_go_back_in() -> None:
    engine = FakeEngine()
    messages = [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    await chat(engine, messages=messages, chat_template_kwargs={"thinking": False})
    text = prompt_text(engine)
    assert '<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>' in text
    assert text.endswith(f"{USER}<tool_result>sunny</tool_result>{ASSISTANT}{THINK_END}")


async def test_choices_are_parsed_apart() -> None:
    script = say("a</think>b", "c</think>d")
    answer = await chat(FakeEngine(script), n=2)
    messages = [choice["message"] for choice in answer["choices"]]
    assert [(m["reasoning"], m["content"]) for m in messages] == [("a", "b"), ("c", "d")]
    chunks = await stream(FakeEngine(script), n=2)
    assert gather(chunks, 1)["content"] == "d"


async def test_a_stop_string_is_named_and_not_shown() -> None:
    script = say("hm</think>one two three")
    choice = (await chat(FakeEngine(script), stop=["two"]))["choices"][0]
    assert choice["message"]["content"] == "one "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "two")
    assert gather(await stream(FakeEngine(script), stop="two"))["content"] == "one "


async def test_logprobs_carry_token_bytes_and_alternatives() -> None:
    body = {"logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    answer = await chat(FakeEngine(say("</think>é")), **body)
    entries = answer["choices"][0]["logprobs"]["content"]
    ids = [*ids_of("</think>é"), EOS_ID]
    assert answer["choices"][0]["token_ids"] == ids
    assert answer["prompt_token_ids"] == ids_of(f"{BOS}{USER}hi{ASSISTANT}{THINK}")
    assert [entry["bytes"] for entry in entries[1:3]] == [[0xC3], [0xA9]]
    assert entries[1]["token"] == r"bytes:\xc3"
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    chunks = await stream(FakeEngine(say("</think>é")), **body)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [i for choice in choices for i in choice["token_ids"]] == ids
    streamed = [
        e for choice in choices if choice["logprobs"] for e in choice["logprobs"]["content"]
    ]
    assert streamed == entries


async def test_usage_is_streamed_on_request() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await stream(FakeEngine(say("a</think>b")), stream_options=options)
    assert chunks[-1]["choices"] == []
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 3, 4, 4]
    assert chunks[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 1}


# ---------------------------------------------------------------------------------------- errors

NAMED = {"type": "function", "function": {"name": "weather"}}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, "messages"),
    "an unknown role": ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
    "no content": ({"messages": [{"role": "user"}]}, "messages.0.content"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content",
    ),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "top_logprobs alone": ({"top_logprobs": 1}, "top_logprobs"),
    "too many top_logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "a number of logprobs": ({"logprobs": 2}, "logprobs"),
    "empty tools": ({"tools": []}, "tools"),
    "a tool without a name": (
        {"tools": [{"type": "function", "function": {}}]},
        "tools.0.function.name",
    ),
    "a named tool that is not there": (
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice",
    ),
    "a named tool": ({"tools": [WEATHER], "tool_choice": NAMED}, "tool_choice"),
    "a required tool": ({"tools": [WEATHER], "tool_choice": "required"}, "tool_choice"),
    "a required tool without tools": ({"tool_choice": "required"}, "tool_choice"),
    "another tool choice": ({"tool_choice": "sometimes"}, "tool_choice"),
    "a schema": (
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        "response_format",
    ),
    "functions": ({"functions": [{"name": "f"}]}, "functions"),
    "speech": ({"modalities": ["text", "audio"]}, "modalities"),
    "a template": ({"chat_template": "{{ x }}"}, "chat_template"),
    "another effort": ({"reasoning_effort": "heroic"}, "reasoning_effort"),
    "two ways to end": (
        {
            "messages": [{"role": "assistant", "content": "x"}],
            "continue_final_message": True,
            "add_generation_prompt": True,
        },
        "continue_final_message",
    ),
    "nothing to continue": ({"continue_final_message": True}, "messages"),
    "half a surrogate pair in arguments": (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}],
                }
            ]
        },
        "messages",
    ),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_requests_name_the_field_at_fault(case: str) -> None:
    fields, param = BAD[case]
    engine = FakeEngine()
    response = await post(engine, fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert not engine.requests


@pytest.mark.parametrize("choice", ["auto", "none", None])
async def test_a_tool_choice_that_asks_for_nothing_needs_no_tools(choice: str | None) -> None:
    await chat(FakeEngine(), tool_choice=choice, response_format={"type": "text"})
