"""The frames that the gateway and the process of its chat templates exchange over a socket pair.

A frame is four bytes of length, most significant first, and as many bytes of JSON:

    in   first: {"templates": {name: text}, "variables": {...}, "limits": {...}}
    out  {} when all of them compile, else {"error": text}
    in   then, for each prompt: {"template": name, "arguments": {...}}
    out  {"prompt": text}, {"refusal": the template's own message} or {"error": text}
"""

import socket
import struct

_LENGTH = struct.Struct(">I")


def send_frame(connection: socket.socket, frame: bytes) -> None:
    """Raises OSError; TimeoutError is one, when the socket has a timeout."""
    connection.sendall(_LENGTH.pack(len(frame)))
    connection.sendall(frame)


def receive_frame(connection: socket.socket) -> bytes:
    """Raises OSError; EOFError when the other end has gone."""
    (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
    return _receive(connection, length)


def _receive(connection: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError("the other end of the socket has gone")
        view = view[count:]
    return bytes(data)
