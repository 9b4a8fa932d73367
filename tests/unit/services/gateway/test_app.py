import asyncio
import gc
import json
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import ASGIApp, Message

from scission.common.errors import DeadlineError, UnavailableError
from scission.services.gateway.engine import ReadyState
from scission.services.gateway.openai.json_body import MAX_PARTS
from tests.unit.services.gateway.fake_engine import (
    MAX_MODEL_LEN,
    MODEL,
    FakeEngine,
    ids_of,
    make_app,
    make_client,
    say,
)

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": MODEL, "prompt": "hi", "max_tokens": 100}


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and isinstance(error["type"], str)
    return error


# -------------------------------------------------------------------------- errors, in one shape


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/rerank", "/nowhere", "/v1/models/gpt-4"])
async def test_what_is_not_there_is_404_in_openais_shape(path: str) -> None:
    async with make_client(make_app(FakeEngine())) as client:
        get = await client.get(path)
        post = await client.post(path, json={})
    assert get.status_code == 404
    assert error_of(get)["type"] == "not_found_error"
    assert post.status_code in (404, 405)
    error_of(post)


async def test_wrong_methods_types_and_bodies_have_their_status() -> None:
    async with make_client(make_app(FakeEngine(), max_body_bytes=1000)) as client:
        path = "/v1/completions"
        json_type = {"content-type": "application/json"}

        async def chunks() -> Any:
            for _ in range(20):
                yield b" " * 100

        cases: list[tuple[httpx.Response, int]] = [
            (await client.get(path), 405),
            (await client.post(path, content=b"a=1"), 415),
            (await client.post(path, data={"prompt": "x"}), 415),
            (await client.post(path, content=b"", headers=json_type), 400),
            (await client.post(path, content=b"{", headers=json_type), 400),
            (await client.post(path, content=b"[1]", headers=json_type), 400),
            (await client.post(path, content=b'"x"', headers=json_type), 400),
            (await client.post(path, content=b'{"prompt": NaN}', headers=json_type), 400),
            (await client.post(path, content=b'{"prompt": "\\ud800"}', headers=json_type), 400),
            (await client.post(path, content=b'{"prompt": "\xff"}', headers=json_type), 400),
            (await client.post(path, content=b" " * 1001, headers=json_type), 413),
            (await client.post(path, content=chunks(), headers=json_type), 413),
        ]
    for response, status in cases:
        assert response.status_code == status, response.text
        error_of(response)


async def test_deep_json_is_refused() -> None:
    deep = b'{"model": null, "prompt": "x", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    less = b'{"prompt": "x", "x": ' + b'{"a":' * 120 + b"1" + b"}" * 120 + b"}"
    wide = b'{"prompt": "x", "x": [' + b"[]," * 5000 + b"[]]}"
    headers = {"content-type": "application/json; charset=utf-8"}
    async with make_client(make_app(FakeEngine())) as client:
        for body, status in ((deep, 400), (less, 400), (wide, 200)):
            response = await client.post("/v1/completions", content=body, headers=headers)
            assert response.status_code == status, response.text


async def test_a_body_of_a_great_many_parts_is_refused_before_it_is_parsed() -> None:
    objects = b'{"prompt": "x", "x": [' + b"{}," * MAX_PARTS + b"{}]}"
    fields = b'{"prompt": "x"' + b"".join(b',"%d":1' % i for i in range(MAX_PARTS)) + b"}"
    unclosed = b'{"prompt": "x", "x": [' + b"{}," * MAX_PARTS + b'"' + b'\\"' * 1000
    text = b'{"prompt": "x", "x": "' + b'{\\"a\\": [' * MAX_PARTS + b'"}'
    headers = {"content-type": "application/json"}
    async with make_client(make_app(FakeEngine())) as client:
        for body, status in ((objects, 400), (fields, 400), (unclosed, 400), (text, 200)):
            response = await client.post("/v1/completions", content=body, headers=headers)
            assert response.status_code == status, response.text
            if status == 400:
                assert str(MAX_PARTS) in error_of(response)["message"]


async def test_what_nobody_reads_of_a_body_is_not_held_while_the_request_runs() -> None:
    engine = FakeEngine(hang_after=0)
    mark = "mark of this test " * 3
    async with make_client(make_app(engine)) as client:
        # the collector knows no dicts of plain values alone
        ignored = {"a": mark, "b": [[]]}
        body = {**TEXT, "nobodys": [ignored]}
        asking = asyncio.create_task(client.post("/v1/completions", json=body))
        await engine.num_hanging.acquire()
        gc.collect()
        held = [o for o in gc.get_objects() if type(o) is dict and o.get("a") == mark]
        held = [o for o in held if o is not ignored]
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    assert not held


async def test_an_error_of_ours_shows_no_detail() -> None:
    engine = FakeEngine(error=RuntimeError("secret /path/of/ours"))
    for streams in (False, True):
        async with make_client(make_app(engine)) as client:
            response = await client.post("/v1/completions", json={**TEXT, "stream": streams})
        assert response.status_code == 500
        assert "secret" not in response.text
        error_of(response)


async def test_unavailable_and_late_have_their_status() -> None:
    for error, status, kind in (
        (UnavailableError("no decode service"), 503, "service_unavailable"),
        (DeadlineError("too late"), 504, "timeout"),
    ):
        async with make_client(make_app(FakeEngine(error=error))) as client:
            response = await client.post("/v1/chat/completions", json=CHAT)
        assert response.status_code == status
        assert error_of(response)["type"] == kind
        assert ("retry-after" in response.headers) == (status == 503)


# ------------------------------------------------------------------------------- hostile bodies

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["auto", "text", "user", MODEL, "\0", "\u2028", "﷐"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "a"]), inner)
    ),
    max_leaves=8,
)
FIELDS = [
    *("model", "prompt", "messages", "max_tokens", "temperature", "top_p", "n", "stop", "stream"),
    *("stream_options", "logit_bias", "logprobs", "top_logprobs", "echo", "best_of", "seed"),
    *("tools", "tool_choice", "response_format", "reasoning_effort", "chat_template_kwargs"),
    *("prompt_logprobs", "stop_token_ids", "bad_words", "allowed_token_ids", "thinking"),
    *("truncate_prompt_tokens", "min_tokens", "cache_salt", "tokens", "metadata", "modalities"),
]
bodies = st.dictionaries(st.sampled_from(FIELDS), values, max_size=6)


