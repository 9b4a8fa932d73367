"""The prefills connected to a decode: handshake, tier, what is sent to them, their loss."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import zmq
from google.protobuf.message import Message

from scission.common.cache.layout import first_mismatch
from scission.common.transfer.arena import PREFIX, Arena, is_locked
from scission.common.transfer.incoming import Incoming, Session
from scission.common.transfer.options import TransferOptions
from scission.common.transfer.sockets import Socket
from scission.common.transfer.wire import VERSION, Header, Kind, pack_control
from scission.protos import transfer_pb2

logger = logging.getLogger(__name__)

MAX_SESSIONS = 1024
MAX_OUTBOX = 1000  # control messages that wait for room in the socket


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a receiver says of itself."""

    worker_id: str
    epoch: int
    layout_digest: dict[str, str]
    address: str
    bulk_addresses: list[str]
    arena: Arena | None
    options: TransferOptions


class Peers:
    """Lives on the receiver's I/O thread. `end_all` ends a lost session's transfers, `free` takes
    back the slots of one whose peer cannot write any more.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        control: Socket,
        stats: Counter[str],
        end_all: Callable[[Session], None],
        free: Callable[[Incoming], None],
    ) -> None:
        self.sessions: dict[bytes, Session] = {}
        self._endpoint = endpoint
        self._control = control
        self._stats = stats
        self._end_all = end_all
        self._free = free
        self._num_sessions = 0

    def numbered(self, number: int) -> Session | None:
        """The session with this number, if it still stands."""
        return next((s for s in self.sessions.values() if s.number == number), None)

    def send(
        self, session: Session, kind: Kind, transfer_id: int, body: Message | None = None
    ) -> None:
        """A ROUTER that must deliver says when it cannot: full (wait) or gone (the session is
        over).
        """
        if session.is_lost:
            return
        session.outbox.append(
            [session.identity, *pack_control(kind, transfer_id, self._endpoint.epoch, body)]
        )
        self.flush(session)
        if len(session.outbox) > MAX_OUTBOX:
            self.lose(session)

    def flush(self, session: Session) -> None:
        while session.outbox and not session.is_lost:
            try:
                self._control.send_multipart(session.outbox[0], zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                self.lose(session)
                return
            session.outbox.popleft()

    def lose(self, session: Session) -> None:
        """The connection is gone: its transfers have failed, and what it may still write stays in
        quarantine.
        """
        if session.is_lost:
            return
        session.is_lost = True
        session.outbox.clear()
        logger.info("%s: connection lost", session.worker_id)
        self._end_all(session)
        self.bury(session)

    def bury(self, session: Session) -> None:
        """Free a lost session's quarantine once its process cannot write any more."""
        is_shared = session.tier != transfer_pb2.TIER_MESSAGE
        if is_shared and session.lease is not None and is_locked(session.lease):
            return
        aborting, session.aborting = session.aborting, {}
        if session.lease is not None:
            session.lease.unlink(missing_ok=True)
        self.sessions.pop(session.identity, None)
        for transfer in aborting.values():
            self._free(transfer)

    def hello(self, identity: bytes, header: Header, hello: transfer_pb2.Hello) -> None:
        if identity in self.sessions:
            return  # said twice
        refuse = self._objection(header, hello)
        self._num_sessions += 1
        session = Session(
            self._num_sessions,
            identity,
            hello.worker_id,
            hello.epoch,
            transfer_pb2.TIER_MESSAGE,
            last_heard=time.monotonic(),
        )
        if refuse is not None:
            # answered under the epoch that was asked for: the asker drops any other
            self._stats["refused_hellos"] += 1
            frames = pack_control(Kind.REFUSE, 0, header.epoch, refuse)
            session.outbox.append([identity, *frames])
            self.flush(session)
            return
        self._supersede(session)
        welcome = transfer_pb2.Welcome(
            epoch=self._endpoint.epoch,
            worker_id=self._endpoint.worker_id,
            slot_bytes=self._endpoint.options.slot_bytes,
            num_slots=self._endpoint.options.num_slots,
            bulk_addresses=self._endpoint.bulk_addresses,
        )
        arena = self._endpoint.arena
        if arena is not None and transfer_pb2.TIER_SHARED in hello.tiers:
            session.tier = None
            session.lease = arena.path.with_name(
                f"{PREFIX}{self._endpoint.epoch:016x}-{session.number}.lease"
            )
            welcome.arena_name = arena.path.name
            welcome.ipc_name = arena.path.with_suffix(".ipc").name
            welcome.lease_name = session.lease.name
        self.sessions[identity] = session
        self.send(session, Kind.WELCOME, 0, welcome)

    def _objection(self, header: Header, hello: transfer_pb2.Hello) -> transfer_pb2.Refuse | None:
        """Why this connection cannot be."""
        if header.epoch != self._endpoint.epoch:
            return transfer_pb2.Refuse(reason="old_epoch")
        if hello.protocol_version != VERSION:
            detail = f"version {VERSION} is spoken here, got {hello.protocol_version}"
            return transfer_pb2.Refuse(reason="protocol_version", detail=detail)
        digest = self._endpoint.layout_digest
        field = first_mismatch(digest, dict(hello.layout_digest))
        if field is not None:
            ours, theirs = digest.get(field), hello.layout_digest.get(field)
            detail = f"{field} is {ours} here and {theirs} there"
            return transfer_pb2.Refuse(reason="layout_mismatch", field=field, detail=detail)
        if len(self.sessions) >= MAX_SESSIONS:
            return transfer_pb2.Refuse(reason="full", detail=f"{MAX_SESSIONS} connections")
        return None

    def _supersede(self, session: Session) -> None:
        """A worker connects anew: what it had open over an older connection is over."""
        for known in list(self.sessions.values()):
            if known.worker_id != session.worker_id:
                continue
            if known.epoch != session.epoch:
                known.lease = None  # another life of the worker: the old one cannot write any more
            self.lose(known)

    def prove(self, session: Session, proof: transfer_pb2.ArenaProof) -> None:
        if session.tier is None:
            arena = self._endpoint.arena
            assert arena is not None and session.lease is not None
            is_shared = proof.nonce == arena.nonce and is_locked(session.lease)
            session.tier = transfer_pb2.TIER_SHARED if is_shared else transfer_pb2.TIER_MESSAGE
        decision = transfer_pb2.TierDecision(tier=session.tier)
        self.send(session, Kind.TIER_DECISION, 0, decision)
