"""A prefill's connection to one life of one decode: handshake, tier, sockets.

HELLO -> WELCOME (or REFUSE) -> where both can share memory ARENA_PROOF -> TIER_DECISION -> up. A
connection never comes back: once it is lost, the next transfer makes a new one under a fresh
identity.
"""

import logging
import secrets
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq
from google.protobuf.message import Message
from zmq.utils.monitor import recv_monitor_message

from scission.common.errors import TransferError, WireError
from scission.common.transfer.arena import Arena, Lease
from scission.common.transfer.events import Destination
from scission.common.transfer.loop import Loop
from scission.common.transfer.options import TransferOptions
from scission.common.transfer.sockets import Socket, bulk_socket, control_socket, receive
from scission.common.transfer.wire import Header, Kind, pack_control, unpack_control
from scission.protos import transfer_pb2

logger = logging.getLogger(__name__)

MAX_OUTBOX = 1000  # control messages that wait for room in the socket
LOST_EVENTS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
OnMessage = Callable[["Connection", Header, Message | None], None]
OnUp = Callable[["Connection"], None]
OnLost = Callable[["Connection", str], None]


class Connection:
    """Lives on the sender's I/O thread. Hands messages about transfers to `on_message` and its end
    to `on_lost`, once, with the reason; a refused HELLO arrives as the message it is. Slots below
    `min_slot_bytes` will not do.
    """

    def __init__(
        self,
        loop: Loop,
        options: TransferOptions,
        hello: transfer_pb2.Hello,
        destination: Destination,
        min_slot_bytes: int,
        pins_arena: bool,
        on_up: OnUp,
        on_message: OnMessage,
        on_lost: OnLost,
    ) -> None:
        """Raises TransferError for an address that ZeroMQ does not understand."""
        self.destination = destination
        self.is_up = False
        self.arena: Arena | None = None  # set: the shared tier
        self.slot_bytes = 0
        self.num_slots = 0
        self.last_heard = time.monotonic()
        self.num_dropped = 0  # messages that were not valid, or of another epoch
        self._started = self.last_heard
        self._loop = loop
        self._options = options
        self._hello = hello
        self._min_slot_bytes = min_slot_bytes
        self._pins_arena = pins_arena
        self._on_up = on_up
        self._on_message = on_message
        self._on_lost = on_lost
        self._is_said = False
        self._is_closed = False
        self._lease: Lease | None = None
        self._bulk: deque[Socket] = deque()
        self._headers: list[bytes] = []  # of the next message of the shared tier
        self._unsent: deque[list[bytes | zmq.Frame]] = deque()
        self._outbox: deque[list[bytes]] = deque()
        self._identity = b"P" + struct.pack("<Q", hello.epoch) + secrets.token_bytes(8)
        self._control = control_socket(loop.context, options, self._identity)
        self._monitor = self._control.get_monitor_socket(
            LOST_EVENTS | zmq.EVENT_HANDSHAKE_SUCCEEDED
        )
        loop.register(self._control, self._receive)
        loop.register(self._monitor, self._observe)
        try:
            self._control.connect(destination.address)
        except zmq.ZMQError as error:
            self.close()
            raise TransferError(f"transfer address {destination.address!r}: {error}") from error
        self._say_hello()

    @property
    def tier(self) -> str:
        if self.arena is not None:
            return "shared"
        return self.destination.address.split(":", 1)[0]

    def send(self, kind: Kind, transfer_id: int, body: Message | None = None) -> None:
        """Send a control message; it waits in the outbox while the socket is full."""
        if self._is_closed:
            return
        frames = pack_control(kind, transfer_id, self.destination.epoch, body)
        if self._outbox or not self._try_send(frames):
            self._outbox.append(frames)
            if len(self._outbox) > MAX_OUTBOX:
                self._lose("peer_lost")

    @property
    def is_blocked(self) -> bool:
        """Whether chunks wait for room in the bulk sockets: send no more of them."""
        return bool(self._unsent)

    def send_chunk(self, header: bytes, rows: zmq.Frame | None) -> None:
        """Send a CHUNK, soon: without rows (shared tier) its header goes out with the next
        `flush`.
        """
        if rows is None:
            self._headers.append(header)
        else:
            self._unsent.append([header, rows])
            self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the bulk sockets have room."""
        if self._headers and not self._is_closed:
            self._unsent.append([b"".join(self._headers)])
            self._headers.clear()
        while self._unsent and self._try_send_bulk(self._unsent[0]):
            self._unsent.popleft()

    def _try_send_bulk(self, frames: Sequence[bytes | zmq.Frame]) -> bool:
        for _ in range(len(self._bulk)):
            socket = self._bulk[0]
            self._bulk.rotate(-1)
            try:
                socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
            except zmq.Again:
                continue
            return True
        return False

    def tick(self, now: float) -> None:
        if not self._is_said:
            self._say_hello()
        while self._outbox and self._try_send(self._outbox[0]):
            self._outbox.popleft()
        if not self.is_up and now - self._started > self._options.connect_timeout_s:
            self._lose("unreachable")

    def close(self) -> None:
        """Let go of the sockets and of the arena. Nothing is written to it any more."""
        if self._is_closed:
            return
        self._is_closed = True
        self.is_up = False
        self._loop.unregister(self._monitor)
        self._loop.unregister(self._control)
        self._control.disable_monitor()
        self._monitor.close(linger=0)
        self._control.close()
        for socket in self._bulk:
            socket.close(linger=0)
        self._bulk.clear()
        self._headers.clear()
        self._unsent.clear()
        if self.arena is not None:
            self.arena.close()
        if self._lease is not None:
            self._lease.close()

    def _lose(self, reason: str) -> None:
        if not self._is_closed:
            self.close()
            self._on_lost(self, reason)

    def _say_hello(self) -> None:
        frames = pack_control(Kind.HELLO, 0, self.destination.epoch, self._hello)
        self._is_said = self._try_send(frames)

    def _try_send(self, frames: list[bytes]) -> bool:
        try:
            self._control.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _observe(self) -> None:
        """A change of the connection: a new process may answer under the same address from here
        on.
        """
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            if event & LOST_EVENTS:
                self._lose("peer_lost" if self.is_up or self._is_said else "unreachable")
                return
            if not self._is_said:
                self._say_hello()

    def _receive(self) -> None:
        while not self._is_closed:
            frames = receive(self._control, copy=True)
            if frames is None:
                return
            try:
                header, body = unpack_control(frames)
            except WireError as error:
                self.num_dropped += 1
                logger.warning("%s sent a message that is not valid: %s", self._name, error)
                continue
            if header.epoch != self.destination.epoch:
                self.num_dropped += 1
                continue
            self.last_heard = time.monotonic()
            if isinstance(body, transfer_pb2.Welcome):
                self._welcome(body)
            elif isinstance(body, transfer_pb2.TierDecision):
                self._decide_tier(body)
            elif header.kind is Kind.PING:
                self.send(Kind.PONG, 0)
            elif header.kind is not Kind.PONG:
                self._on_message(self, header, body)

    @property
    def _name(self) -> str:
        return self.destination.worker_id

    def _welcome(self, welcome: transfer_pb2.Welcome) -> None:
        if self.slot_bytes or self.is_up:
            return  # said twice
        if welcome.slot_bytes < self._min_slot_bytes or welcome.num_slots < 1:
            self._lose("protocol")
            return
        self.slot_bytes = welcome.slot_bytes
        self.num_slots = welcome.num_slots
        self._welcomed = welcome
        directory = self._options.arena_dir
        if not welcome.arena_name or directory is None:
            self._connect_bulk(list(welcome.bulk_addresses))
            return
        nonce = b""
        try:
            nonce = self._open_arena(directory, welcome)
        except (OSError, TransferError) as error:
            logger.info("%s: no shared memory with this worker: %s", self._name, error)
        self._pin_arena()
        self.send(Kind.ARENA_PROOF, 0, transfer_pb2.ArenaProof(nonce=nonce))

    def _open_arena(self, directory: Path, welcome: transfer_pb2.Welcome) -> bytes:
        """Take the arena and our lease of it; the arena's nonce. Raises OSError or TransferError
        where either is not to be had.
        """
        arena = Arena.open(directory, welcome.arena_name, welcome.slot_bytes, welcome.num_slots)
        try:
            self._lease = Lease(directory, welcome.lease_name)
        except (OSError, TransferError):
            arena.close()
            raise
        self.arena = arena
        return arena.nonce

    def _pin_arena(self) -> None:
        if self.arena is None or not self._pins_arena:
            return
        try:
            self.arena.pin()
        except RuntimeError as error:
            logger.warning("%s: the device copies to it by way of the host: %s", self._name, error)

    def _decide_tier(self, decision: transfer_pb2.TierDecision) -> None:
        if self.is_up or not self.slot_bytes:
            return
        if decision.tier == transfer_pb2.TIER_SHARED:
            directory = self._options.arena_dir
            if self.arena is None or directory is None:
                self._lose("protocol")
                return
            self._connect_bulk([f"ipc://{directory / self._welcomed.ipc_name}"])
            return
        if self.arena is not None:
            self.arena.close()
            self.arena = None
        if self._lease is not None:
            self._lease.close()
            self._lease = None
        self._connect_bulk(list(self._welcomed.bulk_addresses))

    def _connect_bulk(self, addresses: list[str]) -> None:
        if not addresses:
            self._lose("protocol")
            return
        for i, address in enumerate(addresses[:16]):
            socket = bulk_socket(self._loop.context, self._options, self._identity + bytes([i]))
            self._bulk.append(socket)
            try:
                socket.connect(address)
            except zmq.ZMQError as error:
                logger.warning("%s: bulk address %r: %s", self._name, address, error)
                self._lose("protocol")
                return
        self.is_up = True
        logger.info("%s: transfers go by %s", self._name, self.tier)
        self._on_up(self)
