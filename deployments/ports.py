"""TCP ports of servers that will listen only in a while, and how an address is written."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

PICKED = range(20_000, 30_000)
"""Below the ports that the system gives to whoever asks for any (from 32768 on Linux): those it
may give away between the choice and the server's start, and starting Ray takes dozens. Below
those on which Serve's replicas listen, too (from 30000)."""


def pick_port(wanted: int | None = None) -> int:
    """A port on which nobody listens, and which no other process has picked and still means to use.

    Args:
        wanted: taken if it can be had.

    Raises:
        OSError: not one of `PICKED` could be had.
    """
    for port in _candidates(wanted):
        with socket.socket(socket.AF_UNIX) as mark:
            try:
                mark.bind(f"\0trunkline port {port}")  # Linux's abstract names: no file is left
                bind("", port)
            except OSError as error:
                refused = error
                continue
            mark.detach()  # stays open until this process ends
            return port
    raise refused


def bind(host: str, port: int) -> None:
    """Bind a port and let it go, to see that it can be had.

    Raises:
        OSError: it cannot.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        probe.listen()


def address(host: str, port: int) -> str:
    """A host and a port as one word, as in a URL: an IPv6 address has colons of its own."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _candidates(wanted: int | None) -> Iterator[int]:
    if wanted is not None:
        yield wanted
    yield from random.sample(PICKED, len(PICKED))
