"""The registry: versions of models in MLflow's store, their evaluations, and the champion."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hrnet_core.errors import CheckpointError
from hrnet_core.locations import one_line, without_credentials
from pipelines.settings.config import TrackSettings
from pipelines.storage.files import join, read_file
from pipelines.tracking.store import Tracker, quiet_mlflow, refusals_told

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import Model

REGISTERED = "models:/"
"""How the name of a registered version begins."""
CHAMPION = "champion"
DECISIVE = ("data_digest", "boxes", "flip_test", "preset")
"""What of two protocols must be equal before their APs are compared (docs/contracts.md)."""
EVALUATION = "evaluation."
"""Prefix of a version's tags that hold an evaluation: JSON {"protocol", "stats", "keypoint_scores"}."""


def champion_of(registered_model: str) -> str:
    """The checkpoint that is meant where none is named."""
    return f"{REGISTERED}{registered_model}@{CHAMPION}"


@contextlib.contextmanager
def _absent_is_none() -> Iterator[None]:
    """Ends a block or function where MLflow says that there is no such model, version or alias."""
    from mlflow import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise


class Registry:
    """Versions of the model that `track.registered_model` names, and of others by their full name."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.model = tracker.settings.registered_model

    @property
    def client(self) -> MlflowClient:
        return self.tracker.client

    @quiet_mlflow()
    def register(self, run_id: str, checkpoint: Path, tags: Mapping[str, str], about: str = "") -> int:
        """The checkpoint folder as a new version of the model (`Files`); its number. about: its description,
        which MLflow's page shows as Markdown."""
        import mlflow
        from mlflow.models import Model

        self.tracker.select()
        with mlflow.start_run(run_id=run_id):
            info = Model.log(None, Files, name="model", checkpoint=checkpoint)
        # start_run's end says FINISHED; the owner of the run decides that.
        self.client.update_run(run_id, status="RUNNING")
        tags = {"weights_sha256": _weights_sha256(checkpoint), **tags}
        with contextlib.redirect_stderr(io.StringIO()):  # where it says so
            version = mlflow.register_model(info.model_uri, self.model, tags=tags).version
        self.client.update_model_version(self.model, version, about)
        return int(version)

    @quiet_mlflow()
    @_absent_is_none()
    def version(self, ref: str | None) -> ModelVersion | None:
        """The version that "models:/name@alias", "models:/name/3" or "3" names, or the newest of the weights
        that a sha256 or a checkpoint folder (path or URI) names; None: the newest of all. None where there is
        none."""
        if not self.tracker.there:
            return None
        with refusals_told(self.tracker.shown):
            if ref is None:
                return self._newest()
            if re.fullmatch("[0-9a-f]{64}", ref):
                return self._newest(f" and tag.weights_sha256='{ref}'")
            if ref.isdecimal():
                return self.client.get_model_version(self.model, ref)
            if not ref.startswith(REGISTERED):
                return self.version(_weights_sha256(ref))
            name, alias, which = ref.removeprefix(REGISTERED).rpartition("@")
            if alias:
                return self.client.get_model_version_by_alias(name, which)
            name, _, which = ref.removeprefix(REGISTERED).rpartition("/")
            return self.client.get_model_version(name, which)

    def _newest(self, condition: str = "") -> ModelVersion | None:
        found = self.client.search_model_versions(f"name='{self.model}'{condition}", max_results=10_000)
        return max(found, key=lambda version: int(version.version), default=None)

    @quiet_mlflow()
    def checkpoint_folder(self, version: ModelVersion, into: Path) -> Path:
        """A version's checkpoint: the folder in a store on this machine, else a copy in `into`.

        CheckpointError where the store does not give it.
        """
        import mlflow

        name, target = f"{version.name}/{version.version}", None if self.tracker.local else str(into)
        self.tracker.select()
        try:
            folder = mlflow.artifacts.download_artifacts(f"{REGISTERED}{name}", dst_path=target)
            found = list(Path(folder).glob("artifacts/*/checkpoint.json"))
            if len(found) != 1:
                raise FileNotFoundError(f"{len(found)} checkpoint.json in it")
        except Exception as error:
            raise CheckpointError(
                f"{name}: the MLflow store {self.tracker.shown} gives no checkpoint folder "
                f"({without_credentials(one_line(error))}). Where its files are gone, name the folder that "
                f"was registered, runs/NAME/best."
            ) from None
        return found[0].parent

    def set_champion(self, version: ModelVersion) -> None:
        """Move the alias; the version that had it stands in the tag previous_champion."""
        old = self.version(champion_of(version.name))
        with refusals_told(self.tracker.shown):
            if old is not None and old.version != version.version:
                self.client.set_registered_model_tag(version.name, "previous_champion", str(old.version))
            self.client.set_registered_model_alias(version.name, CHAMPION, str(version.version))


