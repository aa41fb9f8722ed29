"""The stages as jobs on a cluster of three machines, with everything in a bucket; a machine is lost in each.

In the order of the walk: a test takes what those before it have left. What comes out is held against the same
commands on one machine alone, the laptop, on its own disk.
"""

from __future__ import annotations

import json
from typing import Any

from bucket_server import Bucket, Fault
from machines import Cluster, until
from stages import DRAWN, begin_training, losses, preprocess, shards, train

from pipelines.storage import read_file


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
