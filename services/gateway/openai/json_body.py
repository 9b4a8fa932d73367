"""Reading JSON bodies: strict, fast and before anything else sees them."""

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute

from scission.common.errors import MediaTypeError, RequestError

MAX_DEPTH = 100


class JsonBodyRoute(APIRoute):
    """A route whose body must be JSON; lone surrogates, NaN and deep nesting are refused."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def read_and_handle(request: Request) -> Response:
            if request.method == "POST" and self.body_field is not None:
                _check_media_type(request.headers.get("content-type", ""))
                body = parse_json(await request.body())
                request = _ParsedRequest(request.scope, request.receive, body)
            return await handler(request)

        return read_and_handle


class _ParsedRequest(Request):
    def __init__(self, scope: Any, receive: Any, parsed: Any) -> None:
        super().__init__(scope, receive)
        self._parsed = parsed

    async def body(self) -> bytes:
        return b"{}"  # read already; FastAPI asks only whether there is one

    async def json(self) -> Any:
        return self._parsed


def parse_json(body: bytes) -> Any:
    """The body's value.

    Raises:
        RequestError: it is no JSON, or is nested too deeply to be handled safely.
    """
    if not body:
        raise RequestError("The body is empty; a JSON object is expected.")
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"The body is no valid JSON: {error}.") from None
    # counting is far cheaper than walking, and no deep value has few brackets
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _is_deeper(parsed, MAX_DEPTH):
        raise RequestError(f"The body is nested deeper than {MAX_DEPTH} levels.")
    return parsed


def _is_deeper(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below += [child for child in item.values() if isinstance(child, dict | list)]
            elif isinstance(item, list):
                below += [child for child in item if isinstance(child, dict | list)]
        if not below:
            return False
        level = below
    return True


def _check_media_type(given: str) -> None:
    media_type = given.partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise MediaTypeError(
            f"The body must be sent with Content-Type: application/json, got {given[:80]!r}."
        )
