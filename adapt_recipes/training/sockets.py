"""How long gloo waits for other processes.

A host that is gone is noticed: one that lost its power or its cable says nothing, and gloo would wait for ever.
"""

from __future__ import annotations

import contextlib
import os
import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)  # for all processes to start
COLLECTIVE_TIMEOUT = timedelta(hours=1)  # of the slowest process: the first may have a whole collection to tokenise
DEAD_PEER_SECONDS = 60  # seconds without an answer from another host's kernel, however busy its processes are


def set_collective_timeout(group: dist.ProcessGroup) -> None:
    """Lets gloo wait for ``COLLECTIVE_TIMEOUT`` from now on, in a group that has connected.

    torch has no public way to wait for a connection less long than for an answer.
    """
    group._get_backend(torch.device("cpu"))._set_default_timeout(COLLECTIVE_TIMEOUT)


def notice_lost_hosts() -> None:
    """Have all connections that this process has open end with an error when the other side is out of reach.

    For those of process groups that are set up; nothing where the system does not list its open files.
    """
    if not (hasattr(socket, "TCP_USER_TIMEOUT") and os.path.isdir("/proc/self/fd")):
        return
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # it may be closed by now, as the folder that was listed is
            if path.is_socket():
                _ask_for_the_other_side(os.dup(int(path.name)))


def _ask_for_the_other_side(descriptor: int) -> None:
    with socket.socket(fileno=descriptor) as connection:
        if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # asks while nothing is sent
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(DEAD_PEER_SECONDS // 6, 1))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(DEAD_PEER_SECONDS // 6, 1))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * DEAD_PEER_SECONDS)
