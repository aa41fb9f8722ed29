"""Files on this machine or in a bucket: written whole or not at all, read, listed.

Local: temporary name, fsync, rename. Bucket: made here, copied there in one go; an object is visible once
it is complete. A folder is a path, or a URI that pyarrow.fs opens: s3://, gs://, az:// (docs/sources.md).
What a bucket does not give is a DataError that names the key (`answering`), a file that is not there a
FileNotFoundError as everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import psutil
import pyarrow as pa
from pyarrow import fs

from hrnet_core.errors import DataError
from hrnet_core.files import put_in_place
from hrnet_core.locations import fetch_file, is_uri, one_line, open_folder
from pipelines.process.in_order import ahead

AT_ONCE = 16
"""Files of a bucket that a process reads or writes at a time: a request waits much longer than it works."""
PARTS = ".hrnet-uploads"
"""Folder of an Azure container in which uploads begin."""
OUR_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.(?P<process>\d+)@(?P<host>.*)\.tmp")


class BucketAway(DataError):
    """A bucket did not answer as it should: it may the next time."""


@contextlib.contextmanager
def answering(place: str) -> Iterator[None]:
    """OSErrors of the block, where `place` is a URI, as a BucketAway; a missing file stays what it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowInvalid) as error:  # Invalid: a name like a//b
        if not is_uri(place):
            raise
        raise BucketAway(
            f"{place.partition('?')[0]}: the bucket did not give it ({one_line(error)}). Check the bucket's "
            f"name, the credentials in the environment and the network, then run the same command again: "
            f"what is finished is kept."
        ) from None


@contextlib.contextmanager
def writable(place: str) -> Iterator[None]:
    """OSErrors of the block, which writes to `place` (path or URI) or into it, as a DataError."""
    try:
        yield
    except OSError as error:
        where, why = error.filename or place.partition("?")[0], error.strerror or one_line(error)
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise DataError(
                f"{where}: cannot be written: it, or a part of its path, is a file, not a folder. Name "
                f"another place, then run the same command again: what is finished is kept."
            ) from None
        raise DataError(
            f"{where}: cannot be written ({why}). Check the rights and the room there or name another place, "
            f"then run the same command again: what is finished is kept."
        ) from None


