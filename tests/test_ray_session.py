"""The Ray that a stage starts on this machine: what it has ready, and that its processes are quiet."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from hrnet_core import memory
from hrnet_core.errors import ConfigError
from pipelines.cluster import session as cluster
from pipelines.cluster.session import LOOPBACK_ONLY, ray_session
from pipelines.process.stop import GROUPS
from pipelines.settings.config import RaySettings


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they stay in our group")
def test_a_signal_for_our_process_group_does_not_reach_what_ray_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray._private import services

    say = [sys.executable, "-c", "import os; print(os.getpgid(0), os.getsid(0))"]
    usual = services.ConsolePopen
    with tempfile.TemporaryFile("w+") as said:
        with cluster._sessions_of_their_own() as processes:
            started = services.start_ray_process(say, "raylet", fate_share=True, stdout_file=said)
        assert processes == [started.process]
        assert started.process.pid in GROUPS
        assert started.process.wait(60) == 0
        said.seek(0)
        assert said.read().split() == [str(started.process.pid)] * 2
    assert services.ConsolePopen is usual
    monkeypatch.setattr("ray.shutdown", lambda: None)
    cluster._shut_down(processes)
    assert started.process.pid not in GROUPS


SIGNALLED_IN_A_FORK = """
import os, signal, sys
from ray._private import services
from pipelines.cluster import session
from pipelines.process.stop import Stopped, stoppable

os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
try:
    with stoppable(), session._sessions_of_their_own() as processes:
        services.start_ray_process([sys.executable, "-c", ""], "raylet", fate_share=True)
except Stopped as stopped:
    sys.exit(stopped.exit_code - len(processes))
"""


def test_a_signal_that_comes_while_ray_forks_is_not_lost() -> None:
    """It was raised in logging's function that runs after a fork, where Python drops it: the verb went on and
    waited for logging's lock for ever."""
    done = subprocess.run([sys.executable, "-c", SIGNALLED_IN_A_FORK], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143 - 1, ""), "stopped, and the process is in the list"


def test_while_ray_starts_sigterm_is_ours() -> None:
    from ray._private import utils

    before, usual = signal.getsignal(signal.SIGTERM), utils.set_sigterm_handler
    with cluster._sigterm_stays_ours():
        utils.set_sigterm_handler(lambda *_: sys.exit(1))
        assert signal.getsignal(signal.SIGTERM) == before
    assert utils.set_sigterm_handler is usual


def test_helpers_of_a_node_manager_that_had_to_be_killed_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    helper = "import time; print('begun', flush=True); time.sleep(600)"
    manager = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {helper!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", manager], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout.readline() == b"begun\n"
    monkeypatch.setattr(ray, "shutdown", process.kill)
    cluster._shut_down([process])
    assert process.stdout.read() == b"", "whoever could write has ended"
    process.wait(60)


def test_a_ray_that_could_not_map_its_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import utils

    monkeypatch.setattr(utils, "estimate_available_memory", lambda: 20_000_000_000)
    monkeypatch.setattr(utils, "get_shared_memory_bytes", lambda: 20_000_000_000)
    for limit in (12_500_000_000, resource.RLIM_INFINITY):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        cluster.refuse_narrow_addresses()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8_000_000_000, resource.RLIM_INFINITY))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    narrow = r"may map 8\.0 GB here \(ulimit -v\), and the Ray that is to be started maps 12\.4 GB"
    with pytest.raises(ConfigError, match=narrow), cluster._started(RaySettings(), None, *[False] * 4):
        pytest.fail("it began")


@pytest.mark.slow
def test_work_of_a_stage_takes_a_process_that_was_started_ahead() -> None:
    seen = session(train=False)
    assert len(seen["ahead"]) == 1
    assert seen["process"] in seen["ahead"]
    assert seen["level"] == logging.ERROR
    assert seen["memory"] == memory.PASSES


@pytest.mark.slow
def test_nothing_is_started_ahead_that_ray_train_could_not_use() -> None:
    """Its processes have environments; without the address it would ask another Ray of this machine."""
    seen = session(train=True)
    assert seen["ahead"] == []
    assert seen["level"] == logging.ERROR
    assert seen["address"] == seen["of_this_ray"]
    assert seen["memory"] == memory.KEPT


def session(train: bool) -> dict[str, Any]:
    """What a task on such a Ray of one CPU sees; in a process of its own, which joins no other Ray."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, __file__, *(["train"] if train else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def look(train: bool) -> dict[str, Any]:
    import ray

    with ray_session(RaySettings(num_cpus=1), quiet=True, train=train):
        deadline = time.monotonic() + (60 if not train else 5)
        while not (ahead := idle()) and time.monotonic() < deadline:
            time.sleep(0.1)

        def task() -> dict[str, Any]:
            level = logging.getLogger("ray").level
            began_with = Path("/proc/self/environ").read_bytes().decode().split("\0")
            return {
                "process": os.getpid(),
                "level": level,
                "address": os.environ.get("RAY_ADDRESS"),
                "memory": dict(one.split("=", 1) for one in began_with if one.startswith("MALLOC_")),
            }

        asked = ray.remote(task)
        if train:
            asked = asked.options(runtime_env={"env_vars": memory.KEPT})
        return {
            **ray.get(asked.remote()),
            "ahead": ahead,
            "of_this_ray": ray.get_runtime_context().gcs_address,
        }


def idle() -> list[int]:
    """Ray's processes that have nothing to do yet."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [process.pid] if process.cmdline()[:1] == ["ray::IDLE"] else []
    return found


if __name__ == "__main__":
    print(json.dumps(look(train="train" in sys.argv[1:])))


def test_a_ray_of_another_version_is_named_with_both(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray._private.utils import check_version_info

    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # ray_session would leave both behind
    monkeypatch.setenv(LOOPBACK_ONLY, "0")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    started = {"ray_version": "2.9.9", "python_version": "3.9.1"}
    monkeypatch.setattr(ray, "init", lambda **_: check_version_info(started, "node 10.0.0.7"))
    wanted = (
        rf"127\.0\.0\.1:6000 .*Ray: 2\.9\.9 Python: 3\.9\.1 .*Ray: {re.escape(ray.__version__)} .*environment"
    )
    with pytest.raises(ConfigError, match=wanted), ray_session(RaySettings(), address="127.0.0.1:6000"):
        raise AssertionError("it was joined")


def test_a_crash_of_native_code_says_where_though_engines_are_quiet() -> None:
    """Nobody reads what engines said after that: the stacks go where the user sees them."""
    code = "import os, signal\nfrom pipelines.cluster.session import quiet_engines\n"
    code += "def in_here():\n    os.kill(os.getpid(), signal.SIGSEGV)\n"
    code += "with quiet_engines():\n    os.write(2, b'chatter')\n    in_here()\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr
    assert "in in_here" in done.stderr
    assert "chatter" not in done.stderr


def test_a_user_who_wants_crashes_told_has_that_after_the_engines_too() -> None:
    code = "import os, signal\nfrom pipelines.cluster.session import quiet_engines\n"
    code += "with quiet_engines():\n    pass\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    command = [sys.executable, "-c", code]
    for wanted in ("1", ""):
        environment = os.environ | {"PYTHONFAULTHANDLER": wanted}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == -signal.SIGSEGV
        assert ("Segmentation fault" in done.stderr) == bool(wanted)
