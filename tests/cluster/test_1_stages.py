"""The stages as jobs on a cluster of three machines, with everything in a bucket; a machine is lost in each.

In the order of the walk: a test takes what those before it have left. What comes out is held against the same
commands on one machine alone, the laptop, on its own disk.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from bucket_server import Bucket, Fault
from machines import Cluster, until
from stages import DATA, DRAWN, SPACE, TWO, begin_training, losses, objects, preprocess, shards, train

from pipelines.storage.files import read_file


def test_preprocess_loses_a_machine(cluster: Cluster, bucket: Bucket, alone: dict[str, Any]) -> None:
    cluster.laptop.run(f"hrnet draw s3://team/coco {DRAWN}")
    slow = Fault("PUT", "team/shards/", delay=0.5)  # so that some shards are being made when it is lost
    bucket.faults.append(slow)
    job = cluster.submit("preprocess", preprocess("s3://team/coco", "s3://team/shards"))
    w1 = cluster.machines["w1"]
    until(lambda: len(shards()) >= 2 and w1.works_at("MapBatches(_build_batch)"), 120, job.said)
    w1.kill()
    there = shards()
    bucket.faults.remove(slow)
    assert job.ends() == 0, job.said()
    cluster.start_worker("w1")
    manifest = json.loads(read_file("s3://team/shards/manifest.json"))
    listed = [shard["path"] for split in manifest["splits"].values() for shard in split["shards"]]
    assert 2 <= len(there) < len(listed)
    assert shards() == {f"team/shards/{path}" for path in listed}
    assert len(set(listed)) == len(listed)
    assert manifest["digest"] == alone["digest"]


def test_training_is_stopped_and_goes_on(cluster: Cluster, alone: dict[str, Any]) -> None:
    job = begin_training(cluster, "train-1", "stopped")
    cluster.laptop.run("ray job stop train-1")
    job.ends()
    assert "stopped by SIGTERM" in job.said(), job.said()
    assert "the same command goes on from the checkpoint of epoch" in job.said(), job.said()
    again = cluster.submit("train-2", train("s3://team/shards", "s3://team/runs", "stopped"))
    assert again.ends() == 0, again.said()
    assert losses(read_file("s3://team/runs/stopped/metrics.jsonl")) == alone["losses"]


def test_training_loses_a_machine(cluster: Cluster, alone: dict[str, Any]) -> None:
    job = begin_training(cluster, "train-3", "lost")
    cluster.machines["w2"].kill()
    job.says("going on from the checkpoint of epoch")
    cluster.start_worker("w2")
    assert job.ends() == 0, job.said()
    lost = ("its machine is gone", "lost the connection to another worker")
    assert any(words in job.said() for words in lost), job.said()
    assert losses(read_file("s3://team/runs/lost/metrics.jsonl")) == alone["losses"]


def test_a_sweep_tries_its_settings_on_both_machines(cluster: Cluster) -> None:
    """With a config that the laptop has, which goes along with the job."""
    cluster.laptop.run(f"mkdir -p mine && echo '{SPACE}' > mine/rates.yaml")
    sweep = f"hrnet sweep rates.yaml --data.shards s3://team/shards --run.storage s3://team/runs {DATA}"
    short = "--run.name rates --train.epochs 1 --train.batch-size 16 --train.no-flip-test"
    job = cluster.submit("sweep", f"{sweep} {short} --train.num-workers 1", "--working-dir mine")
    assert job.ends() == 0, job.said()
    assert "sweep rates: 2 trials, 2 at a time" in job.said(), job.said()
    rates, aps = [], []
    for trial in ("rates-00", "rates-01"):
        rates.append(json.loads(read_file(f"s3://team/runs/{trial}/run.json"))["decides"]["train.lr"])
        aps.append(json.loads(read_file(f"s3://team/runs/{trial}/result.json"))["best_ap"])
        assert f"team/runs/{trial}/best/model.safetensors" in objects(f"runs/{trial}")
    assert 1e-3 <= min(rates) < max(rates) <= 5e-3
    best = yaml.safe_load(read_file("s3://team/runs/rates/best.yaml"))
    assert best["train"]["lr"] == rates[aps.index(max(aps))]


def test_evaluation_loses_a_machine(cluster: Cluster, bucket: Bucket, alone: dict[str, Any]) -> None:
    evaluate = "hrnet evaluate s3://team/runs/stopped/best {} --out {} --evaluate.batch-size 2"
    slow = Fault("GET", "team/coco/val2017/", delay=0.5)
    bucket.faults.append(slow)
    command = evaluate.format("s3://team/coco", "s3://team/evaluation")
    job = cluster.submit("evaluate", f"{command} --evaluate.num-workers 2")
    w1 = cluster.machines["w1"]
    until(
        lambda: objects("evaluation/unfinished") and w1.works_at("MapWorker(MapBatches(Actor))"),
        300,
        job.said,
    )
    w1.kill()
    there = len(objects("evaluation/unfinished"))
    bucket.faults.remove(slow)
    cluster.start_worker("w1")
    assert job.ends() == 0, job.said()
    assert 1 <= there < 6, there
    cluster.laptop.run(f"{evaluate.format('coco', 'evaluation')} {TWO}")
    here = json.loads(cluster.laptop.run("cat evaluation/evaluation.json"))
    found = json.loads(read_file("s3://team/evaluation/evaluation.json"))
    assert found["stats"] == here["stats"]
    assert len(here["stats"]) == 10
    assert found["results_sha256"] == here["results_sha256"]


def test_a_job_waits_for_a_machine_that_comes(cluster: Cluster) -> None:
    """One worker is taken away as a user does it, and brought again while a job asks for two."""
    cluster.leave("w2")
    until(lambda: len(cluster.nodes()) == 2, 120, "the head and one worker are there")
    two = "--out s3://team/waited --evaluate.batch-size 2 --evaluate.num-workers 2"
    job = cluster.submit("waits", f"hrnet evaluate s3://team/runs/stopped/best s3://team/coco {two}")
    job.says("hrnet evaluate --evaluate.num-workers wants 2 workers of 1 CPU, it has 1 CPUs")
    cluster.start_worker("w2")
    assert job.ends() == 0, job.said()
    found, before = (
        json.loads(read_file(f"s3://team/{name}/evaluation.json")) for name in ("waited", "evaluation")
    )
    assert found["results_sha256"] == before["results_sha256"]


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (preprocess("coco", "s3://team/other"), "--data.root"),
        (preprocess("s3://team/coco", "shards"), "--data.shards"),
        (train("s3://team/shards", "runs", "mine"), "--run.storage"),
        ("hrnet evaluate s3://team/runs/stopped/best coco --out evaluation", "COCO"),
        ("hrnet deploy s3://team/runs/stopped/best --run.storage /tmp/home/runs", "--run.storage"),
    ],
    ids=["pictures", "shards", "run", "evaluated", "deployed"],
)
def test_what_only_the_driver_has_is_refused(cluster: Cluster, command: str, flag: str) -> None:
    head = cluster.machines["head"]
    head.run(f"hrnet draw coco {DRAWN}")
    job = cluster.submit(f"refused-{command.split()[1]}-{flag.strip('-')}", command)
    assert job.ends() == 1
    said = job.said()
    assert f"{flag}: /tmp/home/" in said, said
    assert "is a folder of head, where this job's driver runs; node w" in said, said
    assert "Traceback" not in said, said
    assert not objects("other")


def test_a_cluster_without_a_tracking_server_is_refused(cluster: Cluster) -> None:
    job = cluster.submit(
        "no-mlflow", f"env -u MLFLOW_TRACKING_URI {train('s3://team/shards', 's3://team/runs', 'no')}"
    )
    assert job.ends() == 1
    assert "MLFLOW_TRACKING_URI is not set" in job.said(), job.said()
    assert not objects("runs/no")
