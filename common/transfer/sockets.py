"""Every socket of the transfer: finite queues, bounded messages, CURVE where keys are
configured.
"""

import logging
import re
from typing import Any

import zmq
from zmq.utils import z85

from scission.common.errors import ConfigError
from scission.common.transfer.options import CurveKeys, TransferOptions
from scission.common.transfer.wire import HEADER, MAX_CONTROL_BYTES

logger = logging.getLogger(__name__)

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]

CONTROL_HIGH_WATER_MARK = 1000  # messages
LINGER_MS = 200  # for the last ABORTs at close
ZAP_ADDRESS = "inproc://zeromq.zap.01"
MAX_FRAMES = 4


def control_socket(context: Context, options: TransferOptions, identity: bytes | None) -> Socket:
    """With an identity a sender's DEALER, without one a receiver's ROUTER."""
    return _socket(context, options, identity, CONTROL_HIGH_WATER_MARK, MAX_CONTROL_BYTES)


def bulk_socket(context: Context, options: TransferOptions, identity: bytes | None) -> Socket:
    """As `control_socket`, for CHUNK messages; credits keep their number below the high-water
    mark.
    """
    # a reader tells how far it came only each half of the mark
    high_water_mark = 2 * (options.num_slots + 1)
    max_bytes = max(options.slot_bytes, options.num_slots * HEADER.size) + HEADER.size
    return _socket(context, options, identity, high_water_mark, max_bytes)


def _socket(
    context: Context,
    options: TransferOptions,
    identity: bytes | None,
    high_water_mark: int,
    max_bytes: int,
) -> Socket:
    socket = context.socket(zmq.ROUTER if identity is None else zmq.DEALER)
    socket.set_hwm(high_water_mark)
    socket.set(zmq.MAXMSGSIZE, max_bytes)
    socket.set(zmq.LINGER, LINGER_MS)
    # a partition that closes nothing: let go of the connection after a while, timers act long
    # before
    socket.set(zmq.HEARTBEAT_IVL, 5000)
    socket.set(zmq.HEARTBEAT_TIMEOUT, 15000)
    if identity is None:
        socket.set(zmq.ROUTER_MANDATORY, 1)
    else:
        socket.set(zmq.IDENTITY, identity)
        # nothing queues for a peer that is not there, nor for the one that takes its address
        socket.set(zmq.IMMEDIATE, 1)
    if options.curve is not None:
        _secure(socket, options.curve, is_server=identity is None)
    return socket


def _secure(socket: Socket, keys: CurveKeys, *, is_server: bool) -> None:
    socket.set(zmq.CURVE_PUBLICKEY, keys.public.encode())
    socket.set(zmq.CURVE_SECRETKEY, keys.secret.encode())
    if is_server:
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.ZAP_DOMAIN, b"transfer")
    else:
        socket.set(zmq.CURVE_SERVERKEY, keys.server.encode())


def bind(socket: Socket, address: str) -> str:
    """Bind and return the address with its port. Raises ConfigError where the address cannot be
    had.
    """
    if "[" in address:
        socket.set(zmq.IPV6, 1)
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        raise ConfigError(f"transfer: cannot listen on {address}: {error}") from error
    bound = socket.get(zmq.LAST_ENDPOINT)
    assert isinstance(bound, bytes)
    return bound.decode().rstrip("\0")


def with_host(address: str, host: str | None) -> str:
    """tcp://0.0.0.0:5555 as peers reach it; other transports have no host."""
    if host is None or not address.startswith("tcp://"):
        return address
    return re.sub(r"^tcp://.*:", f"tcp://{host}:", address)


def with_port(address: str, port: str) -> str:
    return re.sub(r":[^:]*$", f":{port}", address)


def receive(socket: Socket, *, copy: bool) -> list[Any] | None:
    """The next message's frames, or None when none waits; a message of too many frames comes cut to
    MAX_FRAMES.

    With copy the frames are bytes, without it zmq.Frame over the memory that ZeroMQ received into.
    """
    frames: list[Any] = []
    try:
        while True:
            frame: Any = socket.recv(zmq.NOBLOCK, copy=copy)
            if len(frames) < MAX_FRAMES:
                frames.append(frame)
            if not socket.get(zmq.RCVMORE):
                return frames
    except zmq.Again:
        return None


class Authenticator:
    """ZeroMQ's authentication protocol (RFC 27) for CURVE: answers from the thread that owns the
    sockets.
    """

    def __init__(self, context: Context, keys: CurveKeys) -> None:
        self.socket: Socket = context.socket(zmq.REP)
        self.socket.set(zmq.LINGER, 0)
        self.socket.bind(ZAP_ADDRESS)
        self._allowed = keys.allowed
        self.num_refused = 0

    def answer(self) -> None:
        """Answer one request."""
        frames = receive_request(self.socket)
        if len(frames) != 7 or frames[0] != b"1.0":
            self.socket.send_multipart([b"1.0", *frames[1:2], b"500", b"bad request", b"", b""])
            return
        version, request_id, _, address, _, mechanism, key = frames
        client = z85.encode(key).decode() if len(key) == 32 else ""
        if mechanism == b"CURVE" and client in self._allowed:
            status, text, user = b"200", b"OK", client.encode()
        else:
            status, text, user = b"400", b"not on the allow-list", b""
            self.num_refused += 1
            logger.warning(
                "refused a transfer connection from %s: key %s", address.decode(), client or "none"
            )
        self.socket.send_multipart([version, request_id, status, text, user, b""])


def receive_request(socket: Socket) -> list[bytes]:
    frames: list[bytes] = socket.recv_multipart()
    return frames
