"""Who can reach a Ray that a verb starts on this machine: nobody from another one."""

from __future__ import annotations

import os
import subprocess
import sys

from listening import Port, beyond_loopback

START = """
import sys
from pipelines.cluster.session import ray_session
from pipelines.settings.config import RaySettings

with ray_session(RaySettings(num_cpus=1)):
    import ray
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
    print("up", flush=True)
    sys.stdin.read()
"""


def test_a_ray_started_here_listens_on_loopback_alone() -> None:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=kept
    ) as process:
        try:
            assert process.stdout
            lines = [process.stdout.readline() for _ in range(2)]
            assert lines == ["starting Ray ...\n", "up\n"]
            everything, outside = beyond_loopback(process.pid)
        finally:
            process.communicate("")
    programs = {port.program for port in everything}
    assert {"gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent"} <= programs
    assert outside == []
    assert process.returncode == 0


def test_the_list_knows_who_can_be_reached() -> None:
    """Of this process: what the other test would say of a Ray that is open."""
    import socket

    with socket.socket() as closed, socket.socket() as opened, socket.socket(socket.AF_INET6) as mapped:
        for one, address in ((closed, "127.0.0.1"), (opened, "0.0.0.0"), (mapped, "::ffff:127.0.0.1")):
            one.bind((address, 0))
            one.listen()
        everything, outside = beyond_loopback(os.getpid())
        numbers = [one.getsockname()[1] for one in (closed, opened, mapped)]
    assert set(numbers) <= {port.number for port in everything}
    assert [port.number for port in outside if port.number in numbers] == [numbers[1]]
    assert Port("x", "::", 1).reachable
