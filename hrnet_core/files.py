"""A file of this machine appears under its name whole or not at all: temporary beside it, fsync, rename."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(file: Path, content: bytes) -> None:
    """OSError where that failed; `file` then is what it was."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        put_in_place(part, file)
    finally:
        part.unlink(missing_ok=True)


def put_in_place(part: str | Path, file: str | Path) -> None:
    """Rename a finished file in its folder, once it is on the disk. OSError where that failed."""
    _sync(part, os.O_RDWR)
    os.replace(part, file)
    _sync(os.path.dirname(file) or ".", os.O_RDONLY)


def _sync(path: str | Path, mode: int) -> None:
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
