"""Ports for a server that a test starts itself."""

from __future__ import annotations

import contextlib
import random
import socket


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different.

    Asking the kernel for port 0 gives one that any connection of another process may be given again before
    the server has it: these are of a range that nobody is given at random, above Ray's workers and below
    Serve's replicas.
    """
    with contextlib.ExitStack() as stack:
        free: list[int] = []
        while len(free) < count:
            port = random.SystemRandom().randrange(20000, 30000)  # a test's seed must not choose it
            with contextlib.suppress(OSError):
                stack.enter_context(socket.socket()).bind(("", port))
                free.append(port)
        return free


def free_port() -> int:
    return free_ports(1)[0]
