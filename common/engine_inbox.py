"""What reaches an engine thread from the network, and the one door it comes through."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from scission.common.errors import ScissionError
from scission.protos import inference_pb2

T = TypeVar("T")

# The engine's answer: the expected wait in seconds (accepted), or why not. Callable from any
# thread, once.
Reply = Callable[[ScissionError | float], None]


@dataclass(frozen=True, slots=True)
class Submit:
    """A new attempt of a request. `received_at` and `deadline` are `time.monotonic()` of this
    process.
    """

    request: inference_pb2.PrefillRequest | inference_pb2.DecodeRequest
    gateway_epoch: int
    deadline: float
    received_at: float
    reply: Reply


@dataclass(frozen=True, slots=True)
class Redirect:
    """Ship the state that is retained for the request to another decode, as the given higher
    attempt.
    """

    request: inference_pb2.RedirectRequest
    gateway_epoch: int
    deadline: float
    received_at: float
    reply: Reply


@dataclass(frozen=True, slots=True)
class Cancel:
    """End this attempt of a request and every lower one; with `choice`, only that choice of it."""

    gateway_epoch: int
    request_id: str
    attempt: int
    reason: str
    choice: int | None = None


@dataclass(frozen=True, slots=True)
class GatewayGone:
    """The gateway's event stream broke or was not read: cancel all its requests."""

    gateway_epoch: int


InboxItem = Submit | Redirect | Cancel | GatewayGone


class Inbox(Generic[T]):
    """Many producers, one consumer (the engine thread), in order of arrival.

    It holds no more than the calls in flight, which the gRPC server bounds: a submitting call waits
    for the reply.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._items: list[T] = []
        self._is_woken = False

    def put(self, item: T) -> None:
        """Append and wake the engine; from any thread."""
        with self._condition:
            self._items.append(item)
            self._condition.notify()

    def wake(self) -> None:
        """End the current or the next `drain` wait although nothing was put; from any thread."""
        with self._condition:
            self._is_woken = True
            self._condition.notify()

    def drain(self, timeout_s: float) -> list[T]:
        """Take everything; waits up to `timeout_s` while there is nothing and nobody called
        `wake`.
        """
        with self._condition:
            if timeout_s > 0 and not self._items and not self._is_woken:
                give_up_at = time.monotonic() + timeout_s
                while not self._items and not self._is_woken:
                    remaining_s = give_up_at - time.monotonic()
                    if remaining_s <= 0:
                        break
                    self._condition.wait(remaining_s)
            self._is_woken = False
            items, self._items = self._items, []
            return items
