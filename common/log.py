"""How every process logs: one line an event, as text or JSON, each with the request it is about.

Loggers are the standard library's (`logging.getLogger(__name__)`). A coroutine that works for one
request calls `bind_request`; an engine thread, which works for many, logs through
`request_logger(log, request_id)`. Prompts and outputs are never logged.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO

from scission.common.config import LogOptions

_request_id: ContextVar[str] = ContextVar("request_id", default="")

# what every record has; the rest came by `extra` and belongs to the event
_OWN_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "request_id"}


@contextmanager
def bind_request(request_id: str) -> Iterator[None]:
    """Name the request in every line logged by this task, and by tasks that it starts."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def request_logger(logger: logging.Logger, request_id: str) -> "RequestLogger":
    """A logger whose lines all name the request, whatever task or thread uses it."""
    return RequestLogger(logger, {"request_id": request_id})


class RequestLogger(logging.LoggerAdapter[logging.Logger]):
    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**(self.extra or {}), **kwargs.get("extra", {})}
        return msg, kwargs


class _RequestFilter(logging.Filter):
    """Fills in the request of the running task where the call named none."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "request_id"):
            record.request_id = _request_id.get()
        return True


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO prefill scission.x [request] message key=value`"""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        request_id = getattr(record, "request_id", "")
        parts = [
            _timestamp(record.created),
            record.levelname,
            self._role,
            record.name,
            *([f"[{request_id}]"] if request_id else []),
            record.getMessage(),
            *(f"{name}={value}" for name, value in _event_fields(record).items()),
        ]
        # one event, one line: a newline in a message could pass for another event
        line = " ".join(parts).replace("\r", "\\r").replace("\n", "\\n")
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, role, logger, message, request_id, event's fields."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            "role": self._role,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", ""):
            line["request_id"] = request_id
        line |= _event_fields(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def set_up_logging(options: LogOptions, role: str, stream: TextIO | None = None) -> None:
    """Send every logger of the process to `stream` (standard error), replacing what was set up."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    formatter = JsonFormatter(role) if options.format == "json" else TextFormatter(role)
    handler.setFormatter(formatter)
    handler.addFilter(_RequestFilter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(options.level.upper())
    logging.captureWarnings(True)
    # the gateway writes the lines about its requests and its start itself
    logging.getLogger("uvicorn.access").propagate = False
    for name in ("uvicorn", "asyncio", "grpc", "urllib3", "httpx", "filelock"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def _event_fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _OWN_FIELDS}


def _timestamp(created_s: float) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created_s))
    return f"{seconds}.{int(created_s % 1 * 1000):03d}Z"
