"""Seconds from a command to its first work, part by part, against 15 s.

    python tests/benchmarks/bench_start.py                        train, preprocess, evaluate, in turns
    python tests/benchmarks/bench_start.py --other TREE           each beside the same of another checkout
    python tests/benchmarks/bench_start.py --only train --rounds 5 --workers 4

    train        until the first step of `tiny` is done        (metrics.jsonl)
    preprocess   until the first shard stands                  (data/)
    evaluate     until the first unit is answered              (unfinished/)

Seen from outside, by the processes that a command starts: when each began, when it took its part, and its CPU
seconds until the first work is done. Then the command is stopped. Wall time is judged, and says little on a
machine that does other work; CPU seconds say more there. Exit code 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from ratios import exit_code, judge

from hrnet_core.architecture import HRNetConfig
from hrnet_core.checkpoint import CheckpointSpec, save_checkpoint
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.model import HRNet

LIMIT_S = 15.0
HERE = Path(__file__).parents[2]
LOOK_S = 0.05
ROLES = {
    "gcs_server": "Ray's own processes",
    "raylet": "Ray's own processes",
    "agent": "Ray's own processes",
    "log_monitor": "Ray's own processes",
    "dashboard": "Ray's own processes",
    "monitor": "Ray's own processes",
    "ray::IDLE": "Ray's processes without work",
}
"""Part of a command line: what the process is. Others are named by Ray, after what they do."""


@dataclass
class Seen:
    """A process that a command started."""

    begun: float
    """Seconds after the command."""
    role: str = ""
    took_part: float = 0.0
    """When it was first seen in its role."""
    cpu: float = 0.0


@dataclass
class Start:
    """One start, until its first work was done."""

    seconds: float
    seen: dict[int, Seen] = field(default_factory=dict)

    def cpu(self) -> dict[str, float]:
        """CPU seconds by role, the most first."""
        sums: dict[str, float] = {}
        for one in self.seen.values():
            sums[one.role] = sums.get(one.role, 0.0) + one.cpu
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def moments(self) -> dict[str, float]:
        """When the first process of each role began, and took it, in order of time."""
        found: dict[str, float] = {}
        for one in self.seen.values():
            for what, when in ((f"{one.role} begun", one.begun), (f"{one.role} at work", one.took_part)):
                found[what] = min(when, found.get(what, when))
        return dict(sorted(found.items(), key=lambda item: item[1]))


def role_of(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    if line.startswith("ray::") and not line.startswith("ray::IDLE"):
        return line.split("(")[0].split(".")[0].split()[0]
    return next((role for part, role in ROLES.items() if part in line), "starting")


def watched(tree: Path, arguments: list[str], done: Callable[[], bool]) -> Start:
    """The command, until `done`; then it is stopped."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    environment.pop("RAY_ADDRESS", None)
    environment.setdefault("RAY_raylet_start_wait_time_s", "300")  # 60 is little on a busy machine
    with tempfile.TemporaryFile("w+") as told:
        begun = time.time()
        command = [sys.executable, "-m", "pipelines.cli", *arguments]
        running = subprocess.Popen(command, cwd=tree, env=environment, stdout=told, stderr=told)
        start = Start(0.0)
        try:
            while not done():
                if running.poll() is not None:
                    told.seek(0)
                    sys.exit(f"hrnet {' '.join(arguments)} ended with {running.returncode}:\n{told.read()}")
                look(running.pid, begun, start)
                time.sleep(LOOK_S)
            start.seconds = time.time() - begun
            look(running.pid, begun, start)
        finally:
            stop(running)
    return start


def look(driver: int, begun: float, start: Start) -> None:
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(driver)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                one = start.seen.setdefault(process.pid, Seen(process.create_time() - begun))
                role = "the command" if process.pid == driver else role_of(process)
                if role != one.role:
                    one.role, one.took_part = role, time.time() - begun
                times = process.cpu_times()
                one.cpu = times.user + times.system


