"""A stage as a submitted job, on a head with token auth that the test starts and ends itself."""

from __future__ import annotations

import shutil
import tempfile
import urllib.error
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_head import Head

CONFIG = """
data: {input_size: [64, 64], people_per_shard: 64}
model: {width: 4, stem_width: 4, bottlenecks: 1, modules: [1, 1, 1], blocks: 1}
train: {epochs: 1, batch_size: 8, log_every: 1, flip_test: false}
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="hr", dir="/tmp"))  # short, for the sockets
    yield path
    shutil.rmtree(path)


def make_shards(folder: Path, config: Path) -> Path:
    """A drawn set as shards, without Ray."""
    from hrnet_core.skeleton import COCO17
    from pipelines.draw import draw
    from pipelines.preprocess import finish
    from pipelines.settings.config_file import load_config
    from pipelines.shards.build import build_shard
    from pipelines.shards.plan import finished_shards, plan_shards
    from pipelines.sources.coco import read_coco

    coco, shards = folder / "coco", folder / "shards"
    draw(coco, 4, 0, 4, 1)
    data = load_config(str(config)).data.model_copy(update={"root": str(coco), "shards": str(shards)})
    splits = [read_coco(coco, name, COCO17) for name in (data.train_split, data.val_split)]
    works = [work for split in splits for work in plan_shards(split, data)]
    assert not finished_shards(works, data.shards)  # makes the folder
    finish(splits, works, {work.key: build_shard(work) for work in works}, data)
    return shards


def test_training_as_a_job(folder: Path) -> None:
    """Logs, exit status and MLflow run of one that works, and of one with a misspelt setting."""
    config, misspelt = folder / "small.yaml", folder / "misspelt.yaml"
    config.write_text(CONFIG)
    misspelt.write_text(CONFIG.replace("train:", "trian:"))
    shards = make_shards(folder, config)
    store = f"sqlite:///{folder / 'mlflow.db'}"
    arguments = ["--data.shards", str(shards), "--run.name", "job", "--run.storage", str(folder / "runs")]
    arguments += ["--track.no-onnx"]  # other tests look at the file
    with Head(folder).running() as head:
        with pytest.raises(urllib.error.HTTPError, match="403"):
            head.get("/api/jobs/", token="cd" * 32)
        good = head.submit("good", "hrnet", "train", str(config), *arguments, MLFLOW_TRACKING_URI=store)
        bad = head.submit("bad", "hrnet", "train", str(misspelt), *arguments, MLFLOW_TRACKING_URI=store)
        said, complained = good.communicate()[0], bad.communicate()[0]
        jobs = {name: head.get(f"/api/jobs/{name}") for name in ("good", "bad")}

    assert good.returncode == 0, said
    assert (jobs["good"]["status"], jobs["good"]["driver_exit_code"]) == ("SUCCEEDED", 0)
    assert "epoch 1/1" in said
    assert "run job: best AP" in said

    assert bad.returncode == 1
    assert (jobs["bad"]["status"], jobs["bad"]["driver_exit_code"]) == ("FAILED", 2)
    (line,) = {line for line in complained.splitlines() if line.startswith("hrnet train: ")}
    assert f"{misspelt}: unknown key 'trian' (did you mean 'train'?)" in line
    assert "Traceback" not in complained

    with warnings.catch_warnings(action="ignore"):  # SQLAlchemy's, about MLflow's tables
        check_mlflow(store)


def check_mlflow(store: str) -> None:
    """One finished run with its figures, and its model in the registry."""
    from mlflow import MlflowClient

    client = MlflowClient(store, store)  # the registry too: other tests may have named theirs
    (run,) = client.search_runs([client.get_experiment_by_name("hrnet").experiment_id])
    assert (run.info.run_name, run.info.status) == ("job", "FINISHED")
    assert run.data.metrics["train/loss"] > 0
    assert 0 <= run.data.metrics["val_gt/AP"] <= 1
    (version,) = client.search_model_versions("name = 'hrnet-pose'")
    assert version.run_id == run.info.run_id
