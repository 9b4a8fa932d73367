import json
from typing import Any

import httpx
import pytest

from scission.common.errors import CapacityError, EngineError
from scission.services.gateway.engine import GenerationRequest
from tests.unit.services.gateway.fake_engine import (
    EOS_ID,
    MAX_MODEL_LEN,
    MODEL,
    TOKENIZER,
    VOCAB_SIZE,
    FakeEngine,
    ids_of,
    make_app,
    make_client,
    say,
)


async def post(engine: FakeEngine, body: dict[str, Any], **options: Any) -> httpx.Response:
    async with make_client(make_app(engine, **options)) as client:
        return await client.post("/v1/completions", json={"model": MODEL, **body})


async def complete(engine: FakeEngine, **body: Any) -> dict[str, Any]:
    response = await post(engine, {"max_tokens": 50, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def stream(engine: FakeEngine, **body: Any) -> list[dict[str, Any]]:
    response = await post(engine, {"max_tokens": 50, "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    *events, last, end = response.text.split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def joined(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(
        choice["text"]
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index
    )


def seen(engine: FakeEngine) -> GenerationRequest:
    assert len(engine.requests) == 1
    return engine.requests[0]


# ------------------------------------------------------------------------------------- requests


async def test_a_text_prompt_is_completed() -> None:
    engine = FakeEngine(say("hello wörld"), cached_tokens=2)
    answer = await complete(engine, prompt="abc")
    assert answer["object"] == "text_completion"
    assert answer["model"] == MODEL
    assert answer["choices"] == [
        {
            "index": 0,
            "text": "hello wörld",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    num_tokens = len(ids_of("hello wörld")) + 1
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": num_tokens,
        "total_tokens": 3 + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert engine.num_closed == 1


@pytest.mark.parametrize(
    "field", ["temperature", "top_p", "n", "stop", "seed", "max_tokens", "echo"]
)
async def test_null_means_default(field: str) -> None:
    engine = FakeEngine()
    await complete(engine, **{"prompt": "abc", field: None})
    sampling = seen(engine).sampling
    assert (sampling.temperature, sampling.top_p, seen(engine).n) == (1.0, 1.0, 1)
    assert sampling.max_tokens == (16 if field == "max_tokens" else 50)


async def test_sampling_parameters_reach_the_engine() -> None:
    engine = FakeEngine()
    await complete(
        engine,
        prompt="abc",
        max_tokens=9,
        min_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        presence_penalty=-1,
        frequency_penalty=2,
        repetition_penalty=1.1,
        logit_bias={"3": -100, "7": 1.5},
        allowed_token_ids=[9, 3, 9],
        bad_words=["hello"],
        seed=-5,
        stop_token_ids=[8],
        ignore_eos=True,
        logprobs=3,
        priority=-2,
        cache_salt="tenant",
    )
    request, sampling = seen(engine), seen(engine).sampling
    assert (sampling.max_tokens, sampling.min_tokens) == (9, 2)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 0)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1, 2)
    assert sampling.logit_bias == {3: -100, 7: 1.5}
    assert sampling.allowed_token_ids == (3, 9)
    assert sampling.bad_token_ids == tuple(ids_of("hello"))
    assert (sampling.seed, sampling.stop_token_ids, sampling.ignore_eos) == (-5, (8,), True)
    assert (sampling.logprobs, sampling.prompt_logprobs) == (3, None)
    assert (request.priority, request.cache_salt) == (-2, "tenant")


async def test_requests_without_a_seed_get_one_each() -> None:
    engine = FakeEngine()
    await complete(engine, prompt=["a", "b"])
    first, second = engine.requests
    assert first.sampling.seed != second.sampling.seed


@pytest.mark.parametrize(
    "prompt",
    ["abc", ids_of("abc"), ["abc", "de"], [ids_of("abc"), ids_of("de")]],
    ids=["text", "ids", "texts", "lists of ids"],
)
async def test_every_form_of_prompt_is_taken(prompt: Any) -> None:
    answer = await complete(FakeEngine(), prompt=prompt, n=2)
    texts = {choice["index"]: choice["text"] for choice in answer["choices"]}
    many = isinstance(prompt[0], list) or (isinstance(prompt, list) and isinstance(prompt[0], str))
    assert texts == ({0: "abc", 1: "abc", 2: "de", 3: "de"} if many else {0: "abc", 1: "abc"})
    assert answer["usage"]["prompt_tokens"] == (5 if many else 3)
    chunks = await stream(FakeEngine(), prompt=prompt, n=2)
    assert {i: joined(chunks, i) for i in texts} == texts


async def test_a_long_prompt_can_be_truncated_from_the_left() -> None:
    engine = FakeEngine()
    await complete(engine, prompt="abcdef", truncate_prompt_tokens=2)
    assert seen(engine).prompt_token_ids == ids_of("ef")


# --------------------------------------------------------------------------------------- choices


async def test_choices_have_their_own_index_and_usage_sums_them() -> None:
    engine = FakeEngine(say("one", "three", "fourteen"))
    answer = await complete(engine, prompt="a", n=3)
    assert [c["text"] for c in answer["choices"]] == ["one", "three", "fourteen"]
    assert answer["usage"]["completion_tokens"] == 4 + 6 + 9
    assert answer["usage"]["prompt_tokens"] == 1


async def test_best_of_answers_the_likeliest_by_mean_logprob() -> None:
    # in the fake, a lower id is likelier
    engine = FakeEngine(say("zz", "!!", "aa"))
    answer = await complete(engine, prompt="a", n=2, best_of=3)
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "!!"), (1, "aa")]
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 9


async def test_a_stop_string_ends_its_choice_only() -> None:
    engine = FakeEngine(say("one STOP two", "one two three"))
    answer = await complete(engine, prompt="a", n=2, stop=["STOP", "nope"])
    first, second = answer["choices"]
    assert (first["text"], first["finish_reason"], first["stop_reason"]) == ("one ", "stop", "STOP")
    assert (second["text"], second["stop_reason"]) == ("one two three", None)
    assert engine.stopped == [(seen(engine).request_id, 0)]


@pytest.mark.parametrize("tokens_per_step", [1, 3, 100])
async def test_a_stop_string_is_never_shown_by_a_stream(tokens_per_step: int) -> None:
    engine = FakeEngine(say("one ST STO STOP two"), tokens_per_step=tokens_per_step)
    chunks = await stream(engine, prompt="a", stop="STOP")
    assert joined(chunks) == "one ST STO "
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"][0]["stop_reason"] == "STOP"
    assert engine.num_closed == 1
    assert engine.stopped == []


async def test_stop_strings_may_be_kept_in_the_output() -> None:
    answer = await complete(
        FakeEngine(say("a.b.")), prompt="x", stop=".", include_stop_str_in_output=True
    )
    assert answer["choices"][0]["text"] == "a."


async def test_stop_strings_do_not_count_before_min_tokens() -> None:
    answer = await complete(FakeEngine(say("a.b.")), prompt="x", stop=".", min_tokens=3)
    assert answer["choices"][0]["text"] == "a.b"


async def test_a_stop_token_is_not_shown_and_is_named() -> None:
    stop_id = ids_of("c")[0]
    answer = await complete(FakeEngine(say("abcd")), prompt="x", stop_token_ids=[stop_id])
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")
    assert choice["stop_reason"] == stop_id


async def test_length_is_told() -> None:
    answer = await complete(FakeEngine(say("abcd")), prompt="x", max_tokens=2)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["text"] == "ab"


async def test_special_tokens_are_left_out_unless_wanted() -> None:
    script = say("a<｜Assistant｜>b<think>")
    assert (await complete(FakeEngine(script), prompt="x"))["choices"][0]["text"] == "ab<think>"
    answer = await complete(FakeEngine(script), prompt="x", skip_special_tokens=False)
    assert answer["choices"][0]["text"] == "a<｜Assistant｜>b<think>"


async def test_an_incomplete_character_at_the_end_becomes_a_replacement() -> None:
    engine = FakeEngine(lambda request, choice: [*ids_of("aé")[:-1]])
    answer = await complete(engine, prompt="x", max_tokens=2)
    assert answer["choices"][0]["text"] == "a\ufffd"
    chunks = await stream(engine, prompt="x", max_tokens=2)
    assert joined(chunks) == "a\ufffd"


# -------------------------------------------------------------------------------------- logprobs


async def test_logprobs_have_openai_columns() -> None:
    answer = await complete(FakeEngine(say("aé")), prompt="x", logprobs=1)
    logprobs = answer["choices"][0]["logprobs"]
    ids = [*ids_of("aé"), EOS_ID]
    assert logprobs["tokens"] == ["a", r"bytes:\xc3", r"bytes:\xa9", "<｜end▁of▁sentence｜>"]
    assert logprobs["text_offset"] == [0, 1, 1, 2]
    assert logprobs["token_logprobs"] == pytest.approx([-0.5 - i / 1000 for i in ids if i])
    assert [list(top) for top in logprobs["top_logprobs"]] == [[t] for t in logprobs["tokens"]]


async def test_tokens_can_be_named_by_their_ids() -> None:
    answer = await complete(
        FakeEngine(say("a")), prompt="x", logprobs=2, return_tokens_as_token_ids=True
    )
    [a_id] = ids_of("a")
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"][0] == f"token_id:{a_id}"
    assert set(logprobs["top_logprobs"][0]) == {f"token_id:{a_id}", f"token_id:{a_id + 1}"}


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_a_prompt_is_scored_by_echo(max_tokens: int) -> None:
    engine = FakeEngine(say("z"))
    answer = await complete(
        engine, prompt="hello wé", echo=True, logprobs=1, max_tokens=max_tokens, temperature=0
    )
    choice = answer["choices"][0]
    assert choice["text"] == "hello wé" + "z" * max_tokens
    assert choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][:2] == ["hello", " w"]
    assert logprobs["text_offset"] == [0, 5, 7, 7, 8][: 4 + max_tokens]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(isinstance(value, float) for value in logprobs["token_logprobs"][1:])
    assert len(logprobs["tokens"]) == 4 + max_tokens
    assert seen(engine).sampling.prompt_logprobs == 1
    assert answer["usage"]["completion_tokens"] == max_tokens


