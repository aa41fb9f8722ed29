"""The script that checks and measures on a GPU, with a stand-in for Python: what it calls, and how."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parent / "benchmarks" / "on_gpu.sh"
STAND_IN = """#!/bin/bash
[ "$1" = -c ] && exit 0
echo "$PYTHONPATH: $*" >>"$CALLS"
[[ "$*" != *bench_inference.py* ]]
"""


def run(folder: Path, *parts: str, path: str | None = "/where/packages/are") -> tuple[int, list[str]]:
    """Its exit code and the calls of Python; the benchmark of inference misses a limit."""
    python, calls = folder / "python", folder / "calls"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    calls.write_text("")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"CALLS": str(calls), **({"PYTHONPATH": path} if path else {})}
    # From elsewhere, by a relative path.
    done = subprocess.run(
        ["bash", str(SCRIPT), "./python", *parts], cwd=folder, env=variables, capture_output=True, check=False
    )
    return done.returncode, calls.read_text().splitlines()


def test_all_parts_run_though_one_fails_and_find_the_packages_that_were_there(tmp_path: Path) -> None:
    code, calls = run(tmp_path)
    root = SCRIPT.parents[2]
    assert code == 1
    assert all(call.startswith(f"{root}:/where/packages/are: ") for call in calls)
    words = ("bench_train.py", "bench_inference.py", "pytest", "w32_256x192", "w48_384x288")
    assert [word for word, call in zip(words, calls, strict=True) if word in call] == list(words)


def test_parts_are_chosen_by_name(tmp_path: Path) -> None:
    code, calls = run(tmp_path, "tests", path=None)
    assert code == 0
    (call,) = calls
    assert call.startswith(f"{SCRIPT.parents[2]}: -m pytest")
    assert run(tmp_path, "tests", "nonsense") == (2, [])
