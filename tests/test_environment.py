"""What a process was given: as many CPUs as it may use, not as the machine has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipelines.cluster.session import ray_session
from pipelines.process.environment import usable_cpus
from pipelines.settings.config import RaySettings


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu.max": "damaged"}, 8),
    ],
)
def test_bound_to_eight_within_a_quota(
    files: dict[str, str], cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cpus(tmp_path) == cpus


def test_where_nothing_is_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no affinity."""
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cpus(tmp_path) == 12


def test_a_ray_that_is_started_here_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself counts all of the machine's, whatever the process is bound to."""
    asked: list[Any] = []

    class Started(Exception):
        pass

    def init(**how: Any) -> None:
        asked.append(how["num_cpus"])
        raise Started

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("pipelines.process.environment.usable_cpus", lambda: 3)
    for settings in (RaySettings(), RaySettings(num_cpus=5)):
        with pytest.raises(Started), ray_session(settings):
            pass
    assert asked == [3, 5]
