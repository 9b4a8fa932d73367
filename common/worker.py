"""The process around an engine: what prefill and decode workers have in common.

The main thread runs the event loop: gRPC, registration, metrics, signals. The engine thread builds
the engine (which loads the model) and runs it. An engine that raises ends the process with 1;
SIGTERM drains and ends it with 0, a second signal at once.
"""

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import HTTPServer
from typing import Protocol

from prometheus_client import start_http_server

from scission.common import rpc
from scission.common.config import WorkerConfig, parse_address
from scission.common.engine_inbox import Inbox, InboxItem
from scission.common.errors import ConfigError, ScissionError
from scission.common.event_stream import EventStreams
from scission.common.metrics import Metrics
from scission.common.registration import Registrar, WorkerState
from scission.common.types import Epoch, Role, WorkerId
from scission.common.worker_service import InferenceServicer, WorkerServer
from scission.protos import cluster_pb2, inference_pb2

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 10.0  # for the engine to leave its loop once it was told to stop
IDLE_POLL_S = 0.02  # while draining


class Engine(Protocol):
    """A role's engine. `run` belongs to the engine thread; the rest may be called from any."""

    @property
    def is_idle(self) -> bool:
        """Nothing runs, waits or is retained."""
        ...

    def run(self) -> None:
        """The loop, until `stop`; closes what the engine owns before it returns."""
        ...

    def stop(self) -> None: ...

    def drain(self) -> None:
        """Refuse what is new, finish what runs; the load then says `is_draining`."""
        ...

    def describe(self) -> cluster_pb2.WorkerDescription:
        """transfer_address, max_model_len, block_size, num_blocks, max_num_seqs, layout_digest."""
        ...

    def load(self) -> inference_pb2.Load: ...

    def prefix_update(self, full: bool) -> cluster_pb2.PrefixUpdate:
        """All that is cached when `full`; else the changes since the last call with False."""
        ...


@dataclass(frozen=True, slots=True)
class EngineContext:
    """What a process gives its engine."""

    role: Role
    worker_id: WorkerId
    epoch: Epoch
    advertise_host: str
    inbox: Inbox[InboxItem]
    streams: EventStreams
    metrics: Metrics


BuildEngine = Callable[[EngineContext], Engine]


