"""Files of this machine: they and their folders appear under their names whole or not at all, made beside and
renamed; what JSON in them declares becomes a dataclass."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from hrnet_core.errors import PoseError

T = TypeVar("T")


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
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # where it is still there, it failed


def json_kind(value: Any) -> str:
    """What a value of JSON is, in a few words, for messages."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    names = {dict: "an object", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def read_object(file: Path, error: type[PoseError], way_out: str) -> dict[str, Any]:
    """The JSON object that a file holds; else `error`, with the file and the way out."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{file}: no readable JSON ({problem}). {way_out}") from None
    if not isinstance(content, dict):
        raise error(f"{file}: holds {json_kind(content)}, not one JSON object. {way_out}")
    return content


def from_json(
    kind: Callable[..., T],
    content: Any,
    source: str,
    error: type[PoseError],
    way_out: str,
    whole: bool = False,
) -> T:
    """A dataclass from the JSON object with its fields, `whole`: those with a default too; lists as tuples.
    Else `error`, with the source, the field and the way out."""
    if not isinstance(content, dict):
        raise error(f"{source} must be an object, got {content!r}. {way_out}")
    known = inspect.signature(kind).parameters
    needed = {name for name, field in known.items() if whole or field.default is field.empty}
    missing, unknown = sorted(needed - set(content)), sorted(set(content) - set(known))
    if missing or unknown:
        raise error(f"{source}: missing fields {missing}, unknown fields {unknown}. {way_out}")
    try:
        return kind(**{name: _tuples(value) for name, value in content.items()})
    except (PoseError, TypeError, ValueError) as problem:
        raise error(f"{source}: {problem}. {way_out}") from None


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
