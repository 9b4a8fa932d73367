"""TCP ports before a server takes them: is this one free, and which one is."""

import socket


def listen(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    """A socket that listens as our servers do: a port whose last connections still linger is free.

    Args:
        is_shared: other processes of this user may listen there too, if they say so as well; the
            kernel deals connections out among them.

    Raises:
        OSError: the address is taken, not this machine's, or no address.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    return listener


def free_port(host: str) -> int:
    """A port that was free a moment ago."""
    with listen(host, 0) as listener:
        return int(listener.getsockname()[1])
