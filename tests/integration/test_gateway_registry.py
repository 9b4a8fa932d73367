"""Workers come, go, restart and fall silent: what the gateway's registry makes of it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest

from scission.common import rpc
from scission.common.config import DiscoveryOptions
from scission.common.metrics import GatewayMetrics, Metrics
from scission.common.prefix_hash import HASH_BYTES
from scission.common.registration import Registrar, WorkerState
from scission.common.types import Role
from scission.protos import cluster_pb2, cluster_pb2_grpc, inference_pb2
from scission.services.gateway.registry import MISSED_HEARTBEATS, Registry
from tests.fakes import FakeDecode, FakePrefill, FakeWorker

HEARTBEAT_S = 0.05
OPTIONS = DiscoveryOptions(heartbeat_s=HEARTBEAT_S, silence_s=0.4, beat_s=0.1)


def prefix(number: int) -> bytes:
    return number.to_bytes(HASH_BYTES, "big")


class Gateway:
    """A registry behind its gRPC server."""

    def __init__(self, epoch: int = 1, port: int = 0) -> None:
        metrics = GatewayMetrics(Metrics(Role.GATEWAY, "tiny", "0"))
        self.registry = Registry(epoch, OPTIONS, metrics)
        self._server = rpc.make_server()
        cluster_pb2_grpc.add_RegistryServicer_to_server(self.registry, self._server)
        self.port = rpc.bind(self._server, "127.0.0.1", port)

    async def start(self) -> None:
        await self._server.start()
        self._checking = asyncio.create_task(self._check())

    async def stop(self) -> None:
        self._checking.cancel()
        await self._server.stop(0)
        await self.registry.close()

    async def _check(self) -> None:
        while True:
            await asyncio.sleep(0.02)
            self.registry.check()

    def states(self) -> dict[str, str]:
        return {worker.worker_id: worker.state() for worker in self.registry.workers.values()}

    def takes(self, worker: FakeWorker) -> bool:
        known = self.registry.workers.get(worker.worker_id)
        return known is not None and self.registry.takes_requests(known)


class Registered:
    """A fake worker and its real registrar."""

    def __init__(self, worker: FakeWorker, *gateways: Gateway) -> None:
        self.worker = worker
        self.full = cluster_pb2.PrefixUpdate()
        self.change = cluster_pb2.PrefixUpdate()
        state = WorkerState(
            describe=lambda: worker.description,
            load=lambda: worker.load,
            prefixes=lambda is_full: self.full if is_full else self.take_change(),
        )
        addresses = tuple(f"127.0.0.1:{gateway.port}" for gateway in gateways)
        self.registrar = Registrar(
            state, DiscoveryOptions(gateways=addresses, heartbeat_s=HEARTBEAT_S)
        )
        self.task = asyncio.create_task(self.registrar.run())

    def take_change(self) -> cluster_pb2.PrefixUpdate:
        change, self.change = self.change, cluster_pb2.PrefixUpdate()
        return change


@asynccontextmanager
async def started(*things: Gateway | FakeWorker) -> AsyncIterator[None]:
    for thing in things:
        await thing.start()
    try:
        yield
    finally:
        for thing in things:
            await (thing.stop() if isinstance(thing, Gateway) else thing.kill())


async def until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_worker_is_known_to_every_gateway() -> None:
    gateways, worker = (Gateway(1), Gateway(2)), FakeDecode()
    async with started(*gateways, worker):
        ours = Registered(worker, *gateways)
        await until(lambda: all(gateway.takes(worker) for gateway in gateways))
        assert sorted(worker.streams.gateway_epochs) == [1, 2]
        ours.task.cancel()


async def test_a_restarted_gateway_learns_its_workers_again() -> None:
    gateway, worker = Gateway(1), FakeDecode()
    async with started(worker):
        await gateway.start()
        ours = Registered(worker, gateway)
        await until(lambda: gateway.takes(worker))
        await gateway.stop()
        again = Gateway(2, gateway.port)
        async with started(again):
            await until(lambda: again.takes(worker))
            assert worker.streams.gateway_epochs == (2,)
        ours.task.cancel()


async def test_a_worker_that_stops_its_heartbeats_takes_no_requests() -> None:
    gateway, worker = Gateway(), FakeDecode()
    async with started(gateway, worker):
        ours = Registered(worker, gateway)
        await until(lambda: gateway.takes(worker))
        ours.task.cancel()
        await until(lambda: not gateway.takes(worker))
        # Its stream still brings what runs there.
        assert gateway.states() == {worker.worker_id: "ready"}


async def test_a_killed_worker_is_dropped() -> None:
    gateway, worker = Gateway(), FakePrefill([])
    async with started(gateway):
        await worker.start()
        ours = Registered(worker, gateway)
        await until(lambda: gateway.takes(worker))
        ours.task.cancel()
        await worker.kill()
        await until(lambda: not gateway.registry.workers, MISSED_HEARTBEATS * HEARTBEAT_S + 5)


async def test_a_silent_worker_comes_back_when_it_speaks_again() -> None:
    gateway, worker = Gateway(), FakeDecode()
    async with started(gateway, worker):
        ours = Registered(worker, gateway)
        await until(lambda: gateway.takes(worker))
        worker.freeze()
        await until(lambda: gateway.states() == {worker.worker_id: "silent"})
        assert "no prefill and no decode" in gateway.registry.explain()
        worker.thaw()
        await until(lambda: gateway.takes(worker))
        ours.task.cancel()


async def test_a_draining_worker_keeps_its_stream_and_gets_nothing_new() -> None:
    gateway, worker = Gateway(), FakeDecode()
    async with started(gateway, worker):
        ours = Registered(worker, gateway)
        await until(lambda: gateway.takes(worker))
        worker.load = inference_pb2.Load(is_draining=True)
        await until(lambda: not gateway.takes(worker))
        assert gateway.states() == {worker.worker_id: "draining"}
        ours.task.cancel()
        await ours.registrar.deregister()
        assert gateway.states() == {worker.worker_id: "draining"}
        await worker.kill()
        await until(lambda: not gateway.registry.workers)


async def test_prefixes_follow_the_heartbeats() -> None:
    gateway, worker = Gateway(), FakePrefill([])
    async with started(gateway, worker):
        ours = Registered(worker, gateway)
        ours.full.added.extend([prefix(1), prefix(2)])
        await until(lambda: gateway.takes(worker))
        known = gateway.registry.workers[worker.worker_id]
        ours.change.added.append(prefix(3))
        ours.change.evicted.append(prefix(1))
        ours.change.added.append(b"no hash")
        await until(lambda: known.prefixes == {prefix(2), prefix(3)})
        index, ids = gateway.registry.prefix_index, frozenset({worker.worker_id})
        assert index.match([prefix(1)], ids) == {}
        assert index.match([prefix(9), prefix(3), prefix(1)], ids) == {worker.worker_id: 2}
        ours.task.cancel()


def describe(role: str = "decode", **fields: str) -> cluster_pb2.WorkerDescription:
    described = {"worker_id": "w", "grpc_address": "127.0.0.1:1", "transfer_address": "t"}
    return cluster_pb2.WorkerDescription(role=role, **(described | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "description",
    [
        describe(role="gateway"),
        describe(worker_id=""),
        describe(grpc_address=""),
        describe(transfer_address=""),
    ],
    ids=["role", "worker_id", "grpc_address", "transfer_address"],
)
async def test_a_description_that_makes_no_sense_is_refused(
    description: cluster_pb2.WorkerDescription,
) -> None:
    gateway = Gateway()
    async with started(gateway), rpc.open_channel(f"127.0.0.1:{gateway.port}") as channel:
        stub = cluster_pb2_grpc.RegistryStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Register(description)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not gateway.registry.workers


async def test_a_restarted_worker_replaces_the_one_at_its_address() -> None:
    gateway = Gateway()
    async with started(gateway):
        for worker_id in ("old", "new"):
            gateway.registry.register(describe(worker_id=worker_id))
        assert list(gateway.registry.workers) == ["new"]
        gateway.registry.register(describe(worker_id="new"))
        assert list(gateway.registry.workers) == ["new"]