async def test_echo_of_token_ids_shows_their_text() -> None:
    answer = await complete(FakeEngine(say("!")), prompt=ids_of("wé"), echo=True)
    assert answer["choices"][0]["text"] == "wé!"
    chunks = await stream(FakeEngine(say("!")), prompt=ids_of("wé"), echo=True, logprobs=0)
    assert joined(chunks) == "wé!"
    assert chunks[0]["choices"][0]["logprobs"]["token_logprobs"][0] is None


async def test_prompt_logprobs_are_vllms() -> None:
    answer = await complete(FakeEngine(say("!")), prompt="ab", prompt_logprobs=1)
    first, second = answer["choices"][0]["prompt_logprobs"]
    b_id = ids_of("b")[0]
    assert first is None
    assert second[str(b_id)]["decoded_token"] == "b"
    assert second[str(b_id)]["rank"] == 1


async def test_token_ids_are_returned_on_request() -> None:
    answer = await complete(FakeEngine(say("é!")), prompt="ab", return_token_ids=True)
    choice = answer["choices"][0]
    assert choice["prompt_token_ids"] == ids_of("ab")
    assert choice["token_ids"] == [*ids_of("é!"), EOS_ID]
    chunks = await stream(FakeEngine(say("é!")), prompt="ab", return_token_ids=True)
    assert chunks[0]["choices"][0]["prompt_token_ids"] == ids_of("ab")
    streamed = [i for chunk in chunks for i in chunk["choices"][0]["token_ids"]]
    assert streamed == choice["token_ids"]


