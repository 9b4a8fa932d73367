"""The process around an engine: ready, found, drained, ended."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from scission.common import rpc
from scission.common.config import DiscoveryOptions
from scission.common.metrics import GatewayMetrics, Metrics
from scission.common.ports import free_port, listen
from scission.common.types import Role
from scission.protos import cluster_pb2_grpc, inference_pb2, inference_pb2_grpc
from scission.services.gateway.registry import Registry

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"


class Gateway:
    def __init__(self) -> None:
        metrics = GatewayMetrics(Metrics(Role.GATEWAY, "tiny", "0"))
        self.registry = Registry(7, DiscoveryOptions(), metrics)
        self._server = rpc.make_server()
        cluster_pb2_grpc.add_RegistryServicer_to_server(self.registry, self._server)
        self.port = rpc.bind(self._server, HOST, 0)

    async def __aenter__(self) -> "Gateway":
        await self._server.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._server.stop(0)
        await self.registry.close()

    async def until_ready(self) -> None:
        async with asyncio.timeout(60):
            while not self.registry.available(Role.PREFILL):
                await asyncio.sleep(0.01)


class Process:
    def __init__(self, gateway_port: int, behaviour: str) -> None:
        self.grpc_port, self.metrics_port = free_port(HOST), free_port(HOST)
        self._arguments = [
            str(ROOT / "tests" / "integration" / "idle_worker.py"),
            f"{self.grpc_port}",
            f"{self.metrics_port}",
            f"{HOST}:{gateway_port}",
            *([behaviour] if behaviour else []),
        ]

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *self._arguments,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            stderr=asyncio.subprocess.PIPE,
        )

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def end(self) -> tuple[int, str]:
        """The exit status and what was logged."""
        _, log = await asyncio.wait_for(self._process.communicate(), 60)
        assert self._process.returncode is not None
        return self._process.returncode, log.decode()

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.communicate()


@asynccontextmanager
async def worker(behaviour: str = "") -> AsyncIterator[tuple[Gateway, Process]]:
    async with Gateway() as gateway:
        process = Process(gateway.port, behaviour)
        await process.start()
        try:
            await gateway.until_ready()
            yield gateway, process
        finally:
            await process.kill()


async def test_a_worker_is_found_serves_health_and_metrics_and_drains() -> None:
    async with worker() as (gateway, process):
        description = next(iter(gateway.registry.workers.values())).description
        assert description.grpc_address == f"{HOST}:{process.grpc_port}"
        assert description.metrics_address == f"{HOST}:{process.metrics_port}"
        async with rpc.open_channel(description.grpc_address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        async with httpx.AsyncClient() as http:
            metrics = await http.get(f"http://{description.metrics_address}/metrics")
        assert 'scission_build_info{model_name="model",role="prefill"' in metrics.text
        process.signal(signal.SIGTERM)
        code, log = await process.end()
        assert code == 0, log
        known = list(gateway.registry.workers.values())
        assert all(each.is_leaving for each in known)


async def test_requests_that_do_not_end_are_aborted_after_the_shutdown_timeout() -> None:
    async with worker("busy") as (_, process):
        process.signal(signal.SIGTERM)
        code, log = await process.end()
        assert code == 0 and "aborting" in log


async def test_a_second_signal_ends_the_process_at_once() -> None:
    async with worker("busy") as (gateway, process):
        known = next(iter(gateway.registry.workers.values()))
        process.signal(signal.SIGINT)
        async with asyncio.timeout(30):
            while not known.is_leaving:
                await asyncio.sleep(0.005)
        process.signal(signal.SIGTERM)
        code, _ = await process.end()
        assert code == 128 + signal.SIGTERM


async def test_an_engine_that_raises_ends_the_process_with_an_error() -> None:
    async with worker("crash") as (gateway, process):
        link = next(iter(gateway.registry.workers.values())).link
        request = inference_pb2.PrefillRequest(gateway_epoch=7, request_id="r", remaining_ms=5000)
        call = asyncio.ensure_future(link.submit(request))
        code, log = await process.end()
        assert code == 1 and "as the test asked" in log
        with pytest.raises(Exception):  # noqa: B017
            await call


async def test_a_taken_port_ends_the_process_before_anything_is_loaded() -> None:
    async with Gateway() as gateway:
        process = Process(gateway.port, "")
        with listen(HOST, process.grpc_port):
            await process.start()
            code, log = await process.end()
        assert code == 2 and f"{process.grpc_port}" in log and "Traceback" not in log


async def test_events_flow_to_a_gateway_that_attaches_by_hand() -> None:
    async with worker() as (_, process):
        async with rpc.open_channel(f"{HOST}:{process.grpc_port}") as channel:
            stub = inference_pb2_grpc.PrefillStub(channel)
            events = stub.Events(inference_pb2.EventsRequest(gateway_epoch=8))
            step = await asyncio.wait_for(events.read(), 30)
            assert step is not grpc.aio.EOF and step.sent_at > 0
