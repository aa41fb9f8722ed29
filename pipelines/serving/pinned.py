"""A copy of what is deployed that nothing changes any more, where replicas find it whenever they start."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Set
from pathlib import Path

from hrnet_core.checkpoint import DESCRIPTION, EXPORTED, SELFTEST, WEIGHTS
from hrnet_core.detector import PersonDetector
from hrnet_core.errors import ConfigError
from hrnet_core.locations import is_uri, one_line
from pipelines.cluster.session import on_cluster
from pipelines.storage.files import (
    absolute,
    is_file,
    join,
    list_files,
    read_json,
    remove_folder,
    sha256_of,
    write_json,
    writing,
)
from pipelines.tracking.checkpoints import LocalCheckpoint
from serve.settings import DetectorChoice

SERVED = (DESCRIPTION, WEIGHTS, SELFTEST, *EXPORTED)
KEPT = 5
"""Copies that stay beside those that are named: of the last deploys of an endpoint, whatever came of them."""


@contextlib.contextmanager
def standing_still(found: LocalCheckpoint) -> Iterator[Path]:
    """A folder with what a replica needs of a checkpoint; no training run replaces it while it is checked."""
    if found.copied:
        yield found.folder
        return
    with tempfile.TemporaryDirectory(prefix="hrnet-deploy-") as copy:
        for name in SERVED:
            if (found.folder / name).is_file():
                shutil.copyfile(found.folder / name, Path(copy) / name)
        yield Path(copy) if any(Path(copy).iterdir()) else found.folder  # nothing there: the checks say so


def pinned(found: LocalCheckpoint, still: Path, storage: str, port: int) -> str:
    """Where the replicas read it: STORAGE/deployed/DIGEST, made of `still`, DIGEST of all its files.

    port: of the endpoint, whose list of copies then begins with it. On a cluster whose job leaves `storage`
    relative nodes share no such folder: a checkpoint that they can reach is then read from where it lies, and
    only its weights' sha256 tells that it changed.
    """
    if not _shared(storage) and not (found.version and found.copied):
        return found.name if is_uri(found.name) else str(found.folder.resolve())
    names = sorted(name for name in SERVED if (still / name).is_file())
    sums = [f"{sha256_of(still / name)}  {name}" for name in names]
    digest = hashlib.sha256("\n".join(sums).encode()).hexdigest()[:16]
    folder = join(storage, "deployed")
    with _told(folder):
        # Before it is there: who removes copies meanwhile sees that this one is wanted.
        _write(folder, port, [digest, *(one for one in _own(folder, port) if one != digest)])
    return published(still, join(folder, digest))


def prune(checkpoint: str, storage: str, port: int, named: Set[str]) -> list[str]:
    """Remove the copies that this endpoint was once given and has no more use for; returns their digests.

    checkpoint: what has come live; one that is no copy of `pinned` removes nothing. named: all that a replica
    may start from. KEPT others stay, and so does what other endpoints on the same storage list, and what none
    of them has ever listed. OSError, DataError, ValueError where a list cannot be read.
    """
    folder = join(storage, "deployed")
    own = _own(folder, port)
    if checkpoint not in {_copy(folder, one) for one in own}:
        return []
    keep = {one for one in own if _copy(folder, one) in named} | set(own[:KEPT])
    old = [one for one in own if one not in keep]
    if not old:
        return []
    others = {one for file in _lists(folder) if file != _list_of(port) for one in _digests(folder, file)}
    removed = [one for one in old if one not in others]
    for one in removed:
        remove_folder(join(folder, one))
    _write(folder, port, [one for one in own if one in keep])
    return removed


def _copy(folder: str, digest: str) -> str:
    """As replicas name it."""
    return absolute(join(folder, digest))


def _list_of(port: int) -> str:
    """The file that lists an endpoint's copies, the last one first. Machines and clusters share storage."""
    where = [platform.node(), os.environ["RAY_ADDRESS"]] if on_cluster() else [platform.node(), str(port)]
    return re.sub(r"[^\w.-]+", "_", "-".join(where)) + ".json"


def _lists(folder: str) -> list[str]:
    return [name for name in list_files(folder) if name.endswith(".json")]


def _digests(folder: str, file: str) -> list[str]:
    return (read_json(join(folder, file)) or {}).get("deployed", [])


def _own(folder: str, port: int) -> list[str]:
    return _digests(folder, _list_of(port))


def _write(folder: str, port: int, digests: list[str]) -> None:
    write_json(join(folder, _list_of(port)), {"deployed": digests})


@contextlib.contextmanager
def _told(target: str) -> Iterator[None]:
    """An OSError of the block as a ConfigError that says where replicas have to find their files."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{target}: cannot be written for the replicas ({one_line(error)}). Set --run.storage to a "
            f"folder or URI that every node can read and write."
        ) from None


def pinned_detector(file: str, storage: str) -> DetectorChoice:
    """An ONNX detector (path or URI), tried here, and its copy with its declaration for the replicas, as
    `pinned`. ConfigError says what is wrong with it."""
    detector = PersonDetector.load(file)
    choice = DetectorChoice(model=absolute(file), source=file, sha256=detector.sha256)
    if not _shared(storage):
        return choice
    target = join(storage, f"deployed/{detector.sha256[:16]}")
    with tempfile.TemporaryDirectory(prefix="hrnet-deploy-") as copy:
        model = Path(copy) / choice.name
        model.write_bytes(detector.model)
        model.with_suffix(".json").write_bytes(detector.declared)
        return choice.model_copy(update={"model": join(published(Path(copy), target), choice.name)})


def _shared(storage: str) -> bool:
    """Whether the replicas find what is put there."""
    return not on_cluster() or is_uri(storage) or Path(storage).is_absolute()


def published(folder: Path, target: str) -> str:
    """The files of a folder as `target` (path or URI); those that lie there already are left as they are."""
    with _told(target):
        for file in sorted(folder.iterdir()):
            place = join(target, file.name)
            if is_file(place) and sha256_of(place) == sha256_of(file):
                continue
            with writing(place) as part:
                shutil.copyfile(file, part)
    return absolute(target)