@settings(max_examples=150)
@given(bodies, st.booleans())
async def test_no_body_is_a_server_error(body: dict[str, Any], is_valid_otherwise: bool) -> None:
    text = json.dumps(body).encode()
    async with make_client(make_app(FakeEngine())) as client:
        for path, valid in (
            ("/v1/completions", TEXT),
            ("/v1/chat/completions", CHAT),
            ("/tokenize", {"prompt": "x"}),
            ("/detokenize", {"tokens": [1]}),
        ):
            content = json.dumps({**valid, **body}).encode() if is_valid_otherwise else text
            headers = {"content-type": "application/json"}
            response = await client.post(path, content=content, headers=headers)
            assert response.status_code in (200, 400, 404), response.text
            if response.status_code != 200:
                error_of(response)


@settings(max_examples=100)
@given(st.binary(max_size=60))
async def test_no_bytes_are_a_server_error(content: bytes) -> None:
    async with make_client(make_app(FakeEngine())) as client:
        headers = {"content-type": "application/json"}
        response = await client.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 400
    error_of(response)


# --------------------------------------------------------------------------- status and metadata


async def test_models_are_listed_with_their_length() -> None:
    async with make_client(make_app(FakeEngine())) as client:
        listed = (await client.get("/v1/models")).json()
        one = (await client.get(f"/v1/models/{MODEL}")).json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == [MODEL, "alias"]
    assert one == listed["data"][0]
    assert one["max_model_len"] == MAX_MODEL_LEN


async def test_readiness_follows_the_engine_and_health_does_not() -> None:
    engine = FakeEngine(state=ReadyState.STARTING)
    async with make_client(make_app(engine)) as client:
        assert (await client.get("/health")).status_code == 200
        not_yet = await client.get("/ready")
        assert not_yet.status_code == 503
        assert error_of(not_yet)["message"] == "no decode yet"
        engine.state = ReadyState.READY
        for path in ("/ready", "/readyz"):
            ready = await client.get(path)
            assert ready.status_code == 200
            assert ready.json() == {"status": "ready", "workers": {"prefill": 1, "decode": 1}}
        assert (await client.get("/version")).json() == {"version": "0.0.0"}
        assert (await client.get("/load")).json() == {"num_requests_running": 0}
        assert (await client.post("/ping")).status_code == 200


