"""Files and folders of this machine appear under their names whole or not at all: made beside, renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
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


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside it that takes the place of `folder` when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's 0700 would keep other users of a shared disk out
        yield temporary
        old = temporary.with_name(temporary.name.replace(".new-", ".old-"))
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
