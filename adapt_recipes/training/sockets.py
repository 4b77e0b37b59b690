"""Timeouts of gloo, and the detection of lost hosts.

A host without power or network sends nothing, and gloo would wait for it forever.
"""

from __future__ import annotations

import contextlib
import os
import socket
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


def notice_lost_hosts() -> None:
    """Makes all open connections of this process fail when the other side is unreachable.

    To be called after process groups are set up. Does nothing if the system does not list open files.
    """
    if not (hasattr(socket, "TCP_USER_TIMEOUT") and os.path.isdir("/proc/self/fd")):
        return
    for path in Path("/proc/self/fd").iterdir():
        # A descriptor may be closed by now, such as that of the listed folder itself.
        with contextlib.suppress(OSError):
            if path.is_socket():
                _enable_keepalive(os.dup(int(path.name)))


def _enable_keepalive(descriptor: int) -> None:
    with socket.socket(fileno=descriptor) as connection:
        if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(DEAD_PEER_SECONDS // 6, 1))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(DEAD_PEER_SECONDS // 6, 1))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * DEAD_PEER_SECONDS)