async def test_the_openapi_page_has_typed_bodies() -> None:
    async with make_client(make_app(FakeEngine())) as client:
        page = (await client.get("/openapi.json")).json()
        assert (await client.get("/docs")).status_code == 200
    body = page["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    reference = body["content"]["application/json"]["schema"]["$ref"]
    schema = page["components"]["schemas"][reference.rsplit("/", 1)[1]]
    assert {"messages", "temperature", "tools"} <= set(schema["properties"])


async def test_request_ids_are_echoed_or_made() -> None:
    engine = FakeEngine()
    async with make_client(make_app(engine)) as client:
        given = await client.post("/v1/completions", json=TEXT, headers={"X-Request-Id": "abc-1"})
        made = await client.get("/health")
        bad = await client.get("/nowhere", headers={"X-Request-Id": "x" * 500})
        await client.post("/v1/completions", json={**TEXT, "request_id": "body-1"})
    assert given.headers["x-request-id"] == "abc-1"
    assert [request.external_id for request in engine.requests] == ["abc-1", "body-1"]
    assert len(made.headers["x-request-id"]) == len(bad.headers["x-request-id"]) == 32


@pytest.mark.parametrize("bad", ["two\nlines", "x" * 200, "é", ""])
async def test_a_request_id_in_the_body_cannot_write_lines_of_its_own_into_logs(bad: str) -> None:
    engine = FakeEngine()
    async with make_client(make_app(engine)) as client:
        response = await client.post("/v1/completions", json={**TEXT, "request_id": bad})
    (request,) = engine.requests
    assert request.external_id == response.headers["x-request-id"] != bad


async def test_probes_may_ask_by_head() -> None:
    async with make_client(make_app(FakeEngine())) as client:
        for path in ("/health", "/ready", "/readyz"):
            response = await client.head(path)
            assert (response.status_code, response.content) == (200, b"")


async def test_cors_is_closed_by_default() -> None:
    headers = {"Origin": "http://page"}
    async with make_client(make_app(FakeEngine())) as client:
        assert (
            "access-control-allow-origin"
            not in (await client.get("/health", headers=headers)).headers
        )
    async with make_client(make_app(FakeEngine(), allowed_origins=("http://page",))) as client:
        response = await client.get("/health", headers=headers)
        assert response.headers["access-control-allow-origin"] == "http://page"


async def test_requests_are_counted_by_path_template_and_status() -> None:
    app = make_app(FakeEngine(say("abc")))
    async with make_client(app) as client:
        await client.post("/v1/completions", json=TEXT)
        await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        await client.post("/v1/chat/completions", json={})
        await client.get(f"/v1/models/{MODEL}")
        await client.get("/nowhere/123")
        text = (await client.get("/metrics")).text
    values = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            values[name] = float(value)

    def counted(path: str, method: str, status: int) -> float:
        labels = f'method="{method}",model_name="{MODEL}",path="{path}",role="gateway"'
        return values[f'scission_http_requests_total{{{labels},status="{status}"}}']

    assert counted("/v1/completions", "POST", 200) == 1
    assert counted("/v1/chat/completions", "POST", 200) == 1
    assert counted("/v1/chat/completions", "POST", 400) == 1
    assert counted("/v1/models/{model_id:path}", "GET", 200) == 1
    assert counted("unmatched", "GET", 404) == 1
    shared = f'model_name="{MODEL}",role="gateway"'
    assert values[f"scission_time_to_first_token_seconds_count{{{shared}}}"] == 2
    assert values[f"scission_inter_token_latency_seconds_count{{{shared}}}"] == 6
    assert values[f"scission_request_time_per_output_token_seconds_count{{{shared}}}"] == 2
    assert values[f"scission_e2e_request_latency_seconds_count{{{shared}}}"] == 2
    assert values[f"scission_generation_tokens_total{{{shared}}}"] == 8
    stop = f'scission_request_success_total{{finished_reason="stop",{shared}}}'
    assert values[stop] == 2


async def test_text_and_chats_are_tokenised_as_they_would_be_served() -> None:
    engine = FakeEngine()
    async with make_client(make_app(engine)) as client:
        text = (await client.post("/tokenize", json={"prompt": "hello é"})).json()
        assert text["tokens"] == ids_of("hello é")
        assert text["count"] == len(text["tokens"])
        assert text["max_model_len"] == MAX_MODEL_LEN
        assert text["token_strs"] is None
        body = {"messages": CHAT["messages"], "return_token_strs": True}
        chat = (await client.post("/tokenize", json=body)).json()
        await client.post("/v1/chat/completions", json=CHAT)
        assert chat["tokens"] == engine.requests[0].prompt_token_ids
        assert chat["token_strs"][0] == "<｜begin▁of▁sentence｜>"
        back = await client.post("/detokenize", json={"tokens": text["tokens"]})
        assert back.json() == {"prompt": "hello é"}
        bad = await client.post("/detokenize", json={"tokens": [10**6]})
        assert error_of(bad)["param"] == "tokens"
        missing = await client.post("/tokenize", json={})
        assert error_of(missing)["param"] == "prompt"


# ------------------------------------------------------------------------------ clients that leave


class Connection:
    """One ASGI request whose client can hang up."""

    def __init__(self, app: ASGIApp, path: str, body: dict[str, Any]) -> None:
        self._app = app
        self._path = path
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})
        self.sent: asyncio.Queue[Message] = asyncio.Queue()

    def hang_up(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def run(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        await self._app(scope, self._incoming.get, self.sent.put)


@pytest.mark.parametrize("path,body", [("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("hang_after", [0, 2])
async def test_a_client_that_leaves_closes_the_engines_request(
    path: str, body: dict[str, Any], streams: bool, hang_after: int
) -> None:
    engine = FakeEngine(say("abc"), hang_after=hang_after)
    app = make_app(engine)
    connection = Connection(app, path, {**body, "stream": streams})
    serving = asyncio.create_task(connection.run())
    await engine.num_hanging.acquire()
    assert engine.num_closed == 0
    connection.hang_up()
    await serving
    assert engine.num_closed == 1
    if not streams or hang_after == 0:
        assert (await connection.sent.get())["status"] == 499


async def test_a_client_that_leaves_closes_all_prompts_of_its_request() -> None:
    for streams in (False, True):
        engine = FakeEngine(say("abc"), hang_after=2)
        body = {**TEXT, "prompt": ["x", "y", "z"], "stream": streams}
        connection = Connection(make_app(engine), "/v1/completions", body)
        serving = asyncio.create_task(connection.run())
        for _ in range(3):
            await engine.num_hanging.acquire()
        connection.hang_up()
        await serving
        assert engine.num_closed == 3


async def test_a_client_that_does_not_read_is_cut_off_after_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("scission.services.gateway.openai.routes.READING_GRACE_S", 0.0)
    engine = FakeEngine(say("abc" * 100))
    app = make_app(engine, request_timeout_s=0.05)
    connection = Connection(app, "/v1/completions", {**TEXT, "stream": True})
    connection.sent = asyncio.Queue(maxsize=3)
    await connection.run()
    assert engine.num_closed == 1


async def test_a_silent_stream_is_kept_alive_by_comments() -> None:
    engine = FakeEngine(say("abc"), hang_after=0)
    connection = Connection(
        make_app(engine, keep_alive_s=0.001), "/v1/completions", {**TEXT, "stream": True}
    )
    serving = asyncio.create_task(connection.run())
    assert (await connection.sent.get())["status"] == 200
    for _ in range(3):
        assert (await connection.sent.get())["body"] == b": keep-alive\n\n"
    connection.hang_up()
    await serving
    assert engine.num_closed == 1


# ----------------------------------------------------------------------------- the official client


def make_openai(engine: FakeEngine) -> openai.AsyncOpenAI:
    # its versions differ in which httpx they are typed for
    http_client: Any = make_client(make_app(engine))
    return openai.AsyncOpenAI(
        api_key="none",
        base_url="http://gateway/v1",
        max_retries=0,
        http_client=http_client,
    )


TOOL: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


async def test_the_official_client_reads_chats_and_streams() -> None:
    client = make_openai(FakeEngine(say("hm</think>hello")))
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        extra_body={"top_k": 5},
        logprobs=True,
        top_logprobs=1,
    )
    message = answer.choices[0].message
    assert message.content == "hello"
    assert getattr(message, "reasoning_content") == "hm"  # noqa: B009  # not in its types
    assert answer.choices[0].logprobs is not None
    assert answer.usage is not None and answer.usage.prompt_tokens > 0
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello"
    assert chunks[-1].usage is not None
    await client.close()


async def test_the_official_client_reads_tool_calls() -> None:
    from scission.services.gateway.chat.dsml import render_tool_calls

    calls = render_tool_calls([{"name": "weather", "arguments": '{"city": "Rome"}'}], str)
    client = make_openai(FakeEngine(say(f"</think>{calls}")))
    messages: Any = [{"role": "user", "content": "hi"}]
    answer = await client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL])
    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    assert answer.choices[0].finish_reason == "tool_calls"
    async with client.chat.completions.stream(
        model=MODEL, messages=messages, tools=[TOOL]
    ) as stream:
        final = await stream.get_final_completion()
    [streamed] = final.choices[0].message.tool_calls or []
    assert json.loads(streamed.function.arguments) == {"city": "Rome"}
    await client.close()


async def test_the_official_client_reads_completions_models_and_errors() -> None:
    client = make_openai(FakeEngine(say("abc")))
    answer = await client.completions.create(model=MODEL, prompt=["a", "b"], logprobs=1, echo=True)
    assert [choice.text for choice in answer.choices] == ["aabc", "babc"]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.BadRequestError) as error:
        await client.completions.create(model=MODEL, prompt="a", temperature=3)
    assert error.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="other", prompt="a")
    failing = make_openai(FakeEngine(say("abc"), error=UnavailableError("gone"), error_after=2))
    stream = await failing.completions.create(model=MODEL, prompt="a", stream=True)
    with pytest.raises(openai.APIError, match="gone"):
        [chunk async for chunk in stream]
    await client.close()
    await failing.close()
