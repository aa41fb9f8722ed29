"""The stages' commands as the tests give them, and what they leave."""

from __future__ import annotations

import json

from machines import Cluster, Running, until

from hrnet_core.locations import open_folder
from pipelines.training.run_folder import saved_step

DRAWN = "--images 60 --val-images 12 --seed 3"
DATA = "--data.input-size 64 96 --data.people-per-shard 12 --data.row-group-people 8"
TRAIN = (
    "--train.epochs 3 --train.batch-size 16 --train.num-workers 2 --train.log-every 1 --train.no-flip-test"
)
TWO = "--ray.num-cpus 2"
"""Of the Ray that the laptop starts."""
OPEN = "--serve.host 0.0.0.0 --serve.anyone --serve.grpc-port 8001"
SERVED = f"--run.storage s3://team/runs --serve.replicas 2 {OPEN}"
DEPLOY = f"hrnet deploy s3://team/runs/stopped/best {SERVED}"
ANOTHER = f"hrnet deploy s3://team/runs/rates-00/best {SERVED}"
"""Of a network that was trained at another rate."""
SPACE = "{base: tiny, sweep: {trials: 2, space: {train.lr: {uniform: [1.0e-3, 5.0e-3]}}}}"
BOX = [[10.0, 10.0, 200.0, 300.0]]


def objects(prefix: str) -> set[str]:
    """Names below a folder of the bucket."""
    from pyarrow import fs

    files, path = open_folder(f"s3://team/{prefix}")
    found = files.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    return {one.path for one in found if one.is_file}


def shards(folder: str = "shards") -> set[str]:
    return {name for name in objects(folder) if name.endswith(".parquet") and "rejected" not in name}


def preprocess(root: str, to: str) -> str:
    return f"hrnet preprocess tiny --data.root {root} --data.shards {to} {DATA}"


def train(data: str, storage: str, name: str) -> str:
    return f"hrnet train tiny --data.shards {data} --run.storage {storage} --run.name {name} {DATA} {TRAIN}"


def losses(metrics: str | bytes) -> list[tuple[int, float]]:
    """(step, loss) of all rows of a run's metrics.jsonl, in their order."""
    rows = [json.loads(line) for line in metrics.splitlines()]
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


def begin_training(cluster: Cluster, job_name: str, run: str, flags: str = "") -> Running:
    """A training job that has left a checkpoint."""
    job = cluster.submit(job_name, f"{train('s3://team/shards', 's3://team/runs', run)} {flags}")
    saved = f"s3://team/runs/{run}"
    until(lambda: saved_step(saved) or job.process.poll() is not None, 400, job.said)
    assert job.process.poll() is None, job.said()
    return job
