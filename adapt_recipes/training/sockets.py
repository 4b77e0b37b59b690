"""Timeouts of gloo, and the detection of lost hosts.

A host without power or network sends nothing, and gloo would wait for it forever.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# For all processes to start.
RENDEZVOUS_TIMEOUT = timedelta(minutes=5)
# For the slowest process: the first one may have a large collection to tokenize.
COLLECTIVE_TIMEOUT = timedelta(hours=1)
# Without an answer of another host's kernel, which answers however busy its processes are.
DEAD_PEER_SECONDS = 60


def set_collective_timeout(group: dist.ProcessGroup) -> None:
    """Sets the timeout of a connected gloo group to ``COLLECTIVE_TIMEOUT``.

    torch has no public way to set different timeouts for connections and for collectives.
    """
    group._get_backend(torch.device("cpu"))._set_default_timeout(COLLECTIVE_TIMEOUT)


@contextlib.contextmanager
def detect_lost_hosts() -> Iterator[None]:
    """The connections opened in the block will fail when the other side is unreachable; all others stay as they are.

    For the block that sets up a process group. Does nothing if the system does not list open files.
    """
    before = _open_sockets()
    yield
    for name, descriptor in _open_sockets().items():
        # A descriptor may be closed by now.
        if name not in before:
            with contextlib.suppress(OSError):
                _enable_keepalive(os.dup(descriptor))


def _open_sockets() -> dict[str, int]:
    """The descriptors of this process's sockets, by names that are not used twice."""
    sockets: dict[str, int] = {}
    if hasattr(socket, "TCP_USER_TIMEOUT") and os.path.isdir("/proc/self/fd"):
        for path in Path("/proc/self/fd").iterdir():
            # The descriptor of the listed folder itself is closed by now.
            with contextlib.suppress(OSError):
                if (name := os.readlink(path)).startswith("socket:"):
                    sockets[name] = int(path.name)
    return sockets


def _enable_keepalive(descriptor: int) -> None:
    with socket.socket(fileno=descriptor) as connection:
        if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(DEAD_PEER_SECONDS // 6, 1))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(DEAD_PEER_SECONDS // 6, 1))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * DEAD_PEER_SECONDS)
