"""Machines of one network, made of Linux namespaces: each has an address, a name, processes, a /tmp, a home
and a /dev/shm of its own. They share a kernel, and the code and its packages, which they cannot write to.

This process has namespaces of its own already (run.sh): nothing of the machine that runs the tests is
touched, and whatever ends this process ends all of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
NETWORK = "10.77.0"
HERE = f"{NETWORK}.1"
"""Of this process on the bridge: what is neither laptop nor Ray (bucket, MLflow, Redis) listens there."""
ADDRESSES = {name: f"{NETWORK}.{n}" for n, name in enumerate(("head", "w1", "w2", "laptop", "w3", "w4"), 2)}
WORKERS = ("w1", "w2")
HOME = "/tmp/home"
TOKEN = "ab" * 32

# Process 1 of a machine. bash collects what loses its parent; it ends by a signal alone.
BOOT = f"""
set -e
mount --make-rprivate /
if [ -n "$2" ]; then mount --bind "$2" /mnt; fi
for own in /tmp /dev/shm; do mount -t tmpfs -o size=4g,mode=1777 machine $own; done
mount -o remount,ro,bind /
mount --bind {ROOT} {ROOT} && mount -o remount,ro,bind {ROOT}
mkdir -p {HOME}/.ray && (umask 077 && echo -n {TOKEN} > {HOME}/.ray/auth_token)
printf '127.0.0.1 localhost\\n{"".join(f"{a} {n}{chr(92)}n" for n, a in ADDRESSES.items())}' > /tmp/hosts
mount --bind /tmp/hosts /etc/hosts
hostname $1
ip link set lo up
touch {HOME}/booted
while :; do sleep 1000 & wait $! || true; done
"""


class Machine:
    """Runs from `start` until `kill`; after that it may be started again, with nothing on its disk."""

    def __init__(self, name: str, variables: dict[str, str], logs: Path, shared: Path | None = None) -> None:
        """variables: of all processes. logs: a folder for what they say, which outlives the machine.
        shared: a folder that all machines have as /mnt, as if by NFS."""
        self.name, self.address = name, ADDRESSES[name]
        self.logs, self.shared = logs, shared
        self.group: Path | None = None
        """Of the kernel's control groups, the one that its commands are in."""
        kept = {k: os.environ[k] for k in ("PYTHONPATH", "LANG") if k in os.environ}
        path = f"{BIN}:{os.environ['PATH']}"
        self.variables = {**kept, "PATH": path, "HOME": HOME, "RAY_AUTH_MODE": "token", **variables}
        self.first: psutil.Process | None = None
        """Process 1 as it is called out here."""

    def start(self) -> None:
        spaces = ["--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (self.logs / f"{self.name}-boot.log").open("w") as log:
            self._unshare = subprocess.Popen(
                ["unshare", *spaces, "bash", "-c", BOOT, "boot", self.name, str(self.shared or "")],
                stderr=log,
            )
        until(lambda: psutil.Process(self._unshare.pid).children(), 60, f"{self.name} boots")
        (self.first,) = psutil.Process(self._unshare.pid).children()
        until(lambda: self.call(f"test -e {HOME}/booted") == 0, 60, f"{self.name} boots")
        port = f"to-{self.name}"
        ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(self.first.pid))
        ip("link", "set", port, "master", "bridge", "up")
        self.run(
            f"ip address add {self.address}/24 dev eth0 && ip link set eth0 up && "
            f"ip route add default via {HERE}"
        )

    def kill(self) -> None:
        """As if the power failed: all its processes at once, its disk, and its end of the network."""
        if self.first is None:
            return
        self.first.send_signal(signal.SIGKILL)
        self._unshare.wait(60)
        self.first = None
        # The kernel takes the link away some time after the last process.
        subprocess.run(["ip", "link", "delete", f"to-{self.name}"], check=False, stderr=subprocess.DEVNULL)

    def processes(self) -> Iterator[psutil.Process]:
        """Its own, as they are called out here."""
        assert self.first is not None
        mine = os.readlink(f"/proc/{self.first.pid}/ns/pid")
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == mine:
                    yield process

    def works_at(self, task: str) -> bool:
        """Whether one of its processes does now what Ray calls so: it gives its workers the name."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if f"ray::{task}" in " ".join(process.cmdline()):
                    return True
        return False

    def cut_off(self) -> None:
        """From the network, and nothing else."""
        ip("link", "set", f"to-{self.name}", "down")

    def argv(self, command: str) -> list[str]:
        """By which this process runs a shell's command there."""
        assert self.first is not None, f"{self.name} does not run"
        enter = ["nsenter", f"--target={self.first.pid}", "--net", "--mount", "--uts", "--ipc", "--pid"]
        clean = ["env", "-i", *(f"{k}={v}" for k, v in self.variables.items())]
        if self.group:
            joins = f'echo $$ > {self.group}/cgroup.procs && exec "$@"'
            enter = ["sh", "-c", joins, "sh", *enter]
        return [*enter, *clean, "bash", "-c", f"cd && {command}"]

    def call(self, command: str) -> int:
        return subprocess.run(self.argv(command), check=False, stderr=subprocess.DEVNULL).returncode

    def run(self, command: str, seconds: float = 600) -> str:
        """What it said on stdout; AssertionError with all that it said unless it ends well in time."""
        done = subprocess.run(
            self.argv(command), capture_output=True, text=True, timeout=seconds, check=False
        )
        assert done.returncode == 0, (
            f"{self.name}: {command} ended {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout

    def begin(self, log: str, command: str) -> Running:
        """The command, going on, and its log."""
        file = self.logs / log
        with file.open("w") as out:
            return Running(subprocess.Popen(self.argv(command), stdout=out, stderr=subprocess.STDOUT), file)


class Running:
    """A command on a machine."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def says(self, text: str, seconds: float = 300) -> None:
        """Return once it said so."""
        until(
            lambda: text in self.said() or self.process.poll() is not None,
            seconds,
            lambda: f"{text!r} is said:\n{self.said()}",
        )
        assert text in self.said(), f"it ended {self.process.poll()} without {text!r}:\n{self.said()}"

    def ends(self, seconds: float = 600) -> int:
        """Exit code."""
        until(lambda: self.process.poll() is not None, seconds, lambda: f"it ends:\n{self.said()}")
        return self.process.wait()


class HeadEnded(AssertionError):
    """Ray ended on the head while another machine started."""


class Cluster:
    """A head that runs no task, workers of a CPU, and a laptop that has nothing of them but their address."""

    def __init__(
        self,
        variables: dict[str, str],
        logs: Path,
        shared: Path | None = None,
        workers: tuple[str, ...] = WORKERS,
    ) -> None:
        self.workers = workers
        self.machines = {
            name: Machine(name, variables, logs, shared) for name in ("head", *workers, "laptop")
        }
        self.labels = {name: f"hrnet-pool={name}" for name in workers}
        self.rays: dict[str, Running] = {}
        """`ray start --block` of head and workers: it ends when that node's Ray does."""
        self.logs = logs
        laptop = self.machines["laptop"].variables
        laptop["RAY_API_SERVER_ADDRESS"] = f"http://{ADDRESSES['head']}:8265"
        laptop["PYTHONUNBUFFERED"] = "1"  # a job's log as it comes, into a file too
        laptop.pop("MLFLOW_TRACKING_URI", None)  # what runs on it alone is its own
        self.laptop = self.machines["laptop"]

    def start(self, flags: str = "", **variables: str) -> None:
        """Head and workers. flags: of the head's `ray start`; variables: of all of them."""
        for name in ("head", *self.workers):
            self.machines[name].variables |= variables
        for _ in range(3):  # a busy head may end while the workers come
            self.start_head(flags)
            with contextlib.suppress(HeadEnded):
                for name in self.workers:
                    self.start_worker(name)
                if self.whole():
                    return
            self.stop()
        raise AssertionError(f"the head ended three times:\n{self.rays['head'].said()}")

    def stop(self) -> None:
        """All but the laptop, as if the power failed."""
        for name in ("head", *self.workers):
            self.machines[name].kill()

    def leave(self, name: str) -> None:
        """SIGTERM to the `ray start --block` of a worker, then no machine."""
        for process in self.machines[name].processes():
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[1:3] == [str(BIN / "ray"), "start"]:
                    process.terminate()
        self.rays[name].ends(120)
        self.machines[name].kill()

    def start_head(self, flags: str = "") -> None:
        own = "--head --port=6379 --num-cpus=0 --dashboard-host=0.0.0.0 --dashboard-port=8265"
        self._start("head", f"{own} {flags}")

    def start_worker(self, name: str) -> None:
        self._start(name, f"--address={ADDRESSES['head']}:6379 --num-cpus=1 --labels={self.labels[name]}")

    def _start(self, name: str, flags: str) -> None:
        """A machine with Ray. A busy one may need a second go: Ray gives its own agents a fixed 15 s."""
        flags += f" --node-ip-address={ADDRESSES[name]} --object-store-memory=200000000 --block"
        machine = self.machines[name]
        for _ in range(3):
            machine.start()
            self.rays[name] = ray = machine.begin(
                f"{name}.log", f"exec ray start --disable-usage-stats {flags}"
            )
            until(
                lambda ray=ray: "Ray runtime started" in ray.said() or self._ended("head", ray),
                300,
                lambda ray=ray: f"Ray starts:\n{ray.said()}",
            )
            if name == "head":
                until(lambda ray=ray: self._answers() or self._ended("head", ray), 300, "the job API answers")
            if not self._ended("head", ray):
                return
            machine.kill()
            if name != "head" and self._ended("head"):
                raise HeadEnded(f"{name}:\n{self.rays['head'].said()}")
        raise AssertionError(f"Ray did not start on {name}:\n{ray.said()}")

    def _ended(self, *which: str | Running) -> bool:
        """Whether Ray has ended on one of them."""
        rays = [self.rays[one] if isinstance(one, str) else one for one in which]
        return any(ray.process.poll() is not None for ray in rays)

    def _answers(self) -> bool:
        """The job API of the head, to whoever has the token."""
        asked = urllib.request.Request(
            f"http://{ADDRESSES['head']}:8265/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with contextlib.suppress(OSError), direct.open(asked, timeout=10):
            return True
        return False

    def submit(self, name: str, command: str, flags: str = "") -> Running:
        """`ray job submit` of a user on the laptop: its log is the job's, it ends with 0 or 1."""
        return self.laptop.begin(
            f"{name}.log", f"exec ray job submit --submission-id {name} {flags} -- {command}"
        )

    def whole(self) -> bool:
        """Whether Ray runs on head and workers."""
        return len(self.rays) == 1 + len(self.workers) and all(
            ray.process.poll() is None for ray in self.rays.values()
        )

    def nodes(self) -> list[dict[str, Any]]:
        """That Ray has now."""
        said = self.laptop.run("ray list nodes --format json --filter state=ALIVE")
        return list(json.loads(said[said.index("[") :]))


@contextlib.contextmanager
def network() -> Iterator[None]:
    """The switch between the machines, and this process at it."""
    ip("link", "set", "lo", "up")
    ip("link", "add", "bridge", "type", "bridge")
    try:
        ip("address", "add", f"{HERE}/24", "dev", "bridge")
        ip("link", "set", "bridge", "up")
        yield
    finally:
        ip("link", "delete", "bridge")


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def until(true: Callable[[], object], seconds: float, what: str | Callable[[], str]) -> None:
    """Return once `true()` is; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            told = what if isinstance(what, str) else what()
            raise AssertionError(f"waited {seconds:g} s until {told}")
        time.sleep(0.1)
