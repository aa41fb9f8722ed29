"""A Ray head for tests that need a real one: `ray start` on ports of its own, ended by its own pids.

Never `ray stop`: that ends every Ray of the machine. Home folder, token and sockets lie in one short-lived
folder, so neither the user's ~/.ray nor another Ray on this machine is touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from free_ports import free_ports

BIN = Path(sys.executable).parent
"""Of the venv: a job's `hrnet` and `python` are found on the PATH that the head was started with."""
FLAGS = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
FLAGS += ("runtime-env-agent-port", "metrics-export-port", "ray-client-server-port")
VARIABLES = ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")


class Head:
    """`folder` must be short: sockets lie under it, and their paths have at most 107 characters."""

    def __init__(
        self,
        folder: Path,
        flags: Sequence[str] = ("--num-cpus=1",),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.flags = flags
        self.ports = dict(zip((*FLAGS, *VARIABLES), free_ports(len(FLAGS + VARIABLES)), strict=True))
        self.dashboard = f"http://127.0.0.1:{self.ports['dashboard-port']}"
        self.token = "ab" * 32
        file = self.home / ".ray" / "auth_token"
        file.parent.mkdir(parents=True, mode=0o700)
        file.touch(mode=0o600)
        file.write_text(self.token)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        self.environment = inherited | {
            "HOME": str(self.home),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
            **{name: str(self.ports[name]) for name in VARIABLES},
            **(environment or {}),
        }

    @contextlib.contextmanager
    def running(self) -> Iterator[Head]:
        # Ray gives its own agents a fixed 15 s to import; a busy machine may need a second go.
        for _ in range(3):
            process = self._start()
            try:
                if self._is_up(process):
                    yield self
                    return
            finally:
                _end(process, str(self.home))
        raise AssertionError(f"the head did not start:\n{self._log()}")

    def _start(self) -> psutil.Popen:
        command = [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
        command += ["--dashboard-host=127.0.0.1", *(f"--{flag}={self.ports[flag]}" for flag in FLAGS)]
        command += [f"--temp-dir={self.folder / 'ray'}", "--object-store-memory=100000000", *self.flags]
        with (self.folder / "head.log").open("w") as log:
            return psutil.Popen(
                command, env=self.environment, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT
            )

    def _is_up(self, process: psutil.Popen) -> bool:
        """Once the node has registered and the jobs API answers; False where `ray start` gave up."""
        while process.poll() is None:
            with contextlib.suppress(OSError):
                if "Ray runtime started" in self._log():
                    self.get("/api/jobs/")
                    return True
            time.sleep(0.1)
        return False

    def _log(self) -> str:
        return (self.folder / "head.log").read_text()

    def get(self, path: str, token: str | None = None) -> Any:
        """JSON of a path of the dashboard; HTTPError where it refuses. token: default the right one."""
        headers = {"Authorization": f"Bearer {self.token if token is None else token}"}
        request = urllib.request.Request(self.dashboard + path, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def submit(self, name: str, *entrypoint: str, **variables: str) -> subprocess.Popen[str]:
        """`ray job submit` as a user types it. Its output is the job's log, its exit code 0 or 1."""
        command = [str(BIN / "ray"), "job", "submit", "--address", self.dashboard, "--submission-id", name]
        command += ["--runtime-env-json", json.dumps({"env_vars": variables}), "--", *entrypoint]
        return subprocess.Popen(
            command,
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def _end(head: psutil.Popen, home: str) -> None:
    """End `ray start` and all that came of it, by their ids."""
    with contextlib.suppress(psutil.NoSuchProcess):
        _kill([head, *head.children(recursive=True)])
    head.wait()
    # What lost its parent before, or was started meanwhile, is known by the home folder it was given.
    _kill([process for process in psutil.process_iter() if _home_of(process) == home])


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive, alive


def _home_of(process: psutil.Process) -> str | None:
    with contextlib.suppress(psutil.Error):
        return process.environ().get("HOME")
    return None
