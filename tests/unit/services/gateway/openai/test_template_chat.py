"""Chats of models with templates, over HTTP: the whole way from messages to deltas."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from scission.common.config import HttpOptions, ModelOptions
from scission.common.metrics import Metrics
from scission.common.types import Epoch, Role
from scission.services.gateway.app import AppDependencies, create_app
from scission.services.gateway.engine import GenerationRequest, RequestIds
from scission.services.gateway.model_folder import ModelFolder, read_model_folder
from tests.unit.services.gateway.chat.template_fixtures import SHAPES, write_folder
from tests.unit.services.gateway.fake_engine import FakeEngine, make_client

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ARGUMENTS = {"city": "Köln"}
CALLS = {
    "qwen3": '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>',
    "ministral 3": '[TOOL_CALLS]weather[ARGS]{"city": "Köln"}',
    "step 3.5": "<tool_call>\n<function=weather>\n<parameter=city>\nKöln\n</parameter>\n"
    "</function>\n</tool_call>",
}
THOUGHTS = {
    "qwen3": "<think>\nhm\n</think>\n\n",
    "ministral 3": "[THINK]hm[/THINK]",
    "step 3.5": "hm\n</think>\n",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFolder]:
    return {
        name: read_model_folder(ModelOptions(_written(tmp_path_factory.mktemp("model"), name)))
        for name in SHAPES
    }


def _written(folder: Path, name: str) -> Path:
    return write_folder(SHAPES[name], folder)


class Server:
    """One model behind the HTTP application; its engine says one text."""

    def __init__(self, folder: ModelFolder, text: str = "") -> None:
        self.tokenizer = folder.tokenizer
        eos_id = folder.tokenizer.eos_id
        assert eos_id is not None
        ids = [*folder.tokenizer.encode(text, add_special_tokens=False), eos_id]

        def script(request: GenerationRequest, choice: int) -> Sequence[int]:
            return ids

        self.engine = FakeEngine(script)
        self._app = create_app(
            AppDependencies(
                engine=self.engine,
                model=folder.model,
                tokenizer=folder.tokenizer,
                chat_format=folder.chat_format,
                request_ids=RequestIds(Epoch(1)),
                metrics=Metrics(Role.GATEWAY, "m", "0.0.0"),
                version="0.0.0",
                options=HttpOptions(),
            )
        )

    async def post(self, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": "hi"}], **body}
        async with make_client(self._app) as client:
            return await client.post(path, json=body)

    @property
    def prompt(self) -> str:
        ids = self.engine.requests[-1].prompt_token_ids
        return self.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("model", SHAPES)
async def test_thought_content_and_calls_come_apart(
    folders: dict[str, ModelFolder], model: str
) -> None:
    server = Server(folders[model], f"{THOUGHTS[model]}Looking.{CALLS[model]}")
    response = await server.post(tools=[WEATHER])
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "Looking.")
    (call,) = message["tool_calls"]
    assert call["type"] == "function" and call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == ARGUMENTS
    assert "weather" in server.prompt

    # and the answer goes back into the next prompt as the client got it
    history = [
        {"role": "user", "content": "hi"},
        message,
        {"role": "tool", "tool_call_id": call["id"], "content": "sunny"},
    ]
    assert (await server.post(messages=history, tools=[WEATHER])).status_code == 200
    assert CALLS[model] in server.prompt and "sunny" in server.prompt


@pytest.mark.parametrize("model", SHAPES)
async def test_a_stream_brings_the_same_in_deltas(
    folders: dict[str, ModelFolder], model: str
) -> None:
    server = Server(folders[model], f"{THOUGHTS[model]}Looking.{CALLS[model]}")
    response = await server.post(tools=[WEATHER], stream=True)
    *events, last, _ = response.text.split("\n\n")
    assert last == "data: [DONE]"
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    deltas = [choice["delta"] for choice in choices]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    assert "".join(delta.get("content", "") for delta in deltas) == "Looking."
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert calls[0]["function"] == {"name": "weather", "arguments": ""}
    arguments = "".join(call["function"]["arguments"] for call in calls)
    assert json.loads(arguments) == ARGUMENTS
    assert choices[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("model", SHAPES)
async def test_a_call_that_cannot_be_parsed_is_content(
    folders: dict[str, ModelFolder], model: str
) -> None:
    broken = CALLS[model].replace("{", "(").replace("parameter=", "parameter:")
    server = Server(folders[model], THOUGHTS[model] + broken)
    choice = (await server.post(tools=[WEATHER])).json()["choices"][0]
    assert choice["message"]["content"] == broken
    assert choice["finish_reason"] == "stop"


async def test_thinking_is_switched_off_by_the_templates_own_name(
    folders: dict[str, ModelFolder],
) -> None:
    server = Server(folders["qwen3"], "yes")
    await server.post(chat_template_kwargs={"enable_thinking": False})
    assert server.prompt.endswith("<think>\n\n</think>\n\n")
    answer = (await server.post(reasoning_effort="none")).json()
    assert server.prompt.endswith("<think>\n\n</think>\n\n")
    assert answer["choices"][0]["message"]["reasoning_content"] is None


async def test_a_templates_refusal_is_a_400_with_its_text(folders: dict[str, ModelFolder]) -> None:
    turn = {"role": "user", "content": "a"}
    server = Server(folders["ministral 3"])
    for path in ("/v1/chat/completions", "/tokenize"):
        response = await server.post(path, messages=[turn, turn])
        assert response.status_code == 400
        error = response.json()["error"]
        assert "user and assistant must alternate" in error["message"]
        assert (error["type"], error["param"]) == ("invalid_request_error", "messages")
    assert not server.engine.requests


@pytest.mark.parametrize(
    "fields,param",
    [
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"documents": [{"text": "d"}]}, "documents"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    ],
)
async def test_what_templates_do_not_take_is_refused_by_name(
    folders: dict[str, ModelFolder], fields: dict[str, Any], param: str
) -> None:
    response = await Server(folders["qwen3"]).post(**fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_the_prompt_has_one_start_of_sequence(folders: dict[str, ModelFolder]) -> None:
    server = Server(folders["ministral 3"])
    await server.post()
    assert server.prompt.count("<s>") == 1
