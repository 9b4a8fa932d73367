"""The gRPC front of a worker: calls become items of the engine's inbox, events leave as streams.

The same servicer answers for Prefill and for Decode; what an item means is the engine's business.
"""

import asyncio
import logging
import time
from collections.abc import Callable

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from scission.common import rpc
from scission.common.engine_inbox import Cancel, GatewayGone, Inbox, InboxItem, Redirect, Submit
from scission.common.errors import (
    CapacityError,
    LayoutMismatchError,
    ScissionError,
    UnavailableError,
)
from scission.common.event_stream import EventStreams
from scission.common.types import Role
from scission.protos import inference_pb2, inference_pb2_grpc

logger = logging.getLogger(__name__)


class InferenceServicer:
    """Prefill and Decode of protos/inference.proto; all methods run on the event loop."""

    def __init__(
        self,
        epoch: int,
        inbox: Inbox[InboxItem],
        streams: EventStreams,
        num_queued: Callable[[], int],
        max_queued: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`num_queued` is the engine's, read from the event loop; at `max_queued` a submission is
        refused here at once, however long the engine's current step still takes.
        """
        self._epoch = epoch
        self._inbox = inbox
        self._streams = streams
        self._num_queued = num_queued
        self._max_queued = max_queued
        self._clock = clock
        self._num_unanswered = 0
        self._is_draining = False

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._is_draining = True

    async def Events(
        self, request: inference_pb2.EventsRequest, context: grpc.aio.ServicerContext
    ) -> None:
        if request.worker_epoch not in (0, self._epoch):
            await rpc.abort(
                context,
                LayoutMismatchError(f"another process answers here, of epoch {self._epoch:x}"),
            )
        gateway_epoch = request.gateway_epoch
        if self._streams.is_attached(gateway_epoch):
            # Before its new requests: those of its broken stream end.
            self._inbox.put(GatewayGone(gateway_epoch))
        stream = self._streams.attach(gateway_epoch)
        logger.info("gateway attached", extra={"gateway": f"{gateway_epoch:x}"})

        async def pump() -> None:
            async for step in stream:
                await context.write(step)

        try:
            # The gateway learns that it is attached before the first sign of life.
            await context.send_initial_metadata(())
            writing = asyncio.create_task(pump())
            overflowing = asyncio.create_task(stream.overflowed.wait())
            try:
                await asyncio.wait({writing, overflowing}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                # A write to a gateway that does not read would wait for ever.
                writing.cancel()
                overflowing.cancel()
                await asyncio.gather(writing, overflowing, return_exceptions=True)
        finally:
            if self._streams.detach(stream):
                self._inbox.put(GatewayGone(gateway_epoch))
            logger.info(
                "gateway detached",
                extra={"gateway": f"{gateway_epoch:x}", "unread": stream.is_overflown},
            )
        if stream.is_overflown:
            await rpc.abort(context, CapacityError("the event stream was not read"))

    async def Submit(
        self,
        request: inference_pb2.PrefillRequest | inference_pb2.DecodeRequest,
        context: grpc.aio.ServicerContext,
    ) -> inference_pb2.SubmitReply:
        received_at = self._clock()
        if self._is_draining:
            await rpc.abort(context, UnavailableError("the worker is draining"))
        if self._num_queued() + self._num_unanswered >= self._max_queued:
            await rpc.abort(
                context, CapacityError(f"the queue is full ({self._max_queued} requests)")
            )
        deadline = received_at + request.remaining_ms / 1000
        return await self._ask(
            request,
            context,
            received_at,
            lambda reply: Submit(request, request.gateway_epoch, deadline, received_at, reply),
        )

    async def Redirect(
        self, request: inference_pb2.RedirectRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.SubmitReply:
        received_at = self._clock()
        deadline = received_at + request.remaining_ms / 1000
        return await self._ask(
            request,
            context,
            received_at,
            lambda reply: Redirect(request, request.gateway_epoch, deadline, received_at, reply),
        )

    async def Cancel(
        self, request: inference_pb2.CancelRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.CancelReply:
        self._inbox.put(
            Cancel(
                gateway_epoch=request.gateway_epoch,
                request_id=request.request_id,
                attempt=request.attempt,
                reason=request.reason,
                choice=request.choice if request.HasField("choice") else None,
            )
        )
        return inference_pb2.CancelReply()

    async def _ask(
        self,
        request: inference_pb2.PrefillRequest
        | inference_pb2.DecodeRequest
        | inference_pb2.RedirectRequest,
        context: grpc.aio.ServicerContext,
        received_at: float,
        item: Callable[[Callable[[ScissionError | float], None]], InboxItem],
    ) -> inference_pb2.SubmitReply:
        """Hand an item to the engine and wait for its answer."""
        if not self._streams.is_attached(request.gateway_epoch):
            await rpc.abort(context, UnavailableError("the gateway has no event stream here"))
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[ScissionError | float] = loop.create_future()

        def settle(result: ScissionError | float) -> None:
            if not answer.done():
                answer.set_result(result)

        self._num_unanswered += 1
        try:
            self._inbox.put(item(lambda result: _call_soon(loop, settle, result)))
            result = await answer
        except asyncio.CancelledError:
            # The gateway gave up waiting: whatever the engine will answer, nobody hears it.
            self._inbox.put(
                Cancel(request.gateway_epoch, request.request_id, request.attempt, "superseded")
            )
            raise
        finally:
            self._num_unanswered -= 1
        if isinstance(result, ScissionError):
            await rpc.abort(context, result)
        return inference_pb2.SubmitReply(
            queue_wait_s=result, received_at=received_at, replied_at=self._clock()
        )


def _call_soon(
    loop: asyncio.AbstractEventLoop,
    function: Callable[[ScissionError | float], None],
    result: ScissionError | float,
) -> None:
    try:
        loop.call_soon_threadsafe(function, result)
    except RuntimeError:
        # The loop has ended, and with it whoever waited.
        logger.debug("an answer came after the event loop's end")


class WorkerServer:
    """A worker's gRPC server: the role's service and gRPC health."""

    def __init__(self, role: Role, servicer: InferenceServicer, host: str, port: int) -> None:
        """Binds at once, so that a taken port is known before a model is loaded.

        Raises:
            ConfigError: the address cannot be bound.
        """
        self._server = rpc.make_server()
        if role is Role.PREFILL:
            inference_pb2_grpc.add_PrefillServicer_to_server(servicer, self._server)
            self._service_name = "scission.inference.Prefill"
        else:
            inference_pb2_grpc.add_DecodeServicer_to_server(servicer, self._server)
            self._service_name = "scission.inference.Decode"
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.port = rpc.bind(self._server, host, port)

    async def start(self) -> None:
        """Answer calls; health says NOT_SERVING until `set_serving`."""
        await self.set_serving(False)
        await self._server.start()

    async def set_serving(self, is_serving: bool) -> None:
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if is_serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for service in ("", self._service_name):
            await self._health.set(service, status)

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)
