"""What the endpoints stand on, put together once by the app."""

import random
from dataclasses import dataclass

from scission.common.config import HttpOptions
from scission.common.metrics import RequestMetrics
from scission.services.gateway.chat.format import ChatFormat
from scission.services.gateway.engine import Engine, RequestIds
from scission.services.gateway.served_model import ServedModel
from scission.services.gateway.tokenizer import TextEncoder, Tokenizer

CALLER_KEY = "scission.caller"  # where the edge leaves the Caller in the ASGI scope
MAX_EXTERNAL_ID_CHARS = 128


@dataclass(frozen=True, slots=True)
class ServingContext:
    engine: Engine
    model: ServedModel
    tokenizer: Tokenizer
    encoder: TextEncoder
    chat_format: ChatFormat
    options: HttpOptions
    metrics: RequestMetrics
    request_ids: RequestIds
    seeds: random.Random  # for requests that bring none


@dataclass(frozen=True, slots=True)
class Caller:
    """What the HTTP request itself says, apart from its body."""

    arrival: float  # time.monotonic() at the request's first byte
    external_id: str  # X-Request-Id, the caller's or ours


def is_fit_for_log(external_id: str) -> bool:
    """Whether a caller's id may stand in a log line and in a header: short, and without line ends
    or other things that would write a second line.
    """
    return (
        0 < len(external_id) <= MAX_EXTERNAL_ID_CHARS
        and external_id.isascii()
        and external_id.isprintable()
    )
