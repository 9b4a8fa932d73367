"""The gateway process: `python -m scission.services.gateway` or `scission gateway`.

HTTP for clients and the gRPC registry for workers, on one event loop. SIGTERM: new requests are
refused and /ready says so, streams may finish for the shutdown timeout, then the process ends with
0; a second signal ends it at once.
"""

import asyncio
import contextlib
import gc
import importlib.metadata
import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator

import grpc.aio
import uvicorn

from scission.common import rpc
from scission.common.command_line import run_main
from scission.common.config import GatewayConfig
from scission.common.errors import ConfigError, ScissionError
from scission.common.log import set_up_logging
from scission.common.metrics import GatewayMetrics, Metrics
from scission.common.ports import listen
from scission.common.types import Epoch, Role
from scission.protos import cluster_pb2_grpc
from scission.services.gateway.app import AppDependencies, create_app
from scission.services.gateway.cluster import Cluster
from scission.services.gateway.engine import RequestIds
from scission.services.gateway.model_folder import read_model_folder
from scission.services.gateway.operations import make_operations_router

logger = logging.getLogger(__name__)

# Answers that are complete may still be on their way to slow clients.
CLOSE_TIMEOUT_S = 5.0


def run(config: GatewayConfig) -> int:
    """One gateway process, until a signal or a failure; returns its exit status."""
    set_up_logging(config.log, Role.GATEWAY)
    try:
        import uvloop
    except ImportError:
        run_loop = asyncio.run
    else:
        run_loop = uvloop.run
    try:
        return run_loop(_Gateway(config).run())
    except ConfigError as error:
        logger.error("%s", error)
        return 2
    except ScissionError as error:
        logger.error("%s", error)
        return 1


class _Gateway:
    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._version = importlib.metadata.version("scission")
        self._epoch = Epoch(secrets.randbits(63) | 1)

    async def run(self) -> int:
        stopping = asyncio.Event()
        _drain_on_signals(stopping)
        config = self._config
        metrics = Metrics(Role.GATEWAY, config.model.names[0], self._version)
        cluster = Cluster(
            self._epoch,
            config.discovery,
            config.admission,
            config.routing,
            GatewayMetrics(metrics),
        )
        http = _HttpServer(self._http_config(cluster, metrics))
        registry = rpc.make_server()
        cluster_pb2_grpc.add_RegistryServicer_to_server(cluster.registry, registry)
        registry_port = rpc.bind(registry, config.registry.host, config.registry.port)
        with self._listen() as listeners:
            await registry.start()
            logger.info(
                "listening",
                extra={
                    "http": " ".join(
                        "http://" + rpc.join_address(*listener.getsockname()[:2])
                        for listener in listeners
                    ),
                    "registry": rpc.join_address(config.registry.host, registry_port),
                    "epoch": f"{self._epoch:x}",
                },
            )
            # What start-up made lives as long as the process: no collection need look at it.
            gc.collect()
            gc.freeze()
            watching = asyncio.create_task(cluster.run(), name="watch workers")
            serving = asyncio.create_task(http.serve(sockets=listeners), name="http")
            waiting = asyncio.create_task(stopping.wait(), name="wait for a signal")
            done, _ = await asyncio.wait(
                {watching, serving, waiting}, return_when=asyncio.FIRST_COMPLETED
            )
            if waiting in done:
                await self._drain(cluster, http, serving, registry)
                watching.cancel()
                logger.info("stopped")
                return 0
            for task in done:
                logger.error("%s ended", task.get_name(), exc_info=task.exception())
            return 1

    async def _drain(
        self,
        cluster: Cluster,
        http: "_HttpServer",
        serving: asyncio.Task[None],
        registry: grpc.aio.Server,
    ) -> None:
        cluster.drain()
        if not await cluster.wait_until_idle(self._config.http.shutdown_timeout_s):
            logger.warning("requests still run after the shutdown timeout: aborting them")
        # First, or workers that find us leaving would register again.
        await registry.stop(0.2)
        await cluster.close()
        http.should_exit = True
        await serving

    def _http_config(self, cluster: Cluster, metrics: Metrics) -> uvicorn.Config:
        options = self._config.http
        folder = read_model_folder(self._config.model, self._config.chat)
        app = create_app(
            AppDependencies(
                engine=cluster,
                model=folder.model,
                tokenizer=folder.tokenizer,
                chat_format=folder.chat_format,
                request_ids=RequestIds(self._epoch),
                metrics=metrics,
                version=self._version,
                options=options,
                routers=(make_operations_router(cluster),),
            )
        )
        return uvicorn.Config(
            app,
            loop="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(CLOSE_TIMEOUT_S),
        )

    @contextlib.contextmanager
    def _listen(self) -> Iterator[list[socket.socket]]:
        options = self._config.http
        ports = [options.port] if options.own_port is None else [options.port, options.own_port]
        with contextlib.ExitStack() as stack:
            listeners = []
            for port in ports:
                is_shared = len(ports) > 1 and port == options.port
                try:
                    listener = listen(options.host, port, is_shared=is_shared)
                except OSError as error:
                    raise ConfigError(f"cannot listen on {options.host}:{port}: {error}") from error
                listeners.append(stack.enter_context(listener))
            yield listeners


class _HttpServer(uvicorn.Server):
    """uvicorn, but signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _drain_on_signals(stopping: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if stopping.is_set():
            logger.warning("second signal, exiting at once")
            os._exit(128 + number)
        logger.info("%s: draining", number.name)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)


if __name__ == "__main__":
    run_main(Role.GATEWAY, run)
