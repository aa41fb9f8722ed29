"""Files of a dataset, on this machine or in a bucket, that appear whole or not at all.

Local: temporary name, fsync, rename. Bucket: made here, copied there in one go; an object is visible once
it is complete. A folder is a path or a URI that pyarrow.fs knows.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import tempfile
import time
import uuid
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from hrnet_core.errors import DataError

OUR_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.(?P<process>\d+)@(?P<host>.*)\.tmp")


def open_folder(folder: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI and the folder's path on it."""
    if "://" not in folder:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(folder))
    try:
        return fs.FileSystem.from_uri(folder)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{folder}: not a folder that can be opened ({error}).") from None


def sha256_of(files: fs.FileSystem, path: str) -> str:
    """Hex sha256 of a stored file, read in pieces."""
    digest = hashlib.sha256()
    with files.open_input_stream(path) as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def put_file(files: fs.FileSystem, path: str, content: bytes) -> None:
    """Write a small file so that it appears whole or not at all."""
    temporary = temporary_name(files, path)
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
        publish(files, temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def temporary_name(files: fs.FileSystem, path: str) -> str:
    """Where to write before `publish`: beside the final name, or on this machine for a bucket. Says who
    writes, so that `remove_leftovers` knows what a killed process left behind."""
    folder, name = os.path.split(path)
    if not isinstance(files, fs.LocalFileSystem):
        folder = tempfile.gettempdir()
    return os.path.join(folder, f".{name}.{uuid.uuid4().hex}.{os.getpid()}@{_host()}.tmp")


def remove_leftovers(files: fs.FileSystem, folder: str) -> None:
    """Remove the temporary files of writers that are gone: of this machine's dead processes, and those
    that no other machine has touched for a day."""
    if not isinstance(files, fs.LocalFileSystem):
        return
    for path in Path(folder).glob(".*.tmp"):
        ours = OUR_TEMPORARY.fullmatch(path.name)
        if ours is None:
            continue
        with contextlib.suppress(FileNotFoundError):  # the writer was done first
            if ours["host"] == _host():
                gone = not _alive(int(ours["process"]))
            else:
                gone = time.time() - path.stat().st_mtime > 86_400
            if gone:
                path.unlink()


def _host() -> str:
    return platform.node().partition(".")[0]


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def publish(files: fs.FileSystem, temporary: str, path: str) -> None:
    """Make a finished local temporary file visible under its final name."""
    if not isinstance(files, fs.LocalFileSystem):
        fs.copy_files(temporary, path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=files)
        return
    _sync(temporary, os.O_RDWR)
    os.replace(temporary, path)
    _sync(os.path.dirname(path), os.O_RDONLY)


def _sync(path: str, mode: int) -> None:
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
