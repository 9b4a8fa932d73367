"""gRPC between our processes: options of channels and servers, our errors as statuses and back."""

import socket
from collections.abc import Sequence
from typing import NoReturn

import grpc
import grpc.aio

from scission.common.errors import ConfigError, ScissionError
from scission.common.inference_messages import error_from_status

# A million tokens of prompt are at most 5 MB; prompt logprobs travel in pieces.
MAX_MESSAGE_BYTES = 64 << 20
MAX_CONCURRENT_CALLS = 4096

Option = tuple[str, int | str]

_SHARED_OPTIONS: tuple[Option, ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # After 3 s without a byte from the peer a ping, and 3 s for its answer: so a stopped process is
    # found although its kernel still answers. The ping's own time limit is what counts, whatever
    # the keepalive's; by default it is a minute.
    ("grpc.keepalive_time_ms", 3000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.ping_timeout_ms", 3000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
CHANNEL_OPTIONS: Sequence[Option] = (
    *_SHARED_OPTIONS,
    # Our processes speak to each other directly, whatever proxy the environment names.
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Channels never share a connection, so that a worker's channel dies with the worker's entry.
    ("grpc.use_local_subchannel_pool", 1),
)
SERVER_OPTIONS: Sequence[Option] = (
    *_SHARED_OPTIONS,
    # A second process on the same port is an error, not a silent sharer of it.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
)


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to `host:port`; it connects, and reconnects within a second, by itself."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


def make_server() -> grpc.aio.Server:
    return grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS)


def bind(server: grpc.aio.Server, host: str, port: int) -> int:
    """Listen on the address; returns the port, which was chosen when `port` is 0.

    Raises:
        ConfigError: the address is taken or not ours.
    """
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {address}: {error}") from error
    if bound == 0:
        raise ConfigError(f"cannot listen on {address}: the address is taken or not this machine's")
    return int(bound)


async def abort(context: grpc.aio.ServicerContext, error: ScissionError) -> NoReturn:
    """End the call with the status that stands for the error."""
    await context.abort(grpc.StatusCode[error.grpc_code], error.message)
    raise AssertionError("abort returned")


def error_of(error: grpc.aio.AioRpcError) -> ScissionError:
    """The error of our tree that a failed call stands for."""
    return error_from_status(error.code().name, error.details() or error.code().name)


def advertised_host(bind_host: str, advertise_host: str | None, peer: str) -> str:
    """The address that others reach us at: as configured, else as bound, else towards `peer`.

    A wildcard bind address says nothing to others; then it is this machine's address on the route
    to `peer`, or that of its own name when there is no route.
    """
    if advertise_host:
        return advertise_host
    if bind_host not in ("0.0.0.0", "::", ""):
        return bind_host
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(peer, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # Connecting a datagram socket sends nothing; it only asks for the route.
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostbyname(socket.gethostname())


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
