"""The head is lost, and nothing has what it knew: the bucket has what counts."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from typing import Any

from bucket_server import Bucket, Fault
from machines import Cluster, Running, until
from stages import TWO, begin_training, losses, objects, preprocess, shards, train

from pipelines.storage.files import read_file

WORKERS_END_S = 60
"""Ray's own `gcs_rpc_server_reconnect_timeout_s`."""


def submitted_until_it_may(cluster: Cluster, name: str, command: str) -> Running:
    """A job's command, again after as many seconds as it is told to wait."""
    for number in range(3):
        job = cluster.submit(f"{name}-{number}", command)
        if job.ends() == 0:
            return job
        wait = re.search(r"the same command takes over in (\d+) s", job.said())
        assert wait, job.said()
        time.sleep(int(wait[1]) + 1)
    raise AssertionError(job.said())


def plain_view_of(path: str) -> str:
    """The file name of a shard's plain view, of any of its files."""
    return re.sub(r"-v\d+-", "-", path.rpartition("/")[2])


def test_without_redis_a_new_cluster_goes_on_from_the_bucket(
    cluster: Cluster, bucket: Bucket, mlflow: str, alone: dict[str, Any]
) -> None:
    # One machine trains, and the other makes shards, as their labels say.
    alone_on = "--train.num-workers 1 --ray.labels hrnet-pool w1"
    training = f"{train('s3://team/shards', 's3://team/runs', 'headless')} {alone_on}"
    making = f"{preprocess('s3://team/coco', 's3://team/again')} --ray.labels hrnet-pool w2"
    w1, w2 = cluster.machines["w1"], cluster.machines["w2"]
    slow = Fault("PUT", "team/again/", delay=3)  # which lasts longer than until training has a checkpoint
    bucket.faults.append(slow)
    making_job = cluster.submit("again", making)
    until(lambda: shards("again"), 300, making_job.said)
    begin_training(cluster, "headless", "headless", alone_on)
    until(lambda: len(shards("again")) >= 3, 300, making_job.said)  # a shard is two files
    assert w2.works_at("MapBatches(_build_batch)")
    assert not w1.works_at("MapBatches(_build_batch)")
    assert w1.works_at("RayTrainWorker")
    assert not w2.works_at("RayTrainWorker")
    assert not objects("runs/headless/result.json")
    cluster.machines["head"].kill()

    # Its driver held the run; who asks too early is told when it is free.
    there = f"env MLFLOW_TRACKING_URI={mlflow} {training}"
    refused = cluster.laptop.begin("refused.log", there)
    assert refused.ends() == 2, refused.said()
    assert re.search(r"process \d+ on head has it, and said so \d+ s ago", refused.said()), refused.said()
    assert re.search(r"if that process is dead, the same command takes over in \d+ s\.", refused.said())

    # Meanwhile, undisturbed: one worker's losses are not those of two to the last digit.
    cluster.laptop.run(f"{train('shards', 'runs', 'one')} --train.num-workers 1 {TWO}")
    undisturbed = losses(cluster.laptop.run("cat runs/one/metrics.jsonl"))
    for name in ("w1", "w2"):
        until(
            lambda name=name: cluster.rays[name].process.poll() is not None,
            WORKERS_END_S + 180,
            f"{name} ends",
        )
    made = shards("again")
    bucket.faults.remove(slow)
    cluster.stop()
    cluster.start()
    again = cluster.submit("again-2", making)
    assert again.ends() == 0, again.said()
    manifest = json.loads(read_file("s3://team/again/manifest.json"))
    listed = [shard["path"] for split in manifest["splits"].values() for shard in split["shards"]]
    files_of = Counter(plain_view_of(path) for path in listed)
    there = [shard for shard, files in Counter(map(plain_view_of, made)).items() if files == files_of[shard]]
    assert 1 <= len(there) < len(files_of)
    assert f"{len(there)} of {len(files_of)} shards are there already" in again.said(), again.said()
    assert manifest["digest"] == alone["digest"]

    job = submitted_until_it_may(cluster, "headless-again", training)
    assert "epoch 3/3" in job.said(), job.said()
    assert "epoch 1/3" not in job.said(), job.said()
    assert losses(read_file("s3://team/runs/headless/metrics.jsonl")) == undisturbed
