"""A registered version where MLflow may run no code: all of ours works, ONNX loads, pyfunc does not."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from dots import SMALL, write_coco

from hrnet_core.checkpoint import CheckpointSpec, save_checkpoint
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.model import HRNet
from hrnet_core.predictor import PosePredictor
from pipelines.evaluate import evaluate
from pipelines.export import export
from pipelines.promote import promote
from pipelines.settings.config import TrackSettings
from pipelines.tracking.checkpoints import local_checkpoint
from pipelines.tracking.registry import Registry
from pipelines.tracking.store import Tracker, quiet_mlflow

FORBIDDEN = {
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false",
}
CHAMPION = "models:/hrnet-pose@champion"


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with model.onnx, as train hands it over."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run") / "best"
    codec = HeatmapCodec("official", (64, 64))
    save_checkpoint(folder, HRNet(SMALL, "kaiming"), CheckpointSpec(SMALL, codec))
    export(folder)
    return folder


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path / "runs"


def registered(best: Path, storage: Path) -> Tracker:
    tracker = Tracker(TrackSettings(), storage)
    assert Registry(tracker).register(tracker.new_run("r", {}), best, {}) == 1
    return tracker


def test_everything_of_ours_works_without_code(
    best: Path, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered, evaluated, promoted and loaded by its name, with the answers of the folder."""
    import mlflow
    from dots import rows_here

    for name, value in FORBIDDEN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", rows_here)
    tracker = registered(best, storage)
    coco = write_coco(tmp_path / "coco", photos=2)
    result = evaluate(
        "models:/hrnet-pose/1", coco, out=tmp_path / "e", track=TrackSettings(), storage=storage
    )
    assert result.version == "hrnet-pose/1"
    assert promote(storage=storage).promoted
    crops = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    expected = PosePredictor.load(best).heatmaps(crops, flip_test=False)
    with local_checkpoint(None, TrackSettings(), storage) as found:
        assert not [file for file in found.folder.parents[1].rglob("*") if file.suffix in (".py", ".pkl")]
        assert {file.name: file.read_bytes() for file in found.folder.iterdir()} == {
            file.name: file.read_bytes() for file in best.iterdir()
        }
        np.testing.assert_array_equal(
            PosePredictor.load(found.folder).heatmaps(crops, flip_test=False), expected
        )
    tracker.select()
    with quiet_mlflow():
        network = mlflow.onnx.load_model(CHAMPION)
        session = onnxruntime.InferenceSession(network.SerializeToString())
        # 3.17 finds no such flavor, 3.18 refuses it by itself.
        refused = "python_function|MLFLOW_ALLOW_MODEL_CODE_EXECUTION"
        with pytest.raises(mlflow.MlflowException, match=refused):
            mlflow.pyfunc.load_model(CHAMPION)
    assert session.get_inputs()[0].name


def test_pyfunc_answers_as_the_predictor_where_code_may_run(best: Path, storage: Path) -> None:
    import mlflow

    tracker = registered(best, storage)
    tracker.select()
    picture = np.random.default_rng(0).integers(0, 256, (80, 60, 3), np.uint8)
    encoded = cv2.imencode(".png", picture)[1].tobytes()
    boxes = [[5.0, 6.0, 40.0, 60.0]]
    with quiet_mlflow():
        model = mlflow.pyfunc.load_model("models:/hrnet-pose/1")
        (answer,) = model.predict(pd.DataFrame({"image": [encoded], "boxes": [boxes]}))
    (expected,) = PosePredictor.load(best)([picture[..., ::-1]], boxes_xywh=[np.array(boxes, np.float32)])
    np.testing.assert_allclose(answer["keypoints"], expected.keypoints.data, rtol=1e-6)
