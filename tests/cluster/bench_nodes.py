"""People per second of preprocess and evaluate on one, two and four worker nodes.

    bash tests/cluster/run.sh .venv/bin/python tests/cluster/bench_nodes.py
    bash tests/cluster/run.sh .venv/bin/python tests/cluster/bench_nodes.py --people 1024 256 --turns 1

The second is a quick look.

Head, workers and their network are those of the tests (machines.py), on a folder that all of them see. The
kernel gives each worker a share of a core and no more (a control group), so that four of them, the head and
the driver have together no more than this machine has: a quarter on two cores leaves head and driver one.
Fewer nodes are the same cluster with the stage sent to a label, in turns (1, 2, 4, 1, 2, 4, ...), so that
other work on the machine meets all. Rates are the stages' own: from the first task to the last, Ray's start
not in them. The limit: n nodes do 0.9 of n times what one does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from bench_preprocess import drawn, repeated
from machines import ADDRESSES, Cluster, Machine, network, until
from ratios import exit_code, judge

from pipelines.benchmark import save_random
from pipelines.settings.config_file import load_config

LIMIT = 0.9
WORKERS = ("w1", "w2", "w3", "w4")
NODES = (1, 2, 4)
CPU = Path("/sys/fs/cgroup/cpu")
SPLIT = "train2017"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--people", type=int, nargs=2, default=(8_192, 1_024), help="preprocessed, evaluated")
    parser.add_argument("--share", type=float, default=0.25, help="of a core, of each worker")
    parser.add_argument("--shard", type=int, default=512, help="people of a shard")
    parser.add_argument("--photos", type=int, default=200, help="drawn, then repeated under new ids")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    if "HRNET_OWN_NAMESPACES" not in os.environ:
        parser.error("it makes machines of namespaces: begin it with tests/cluster/run.sh")
    with (
        tempfile.TemporaryDirectory(prefix="hrnet-nodes-", dir="/var/tmp") as made,
        network(),
        control_groups() as groups,
    ):
        shared, logs = Path(made) / "shared", Path(made) / "logs"
        logs.mkdir()
        shared.mkdir()
        sets = dict(zip(("preprocess", "evaluate"), arguments.people, strict=True))
        source = drawn(shared / "drawn", arguments.photos)
        for verb, people in sets.items():
            repeated(source, shared / verb, people)
        save_random(shared / "checkpoint", load_config("tiny"))
        # The store of a run that nobody reads: the rates are in what the stages say and write.
        cluster = Cluster({"MLFLOW_TRACKING_URI": "sqlite:////mnt/mlflow.db"}, logs, shared, WORKERS)
        for i, name in enumerate(WORKERS):
            cluster.machines[name].group = groups[i]
            cluster.labels[name] = ",".join(
                f"hrnet-of-{nodes}={'no' if i >= nodes else 'yes'}" for nodes in NODES
            )
        try:
            cluster.start()
            for group in groups:
                hold(group, arguments.share)
            stages = {"preprocess": preprocess(arguments.shard), "evaluate": evaluate}
            for verb, stage in stages.items():
                measure(cluster, verb, stage, sets[verb], arguments.turns)
        finally:
            cluster.stop()
    return exit_code()


@contextlib.contextmanager
def control_groups() -> Iterator[list[Path]]:
    """The kernel's, one for each worker, without limits yet."""
    groups = [(CPU if CPU.exists() else CPU.parent) / f"hrnet-{name}" for name in WORKERS]
    try:
        for group in groups:
            group.mkdir()
        yield groups
    finally:
        for group in groups:
            until(lambda group=group: removed(group), 60, f"{group} is empty")


def removed(group: Path) -> bool:
    """False while the last processes in it end."""
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


def hold(group: Path, cores: float) -> None:
    """To so many cores: by the file of the first version of control groups, or of the second, where that
    hands on its cpu controller."""
    quota = f"{int(100_000 * cores)}"
    if CPU.exists():
        (group / "cpu.cfs_quota_us").write_text(quota)
    else:
        (group / "cpu.max").write_text(f"{quota} 100000")


Stage = Callable[[Machine, int], float]
"""Runs on the head, on so many nodes; people/s."""


def preprocess(shard: int) -> Stage:
    def stage(head: Machine, nodes: int) -> float:
        command = "hrnet preprocess w32_256x192 --data.root /mnt/preprocess --data.shards /mnt/shards"
        crops = f"--data.context 1.0 --data.people-per-shard {shard}"
        said = head.run(f"rm -rf /mnt/shards && {joined()} {command} {crops} {sent_to(nodes)}", 3600)
        (rate,) = re.findall(r"^made .*: ([\d,]+) people/s", said, re.MULTILINE)
        return float(rate.replace(",", ""))

    return stage


def evaluate(head: Machine, nodes: int) -> float:
    command = f"hrnet evaluate /mnt/checkpoint /mnt/evaluate --split {SPLIT} --out /mnt/evaluation"
    head.run(f"{joined()} {command} --evaluate.num-workers {nodes} {sent_to(nodes)}", 3600)
    return float(json.loads(head.run("cat /mnt/evaluation/evaluation.json"))["figures"]["people_per_second"])


def sent_to(nodes: int) -> str:
    return f"--ray.labels hrnet-of-{nodes} yes"


def joined() -> str:
    return f"env RAY_ADDRESS={ADDRESSES['head']}:6379"


def measure(cluster: Cluster, verb: str, stage: Stage, people: int, turns: int) -> None:
    rates: dict[int, list[float]] = defaultdict(list)
    cpu: dict[int, list[float]] = defaultdict(list)
    head = cluster.machines["head"]
    for _ in range(turns):
        for nodes in NODES:
            with Watched(cluster) as workers:
                rates[nodes].append(stage(head, nodes))
            cpu[nodes].append(workers.seconds / people * 1000)
            print(
                f"{verb}, {nodes} nodes: {rates[nodes][-1]:,.0f} people/s, {cpu[nodes][-1]:.2f} ms of CPU on "
                f"the nodes a person, the stage's start in it; load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    medians = [statistics.median(rates[nodes]) for nodes in NODES]
    linear = [rate / (nodes * medians[0]) for nodes, rate in zip(NODES, medians, strict=True)]
    cells = (f"{rate:,.0f} | {share:.2f}" for rate, share in zip(medians[1:], linear[1:], strict=True))
    print(f"| {verb} | {medians[0]:,.0f} | {' | '.join(cells)} |")
    for nodes, share in zip(NODES[1:], linear[1:], strict=True):
        judge(f"{verb}, {nodes} nodes against {nodes} times one", share, LIMIT, at_most=False)
        # Of work that is divided without loss, a person costs the nodes the same.
        ratio = statistics.median(cpu[1]) / statistics.median(cpu[nodes])
        print(f"      by CPU time on the nodes: {ratio:.2f}", flush=True)


class Watched:
    """CPU seconds of the workers' processes, those that end during the block too: looked at twice a second,
    as nobody says afterwards what a process has used that its parent did not wait for."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._over = cluster, threading.Event()
        self._seconds: dict[tuple[int, float], float] = {}

    def __enter__(self) -> Watched:
        self._look()
        self._before = sum(self._seconds.values())
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()
        self.seconds = sum(self._seconds.values()) - self._before

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            self._look()

    def _look(self) -> None:
        for name in WORKERS:
            for process in self._cluster.machines[name].processes():
                with contextlib.suppress(psutil.Error):  # it ended just now
                    used = process.cpu_times()
                    self._seconds[process.pid, process.create_time()] = used.user + used.system


if __name__ == "__main__":
    sys.exit(main())
