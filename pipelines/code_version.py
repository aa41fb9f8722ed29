"""Which code this is: one text for checkpoints, evaluations, predictions, shards and runs."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path


def code_version() -> str:
    """The distribution's version, and the commit where this is a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    return f"{version('hrnet-ray')}+{found}" if found else version("hrnet-ray")
