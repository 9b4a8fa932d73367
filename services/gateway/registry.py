"""The workers this gateway knows: they register, say that they live, and go.

A worker takes requests while its event stream is alive (worker_link.py), its heartbeats come and it
does not drain. Pairs of prefill and decode must have equal layout digests.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import grpc.aio

from scission.common import rpc
from scission.common.cache.layout import first_mismatch
from scission.common.config import DiscoveryOptions
from scission.common.errors import CapacityError, RequestError, ScissionError
from scission.common.metrics import GatewayMetrics
from scission.common.prefix_hash import HASH_BYTES
from scission.common.types import Role
from scission.protos import cluster_pb2, cluster_pb2_grpc
from scission.services.gateway.worker_link import WorkerLink

logger = logging.getLogger(__name__)

MAX_WORKERS = 1024
MAX_PREFIXES = 1 << 20  # of one worker
MISSED_HEARTBEATS = 5  # after which a worker takes no requests

DigestKey = tuple[tuple[str, str], ...]


class Worker:
    """A registered worker."""

    def __init__(self, description: cluster_pb2.WorkerDescription, link: WorkerLink) -> None:
        self.worker_id = description.worker_id
        self.role = Role(description.role)
        self.description = description
        self.digest = dict(description.layout_digest)
        self.digest_key: DigestKey = tuple(sorted(self.digest.items()))
        self.link = link
        self.heard_at = 0.0
        self.is_leaving = False
        self.prefixes: set[bytes] = set()

    def state(self) -> str:
        """For people: ready, draining, silent or connecting."""
        if self.is_leaving or self.link.load.is_draining:
            return "draining"
        return "ready" if self.link.is_live else "silent"


class PrefixIndex:
    """Which prefill workers hold which prefix; one look-up finds all of them."""

    def __init__(self) -> None:
        self._holders: dict[bytes, set[str]] = {}

    def add(self, worker_id: str, prefixes: Iterable[bytes]) -> None:
        for prefix in prefixes:
            self._holders.setdefault(prefix, set()).add(worker_id)

    def remove(self, worker_id: str, prefixes: Iterable[bytes]) -> None:
        for prefix in prefixes:
            holders = self._holders.get(prefix)
            if holders is not None:
                holders.discard(worker_id)
                if not holders:
                    del self._holders[prefix]

    def match(self, hashes: Sequence[bytes], worker_ids: frozenset[str]) -> dict[str, int]:
        """Per worker the blocks of its longest cached prefix; workers without one are left out.

        `hashes` are a prompt's block hashes. A worker names only the prefixes that it can start
        from, so a longer one may be there although a shorter one is not.
        """
        matched: dict[str, int] = {}
        if not self._holders:
            return matched
        for number in range(len(hashes), 0, -1):
            for worker_id in self._holders.get(hashes[number - 1], ()):
                if worker_id in worker_ids:
                    matched.setdefault(worker_id, number)
            if len(matched) == len(worker_ids):
                break
        return matched


class Registry(cluster_pb2_grpc.RegistryServicer):
    """The gRPC service that workers register at, and what it knows; belongs to the event loop."""

    def __init__(
        self,
        gateway_epoch: int,
        options: DiscoveryOptions,
        metrics: GatewayMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.gateway_epoch = gateway_epoch
        self.prefix_index = PrefixIndex()
        self._options = options
        self._metrics = metrics
        self._clock = clock
        self._workers: dict[str, Worker] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def workers(self) -> Mapping[str, Worker]:
        return self._workers

    def takes_requests(self, worker: Worker) -> bool:
        expiry_s = MISSED_HEARTBEATS * self._options.heartbeat_s
        return (
            worker.link.is_live
            and not worker.is_leaving
            and not worker.link.load.is_draining
            and self._clock() - worker.heard_at <= expiry_s
        )

    def available(self, role: Role) -> list[Worker]:
        """Workers of a role that take requests, in order of registration."""
        return [w for w in self._workers.values() if w.role is role and self.takes_requests(w)]

    def explain(self) -> str:
        """Why no (prefill, decode) pair can be formed; empty when one can."""
        prefills, decodes = self.available(Role.PREFILL), self.available(Role.DECODE)
        missing = [str(r) for r, ws in ((Role.PREFILL, prefills), (Role.DECODE, decodes)) if not ws]
        if missing:
            return f"no {' and no '.join(missing)} worker answers yet"
        if {w.digest_key for w in prefills} & {w.digest_key for w in decodes}:
            return ""
        field = first_mismatch(prefills[0].digest, decodes[0].digest)
        return (
            f"no prefill and decode workers have equal layouts: {prefills[0].worker_id} and "
            f"{decodes[0].worker_id} differ in {field}"
        )

    async def Register(
        self, request: cluster_pb2.WorkerDescription, context: grpc.aio.ServicerContext
    ) -> cluster_pb2.RegisterReply:
        try:
            self.register(request)
        except ScissionError as error:
            await rpc.abort(context, error)
        return cluster_pb2.RegisterReply(gateway_epoch=self.gateway_epoch)

    async def Heartbeat(
        self, request: cluster_pb2.HeartbeatRequest, context: grpc.aio.ServicerContext
    ) -> cluster_pb2.HeartbeatReply:
        worker = self._workers.get(request.worker_id)
        if worker is not None:
            worker.heard_at = self._clock()
            self._update_prefixes(worker, request.prefixes)
            if not worker.link.is_live:
                worker.link.load = request.load
        return cluster_pb2.HeartbeatReply(
            is_known=worker is not None and not worker.is_leaving,
            gateway_epoch=self.gateway_epoch,
        )

    async def Deregister(
        self, request: cluster_pb2.DeregisterRequest, context: grpc.aio.ServicerContext
    ) -> cluster_pb2.DeregisterReply:
        worker = self._workers.get(request.worker_id)
        if worker is not None:
            # Its stream stays for what still runs there; the entry goes when that ends.
            worker.is_leaving = True
            logger.info("worker is leaving", extra={"worker": worker.worker_id})
        return cluster_pb2.DeregisterReply()

    def register(self, description: cluster_pb2.WorkerDescription) -> None:
        """Take a worker in, or anew; whatever else was known at its address is dropped.

        Raises:
            RequestError: the description makes no sense.
            CapacityError: there are too many workers.
        """
        if description.role not in (Role.PREFILL, Role.DECODE):
            raise RequestError(f"role must be prefill or decode, got {description.role!r}")
        if not description.worker_id or not description.grpc_address:
            raise RequestError("worker_id and grpc_address must be given")
        if description.role == Role.DECODE and not description.transfer_address:
            raise RequestError("a decode must have a transfer_address")
        worker = self._workers.get(description.worker_id)
        if worker is None:
            for other in list(self._workers.values()):
                if other.description.grpc_address == description.grpc_address:
                    self._drop(other, "replaced")
            if len(self._workers) >= MAX_WORKERS:
                raise CapacityError(f"{MAX_WORKERS} workers are registered already")
            worker = self._workers[description.worker_id] = self._connect(description)
            logger.info(
                "worker registered",
                extra={"worker": worker.worker_id, "grpc": description.grpc_address},
            )
            self._warn_of_mismatch(worker)
        worker.heard_at = self._clock()
        worker.is_leaving = False
        self.prefix_index.remove(worker.worker_id, worker.prefixes)
        worker.prefixes.clear()
        self._update_prefixes(worker, description.prefixes)

    def check(self) -> None:
        """Look for silent and expired workers; called several times a second."""
        now = self._clock()
        expiry_s = MISSED_HEARTBEATS * self._options.heartbeat_s
        for worker in list(self._workers.values()):
            worker.link.check_silence()
            if worker.link.is_live:
                continue
            if worker.is_leaving:
                self._drop(worker, "deregistered")
            elif now - worker.heard_at > expiry_s:
                self._drop(worker, "expired")
        for role in (Role.PREFILL, Role.DECODE):
            ready = len(self.available(role))
            known = sum(w.role is role for w in self._workers.values())
            self._metrics.workers(f"{role}_ready").set(ready)
            self._metrics.workers(f"{role}_suspect").set(known - ready)

    def forgive_silence(self) -> None:
        """Our own loop was held up; see WorkerLink."""
        for worker in self._workers.values():
            worker.link.forgive_silence()
            worker.heard_at = max(worker.heard_at, self._clock() - self._options.heartbeat_s)

    async def close(self) -> None:
        for worker in list(self._workers.values()):
            self._drop(worker, "deregistered")
        if self._closing:
            await asyncio.wait(self._closing)

    def _connect(self, description: cluster_pb2.WorkerDescription) -> Worker:
        link = WorkerLink(
            description,
            self.gateway_epoch,
            self._options.silence_s,
            on_lost=lambda reason: self._metrics.worker_losses(reason).inc(),
            on_gone=lambda: self._on_gone(description.worker_id),
            clock=self._clock,
        )
        return Worker(description, link)

    def _on_gone(self, worker_id: str) -> None:
        worker = self._workers.get(worker_id)
        if worker is not None:
            self._drop(worker, "gone")

    def _drop(self, worker: Worker, reason: str) -> None:
        del self._workers[worker.worker_id]
        self.prefix_index.remove(worker.worker_id, worker.prefixes)
        self._metrics.worker_losses(reason).inc()
        logger.info("worker dropped: %s", reason, extra={"worker": worker.worker_id})
        task = asyncio.create_task(worker.link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _update_prefixes(self, worker: Worker, update: cluster_pb2.PrefixUpdate) -> None:
        evicted = worker.prefixes.intersection(update.evicted)
        worker.prefixes -= evicted
        self.prefix_index.remove(worker.worker_id, evicted)
        room = MAX_PREFIXES - len(worker.prefixes)
        # Added last: an update may evict a prefix and add it again.
        added = [prefix for prefix in update.added if len(prefix) == HASH_BYTES][: max(0, room)]
        worker.prefixes.update(added)
        self.prefix_index.add(worker.worker_id, added)

    def _warn_of_mismatch(self, worker: Worker) -> None:
        for other in self._workers.values():
            if other.role is not worker.role and other.digest_key != worker.digest_key:
                logger.warning(
                    "layouts of %s and %s differ in %s: they are never paired",
                    worker.worker_id,
                    other.worker_id,
                    first_mismatch(worker.digest, other.digest),
                )