class Files:
    """What a version is on the disk: MLflow's Model.log asks its flavors for this one function.

    The checkpoint folder alone needs no code, and is all that our stages read. With a model.onnx in it
    mlflow.onnx.load_model reads that. mlflow.pyfunc.load_model runs stored code (mlflow_model.py over the
    hrnet_core package, no pickle), which is stored where MLflow is allowed to run such.
    """

    @staticmethod
    def save_model(path: str, mlflow_model: Model, checkpoint: Path) -> None:
        import mlflow

        import hrnet_core
        from hrnet_core.checkpoint import ONNX

        inside = f"artifacts/{checkpoint.name}"
        mlflow_model.add_flavor("hrnet", checkpoint=inside)
        if (checkpoint / ONNX).exists():
            onnx = {"onnx_version": metadata.version("onnx"), "providers": ["CPUExecutionProvider"]}
            mlflow_model.add_flavor("onnx", data=f"{inside}/{ONNX}", code=None, **onnx)
        if code_is_allowed():
            mlflow.pyfunc.save_model(
                path,
                mlflow_model=mlflow_model,
                python_model=str(Path(__file__).with_name("mlflow_model.py")),
                artifacts={"checkpoint": str(checkpoint)},
                code_paths=[str(Path(hrnet_core.__file__).parent)],
                pip_requirements=["torch", "numpy", "opencv-python-headless", "safetensors", "Pillow"],
            )
            return
        shutil.copytree(checkpoint, Path(path) / inside)
        mlflow_model.save(Path(path) / "MLmodel")


def code_is_allowed() -> bool:
    """MLflow runs a version's code already when it stores it; from 3.18 on this variable forbids both."""
    return os.environ.get("MLFLOW_ALLOW_MODEL_CODE_EXECUTION", "true").strip().lower() in ("true", "1")


@quiet_mlflow()
def record_evaluation(
    ref: str,
    stats: Mapping[str, float],
    protocol: Mapping[str, Any],
    artifacts: Sequence[str | Path] = (),
    *,
    keypoint_scores: Mapping[str, Any] | None = None,
    track: TrackSettings | None = None,
    storage: str | Path = "runs",
) -> str | None:
    """Write an evaluation to the version that `ref` names (Registry.version), and to its run.

    stats: "AP", "AP50", ... as fractions. protocol: data_digest, boxes ("gt", or "det" with whatever
    identifies the boxes), flip_test, preset, and more if wanted; only those four decide whether two APs
    are compared. keypoint_scores: their distribution, {"up_to", "counts"}. Metrics become eval_gt/* or
    eval_det/*. Returns the version's name "hrnet-pose/3", or None where the checkpoint was never registered
    in this store (nothing is written then).
    """
    key = comparable(protocol)
    tracker = Tracker(track or TrackSettings(), storage, create=False)
    version = Registry(tracker).version(ref)
    if version is None:
        return None
    prefix = "eval_gt" if protocol["boxes"] == "gt" else "eval_det"
    found = {"protocol": dict(protocol), "stats": dict(stats)}
    found |= {"keypoint_scores": dict(keypoint_scores)} if keypoint_scores else {}
    body = json.dumps(found, sort_keys=True)
    with refusals_told(tracker.shown):
        for tag, text in ((EVALUATION + key, body), (f"{prefix}/AP", f"{stats['AP']:.4f}")):
            tracker.client.set_model_version_tag(version.name, version.version, tag, text)
        if version.run_id:
            tracker.log_metrics(version.run_id, {f"{prefix}/{name}": of for name, of in stats.items()})
            tracker.log_files(version.run_id, [Path(a) for a in artifacts], f"evaluation/{prefix}")
    return f"{version.name}/{version.version}"


def evaluations(version: ModelVersion) -> dict[str, dict[str, Any]]:
    """{key of what must be equal: {"protocol", "stats", ...}} that record_evaluation wrote to a version."""
    return {
        key.removeprefix(EVALUATION): json.loads(value)
        for key, value in version.tags.items()
        if key.startswith(EVALUATION)
    }


def comparable(protocol: Mapping[str, Any]) -> str:
    """12 hex digits: two APs with the same ones may be compared. KeyError: a decisive field is missing."""
    text = json.dumps([protocol[name] for name in DECISIVE], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _weights_sha256(checkpoint: str | Path) -> str:
    """As the checkpoint folder (path or URI) states it."""
    file = join(str(checkpoint), "checkpoint.json")
    try:
        return str(json.loads(read_file(file))["weights_sha256"])
    except (OSError, ValueError, KeyError):
        raise CheckpointError(
            f"{file}: not a checkpoint folder with its weights' sha256. Give the folder that hrnet train or "
            f"hrnet import wrote."
        ) from None
