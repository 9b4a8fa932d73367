"""From the engine thread to the gateways: one bounded stream of step events per attached gateway.

The engine thread appends and never blocks; the gRPC servicer (worker_service.py) drains each stream
on the event loop. A stream that its gateway does not read is closed, which ends that gateway's
requests here.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from scission.protos import inference_pb2


class EventStream:
    """One gateway's stream. `push` may come from any thread, iteration and `close` belong to the
    event loop.
    """

    def __init__(
        self,
        gateway_epoch: int,
        loop: asyncio.AbstractEventLoop,
        max_pending: int,
        max_unread_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.gateway_epoch = gateway_epoch
        self._loop = loop
        self._max_pending = max_pending
        self._max_unread_s = max_unread_s
        self._clock = clock
        self._pending: deque[inference_pb2.StepEvents] = deque()
        self._lock = threading.Lock()
        self._is_wake_scheduled = False
        self._is_closed = False
        self._is_overflown = False
        self._wakened = asyncio.Event()
        # Set on the event loop once the gateway has read too slowly and lost its stream.
        self.overflowed = asyncio.Event()

    @property
    def is_overflown(self) -> bool:
        """The gateway read too slowly and lost its stream."""
        return self._is_overflown

    def push(self, step: inference_pb2.StepEvents) -> None:
        """Queue one message; closes the stream instead when the gateway has fallen too far
        behind.
        """
        with self._lock:
            if self._is_closed:
                return
            if len(self._pending) >= self._max_pending or (
                self._pending and self._clock() - self._pending[0].sent_at > self._max_unread_s
            ):
                self._is_overflown = True
                self._is_closed = True
                self._pending.clear()
            else:
                self._pending.append(step)
            if self._is_wake_scheduled:
                return
            self._is_wake_scheduled = True
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the loop has ended: the process is on its way out
            self._is_closed = True

    def close(self) -> None:
        """End the iteration after what is pending; idempotent."""
        with self._lock:
            self._is_closed = True
        self._wakened.set()

    def _wake(self) -> None:
        with self._lock:
            self._is_wake_scheduled = False
        if self._is_overflown:
            self.overflowed.set()
        self._wakened.set()

    async def __aiter__(self) -> AsyncIterator[inference_pb2.StepEvents]:
        while True:
            await self._wakened.wait()
            self._wakened.clear()
            while True:
                with self._lock:
                    if not self._pending:
                        is_closed = self._is_closed
                        break
                    step = self._pending[0]
                yield step
                # Kept at the head while the gateway has not taken it, so that its age shows in
                # `push`.
                with self._lock:
                    if self._pending:
                        self._pending.popleft()
            if is_closed:
                return


class EventStreams:
    """All attached gateways. `emit` and `beat` belong to the engine thread, `pulse` and `beat_at`
    to any, the rest to the event loop.
    """

    def __init__(
        self,
        *,
        max_pending: int = 4096,
        max_unread_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A stream ends when `max_pending` messages, or one for `max_unread_s`, wait for its
        gateway.
        """
        self._max_pending = max_pending
        self._max_unread_s = max_unread_s
        self._clock = clock
        self._streams: dict[int, EventStream] = {}
        self._beat_at = clock()

    @property
    def beat_at(self) -> float:
        """When the engine loop last gave a sign of life."""
        return self._beat_at

    @property
    def gateway_epochs(self) -> tuple[int, ...]:
        return tuple(self._streams)

    def is_attached(self, gateway_epoch: int) -> bool:
        return gateway_epoch in self._streams

    def attach(self, gateway_epoch: int) -> EventStream:
        """A new stream for the gateway on the running loop; closes the one it had."""
        previous = self._streams.get(gateway_epoch)
        if previous is not None:
            previous.close()
        stream = EventStream(
            gateway_epoch,
            asyncio.get_running_loop(),
            self._max_pending,
            self._max_unread_s,
            self._clock,
        )
        # A new dict each time: the engine thread may be iterating over the old one.
        self._streams = {**self._streams, gateway_epoch: stream}
        return stream

    def detach(self, stream: EventStream) -> bool:
        """Close and forget a stream; False when the gateway has already attached anew."""
        stream.close()
        if self._streams.get(stream.gateway_epoch) is not stream:
            return False
        self._streams = {e: s for e, s in self._streams.items() if s is not stream}
        return True

    def close(self) -> None:
        """End every stream after what is pending: the worker is shutting down."""
        for stream in self._streams.values():
            stream.close()

    def emit(self, gateway_epoch: int, events: Sequence[inference_pb2.RequestEvent]) -> None:
        """Send one step's events to a gateway; once per step and gateway. A gateway that has gone
        is ignored.
        """
        stream = self._streams.get(gateway_epoch)
        if stream is not None:
            stream.push(inference_pb2.StepEvents(events=events, sent_at=self._clock()))

    def beat(self, load: inference_pb2.Load) -> None:
        """Send a sign of life with the load to every gateway; from the engine loop, each 0.5 s."""
        self._beat_at = sent_at = self._clock()
        for stream in self._streams.values():
            stream.push(inference_pb2.StepEvents(load=load, sent_at=sent_at))

    def pulse(self) -> None:
        """Send a bare sign of life to every gateway: the engine is in a long step."""
        sent_at = self._clock()
        for stream in self._streams.values():
            stream.push(inference_pb2.StepEvents(sent_at=sent_at))