def stop(running: subprocess.Popen[bytes]) -> None:
    """In good order, and what it leaves behind, by their ids."""
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.wait(60)
    for one in (*children, *([running] if running.poll() is None else [])):
        with contextlib.suppress(psutil.Error):
            one.kill()
    running.wait()


# --- what is started ------------------------------------------------------------------------------------


def prepare(work: Path) -> None:
    """A drawn set, its shards, and a checkpoint of random weights."""
    for arguments in (
        ["draw", str(work / "coco"), "--images", "60", "--val-images", "16", "--seed", "1"],
        ["preprocess", "tiny", "--data.root", str(work / "coco"), "--data.shards", str(work / "shards")],
    ):
        environment = {**os.environ, "PYTHONPATH": str(HERE)}
        subprocess.run([sys.executable, "-m", "pipelines.cli", *arguments], env=environment, check=True)
    torch.manual_seed(0)
    architecture = HRNetConfig(width=16, stem_width=32, bottlenecks=1, modules=(1, 1, 1), blocks=2)
    spec = CheckpointSpec(architecture, HeatmapCodec("udp", (96, 128)))
    save_checkpoint(work / "checkpoint", HRNet(architecture), spec)


def stage(verb: str, work: Path, out: Path, workers: int) -> tuple[list[str], Callable[[], bool]]:
    """The command, and whether its first work is done. out: not there yet."""
    if verb == "train":
        places = ["--data.shards", str(work / "shards"), "--run.storage", str(out), "--run.name", "r"]
        how = ["--train.num-workers", str(workers), "--train.log-every", "1", "--track.no-onnx"]
        metrics = out / "r" / "metrics.jsonl"
        return ["train", "tiny", *places, *how], lambda: metrics.exists() and bool(metrics.read_bytes())
    if verb == "preprocess":
        places = ["--data.root", str(work / "coco"), "--data.shards", str(out)]
        few = ["--data.people-per-shard", "32"]
        return ["preprocess", "tiny", *places, *few], lambda: any(out.glob("data/*.parquet"))
    few = ["--evaluate.batch-size", "8", "--evaluate.num-workers", "1"]
    places = [str(work / "checkpoint"), str(work / "coco"), "--out", str(out)]
    return ["evaluate", *places, *few], lambda: any((out / "unfinished").rglob("*.*"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=["train", "preprocess", "evaluate"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="of train")
    parser.add_argument("--other", type=Path, help="another checkout, started in turn with this one")
    args = parser.parse_args()
    trees = [HERE, *([args.other.resolve()] if args.other else [])]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work)
        for verb in args.only:
            starts: dict[Path, list[Start]] = {tree: [] for tree in trees}
            for number in range(args.rounds):
                for tree in trees:
                    out = work / f"{verb}-{number}-{trees.index(tree)}"
                    starts[tree].append(watched(tree, *stage(verb, work, out, args.workers)))
            for tree, several in starts.items():
                show(verb, "this tree" if tree == HERE else str(args.other), several)
            seconds = statistics.median(start.seconds for start in starts[HERE])
            judge(f"{verb}: seconds from the command to the first work", seconds, LIMIT_S)
    return exit_code()


def show(verb: str, tree: str, starts: list[Start]) -> None:
    """Medians over the starts."""
    load = os.getloadavg()[0]
    total = statistics.median(sum(start.cpu().values()) for start in starts)
    wall = ", ".join(f"{start.seconds:.1f}" for start in starts)
    print(f"\n{verb}, {tree}: {wall} s of the clock, {total:.1f} CPU seconds (load {load:.1f})")
    print("| part | CPU seconds | begun, s | at work, s |\n|---|---|---|---|")
    for role in starts[-1].cpu():
        cpu = statistics.median(start.cpu().get(role, 0.0) for start in starts)
        moments = [start.moments() for start in starts]
        begun, at_work = (
            statistics.median(m[f"{role} {what}"] for m in moments if f"{role} {what}" in m)
            for what in ("begun", "at work")
        )
        count = sum(one.role == role for one in starts[-1].seen.values())
        print(f"| {role}{f' ({count})' if count > 1 else ''} | {cpu:.1f} | {begun:.1f} | {at_work:.1f} |")
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
