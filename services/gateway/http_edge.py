"""The outermost layer of the HTTP server: request ids, arrival times, metrics, body limit, last
resort.

Plain ASGI, so that streams and disconnects pass through it untouched.
"""

import logging
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scission.common.errors import PayloadTooLargeError
from scission.common.metrics import HttpMetrics
from scission.services.gateway.openai.context import CALLER_KEY, Caller, is_fit_for_log
from scission.services.gateway.openai.errors import response_of

logger = logging.getLogger(__name__)

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
QUIET_PATHS = frozenset({"/health", "/ready", "/readyz", "/ping", "/metrics", "/load"})


class HttpEdge:
    def __init__(
        self, app: ASGIApp, *, metrics: HttpMetrics, max_body_bytes: int, has_access_log: bool
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._has_access_log = has_access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrival = time.monotonic()
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id"))
        scope[CALLER_KEY] = Caller(arrival=arrival, external_id=request_id)
        status = 500
        is_started = False

        async def send_marked(message: Message) -> None:
            nonlocal status, is_started
            if message["type"] == "http.response.start":
                status = message["status"]
                is_started = True
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            self._check_length(headers.get("content-length"))
            await self._app(scope, self._limited(receive), send_marked)
        except Exception as error:
            if is_started:
                raise
            if not isinstance(error, PayloadTooLargeError):
                logger.exception(
                    "%s %s failed request_id=%s", scope["method"], scope["path"], request_id
                )
            await response_of(error)(scope, receive, send_marked)
        finally:
            seconds = time.monotonic() - arrival
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.observe(method, path_template(scope), status, seconds)
            if self._has_access_log and scope["path"] not in QUIET_PATHS:
                logger.info(
                    "%s %s %d %.3fs request_id=%s",
                    *(scope["method"], scope["path"], status, seconds, request_id),
                )

    def _check_length(self, length: str | None) -> None:
        if length is not None and length.isdigit() and int(length) > self._max_body_bytes:
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        """Counts what a body without a length brings."""
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._max_body_bytes:
                    raise self._too_large()
            return message

        return limited

    def _too_large(self) -> PayloadTooLargeError:
        return PayloadTooLargeError(f"The body is larger than {self._max_body_bytes} bytes.")


def path_template(scope: Scope) -> str:
    """The matched route's path as it was declared; one name for everything that matched none."""
    route: Any = scope.get("route")
    path = getattr(route, "path", None)
    return path if isinstance(path, str) else "unmatched"


def _request_id(given: str | None) -> str:
    """The caller's id if it is fit for a log line, else a fresh one."""
    if given and is_fit_for_log(given):
        return given
    return uuid.uuid4().hex
