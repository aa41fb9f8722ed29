"""A sweep whose storage is a bucket: the real command, and again where nothing is left to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_feed import dotted_shards
from test_train import small_config
from test_train_in_bucket import tracking_server

from pipelines.settings.config_file import load_config
from pipelines.storage.files import list_files, read_file
from pipelines.sweeps.space import trial_values
from pipelines.training.run_folder import TrainResult, read_record


@pytest.mark.slow
def test_a_sweep_leaves_its_trials_and_the_best_config_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    manifest = dotted_shards(tmp_path / "shards", {"train2017": 37, "val2017": 12})
    fields = small_config(manifest, tmp_path, epochs=1, cpus_per_worker=0.5).model_dump(mode="json")
    space = {"train.lr": {"loguniform": [1e-3, 1e-2]}}
    fields["sweep"] |= {"space": space, "trials": 2, "concurrent": 1}
    settings = tmp_path / "small.yaml"
    settings.write_text(json.dumps({key: value for key, value in fields.items() if key != "config_name"}))
    command = [sys.executable, "-m", "pipelines.cli", "sweep", str(settings), "--ray.num-cpus", "2"]
    work = tmp_path / "work"
    work.mkdir()

    with tracking_server(tmp_path) as uri:
        told = []
        for _ in range(2):
            done = subprocess.run(
                [*command, "--run.storage", f"{bucket}/runs", "--track.uri", uri],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=900,
                cwd=work,
                env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            )
            assert done.returncode == 0, done.stdout
            told.append(done.stdout)
        client = MlflowClient(uri, uri)
        parent = (read_record(f"{bucket}/runs/r", "sweep.json") or {})["run_id"]
        statuses = [client.get_run(parent).info.status]
        for number in range(2):
            result = TrainResult.read(f"{bucket}/runs/r-{number:02d}")
            assert result is not None
            assert result.epochs == 1
            run_id = (read_record(result.folder, "run.json") or {})["run_id"]
            assert client.get_run(run_id).data.tags["mlflow.parentRunId"] == parent
            statuses.append(client.get_run(run_id).info.status)
        assert statuses == ["FINISHED"] * 3

    assert told[0].endswith(told[1]), "the second found all trials through: the same table, and no more"
    assert f"a copy of {bucket}/runs/r/best.yaml on this machine" in told[1]
    (tmp_path / "best.yaml").write_bytes(read_file(f"{bucket}/runs/r/best.yaml"))
    rates = [trial_values(space, 0, number)["train.lr"] for number in range(2)]
    assert load_config(str(tmp_path / "best.yaml")).train.lr in rates
    assert list_files(f"{bucket}/runs") == {}, "leases are given back"
    assert list(work.iterdir()) == [], "no folder called s3:"
