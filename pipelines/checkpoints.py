"""A checkpoint as it is named on the command line -> its folder here."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hrnet_core.errors import CheckpointError
from hrnet_core.locations import is_uri, open_folder
from pipelines.config import RunSettings, TrackSettings
from pipelines.tracking import CHAMPION, Tracker, quiet


@contextlib.contextmanager
def local_checkpoint(checkpoint: str | Path, track: TrackSettings, storage: str | Path) -> Iterator[Path]:
    """A local folder for a checkpoint folder, its URI or "models:/name@alias", while the block lasts."""
    ref = str(checkpoint)
    if ref.startswith("models:/"):
        yield fetch_model(ref, track, storage)
        return
    if not is_uri(ref):
        yield Path(ref)
        return
    from pyarrow import fs

    files, path = open_folder(ref)
    with tempfile.TemporaryDirectory(prefix="hrnet-checkpoint-") as folder:
        try:
            fs.copy_files(path, folder, source_filesystem=files)
        except OSError as error:
            raise CheckpointError(
                f"{ref}: cannot be read ({error}). Name a folder, a URI that pyarrow reads (s3://, gs://, "
                f"file://) with its credentials in the environment, or models:/hrnet-pose@champion."
            ) from None
        yield Path(folder)


def fetch_model(model_ref: str, track: TrackSettings, storage: str | Path) -> Path:
    """A local checkpoint folder for a folder, "models:/name@alias" or "models:/name/3".

    A store with local files gives its own folder (do not write there), a server a downloaded copy.
    CheckpointError where there is no such version.
    """
    if not model_ref.startswith("models:/"):
        return Path(model_ref)
    import mlflow

    tracker = Tracker(track, storage)
    version = tracker.version(model_ref)
    if version is None:
        raise CheckpointError(
            f"{model_ref}: not in the MLflow store {tracker.uri}. hrnet train registers versions, hrnet "
            f"promote sets {CHAMPION}; --run.storage, --track.uri or MLFLOW_TRACKING_URI choose the store."
        )
    with quiet():
        folder = mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}")
    found = sorted(Path(folder).glob("artifacts/*/checkpoint.json"))
    if len(found) != 1:
        raise CheckpointError(
            f"{model_ref}: version {version.version} holds no checkpoint folder ({folder})."
        )
    return found[0].parent


def resolve(checkpoint: str, run: RunSettings, track: TrackSettings, scratch: Path) -> tuple[Path, str]:
    """A local folder for what was asked for, and its registered version ("" where it has none)."""
    if checkpoint.startswith("models:/"):
        from pipelines.tracking import Tracker

        folder = fetch_model(checkpoint, track, run.storage)
        version = Tracker(track, run.storage).version(checkpoint)
        return folder, str(version.version) if version else ""
    from serve.model import fetch

    return fetch(checkpoint, scratch / "checkpoint"), ""