async def test_streamed_logprobs_are_those_of_the_whole_answer() -> None:
    body = {"prompt": "ab", "logprobs": 2, "echo": True}
    whole = (await complete(FakeEngine(say("hé wörld")), **body))["choices"][0]["logprobs"]
    chunks = await stream(FakeEngine(say("hé wörld")), **body)
    for column in whole:
        streamed = [v for chunk in chunks for v in chunk["choices"][0]["logprobs"][column]]
        assert streamed == whole[column]


# --------------------------------------------------------------------------------------- streams


async def test_usage_comes_last_and_only_when_asked_for() -> None:
    plain = await stream(FakeEngine(say("abc")), prompt="x")
    assert all("usage" not in chunk for chunk in plain)
    options = {"include_usage": True}
    chunks = await stream(FakeEngine(say("abc")), prompt=["x", "y"], stream_options=options)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert chunks[-1]["usage"]["prompt_tokens"] == 2
    assert len({chunk["id"] for chunk in chunks}) == 1
    options["continuous_usage_stats"] = True
    chunks = await stream(FakeEngine(say("abc")), prompt="x", stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 4]


async def test_an_error_before_the_first_token_has_its_own_status() -> None:
    engine = FakeEngine(error=CapacityError("full", retry_after_s=2.5))
    for streams in (False, True):
        response = await post(engine, {"prompt": "x", "stream": streams})
        assert response.status_code == 429
        assert response.headers["retry-after"] == "3"
        assert response.json()["error"]["type"] == "rate_limit_error"


async def test_an_error_after_the_first_token_is_an_event_and_ends_the_stream() -> None:
    engine = FakeEngine(say("abc"), error=EngineError("lost it"), error_after=2)
    response = await post(engine, {"prompt": "x", "stream": True})
    assert response.status_code == 200
    *_, error, done, end = response.text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"] == {
        "message": "lost it",
        "type": "engine_error",
        "param": None,
        "code": None,
    }
    assert (done, end) == ("data: [DONE]", "")


