"""Server-sent events: the response that streams them, its keep-alive and its end when the client
goes.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from scission.common.errors import CancelledError, DeadlineError, ScissionError
from scission.services.gateway.openai.errors import body_of, response_of

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

_TEXT = "\0text\0"
_TEXT_JSON = orjson.dumps(_TEXT)

T = TypeVar("T")


def event(payload: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


class TextEvent:
    """An event that differs from the next one in its text only: everything else is encoded once."""

    TEXT = _TEXT  # stands for the text in the payload, once or more often

    def __init__(self, payload: dict[str, Any]) -> None:
        self._parts = event(payload).split(_TEXT_JSON)

    def __call__(self, text: str) -> bytes:
        return orjson.dumps(text).join(self._parts)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, or cancel it when the client disconnects.

    Raises:
        CancelledError: the client has gone; the work has been cancelled and has ended.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise CancelledError("the client has gone")
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(StreamingResponse):
    """Streams events as the generator yields them.

    The status goes out with the first event, so that an error before it still has its own. An error
    afterwards becomes an event, and the stream ends. When the client goes, the generator is closed.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        keep_alive_s: float,
        timeout_s: float,
        on_error: Callable[[Exception], None],
        request_id: str,
    ) -> None:
        """`timeout_s` bounds the whole response: a client that stops reading is cut off by then."""
        super().__init__(events, headers=HEADERS, media_type="text/event-stream")
        self._events = events
        self._keep_alive_s = keep_alive_s
        self._timeout_s = timeout_s
        self._on_error = on_error
        self._request_id = request_id  # for the log
        self._is_started = False
        self._num_writes = 0
        self._lock = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await while_connected(receive, self._send_all(scope, receive, send))
        except TimeoutError:
            self._on_error(DeadlineError("the client did not read its stream in time"))
        except CancelledError as error:
            self._on_error(error)
            if not self._is_started:
                await response_of(error)(scope, receive, send)

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        failure: Exception | None = None
        keep_alive = asyncio.create_task(self._keep_alive(send))
        try:
            async with aclosing(self._events):
                async for chunk in self._events:
                    await self._write(send, chunk)
        except Exception as error:
            failure = error
        finally:
            keep_alive.cancel()
            await asyncio.gather(keep_alive, return_exceptions=True)
        # What ends the response comes last of all: to the server a client whose response is
        # complete has gone.
        if failure is not None:
            self._tell(failure)
            if not self._is_started:
                self._is_started = True
                await response_of(failure)(scope, receive, send)
                return
            await self._write(send, b"data: " + body_of(failure) + b"\n\n" + DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _tell(self, error: Exception) -> None:
        """Count and log what ended the stream; refusals of the request are no news."""
        self._on_error(error)
        if not isinstance(error, ScissionError):
            logger.error("request_id=%s stream failed", self._request_id, exc_info=error)
        elif self._is_started or error.http_status >= 500:
            logger.warning("request_id=%s stream failed: %s", self._request_id, error.message)

    async def _write(self, send: Send, chunk: bytes) -> None:
        async with self._lock:
            if not self._is_started:
                self._is_started = True
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
            self._num_writes += 1
            await send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def _keep_alive(self, send: Send) -> None:
        """Write a comment whenever an interval has passed without an event."""
        while True:
            before = self._num_writes
            await asyncio.sleep(self._keep_alive_s)
            if self._num_writes == before:
                await self._write(send, KEEP_ALIVE)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
