"""The response that streams, against a server that behaves as uvicorn does."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest
from starlette.types import Message

from scission.common.errors import CancelledError, CapacityError, EngineError, ScissionError
from scission.services.gateway.openai.event_stream import DONE, EventStream


class Server:
    """To it a client whose response is complete has gone, and nothing more may be sent."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self._is_over = asyncio.Event()

    async def receive(self) -> Message:
        await self._is_over.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._is_over.is_set():
            raise RuntimeError(f"{message['type']} after the response was complete")
        self.sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self._is_over.set()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


async def events(
    chunks: Sequence[bytes], error: Exception | None = None
) -> AsyncGenerator[bytes, None]:
    for chunk in chunks:
        await asyncio.sleep(0)
        yield chunk
    if error is not None:
        raise error


async def respond(
    chunks: Sequence[bytes], error: Exception | None = None
) -> tuple[Server, list[Exception]]:
    """The server after the response, and the errors that were counted."""
    server = Server()
    errors: list[Exception] = []
    response = EventStream(
        events(chunks, error),
        keep_alive_s=60.0,
        timeout_s=60.0,
        on_error=errors.append,
        request_id="r",
    )
    await response({"type": "http"}, server.receive, server.send)
    return server, errors


@pytest.mark.parametrize("error", [CapacityError("full"), EngineError("broken"), KeyError("bug")])
async def test_an_error_before_the_first_event_is_answered_once(error: Exception) -> None:
    server, errors = await respond([], error)
    assert errors == [error]
    (start, *_) = server.sent
    assert start["status"] == (error.http_status if isinstance(error, ScissionError) else 500)
    assert server.body.startswith(b'{"error":')


async def test_an_error_after_the_first_event_is_the_last_but_one() -> None:
    error = EngineError("broken")
    server, errors = await respond([b"data: 1\n\n"], error)
    assert errors == [error]
    assert server.body.startswith(b'data: 1\n\ndata: {"error":')
    assert server.body.endswith(DONE)


async def test_a_whole_stream_counts_no_error() -> None:
    server, errors = await respond([b"data: 1\n\n", DONE])
    assert errors == []
    assert server.body == b"data: 1\n\n" + DONE
    assert server.sent[0]["status"] == 200


async def test_a_client_that_goes_ends_the_events() -> None:
    server = Server()
    errors: list[Exception] = []
    is_closed = asyncio.Event()

    async def endless() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"data: 1\n\n"
                await asyncio.sleep(0)
        finally:
            is_closed.set()

    async def gone() -> Message:
        while not server.sent:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    stream = endless()
    response = EventStream(
        stream, keep_alive_s=60.0, timeout_s=60.0, on_error=errors.append, request_id="r"
    )
    await response({"type": "http"}, gone, server.send)
    assert is_closed.is_set()
    assert [type(error) for error in errors] == [CancelledError]
