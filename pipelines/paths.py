"""A path or a URI of a bucket (s3://, gs://): joined, looked at, read. Local ones need no pyarrow.

What a bucket refuses becomes a DataError that names the key (`files.answering`); a file that is not there
is a FileNotFoundError, here as there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from urllib.parse import quote, unquote

from hrnet_core.errors import DataError


def is_uri(path: str) -> bool:
    return "://" in path


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


def is_file(path: str) -> bool:
    return _kind(path) == "File" if is_uri(path) else os.path.isfile(path)


def is_folder(path: str) -> bool:
    """A folder of a bucket is where some key begins with its name; a bucket is one itself."""
    return _kind(path) == "Directory" if is_uri(path) else os.path.isdir(path)


def _kind(uri: str) -> str:
    from pipelines.files import answering, open_folder

    files, key = open_folder(uri)
    with answering(uri):
        return str(files.get_file_info(key).type.name)


def read_file(path: str, size: int | None = None) -> bytes:
    """A file, or its first `size` bytes. FileNotFoundError; OSError (local); DataError (bucket)."""
    if not is_uri(path):
        with open(path, "rb") as stream:
            return stream.read(-1 if size is None else size)
    from pipelines.files import answering, open_folder

    files, key = open_folder(path)
    with answering(path), files.open_input_file(key) as stream:
        content: bytes = stream.read(size)
    return content


def list_files(folder: str) -> dict[str, int]:
    """Name -> bytes of the files in a folder (none of its subfolders'); nothing where there is none."""
    if not is_uri(folder):
        if not os.path.isdir(folder):
            return {}
        try:
            with os.scandir(folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except OSError as error:
            raise DataError(f"{folder}: cannot be listed ({error.strerror}). Check its rights.") from None
    from pyarrow import fs

    from pipelines.files import answering, open_folder

    files, key = open_folder(folder)
    with answering(folder):
        found = files.get_file_info(fs.FileSelector(key, allow_not_found=True))
    return {info.base_name: info.size for info in found if info.type == fs.FileType.File}


def file_sizes(paths: Sequence[str]) -> list[int]:
    """Bytes of each file, -1 where it is gone. A bucket's folders are listed, not asked a file at a time."""
    folders: dict[str, dict[str, int]] = {}

    def size(path: str) -> int:
        if not is_uri(path):
            try:
                return os.stat(path).st_size
            except OSError:  # gone since the folder was listed: opening it will tell
                return -1
        address, mark, query = path.partition("?")
        folder, _, name = address.rpartition("/")
        folder = f"{folder}{mark}{query}"
        if folder not in folders:
            folders[folder] = list_files(folder)
        return folders[folder].get(unquote(name), -1)

    return [size(path) for path in paths]
