"""Which code this is: one text for checkpoints, evaluations, predictions, shards and runs."""

from __future__ import annotations

import functools
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]


@functools.cache
def code_version() -> str:
    """0.1.0+g3338528 in a git checkout, with -dirty after it where files differ; else 0.1.0."""
    try:
        number = version("hrnet-ray")
    except PackageNotFoundError:  # run from a source tree that is not installed
        project = ROOT / "pyproject.toml"
        number = tomllib.loads(project.read_text())["project"]["version"] if project.is_file() else "unknown"
    if not (ROOT / ".git").exists():  # installed: a git above it would be another project's
        return number
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return f"{number}+g{commit}" if commit else number
