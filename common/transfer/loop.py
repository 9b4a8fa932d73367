"""The I/O thread of a transfer endpoint: sockets, commands from the engine thread, and a clock."""

import logging
import socket as sockets
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import zmq

from scission.common.transfer.sockets import Context, Socket

logger = logging.getLogger(__name__)

IDLE_S = 0.5  # between two ticks with nothing to do
Handler = Callable[[], None]
T = TypeVar("T")


class Loop:
    """Runs handlers of readable sockets, posted calls and `tick` on one thread, which owns
    everything they touch.
    """

    def __init__(self, name: str, context: Context | None) -> None:
        """Without a context the loop makes its own, and ends it."""
        self.context: Context = context if context is not None else zmq.Context()
        self._owns_context = context is None
        self._poller = zmq.Poller()
        self._handlers: dict[object, Handler] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._wake_out, self._wake_in = sockets.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._is_awake = False
        self._is_stopping = False
        self.num_errors = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._poller.register(self._wake_in.fileno(), zmq.POLLIN)

    def start(self, tick: Callable[[float], float], close: Callable[[], None]) -> None:
        """`tick(now)` runs after each round and returns the seconds until it wants to run again;
        `close` ends the thread.
        """
        self._tick = tick
        self._close = close
        self._thread.start()

    def call(self, function: Callable[[], None]) -> None:
        """Run the function on the loop's thread, soon; from any thread."""
        self._calls.append(function)
        if not self._is_awake:
            self._is_awake = True
            try:
                self._wake_out.send(b"\0")
            except (BlockingIOError, OSError):
                pass  # as many wake-ups wait as the pipe holds, or the loop is gone

    def ask(self, function: Callable[[], T], timeout_s: float = 5.0) -> T:
        """The function's result, computed on the loop's thread; on the caller's once the loop has
        ended.
        """
        if not self._thread.is_alive():
            return function()
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(function())
            except BaseException as error:
                answer.set_exception(error)

        self.call(run)
        return answer.result(timeout_s)

    def register(self, socket: Socket, handler: Handler) -> None:
        self._poller.register(socket, zmq.POLLIN)
        self._handlers[socket] = handler

    def unregister(self, socket: Socket) -> None:
        if self._handlers.pop(socket, None) is not None:
            self._poller.unregister(socket)

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread; from any other. Calls already posted run before `close`."""
        self._is_stopping = True
        self.call(lambda: None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        wait_s = 0.0
        while not self._is_stopping:
            readable = self._poller.poll(int(wait_s * 1000 + 0.999))
            for socket, _ in readable:
                handler = self._handlers.get(socket)
                if handler is not None:
                    self._guarded(handler)
            self._run_calls()
            wait_s = IDLE_S
            try:
                wait_s = self._tick(time.monotonic())
            except Exception:
                self._report()
        self._run_calls()
        self._guarded(self._close)
        self._wake_in.close()
        self._wake_out.close()
        if self._owns_context:
            self.context.term()

    def _run_calls(self) -> None:
        # cleared first: a call posted from here on sends its own wake-up
        self._is_awake = False
        try:
            while self._wake_in.recv(4096):
                pass
        except BlockingIOError:
            pass
        while self._calls:
            self._guarded(self._calls.popleft())

    def _guarded(self, function: Callable[[], None]) -> None:
        # one message or command must not end the thread that all other transfers live on
        try:
            function()
        except Exception:
            self._report()

    def _report(self) -> None:
        self.num_errors += 1
        logger.exception("transfer thread %s: unexpected error", self._thread.name)
