"""From drawn people to poses with everything in a bucket, nothing on this machine but a work folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from dots import rows_here
from test_buckets import objects
from test_preprocess import config, without_ray
from test_train import small_config
from test_train_in_bucket import one_worker

from pipelines.draw import draw
from pipelines.evaluate import evaluate
from pipelines.poses.oks_ap import evaluate_results
from pipelines.predict import predict
from pipelines.preprocess import preprocess
from pipelines.settings.config import EvaluateSettings, PredictSettings
from pipelines.storage.files import read_file
from pipelines.training.loop import train_epochs


def test_from_drawn_people_to_poses(any_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray, whose workers do the same in other processes (the slow test below)."""
    bucket = any_bucket
    without_ray(monkeypatch)
    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", rows_here)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    coco, best = f"{bucket}/coco", f"{bucket}/runs/r/best"
    drawn = draw(coco, 4, val_images=2)
    manifest = preprocess(config(coco, f"{bucket}/shards", input_size=(64, 64)))  # type: ignore[arg-type]
    assert manifest.split("val2017")["people"] == drawn.people["val2017"]
    run, _ = one_worker(small_config(manifest, tmp_path, epochs=1), f"{bucket}/runs/r")
    train_epochs(run)
    settings = EvaluateSettings(flip_test=False)
    of = evaluate(best, coco, out=f"{bucket}/evaluation", settings=settings, report=f"{bucket}/page.html")
    assert of.figures["people"] == drawn.people["val2017"]
    annotations = f"{coco}/annotations/person_keypoints_val2017.json"
    plain = PredictSettings(flip_test=False)
    poses = predict([f"{coco}/val2017"], best, boxes=annotations, out=f"{bucket}/poses", settings=plain)
    assert poses.summary["weights_sha256"] == of.protocol["weights_sha256"]
    assert list(Path().iterdir()) == []

    # Outside truth: the set as it is drawn on a disk, scored by what lies in the bucket.
    draw(tmp_path / "coco", 4, val_images=2)
    results = json.loads(read_file(of.results_file))
    truth = tmp_path / "coco" / "annotations" / "person_keypoints_val2017.json"
    assert evaluate_results(results, truth) == of.stats
    found = json.loads(read_file(f"{bucket}/poses/poses.json"))
    asked = Counter(a["image_id"] for a in json.loads(truth.read_text())["annotations"] if not a["iscrowd"])
    assert Counter(pose["image_id"] for pose in found) == asked


@pytest.mark.slow
def test_the_verbs_in_a_row(any_bucket: str, tmp_path: Path) -> None:
    """Real commands, Ray's workers, MLflow's store in the work folder: each ends with 0."""
    bucket = any_bucket
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    variables = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | store

    def hrnet(command: str) -> str:
        argv = [sys.executable, "-m", "pipelines.cli", *command.format(b=bucket).split()]
        done = subprocess.run(
            argv, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    two = "--ray.num-cpus 2"
    hrnet("draw {b}/coco --images 12 --val-images 4")
    hrnet("validate {b}/coco --out {b}/findings.csv --page {b}/findings.html")
    hrnet(f"preprocess tiny --data.root {{b}}/coco --data.shards {{b}}/shards {two}")
    hrnet("inspect {b}/shards --coco {b}/coco --out {b}/inspection")
    train = "train tiny --data.shards {b}/shards --run.name r --run.storage {b}/runs --train.epochs 1"
    hrnet(f"{train} --train.num-workers 1 {two}")
    best = "{b}/runs/r/best"
    told = hrnet(f"evaluate {best} {{b}}/coco --out {{b}}/evaluation --report {{b}}/page.html {two}")
    assert "recorded with hrnet-pose/1" in told
    hrnet(f"promote {best}")
    hrnet(f"export {best}")
    boxes = "{b}/coco/annotations/person_keypoints_val2017.json"
    hrnet(f"predict {{b}}/coco/val2017 --boxes {boxes} --out {{b}}/poses {two}")  # of the champion
    there: dict[str, Any] = objects(bucket)
    for name in ("page.html", "findings.csv", "inspection/index.html", "poses/poses.parquet"):
        assert len(there[name]) > 100, name
    assert json.loads(there["poses/prediction.json"])["checkpoint"] == "models:/hrnet-pose@champion"
    assert "runs/r/best/model.onnx" in there
    assert {p.name for p in tmp_path.iterdir()} <= {"mlflow.db", "mlruns", "mlartifacts"}