def run_worker(role: Role, config: WorkerConfig, build_engine: BuildEngine) -> int:
    """Run a worker process to its end; returns its exit code. `build_engine` loads the model."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(_Worker(role, config, build_engine).run())
    return uvloop.run(_Worker(role, config, build_engine).run())


class _Worker:
    def __init__(self, role: Role, config: WorkerConfig, build_engine: BuildEngine) -> None:
        self._role = role
        self._config = config
        self._build_engine = build_engine
        epoch = Epoch(secrets.randbits(63) | 1)
        endpoint = config.endpoint
        self._context = EngineContext(
            role=role,
            worker_id=WorkerId(f"{role}-{epoch:x}"),
            epoch=epoch,
            advertise_host=rpc.advertised_host(
                endpoint.host,
                endpoint.advertise_host,
                parse_address(config.discovery.gateways[0])[0],
            ),
            inbox=Inbox(),
            streams=EventStreams(),
            metrics=Metrics(role, config.model.names[0], importlib.metadata.version("scission")),
        )
        self._engine: Engine | None = None
        self._failure: BaseException | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        built, ended, stopping = asyncio.Event(), asyncio.Event(), asyncio.Event()

        def on_signal(number: signal.Signals) -> None:
            if stopping.is_set():
                logger.warning("second signal, exiting at once")
                os._exit(128 + number)
            logger.info("%s: draining", number.name)
            stopping.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)

        endpoint = self._config.endpoint
        servicer = InferenceServicer(
            self._context.epoch,
            self._context.inbox,
            self._context.streams,
            num_queued=lambda: self._load().num_queued,
            max_queued=self._config.scheduler.max_queued,
        )
        try:
            server = WorkerServer(self._role, servicer, endpoint.host, endpoint.grpc_port)
            metrics_server = self._serve_metrics()
        except ConfigError as error:
            logger.error("%s", error)
            return 2
        with contextlib.closing(_MetricsServer(metrics_server)):
            await server.start()

            def notify(event: asyncio.Event) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(event.set)

            thread = threading.Thread(
                target=self._run_engine,
                args=(lambda: notify(built), lambda: notify(ended)),
                name="engine",
                daemon=True,
            )
            thread.start()
            await _first_of(built, ended, stopping)
            if self._engine is not None and not ended.is_set() and not stopping.is_set():
                await self._serve(server, servicer, metrics_server.server_port, ended, stopping)
            return await self._shut_down(server, thread, ended)

    async def _serve(
        self,
        server: WorkerServer,
        servicer: InferenceServicer,
        metrics_port: int,
        ended: asyncio.Event,
        stopping: asyncio.Event,
    ) -> None:
        """From ready to drained, or to the engine's end."""
        engine = self._engine
        assert engine is not None
        host = self._context.advertise_host
        description = engine.describe()
        description.worker_id = self._context.worker_id
        description.role = self._role
        description.epoch = self._context.epoch
        description.grpc_address = rpc.join_address(host, server.port)
        description.metrics_address = rpc.join_address(host, metrics_port)
        description.version = importlib.metadata.version("scission")
        description.served_model_name = self._config.model.names[0]

        def describe() -> cluster_pb2.WorkerDescription:
            copy = cluster_pb2.WorkerDescription()
            copy.CopyFrom(description)
            return copy

        registrar = Registrar(
            WorkerState(describe, engine.load, engine.prefix_update), self._config.discovery
        )
        await server.set_serving(True)
        logger.info(
            "ready",
            extra={
                "worker": self._context.worker_id,
                "grpc": description.grpc_address,
                "metrics": description.metrics_address,
            },
        )
        registering = asyncio.create_task(registrar.run())
        try:
            await _first_of(ended, stopping)
            await server.set_serving(False)
            if not ended.is_set():
                servicer.drain()
                engine.drain()
                # No gateway waits for its next heartbeat to learn it; running requests go on.
                registering.cancel()
                await registrar.deregister()
                await self._wait_until_idle(engine, ended)
        finally:
            registering.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await registering

    async def _wait_until_idle(self, engine: Engine, ended: asyncio.Event) -> None:
        give_up_at = time.monotonic() + self._config.endpoint.shutdown_timeout_s
        while not engine.is_idle and not ended.is_set():
            if time.monotonic() >= give_up_at:
                logger.warning("requests still run after the shutdown timeout: aborting them")
                return
            await asyncio.sleep(IDLE_POLL_S)

    async def _shut_down(
        self, server: WorkerServer, thread: threading.Thread, ended: asyncio.Event
    ) -> int:
        if self._engine is not None:
            self._engine.stop()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), STOP_TIMEOUT_S)
        # Else the model is still loading: nothing to finish, the thread dies with the process.
        self._context.streams.close()
        await server.stop(1.0)
        if self._failure is None:
            logger.info("stopped")
            return 0
        return 2 if isinstance(self._failure, ConfigError) else 1

    def _run_engine(self, on_built: Callable[[], None], on_ended: Callable[[], None]) -> None:
        try:
            self._engine = self._build_engine(self._context)
            on_built()
            self._engine.run()
        except ScissionError as error:
            self._failure = error
            logger.error("%s", error, exc_info=logger.isEnabledFor(logging.DEBUG))
        except BaseException as error:
            self._failure = error
            logger.exception("the engine failed")
        finally:
            on_ended()

    def _load(self) -> inference_pb2.Load:
        return inference_pb2.Load() if self._engine is None else self._engine.load()

    def _serve_metrics(self) -> HTTPServer:
        endpoint = self._config.endpoint
        try:
            server, _ = start_http_server(
                endpoint.metrics_port, endpoint.host, self._context.metrics.registry
            )
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {endpoint.host}:{endpoint.metrics_port} for metrics: {error}"
            ) from error
        return server


class _MetricsServer:
    def __init__(self, server: HTTPServer) -> None:
        self._server = server

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


async def _first_of(*events: asyncio.Event) -> None:
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
