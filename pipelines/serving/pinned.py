"""A copy of what is deployed that nothing changes any more, where replicas find it whenever they start."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hrnet_core.checkpoint import DESCRIPTION, EXPORTED, SELFTEST, WEIGHTS
from hrnet_core.detector import PersonDetector
from hrnet_core.errors import ConfigError
from hrnet_core.locations import is_uri, one_line
from pipelines.checkpoints import LocalCheckpoint
from pipelines.cluster import on_cluster
from pipelines.storage import absolute, is_file, join, sha256_of, writing
from serve.settings import DetectorChoice

SERVED = (DESCRIPTION, WEIGHTS, SELFTEST, *EXPORTED)


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


def pinned(found: LocalCheckpoint, still: Path, storage: str) -> str:
    """Where the replicas read it: STORAGE/deployed/DIGEST, made of `still`, DIGEST of all its files.

    On a cluster whose job leaves `storage` relative nodes share no such folder: a checkpoint that they can
    reach is then read from where it lies, and only its weights' sha256 tells that it changed.
    """
    if not _shared(storage) and not (found.version and found.copied):
        return found.name if is_uri(found.name) else str(found.folder.resolve())
    names = sorted(name for name in SERVED if (still / name).is_file())
    sums = [f"{sha256_of(still / name)}  {name}" for name in names]
    digest = hashlib.sha256("\n".join(sums).encode()).hexdigest()
    return published(still, join(storage, f"deployed/{digest[:16]}"))


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
    try:
        for file in sorted(folder.iterdir()):
            place = join(target, file.name)
            if is_file(place) and sha256_of(place) == sha256_of(file):
                continue
            with writing(place) as part:
                shutil.copyfile(file, part)
    except OSError as error:
        raise ConfigError(
            f"{target}: cannot be written for the replicas ({one_line(error)}). Set --run.storage to a "
            f"folder or URI that every node can read and write."
        ) from None
    return absolute(target)
