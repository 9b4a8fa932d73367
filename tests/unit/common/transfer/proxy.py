"""A man in the middle of two transfer endpoints: forwards every message through a function."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import zmq

from scission.common.transfer.wire import HEADER, Header, Kind, pack_control, unpack_control
from scission.protos import transfer_pb2

Direction = Literal["up", "down"]  # to the receiver, to the sender
Frames = list[bytes]  # header, body (none for a CHUNK of the shared tier)
Filter = Callable[[Direction, Header, Frames], list[Frames]]


def pass_on(direction: Direction, header: Header, frames: Frames) -> list[Frames]:
    return [frames]


class Proxy:
    """Senders connect to `address`; what they and the receiver say goes through `filter`."""

    def __init__(self, receiver_address: str, directory: Path, filter: Filter = pass_on) -> None:
        self.filter = filter
        self._receiver_address = receiver_address
        self._directory = directory
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._backs: dict[bytes, zmq.Socket[bytes]] = {}
        self._fronts: dict[zmq.Socket[bytes], tuple[zmq.Socket[bytes], bytes]] = {}
        self._bulk_targets: list[str] = []
        self._control = self._bind("tcp://127.0.0.1:*")
        self._bulk = self._bind("tcp://127.0.0.1:*")
        self._ipc_name = f"scission-proxy-{id(self):x}.ipc"
        self._ipc = self._bind(f"ipc://{directory / self._ipc_name}")
        self.address = self._endpoint(self._control)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _bind(self, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.bind(address)
        self._poller.register(socket, zmq.POLLIN)
        return socket

    @staticmethod
    def _endpoint(socket: zmq.Socket[bytes]) -> str:
        endpoint = socket.get(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        return endpoint.decode().rstrip("\0")

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._context.destroy(linger=0)
        (self._directory / self._ipc_name).unlink(missing_ok=True)

    def _run(self) -> None:
        fronts = (self._control, self._bulk, self._ipc)
        while not self._stop.is_set():
            for socket, _ in self._poller.poll(20):
                if socket in fronts:
                    identity, *frames = socket.recv_multipart()
                    back = self._back(socket, identity)
                    for message in self._split(frames):
                        for out in self.filter("up", Header.unpack(message[0]), message):
                            back.send_multipart(out)
                else:
                    front, identity = self._fronts[socket]
                    frames = socket.recv_multipart()
                    header = Header.unpack(frames[0])
                    if header.kind is Kind.WELCOME:
                        frames = self._redirect(frames)
                    for out in self.filter("down", header, frames):
                        front.send_multipart([identity, *out])

    @staticmethod
    def _split(frames: Frames) -> list[Frames]:
        """A message of the shared tier may hold several chunks' headers."""
        if len(frames) > 1:
            return [frames]
        data, size = frames[0], HEADER.size
        return [[data[i : i + size]] for i in range(0, len(data), size)]

    def _back(self, front: zmq.Socket[bytes], identity: bytes) -> zmq.Socket[bytes]:
        back = self._backs.get(identity)
        if back is None:
            back = self._context.socket(zmq.DEALER)
            back.set(zmq.IDENTITY, identity)
            is_control = front is self._control
            back.connect(self._receiver_address if is_control else self._bulk_targets[0])
            self._poller.register(back, zmq.POLLIN)
            self._backs[identity] = back
            self._fronts[back] = (front, identity)
        return back

    def _redirect(self, frames: Frames) -> Frames:
        """WELCOME names the proxy's own sockets for chunks."""
        header, welcome = unpack_control(frames)
        assert isinstance(welcome, transfer_pb2.Welcome)
        if welcome.ipc_name:
            self._bulk_targets = [f"ipc://{self._directory / welcome.ipc_name}"]
            welcome.ipc_name = self._ipc_name
        else:
            self._bulk_targets = list(welcome.bulk_addresses)
        del welcome.bulk_addresses[:]
        welcome.bulk_addresses.append(self._endpoint(self._bulk))
        return pack_control(Kind.WELCOME, header.transfer_id, header.epoch, welcome)
