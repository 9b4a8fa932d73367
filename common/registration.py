"""A worker makes itself known to every gateway, and says each second that it lives.

A gateway is a name; every address the name resolves to is a gateway of its own, and the name is
resolved anew every few seconds. A gateway that answers `unknown` (it was restarted) or that missed
a heartbeat gets the whole description again, so what it knows of our prefixes is never stale.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from scission.common import rpc
from scission.common.config import DiscoveryOptions, parse_address
from scission.protos import cluster_pb2, cluster_pb2_grpc, inference_pb2

logger = logging.getLogger(__name__)

Resolver = Callable[[str, int], Awaitable[set[str]]]


@dataclass(frozen=True, slots=True)
class WorkerState:
    """Where the registrar reads what it tells; called on the event loop.

    `prefixes(True)` is everything held and changes nothing; `prefixes(False)` is what was added and
    evicted since the last call with False.
    """

    describe: Callable[[], cluster_pb2.WorkerDescription]
    load: Callable[[], inference_pb2.Load]
    prefixes: Callable[[bool], cluster_pb2.PrefixUpdate]


async def resolve(host: str, port: int) -> set[str]:
    """Every address of a name, as `ip:port`: the IPv4 ones, else the IPv6 ones.

    Not both: one gateway on both families would be two gateways to us.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    by_family = {
        family: {rpc.join_address(str(entry[4][0]), port) for entry in found if entry[0] == family}
        for family in (socket.AF_INET, socket.AF_INET6)
    }
    return by_family[socket.AF_INET] or by_family[socket.AF_INET6]


class _Gateway:
    """One address at which we register."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.is_registered = False
        self.has_failed = False  # since it was last registered; one log line a failure
        self._channel = rpc.open_channel(address)
        self._stub = cluster_pb2_grpc.RegistryStub(self._channel)

    async def beat(
        self, state: WorkerState, update: cluster_pb2.PrefixUpdate, timeout_s: float
    ) -> None:
        """Heartbeat, or register when this gateway does not know us (any more)."""
        try:
            if not self.is_registered:
                await self._register(state, timeout_s)
                return
            reply = await self._stub.Heartbeat(
                cluster_pb2.HeartbeatRequest(
                    worker_id=state.describe().worker_id, load=state.load(), prefixes=update
                ),
                timeout=timeout_s,
            )
            if not reply.is_known:
                self.is_registered = False
                await self._register(state, timeout_s)
        except grpc.aio.AioRpcError as error:
            # What it missed of our prefixes is made up for by registering again.
            self.is_registered = False
            if not self.has_failed:
                self.has_failed = True
                logger.warning(
                    "gateway does not answer: %s",
                    error.details() or error.code().name,
                    extra={"gateway": self.address},
                )

    async def deregister(self, worker_id: str, timeout_s: float) -> None:
        if not self.is_registered:
            return
        try:
            await self._stub.Deregister(
                cluster_pb2.DeregisterRequest(worker_id=worker_id), timeout=timeout_s
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                # as when a whole stack ends: gateways go first
                logger.info("gateway has gone before us", extra={"gateway": self.address})
                return
            logger.warning(
                "gateway was not told of our end: %s",
                error.details() or error.code().name,
                extra={"gateway": self.address},
            )

    async def close(self) -> None:
        await self._channel.close()

    async def _register(self, state: WorkerState, timeout_s: float) -> None:
        description = state.describe()
        description.prefixes.CopyFrom(state.prefixes(True))
        await self._stub.Register(description, timeout=timeout_s)
        self.is_registered = True
        self.has_failed = False
        logger.info("registered", extra={"gateway": self.address})


class Registrar:
    """Registers a worker at all gateways and keeps it registered until `deregister`."""

    def __init__(
        self, state: WorkerState, options: DiscoveryOptions, resolver: Resolver = resolve
    ) -> None:
        self._state = state
        self._options = options
        self._resolver = resolver
        self._names = [parse_address(address) for address in options.gateways]
        self._gateways: dict[str, _Gateway] = {}
        self._resolved_at = float("-inf")

    @property
    def registered_at(self) -> Sequence[str]:
        return [g.address for g in self._gateways.values() if g.is_registered]

    async def run(self) -> None:
        """Beat at the configured interval until cancelled."""
        while True:
            began_at = time.monotonic()
            await self.beat()
            elapsed_s = time.monotonic() - began_at
            await asyncio.sleep(max(0.0, self._options.heartbeat_s - elapsed_s))

    async def beat(self) -> None:
        """One heartbeat to every gateway at once; each may take one interval."""
        if time.monotonic() - self._resolved_at >= self._options.resolve_s or not self._gateways:
            await self._resolve()
        # One delta for all: a gateway that does not get it registers again.
        update = self._state.prefixes(False)
        await asyncio.gather(
            *(
                gateway.beat(self._state, update, self._options.heartbeat_s)
                for gateway in self._gateways.values()
            )
        )

    async def deregister(self) -> None:
        """Tell every gateway that we are leaving; each may take one interval."""
        worker_id = self._state.describe().worker_id
        gateways = list(self._gateways.values())
        await asyncio.gather(
            *(gateway.deregister(worker_id, self._options.heartbeat_s) for gateway in gateways)
        )
        await asyncio.gather(*(gateway.close() for gateway in gateways))
        self._gateways.clear()

    async def _resolve(self) -> None:
        addresses: set[str] = set()
        for host, port in self._names:
            try:
                addresses |= await asyncio.wait_for(
                    self._resolver(host, port), self._options.resolve_s
                )
            except (OSError, TimeoutError) as error:
                # Those known stay: a name server's failure is not a gateway's.
                logger.warning("cannot resolve gateway %s: %s", host, error)
                addresses |= self._gateways.keys()
        self._resolved_at = time.monotonic()
        for address in addresses - self._gateways.keys():
            self._gateways[address] = _Gateway(address)
        for address in self._gateways.keys() - addresses:
            await self._gateways.pop(address).close()
