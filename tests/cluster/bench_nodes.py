"""People per second of preprocess and evaluate on one worker node and on two, of one core each.

    bash tests/cluster/run.sh .venv/bin/python tests/cluster/bench_nodes.py
    bash tests/cluster/run.sh .venv/bin/python tests/cluster/bench_nodes.py --people 1024 256 --turns 1

The second is a quick look.

Head, two workers and their network are those of the tests (machines.py), on a folder that all of them see.
Each worker is held to a core of its own. One node is the same cluster with the stage sent to a label, in
turns with both (1, 2, 1, 2, ...), so that other work on the machine meets both. Rates are the stages' own:
from the first task to the last, Ray's start not in them. The limit: two nodes do 0.9 of twice what one does.

The head and the driver have no core of their own where this machine has only two: what they take, two nodes
lack. So CPU time a person on the nodes is told too, of which that takes nothing. Four nodes of a core each
cannot be measured on fewer than four cores: they would share two, and the figure would be of sharing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from bench_preprocess import drawn, repeated
from machines import ADDRESSES, Cluster, Machine, network
from ratios import exit_code, judge

LIMIT = 0.9
WORKERS = ("w1", "w2")
SPLIT = "train2017"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--people", type=int, nargs=2, default=(16_384, 2_048), help="preprocessed, evaluated"
    )
    parser.add_argument("--shard", type=int, default=512, help="people of a shard")
    parser.add_argument("--photos", type=int, default=200, help="drawn, then repeated under new ids")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    if "HRNET_OWN_NAMESPACES" not in os.environ:
        parser.error("it makes machines of namespaces: begin it with tests/cluster/run.sh")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < len(WORKERS):
        parser.error(f"{len(WORKERS)} nodes of a core each need as many cores; there are {len(cores)}")
    with tempfile.TemporaryDirectory(prefix="hrnet-nodes-", dir="/var/tmp") as made, network():
        shared, logs = Path(made) / "shared", Path(made) / "logs"
        logs.mkdir()
        shared.mkdir()
        sets = dict(zip(("preprocess", "evaluate"), arguments.people, strict=True))
        source = drawn(shared / "drawn", arguments.photos)
        for verb, people in sets.items():
            repeated(source, shared / verb, people)
        save_network(shared / "checkpoint")
        # The store of a run that nobody reads: the rates are in what the stages say and write.
        cluster = Cluster({"MLFLOW_TRACKING_URI": "sqlite:////mnt/mlflow.db"}, logs, shared)
        for name, core in zip(WORKERS, cores, strict=False):
            cluster.machines[name].cpus = {core}
        try:
            cluster.start()
            stages = {"preprocess": preprocess(arguments.shard), "evaluate": evaluate}
            for verb, stage in stages.items():
                measure(cluster, verb, stage, sets[verb], arguments.turns)
        finally:
            cluster.stop()
    return exit_code()


def save_network(folder: Path) -> None:
    """Config `tiny` with random weights."""
    import torch

    from hrnet_core.checkpoint import CheckpointSpec, save_checkpoint
    from hrnet_core.heatmaps import HeatmapCodec
    from hrnet_core.model import HRNet
    from pipelines.config_file import load_config

    config = load_config("tiny")
    torch.manual_seed(0)
    network = HRNet(config.model.architecture(17))
    data = config.data
    codec = HeatmapCodec(data.codec, data.input_size, sigma=data.sigma_cells)
    save_checkpoint(folder, network, CheckpointSpec(network.config, codec))


Stage = Callable[[Machine, str], float]
"""Runs on the head with flags of ours; people/s."""


def preprocess(shard: int) -> Stage:
    def stage(head: Machine, flags: str) -> float:
        command = "hrnet preprocess w32_256x192 --data.root /mnt/preprocess --data.shards /mnt/shards"
        crops = f"--data.context 1.0 --data.people-per-shard {shard}"
        said = head.run(f"rm -rf /mnt/shards && {joined()} {command} {crops} {flags}", 3600)
        (rate,) = re.findall(r"^made .*: ([\d,]+) people/s", said, re.MULTILINE)
        return float(rate.replace(",", ""))

    return stage


def evaluate(head: Machine, flags: str) -> float:
    command = f"hrnet evaluate /mnt/checkpoint /mnt/evaluate --split {SPLIT} --out /mnt/evaluation"
    actors = 1 if flags else len(WORKERS)
    head.run(f"{joined()} {command} --evaluate.num-workers {actors} {flags}", 3600)
    return float(json.loads(head.run("cat /mnt/evaluation/evaluation.json"))["figures"]["people_per_second"])


def joined() -> str:
    return f"env RAY_ADDRESS={ADDRESSES['head']}:6379"


def measure(cluster: Cluster, verb: str, stage: Stage, people: int, turns: int) -> None:
    rates: dict[int, list[float]] = defaultdict(list)
    cpu: dict[int, list[float]] = defaultdict(list)
    head = cluster.machines["head"]
    for _ in range(turns):
        for nodes, flags in ((1, f"--ray.labels hrnet-pool {WORKERS[0]}"), (2, "")):
            before = cpu_seconds(cluster)
            rates[nodes].append(stage(head, flags))
            cpu[nodes].append((cpu_seconds(cluster) - before) / people * 1000)
            print(
                f"{verb}, {nodes} nodes: {rates[nodes][-1]:,.0f} people/s, {cpu[nodes][-1]:.2f} ms of CPU on "
                f"the nodes a person, the stage's start in it; load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    one, two = (statistics.median(rates[nodes]) for nodes in (1, 2))
    print(f"| {verb} | {one:,.0f} | {two:,.0f} | {two / one / 2:.2f} |")
    judge(f"{verb}, two nodes against twice one", two / one / 2, LIMIT, at_most=False)
    # Of work that is divided without loss, a person costs the nodes the same.
    ratio = statistics.median(cpu[1]) / statistics.median(cpu[2])
    print(f"      by CPU time on the nodes: {ratio:.2f}", flush=True)


def cpu_seconds(cluster: Cluster) -> float:
    """Of the workers' processes and those that they have waited for."""
    seconds = 0.0
    for name in WORKERS:
        for process in cluster.machines[name].processes():
            try:
                seconds += sum(process.cpu_times()[:4])
            except psutil.Error:  # it ended just now
                continue
    return seconds


if __name__ == "__main__":
    sys.exit(main())
