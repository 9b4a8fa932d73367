"""Reading JSON bodies: strict, fast and before anything else sees them."""

import re
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute

from scission.common.errors import MediaTypeError, RequestError

MAX_DEPTH = 100
# Arrays, objects and fields of objects. Numbers and text cost their bytes, but each of these costs
# an object of Python and a step of the validation: 16 MB of them held the event loop up for seconds
# and took 400 MB. A conversation of the most messages has 200 000.
MAX_PARTS = 1 << 18
# One that is not closed goes to the end, so that every body is read once.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)


class JsonBodyRoute(APIRoute):
    """A route whose body must be JSON; lone surrogates, NaN and deep nesting are refused."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def read_and_handle(request: Request) -> Response:
            if request.method == "POST" and self.body_field is not None:
                _check_media_type(request.headers.get("content-type", ""))
                body = parse_json(await request.body())
                request = ParsedRequest(request.scope, request.receive, body)
            return await handler(request)

        return read_and_handle


class ParsedRequest(Request):
    """A request whose body has been read; the endpoint gets this object."""

    def __init__(self, scope: Any, receive: Any, parsed: Any) -> None:
        super().__init__(scope, receive)
        self._parsed = parsed

    async def body(self) -> bytes:
        return b"{}"  # read already; FastAPI asks only whether there is one

    async def json(self) -> Any:
        return self._parsed

    def forget_body(self) -> None:
        """Validated, the body is needed no more; whoever still holds it holds nothing."""
        if isinstance(self._parsed, dict):
            self._parsed.clear()


def parse_json(body: bytes) -> Any:
    """The body's value.

    Raises:
        RequestError: it is no JSON, or too deep or of too many parts to be handled safely.
    """
    if not body:
        raise RequestError("The body is empty; a JSON object is expected.")
    # what is within strings does not count, but there is rarely as much
    if _num_parts(body) > MAX_PARTS and _has_too_many_parts(body):
        raise RequestError(f"The body has more than {MAX_PARTS} arrays, objects and fields.")
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"The body is no valid JSON: {error}.") from None
    # counting is far cheaper than walking, and no deep value has few brackets
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _is_deeper(parsed, MAX_DEPTH):
        raise RequestError(f"The body is nested deeper than {MAX_DEPTH} levels.")
    return parsed


def _has_too_many_parts(body: bytes) -> bool:
    most = 2 * MAX_PARTS  # each field has two strings at most
    rest, num_strings = _STRING.subn(b"", body, count=most)
    return num_strings == most or _num_parts(rest) > MAX_PARTS


def _num_parts(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{") + text.count(b":")


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
