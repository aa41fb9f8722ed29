"""What this process was given: CPUs, and variables that engines and processes that are started here read."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def defaults(variables: Mapping[str, str]) -> Iterator[None]:
    """The environment with these, where it does not say otherwise, for what is begun in the block."""
    ours = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def job_name() -> str | None:
    """By which `ray job` knows the job whose driver this process is; None where it is none's."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    name = job.get("metadata", {}).get("job_submission_id")
    return None if name is None else str(name)


def usable_cpus(cgroup: Path = CGROUP) -> int:
    """CPUs of the machine that this process may use: those it is bound to (by Slurm, taskset, a container's
    cpuset), and no more than its container's quota, rounded up."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(bound, _quota(cgroup))))


def _quota(cgroup: Path) -> float:
    """CPUs of a container's quota (cgroup v2, v1); infinite where there is none."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # no such file; "max" and -1 are no quota
            quota, period = " ".join((cgroup / file).read_text() for file in files).split()
            if int(quota) > 0:
                return int(quota) / int(period)
    return math.inf
