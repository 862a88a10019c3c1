"""Addresses to listen on: take one, or say who has it."""

from __future__ import annotations

import errno
import socket

from pipelines.errors import ConfigError, PortInUse

BACKLOG = 512


def listen(host: str, port: int, option: str) -> socket.socket:
    """Return a socket that listens on an address; port 0 takes a free one.

    Args:
        host: name or address of this machine.
        port: 0 to 65535.
        option: how the user chooses another port, for the error.

    Raises:
        PortInUse: another process listens there; names it if this user may see it.
        ConfigError: the address is not one of this machine, or the port is reserved.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{host!r} is not an address ({error})", "an address of this machine", "--set host=127.0.0.1") from None
    taken = socket.socket(family, kind, protocol)  # asyncio sends at once (TCP_NODELAY) only what says that it is TCP
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind(address)
        taken.listen(BACKLOG)
    except OSError as error:
        taken.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"{host}:{port} is taken by {owner(port)}", "a free port", f"stop it, or {option}") from None
        expected = "an address of this machine, and a port from 1024"
        raise ConfigError(f"{host}:{port} cannot be listened on ({error.strerror})", expected, option) from None
    return taken


def check_free(host: str, port: int, option: str) -> int:
    """Return the port if it is free, a free one for 0; `PortInUse` otherwise. It is not held."""
    with listen(host, port, option) as probe:
        return int(probe.getsockname()[1])


def owner(port: int) -> str:
    """Return the process that listens on a port, as far as this user may see."""
    import psutil

    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.Error:
        connections = []
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return f"process {connection.pid} ({_command(connection.pid)})"
    return f"another process (to find it: ss -ltnp 'sport = :{port}')"


def _command(pid: int) -> str:
    import psutil

    try:
        return " ".join(psutil.Process(pid).cmdline())[:80]
    except psutil.Error:
        return "command unknown"
