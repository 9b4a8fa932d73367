import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from scission.common import rpc
from scission.common.engine_inbox import Cancel, GatewayGone, Inbox, InboxItem, Redirect, Submit
from scission.common.errors import CapacityError, ConfigError
from scission.common.event_stream import EventStreams
from scission.common.types import Role
from scission.common.worker_service import InferenceServicer, WorkerServer
from scission.protos import inference_pb2, inference_pb2_grpc

GATEWAY = 7
EPOCH = 99


class AnsweringInbox(Inbox[InboxItem]):
    """An inbox whose engine answers at once."""

    def __init__(self, answer: Callable[[InboxItem], None]) -> None:
        super().__init__()
        self.items: list[InboxItem] = []
        self.arrived = asyncio.Event()
        self._answer = answer

    def put(self, item: InboxItem) -> None:
        self.items.append(item)
        self._answer(item)
        self.arrived.set()

    async def wait_for(self, kind: type[InboxItem]) -> InboxItem:
        while not any(isinstance(item, kind) for item in self.items):
            self.arrived.clear()
            await asyncio.wait_for(self.arrived.wait(), 30)
        return next(item for item in self.items if isinstance(item, kind))


class Worker:
    def __init__(self, answer: Callable[[InboxItem], None], max_queued: int = 10) -> None:
        self.inbox = AnsweringInbox(answer)
        self.streams = EventStreams(max_pending=50)
        self.servicer = InferenceServicer(
            EPOCH, self.inbox, self.streams, num_queued=lambda: 0, max_queued=max_queued
        )
        self.server = WorkerServer(Role.PREFILL, self.servicer, "127.0.0.1", 0)
        self.channel = rpc.open_channel(f"127.0.0.1:{self.server.port}")
        self.stub = inference_pb2_grpc.PrefillStub(self.channel)  # type: ignore[no-untyped-call]

    async def attach(self) -> "grpc.aio.UnaryStreamCall":
        call = self.stub.Events(inference_pb2.EventsRequest(gateway_epoch=GATEWAY))
        await call.initial_metadata()
        return call


def accept(item: InboxItem) -> None:
    if isinstance(item, Submit | Redirect):
        item.reply(0.25)


@asynccontextmanager
async def running(
    answer: Callable[[InboxItem], None] = accept, max_queued: int = 10
) -> AsyncIterator[Worker]:
    worker = Worker(answer, max_queued)
    await worker.server.start()
    try:
        yield worker
    finally:
        await worker.channel.close()
        await worker.server.stop(0)


def submission(request_id: str = "r") -> inference_pb2.PrefillRequest:
    return inference_pb2.PrefillRequest(
        gateway_epoch=GATEWAY, request_id=request_id, remaining_ms=5000, prompt_token_ids=[1, 2]
    )


async def code_of(call: "grpc.aio.UnaryUnaryCall[object, object]") -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    code: grpc.StatusCode = caught.value.code()
    return code


async def test_a_submission_reaches_the_engine_with_a_local_deadline() -> None:
    async with running() as worker:
        await worker.attach()
        reply = await worker.stub.Submit(submission())
        item = await worker.inbox.wait_for(Submit)
        assert isinstance(item, Submit)
        assert item.request.prompt_token_ids == [1, 2]
        assert item.deadline == pytest.approx(item.received_at + 5)
        assert reply.queue_wait_s == 0.25
        assert reply.received_at == item.received_at <= reply.replied_at


async def test_a_gateway_without_a_stream_is_refused() -> None:
    async with running() as worker:
        assert await code_of(worker.stub.Submit(submission())) is grpc.StatusCode.UNAVAILABLE
        assert not worker.inbox.items


async def test_the_engines_refusal_becomes_its_status() -> None:
    def refuse(item: InboxItem) -> None:
        if isinstance(item, Submit):
            item.reply(CapacityError("no room"))

    async with running(refuse) as worker:
        await worker.attach()
        code = await code_of(worker.stub.Submit(submission()))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_full_queue_refuses_without_waiting_for_the_engine() -> None:
    async with running(lambda item: None, max_queued=2) as worker:
        await worker.attach()
        waiting = [worker.stub.Submit(submission(f"{i}")) for i in range(2)]
        while len([i for i in worker.inbox.items if isinstance(i, Submit)]) < 2:
            worker.inbox.arrived.clear()
            await asyncio.wait_for(worker.inbox.arrived.wait(), 30)
        code = await code_of(worker.stub.Submit(submission("third")))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in waiting:
            call.cancel()


async def test_a_call_given_up_cancels_what_it_asked_for() -> None:
    async with running(lambda item: None) as worker:
        await worker.attach()
        code = await code_of(worker.stub.Submit(submission(), timeout=0.05))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        item = await worker.inbox.wait_for(Cancel)
        assert isinstance(item, Cancel)
        assert (item.request_id, item.attempt) == ("r", 0)


async def test_a_broken_stream_tells_the_engine_that_the_gateway_has_gone() -> None:
    async with running() as worker:
        call = await worker.attach()
        call.cancel()
        assert await worker.inbox.wait_for(GatewayGone) == GatewayGone(GATEWAY)


async def test_attaching_anew_ends_the_requests_of_the_stream_before() -> None:
    async with running() as worker:
        await worker.attach()
        second = await worker.attach()
        await worker.stub.Submit(submission())
        assert [type(item) for item in worker.inbox.items] == [GatewayGone, Submit]
        worker.streams.beat(inference_pb2.Load(num_running=3))
        step = await asyncio.wait_for(second.read(), 30)
        assert step.load.num_running == 3


async def test_a_gateway_that_does_not_read_is_gone_although_its_connection_lives() -> None:
    async with running() as worker:
        await worker.attach()
        big = [inference_pb2.RequestEvent(request_id="x" * (1 << 20))]
        while not any(isinstance(item, GatewayGone) for item in worker.inbox.items):
            worker.streams.emit(GATEWAY, big)
            await asyncio.sleep(0)
        assert not worker.streams.is_attached(GATEWAY)


async def test_an_address_that_another_process_took_over_refuses_the_old_epoch() -> None:
    async with running() as worker:
        request = inference_pb2.EventsRequest(gateway_epoch=GATEWAY, worker_epoch=EPOCH + 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker.stub.Events(request).read()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_health_says_serving_only_once_told_so() -> None:
    async with running() as worker:
        stub = health_pb2_grpc.HealthStub(worker.channel)
        request = health_pb2.HealthCheckRequest(service="scission.inference.Prefill")
        assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await worker.server.set_serving(True)
        assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING


async def test_a_taken_port_is_an_error_that_names_it() -> None:
    async with running() as worker:
        with pytest.raises(ConfigError, match=f":{worker.server.port}"):
            WorkerServer(Role.DECODE, worker.servicer, "127.0.0.1", worker.server.port)
