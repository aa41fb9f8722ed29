"""A checkpoint as it is named: a folder, a URI of one, or a version of the registry -> a folder here."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hrnet_core.errors import CheckpointError
from hrnet_core.locations import is_uri, refuse_credentials
from pipelines.config import TrackSettings
from pipelines.registry import CHAMPION, REGISTERED, Registry, champion_of
from pipelines.tracking import Tracker


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


def is_folder_here(checkpoint: str | Path) -> bool:
    """True for a folder of this machine, which may be added to. DataError for a URI with credentials."""
    refuse_credentials(str(checkpoint))
    return not (str(checkpoint).startswith(REGISTERED) or is_uri(str(checkpoint)))


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
            registry = Registry(Tracker(track, storage))
            version = registry.version(name)
            if version is None:
                raise CheckpointError(
                    f"{name}: not in the MLflow store {registry.tracker.shown} (models:/NAME@ALIAS or "
                    f"models:/NAME/NUMBER is). hrnet train registers versions, hrnet promote sets the "
                    f"{CHAMPION}; --run.storage, --track.uri or MLFLOW_TRACKING_URI choose the store."
                )
            folder = registry.checkpoint_folder(version, Path(copy))
            copied = folder.is_relative_to(copy)
            yield LocalCheckpoint(name, folder, f"{version.name}/{version.version}", copied)
        else:
            from hrnet_core.checkpoint import fetch_checkpoint

            yield LocalCheckpoint(name, fetch_checkpoint(name, Path(copy)), copied=is_uri(name))
