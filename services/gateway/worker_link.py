"""The gateway's connection to one worker: its event stream, its silence, and calls to it.

One `Events` stream carries everything that the worker says of our requests. Every message is a sign
of life of the engine's own loop: without one for `silence_s`, or when the stream breaks, every
attempt on the worker ends here at once, and the stream is opened anew.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Protocol

import grpc
import grpc.aio

from scission.common import rpc
from scission.common.errors import UnavailableError
from scission.common.types import Role
from scission.protos import cluster_pb2, inference_pb2, inference_pb2_grpc

logger = logging.getLogger(__name__)

CANCEL_TIMEOUT_S = 2.0
MAX_CANCEL_TRIES = 3
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.05, 1.0  # between two attempts to open the stream
MAX_REFUSED = 2  # failures to open it anew, after which the worker is taken for gone
# Offsets of another machine's clock are estimated from the quickest of this many calls.
CLOCK_SAMPLES = 64


class EventSink(Protocol):
    """A request, as its workers' links see it."""

    def on_event(self, link: "WorkerLink", event: inference_pb2.RequestEvent) -> None: ...

    def on_worker_lost(self, link: "WorkerLink", reason: str) -> None: ...


class WorkerLink:
    """All of this object belongs to the event loop."""

    def __init__(
        self,
        description: cluster_pb2.WorkerDescription,
        gateway_epoch: int,
        silence_s: float,
        on_lost: Callable[[str], None] = lambda reason: None,
        on_gone: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.worker_id = description.worker_id
        self.role = Role(description.role)
        self.description = description
        self.load = inference_pb2.Load()
        self.is_live = False  # attached, and heard of within silence_s
        self.sent_at = 0.0  # worker's clock: when the message being dispatched was handed out
        self.sinks: dict[str, EventSink] = {}  # request id -> request that is there
        # Submitted since the worker last told its load.
        self.unreported_tokens = 0
        self.unreported_requests = 0
        self._gateway_epoch = gateway_epoch
        self._silence_s = silence_s
        self._on_lost = on_lost
        self._on_gone = on_gone
        self._clock = clock
        self._last_seen = 0.0
        self._clock_samples: list[tuple[float, float]] = []  # (round trip, offset)
        self._channel = rpc.open_channel(description.grpc_address)
        stub_class = (
            inference_pb2_grpc.PrefillStub
            if self.role is Role.PREFILL
            else inference_pb2_grpc.DecodeStub
        )
        self._stub = stub_class(self._channel)
        self._events: grpc.aio.UnaryStreamCall | None = None
        self._is_closed = False
        self._cancels: set[asyncio.Task[None]] = set()
        self._task = asyncio.create_task(self._follow(), name=f"events of {self.worker_id}")

    @property
    def clock_offset_s(self) -> float:
        """The worker's monotonic clock minus ours; zero on one host, up to half a round trip."""
        return min(self._clock_samples)[1] if self._clock_samples else 0.0

    @property
    def destination(self) -> inference_pb2.Destination:
        return inference_pb2.Destination(
            worker_id=self.worker_id,
            epoch=self.description.epoch,
            transfer_address=self.description.transfer_address,
        )

    async def close(self) -> None:
        """End the stream and everything under way; sinks are told that the worker is lost."""
        self._is_closed = True
        self._lose("closed")
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        if self._cancels:
            await asyncio.wait(self._cancels, timeout=CANCEL_TIMEOUT_S)
        await self._channel.close()

    def check_silence(self) -> None:
        """Give the worker up when it has been silent for too long."""
        if self.is_live and self._clock() - self._last_seen > self._silence_s:
            # The worker's end must see a broken stream too: it then cancels what it still runs.
            if self._events is not None:
                self._events.cancel()
            self._lose("silent")

    def forgive_silence(self) -> None:
        """Our own loop was held up: what the worker has sent meanwhile is still unread."""
        self._last_seen = max(self._last_seen, self._clock() - self._silence_s / 2)

    async def submit(
        self, request: inference_pb2.PrefillRequest | inference_pb2.DecodeRequest
    ) -> inference_pb2.SubmitReply:
        """Hand a request to the engine; returns once it has accepted.

        That may take as long as the engine's current step, bounded by the request's deadline alone:
        on a CPU a step may take many seconds, and a worker that is dead is found by its silence.

        Raises:
            ScissionError: it has not: CapacityError, UnavailableError, DeadlineError, ...
        """
        self.unreported_requests += 1
        self.unreported_tokens += len(request.prompt_token_ids)
        return await self._call(self._stub.Submit, request)

    async def redirect(self, request: inference_pb2.RedirectRequest) -> inference_pb2.SubmitReply:
        """Have a prefill ship what it holds of a request to another decode; raises as `submit`."""
        assert isinstance(self._stub, inference_pb2_grpc.PrefillStub)
        return await self._call(self._stub.Redirect, request)

    def cancel(self, request_id: str, attempt: int, reason: str, choice: int | None = None) -> None:
        """End a request's attempts there; does not wait. A lost worker ends them by itself."""
        if self._is_closed or not self.is_live:
            return
        request = inference_pb2.CancelRequest(
            gateway_epoch=self._gateway_epoch,
            request_id=request_id,
            attempt=attempt,
            reason=reason,
            choice=choice,
        )
        task = asyncio.create_task(self._cancel(request))
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    async def _cancel(self, request: inference_pb2.CancelRequest) -> None:
        for _ in range(MAX_CANCEL_TRIES):
            try:
                await self._stub.Cancel(request, timeout=CANCEL_TIMEOUT_S)
                return
            except grpc.aio.AioRpcError as error:
                if not self.is_live:
                    return
                logger.debug("cancel was not answered: %s", error.code().name)

    async def _call(
        self,
        method: "grpc.aio.UnaryUnaryMultiCallable",
        request: inference_pb2.PrefillRequest
        | inference_pb2.DecodeRequest
        | inference_pb2.RedirectRequest,
    ) -> inference_pb2.SubmitReply:
        timeout_s = max(0.001, request.remaining_ms / 1000)
        sent_at = self._clock()
        try:
            reply: inference_pb2.SubmitReply = await method(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise rpc.error_of(error) from error
        except asyncio.CancelledError:
            if not self._is_closed:
                raise
            raise UnavailableError(f"the {self.role} worker has gone") from None
        self._sample_clock(sent_at, reply, self._clock())
        return reply

    def _sample_clock(
        self, sent_at: float, reply: inference_pb2.SubmitReply, answered_at: float
    ) -> None:
        offset = ((reply.received_at - sent_at) + (reply.replied_at - answered_at)) / 2
        round_trip = (answered_at - sent_at) - (reply.replied_at - reply.received_at)
        self._clock_samples.append((round_trip, offset))
        if len(self._clock_samples) > CLOCK_SAMPLES:
            del self._clock_samples[0]

    async def _follow(self) -> None:
        """Keep one event stream open for as long as the worker is registered."""
        backoff_s = MIN_BACKOFF_S
        was_live = False
        num_refused = 0
        while True:
            request = inference_pb2.EventsRequest(
                gateway_epoch=self._gateway_epoch, worker_epoch=self.description.epoch
            )
            # No deadline: the stream's own silence is what ends it.
            self._events = events = self._stub.Events(request)
            detail = "end of stream"
            try:
                async for step in events:
                    self._on_step(step)
                    backoff_s = MIN_BACKOFF_S
                    was_live = True
                    num_refused = 0
            except grpc.aio.AioRpcError as error:
                detail = error.details() or error.code().name
                is_other = error.code() is grpc.StatusCode.FAILED_PRECONDITION
                num_refused += not self.is_live
                if was_live and (is_other or num_refused >= MAX_REFUSED):
                    # Nobody is there, or somebody else. Should it live, it registers again.
                    self._on_gone()
            except asyncio.CancelledError:
                # Ours (the worker is dropped), or `check_silence` cancelled the call.
                if self._is_closed:
                    events.cancel()
                    raise
                detail = "silent"
            if self.is_live:
                self._lose("stream_broken", detail)
            await asyncio.sleep(backoff_s)
            backoff_s = min(MAX_BACKOFF_S, backoff_s * 2)

    def _on_step(self, step: inference_pb2.StepEvents) -> None:
        self._last_seen = self._clock()
        if not self.is_live:
            self.is_live = True
            logger.info("worker answers", extra={"worker": self.worker_id})
        self.sent_at = step.sent_at
        if step.HasField("load"):
            self.load = step.load
            self.unreported_tokens = 0
            self.unreported_requests = 0
        sinks = self.sinks
        for event in step.events:
            sink = sinks.get(event.request_id)
            if sink is not None:
                sink.on_event(self, event)

    def _lose(self, reason: str, detail: str = "") -> None:
        if self.is_live and reason != "closed":
            logger.log(
                logging.WARNING if self.sinks else logging.INFO,
                "worker lost: %s",
                reason,
                extra={
                    "worker": self.worker_id,
                    "requests": len(self.sinks),
                    **({"detail": detail} if detail else {}),
                },
            )
            self._on_lost(reason)
        self.is_live = False
        self.unreported_tokens = 0
        self.unreported_requests = 0
        sinks, self.sinks = self.sinks, {}
        for sink in sinks.values():
            sink.on_worker_lost(self, reason)