async def test_one_failed_prompt_fails_the_request_and_closes_the_others() -> None:
    engine = FakeEngine(say("abc"), error=CapacityError("full"), error_after=2)
    for streams in (False, True):
        response = await post(engine, {"prompt": ["x", "y", "z"], "stream": streams})
        assert "full" in response.text
        assert response.status_code == (200 if streams else 429)
    assert engine.num_closed == len(engine.requests)


# ---------------------------------------------------------------------------------------- errors

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": None}, "prompt"),
    "an empty prompt": ({"prompt": ""}, "prompt"),
    "an empty list": ({"prompt": []}, "prompt"),
    "mixed prompts": ({"prompt": ["a", [1]]}, "prompt"),
    "a boolean token": ({"prompt": [True]}, "prompt"),
    "a token past the vocabulary": ({"prompt": [VOCAB_SIZE]}, "prompt"),
    "a negative token": ({"prompt": [[-1]]}, "prompt"),
    "a hot temperature": ({"temperature": 2.1}, "temperature"),
    "a cold temperature": ({"temperature": -0.1}, "temperature"),
    "text for a number": ({"temperature": "1"}, "temperature"),
    "too much top_p": ({"top_p": 1.1}, "top_p"),
    "a penalty": ({"presence_penalty": 2.5}, "presence_penalty"),
    "no choices": ({"n": 0}, "n"),
    "too many choices": ({"n": 1000}, "n"),
    "a fraction of a choice": ({"n": 1.5}, "n"),
    "an empty stop": ({"stop": ["a", ""]}, "stop"),
    "too many logprobs": ({"logprobs": 21}, "logprobs"),
    "max_tokens 0 without echo": ({"max_tokens": 0}, "max_tokens"),
    "min above max": ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    "best_of below n": ({"n": 3, "best_of": 2}, "best_of"),
    "best_of streamed": ({"best_of": 2, "stream": True}, "best_of"),
    "options without stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "prompt_logprobs streamed": ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    "a biased word": ({"logit_bias": {"hello": 1}}, "logit_bias"),
    "a biased token past the vocabulary": ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
    "too much bias": ({"logit_bias": {"1": 101}}, "logit_bias"),
    "a bad word of several tokens": ({"bad_words": ["xyz"]}, "bad_words"),
    "nothing allowed but the end, which must not come yet": (
        {"allowed_token_ids": [EOS_ID], "min_tokens": 1},
        "allowed_token_ids",
    ),
    "a large seed": ({"seed": 2**63}, "seed"),
    "a schema": ({"response_format": {"type": "json_object"}}, "response_format"),
    "a guide": ({"guided_regex": "a+"}, "guided_regex"),
    "structured outputs": ({"structured_outputs": {"json": {}}}, "structured_outputs"),
    "a suffix": ({"suffix": "end"}, "suffix"),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_requests_name_the_field_at_fault(case: str) -> None:
    fields, param = BAD[case]
    engine = FakeEngine()
    response = await post(engine, {"prompt": "abc", **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param in error["message"]
    assert not engine.requests


async def test_too_long_requests_are_told_the_maximum() -> None:
    for body in (
        {"prompt": "a" * (MAX_MODEL_LEN - 3), "max_tokens": 4},
        {"prompt": "a" * MAX_MODEL_LEN, "max_tokens": None},
        {"prompt": "a" * (MAX_MODEL_LEN * 50), "max_tokens": 1},
    ):
        response = await post(FakeEngine(), body)
        error = response.json()["error"]
        assert response.status_code == 400
        assert error["code"] == "context_length_exceeded"
        assert f"maximum context length is {MAX_MODEL_LEN}" in error["message"]
    engine = FakeEngine()
    await complete(engine, prompt="a" * (MAX_MODEL_LEN - 3), max_tokens=None)
    assert seen(engine).sampling.max_tokens == 3


async def test_unknown_fields_are_ignored_and_counted() -> None:
    app = make_app(FakeEngine())
    async with make_client(app) as client:
        body = {"prompt": "a", "user": "me", "quux": 1, "foo": None, "suffix": None}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        text = (await client.get("/metrics")).text
    [line] = [
        line for line in text.splitlines() if line.startswith("scission_ignored_fields_total{")
    ]
    assert line.endswith(" 2.0")


async def test_another_models_name_is_404_and_an_alias_is_not() -> None:
    response = await post(FakeEngine(), {"prompt": "a", "model": "gpt-4"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    response = await post(FakeEngine(), {"prompt": "a", "model": "alias"})
    assert response.json()["model"] == MODEL


def test_the_fake_tokenizer_has_a_padded_vocabulary() -> None:
    assert TOKENIZER.num_tokens < VOCAB_SIZE
