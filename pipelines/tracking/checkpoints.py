"""A checkpoint as it is named: a folder, a URI of one, or a version of the registry -> a folder here; and
into a bucket."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hrnet_core.errors import CheckpointError
from hrnet_core.locations import destination, is_uri, open_folder, refuse_credentials
from pipelines.settings.config import TrackSettings
from pipelines.storage.files import join, list_files, put_file, writable
from pipelines.tracking.registry import CHAMPION, REGISTERED, Registry, champion_of, evaluations
from pipelines.tracking.store import Tracker

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from hrnet_core.checkpoint import CheckpointSpec


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint where it can be read here."""

    name: str
    """As it was asked for, the champion's where nothing was."""
    folder: Path
    version: str | None = None
    """"hrnet-pose/3" where the name is of the registry."""
    copied: bool = False
    """The folder goes when the block ends."""
    evaluations: tuple[dict[str, Any], ...] = ()
    """What the registry has of a version (`registry.evaluations`)."""


def is_folder_here(checkpoint: str | Path) -> bool:
    """True for a folder of this machine, which may be added to. DataError for a URI with credentials."""
    refuse_credentials(str(checkpoint))
    return not (str(checkpoint).startswith(REGISTERED) or is_uri(str(checkpoint)))


def evaluation_folder(checkpoint: str, boxes: str, storage: str) -> str:
    """Where evaluate writes unless it is told, boxes "gt" or "det": beside a local checkpoint; in the storage
    folder for one that comes from elsewhere."""
    if is_folder_here(checkpoint):
        return str(Path(checkpoint).parent / f"evaluation_{boxes}")
    name = re.sub(r"[^\w.-]+", "_", checkpoint)
    return join(destination(storage, "--run.storage"), f"evaluations/{name}/evaluation_{boxes}")


@contextlib.contextmanager
def local_checkpoint(
    checkpoint: str | Path | None, track: TrackSettings, storage: str | Path
) -> Iterator[LocalCheckpoint]:
    """What a folder, its URI, "models:/name@alias" or "models:/name/3" names, while the block lasts.

    None: the champion of `track.registered_model`. CheckpointError where nothing is there; a folder is taken
    as it is: loading it will tell. A folder of the registry is not to be written into.
    """
    name = champion_of(track.registered_model) if checkpoint is None else str(checkpoint)
    with tempfile.TemporaryDirectory(prefix="hrnet-checkpoint-") as copy:
        if name.startswith(REGISTERED):
            registry = Registry(Tracker(track, storage, create=False))
            version = registry.version(name)
            if version is None:
                raise CheckpointError(
                    f"{name}: not in the MLflow store {registry.tracker.shown} (models:/NAME@ALIAS or "
                    f"models:/NAME/NUMBER is). hrnet train registers versions, hrnet promote sets the "
                    f"{CHAMPION}; --run.storage, --track.uri or MLFLOW_TRACKING_URI choose the store."
                )
            folder = registry.checkpoint_folder(version, Path(copy))
            copied = folder.is_relative_to(copy)
            known = tuple(evaluations(version).values())
            yield LocalCheckpoint(name, folder, f"{version.name}/{version.version}", copied, known)
        else:
            from hrnet_core.checkpoint import fetch_checkpoint

            yield LocalCheckpoint(name, fetch_checkpoint(name, Path(copy)), copied=is_uri(name))


def put_checkpoint(place: str, weights: Mapping[str, Tensor], spec: CheckpointSpec) -> CheckpointSpec:
    """save_checkpoint at a path or URI. In a bucket file after file, what describes the others last: who
    reads meanwhile finds weights of another sha256 than described, and refuses them. DataError where the
    bucket does not take it."""
    from hrnet_core.checkpoint import DESCRIPTION, EXPORTED, SELFTEST, TRAINER, WEIGHTS, save_checkpoint

    if not is_uri(place):
        return save_checkpoint(place, weights, spec)
    there = list_files(place)
    if others := sorted(set(there) - {DESCRIPTION, WEIGHTS, SELFTEST, TRAINER, *EXPORTED}):
        raise CheckpointError(f"{place}: holds other files ({', '.join(others[:5])}). Name a new folder.")
    with tempfile.TemporaryDirectory(prefix="hrnet-saved-") as temporary, writable(place):
        made = Path(temporary) / "checkpoint"
        spec = save_checkpoint(made, weights, spec)
        for name in (TRAINER, *EXPORTED):  # of other weights
            if name in there:
                files, key = open_folder(join(place, name))
                files.delete_file(key)
        for name in (WEIGHTS, SELFTEST, DESCRIPTION):
            put_file(made / name, join(place, name))
    return spec