def sha256_of(file: str | Path) -> str:
    """Hex sha256 of a file (path or URI), read in pieces. Errors as of `read_file`."""
    files, path = open_folder(str(file))
    with answering(str(file)), files.open_input_stream(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---------------------------------------------------------------------------------- write


@contextlib.contextmanager
def writing(file: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """A name of this machine to write under; what is there becomes `file` (path or URI) when the block ends
    well, else `file` stays as it was. Its folder is made. OSError where that failed.

    sync: on the disk before it has its name, as whoever trusts the name needs it after a power cut. Off for
    one of thousands of files that are all written again.
    """
    files, path = open_folder(str(file))
    local = isinstance(files, fs.LocalFileSystem)
    if local and os.path.exists(path) and not os.path.isfile(path):  # a pipe, a terminal
        yield Path(path)
        return
    if local:
        path = os.path.realpath(path)  # a link stays one
        os.makedirs(os.path.dirname(path), exist_ok=True)
    part = Path(temporary_name(files, path))
    try:
        yield part
        if not local:
            _upload(files, str(part), path)
        elif sync:
            put_in_place(part, path)
        else:
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(file: str | Path, content: str | bytes, *, sync: bool = True) -> None:
    """A file (path or URI) as `writing` leaves it; text as UTF-8."""
    with writing(file, sync=sync) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def writing_many(*, sync: bool = True) -> Iterator[Callable[[str, bytes], None]]:
    """Takes files (path or URI, content) to write as `write_whole` does, those of a bucket AT_ONCE at a time.
    All are there when the block ends well. DataError, from a later call or the block, where one failed."""

    def write(file: str, content: bytes) -> None:
        with writable(file):
            write_whole(file, content, sync=sync)

    begun = deque[Future[None]]()
    with ThreadPoolExecutor(AT_ONCE, "write") as pool:

        def take(file: str, content: bytes) -> None:
            if not is_uri(file):
                write(file, content)
                return
            begun.append(pool.submit(write, file, content))
            if len(begun) > AT_ONCE:
                begun.popleft().result()

        yield take
        while begun:
            begun.popleft().result()


def put_file(source: str | Path, file: str | Path) -> None:
    """A copy of a file of this machine as `file` (path or URI), whole or not at all. OSError, which names
    `file`, where that failed."""
    files, path = open_folder(str(file))
    try:
        if isinstance(files, fs.LocalFileSystem):
            with writing(file) as part:
                shutil.copyfile(source, part)
        else:
            _upload(files, str(source), path)
    except OSError as error:  # copyfile's names the source
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error


def read_json(file: str) -> dict[str, Any] | None:
    """A JSON object (path or URI); None where it is not there."""
    try:
        return dict(json.loads(read_file(file)))
    except FileNotFoundError:
        return None


def write_json(file: str | Path, content: Any) -> None:
    """JSON that people can read too, as `writing` leaves it."""
    write_whole(file, json.dumps(content, indent=1) + "\n")


def temporary_name(files: fs.FileSystem, path: str) -> str:
    """Where to write first: beside the final name, or on this machine for a bucket. Says who writes, so that
    `remove_leftovers` knows what a killed process left behind."""
    folder, name = os.path.split(path)
    if not isinstance(files, fs.LocalFileSystem):
        folder = _uploads()
        os.makedirs(folder, 0o700, exist_ok=True)
    return os.path.join(folder, f".{name[-40:]}.{uuid.uuid4().hex}.{os.getpid()}@{_host()}.tmp")


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files in a folder (path or URI) and below of writers that are gone: of this
    machine's dead processes, and those that no other machine has touched for a day."""
    files, place = open_folder(str(folder))
    for path in Path(place if isinstance(files, fs.LocalFileSystem) else _uploads()).rglob(".*.tmp"):
        if ours := OUR_TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # the writer was done first
                if ours["host"] == _host():
                    gone = not psutil.pid_exists(int(ours["process"]))
                else:
                    gone = time.time() - path.stat().st_mtime > 86_400
                if gone:
                    path.unlink()


@contextlib.contextmanager
def passing_file(folder: str) -> Iterator[str]:
    """A new, empty file in a folder of this machine, for the time of the block; the folder is made and stays.
    DataError where it cannot be written."""
    file = temporary_name(fs.LocalFileSystem(), join(folder, "passing"))
    with writable(folder):
        os.makedirs(folder, exist_ok=True)
        Path(file).touch(exist_ok=False)
    try:
        yield file
    finally:
        Path(file).unlink(missing_ok=True)


def _uploads() -> str:
    """Where this user's files for buckets are made."""
    return os.path.join(tempfile.gettempdir(), f"hrnet-uploads-{os.getuid()}")


def _host() -> str:
    return platform.node().partition(".")[0]


def _upload(files: fs.FileSystem, temporary: str, path: str) -> None:
    """Copy to a bucket. Not by fs.copy_files: Arrow 25's loses the errors of an upload and returns as if all
    were well. All in one write: closing after a part of it would make that part the object."""
    with pa.memory_map(temporary) as source:
        content = source.read_buffer()
        if isinstance(files, fs.AzureFileSystem):
            _put_in_azure(files, content, path)
        else:
            with files.open_output_stream(path) as target:
                target.write(content)
        size = content.size
    if files.get_file_info(path).size != size:
        raise OSError(f"after its upload {path} has not the {size} bytes that were sent")


def _put_in_azure(files: fs.AzureFileSystem, content: pa.Buffer, path: str) -> None:
    """Under a name of its own first: Arrow's stream empties an object when it is opened. A copy within the
    account replaces it in one go."""
    part = f"{path.partition('/')[0]}/{PARTS}/{uuid.uuid4().hex}"
    try:
        with files.open_output_stream(part) as target:
            target.write(content)
        files.copy_file(part, path)
    finally:
        with contextlib.suppress(OSError):
            files.delete_file(part)


def absolute(folder: str) -> str:
    """A path that means the same to workers elsewhere; a URI as it is, without a slash at its end."""
    if not is_uri(folder):
        return os.path.abspath(os.path.expanduser(folder))
    address, mark, query = folder.partition("?")
    return f"{address.rstrip('/')}{mark}{query}"


def join(folder: str, name: str) -> str:
    """FOLDER/name. In a URI the name goes before the query, its special characters quoted."""
    if not is_uri(folder):
        return f"{folder}/{name}"
    address, mark, query = folder.partition("?")
    return f"{address.rstrip('/')}/{quote(name)}{mark}{query}"


def relative(path: str, folder: str) -> str:
    """A path below a folder as seen from there, without query."""
    base = absolute(folder).partition("?")[0]
    return path.partition("?")[0].removeprefix(f"{base}/")


def base_name(folder: str) -> str:
    """The last name of a path or URI, as it was before it was quoted."""
    name = folder.partition("?")[0].rstrip("/").rpartition("/")[2] if is_uri(folder) else Path(folder).name
    return unquote(name) if is_uri(folder) else name


def is_file(path: str) -> bool:
    return _kind(path) == "File" if is_uri(path) else os.path.isfile(path)


def is_folder(path: str) -> bool:
    """A folder of a bucket is where some key begins with its name; a bucket is one itself."""
    return _kind(path) == "Directory" if is_uri(path) else os.path.isdir(path)


def is_empty(folder: str) -> bool:
    """Whether nothing lies in a folder, or there is none. In a bucket an object that marks a folder is
    nothing."""
    if not is_uri(folder):
        return not (os.path.isdir(folder) and os.listdir(folder))
    files, key = open_folder(folder)
    with answering(folder):
        return not files.get_file_info(fs.FileSelector(key, allow_not_found=True))


def _kind(uri: str) -> str:
    files, key = open_folder(uri)
    with answering(uri):
        return str(files.get_file_info(key).type.name)


def read_file(path: str, size: int | None = None) -> bytes:
    """A file, or its first `size` bytes. FileNotFoundError; OSError (local); DataError (bucket)."""
    if not is_uri(path):
        with open(path, "rb") as stream:
            return stream.read(-1 if size is None else size)
    files, key = open_folder(path)
    with answering(path), files.open_input_file(key) as stream:
        content: bytes = stream.read(size)
    return content


def read_files(paths: Iterable[str]) -> Iterator[bytes]:
    """Files (paths or URIs) in their order, those of a bucket AT_ONCE at a time. Errors as of `read_file`."""
    paths = list(paths)
    yield from ahead(read_file, paths, AT_ONCE if any(map(is_uri, paths)) else 0)


@contextlib.contextmanager
def on_this_machine(files: Iterable[str]) -> Iterator[list[Path]]:
    """Paths of the files while the block lasts: of those in a bucket, of copies. Errors as of `read_file`."""
    with tempfile.TemporaryDirectory(prefix="hrnet-copies-") as copies:
        found = []
        for number, file in enumerate(files):
            with answering(file):
                found.append(fetch_file(file, Path(copies) / str(number)))
        yield found


def remove_folder(folder: str) -> None:
    """Remove a folder (path or URI) that nobody needs, with all that is in it, as far as that can be."""
    if not is_uri(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    files, key = open_folder(folder)
    with contextlib.suppress(OSError):
        files.delete_dir(key)


def list_files(folder: str) -> dict[str, int]:
    """Name -> bytes of the files in a folder (none of its subfolders'); nothing where there is none."""
    if not is_uri(folder):
        if not os.path.isdir(folder):
            return {}
        try:
            with os.scandir(folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except OSError as error:
            raise _unlisted(error) from None
    return {name: size for name, (size, _) in _stamps_in(folder).items()}


def list_tree(folder: str) -> list[str]:
    """The files in a folder and in all below it, links to folders included, each by its path from there with
    slashes; nothing where there is none. DataError as of `list_files`."""
    if is_uri(folder):
        files, key = open_folder(folder)
        with answering(folder):
            found = files.get_file_info(fs.FileSelector(key, allow_not_found=True, recursive=True))
        return [i.path.removeprefix(f"{key}/") for i in found if i.type == fs.FileType.File]
    names: list[str] = []
    seen: set[str] = set()
    for place, folders, inside in os.walk(folder, onerror=_cannot_list, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = [f for f in folders if os.path.realpath(os.path.join(place, f)) not in seen]
        paths = [os.path.join(place, name) for name in inside]
        names += [Path(path).relative_to(folder).as_posix() for path in paths if os.path.isfile(path)]
    return names


def _cannot_list(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise _unlisted(error) from None


def _unlisted(error: OSError) -> DataError:
    return DataError(f"{error.filename}: cannot be listed ({error.strerror}). Check its rights.")


def _stamps_in(folder: str) -> dict[str, tuple[int, int]]:
    """Name -> bytes, ns of the last change, of the files in a folder of a bucket."""
    files, key = open_folder(folder)
    with answering(folder):
        found = files.get_file_info(fs.FileSelector(key, allow_not_found=True))
    return {i.base_name: (i.size, i.mtime_ns or 0) for i in found if i.type == fs.FileType.File}


def file_stamps(paths: Sequence[str]) -> list[tuple[int, int] | None]:
    """Bytes and the time of the last change (ns) of each file, None where it is gone. A bucket's folders are
    listed, not asked a file at a time."""
    listed = functools.cache(_stamps_in)

    def stamp(path: str) -> tuple[int, int] | None:
        if not is_uri(path):
            try:
                found = os.stat(path)
            except OSError:  # gone since the folder was listed: opening it will tell
                return None
            return found.st_size, found.st_mtime_ns
        address, mark, query = path.partition("?")
        folder, _, name = address.rpartition("/")
        return listed(f"{folder}{mark}{query}").get(unquote(name))

    return [stamp(path) for path in paths]


def file_sizes(paths: Sequence[str]) -> list[int]:
    """Bytes of each file, -1 where it is gone."""
    return [-1 if stamp is None else stamp[0] for stamp in file_stamps(paths)]
