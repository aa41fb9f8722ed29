"""What a training run adds to its step, and on a GPU what the step gains: ratios against stated limits.

    python tests/benchmarks/bench_train.py                   the loop on the CPU: some minutes
    python tests/benchmarks/bench_train.py --device cuda     the loop and the table on a GPU: 8 minutes

Both sides of a ratio run in turn (A B A B ...) and the median of the pairs counts, so that other work on the
machine meets both alike. Exit code 1 where a limit is missed. The table stops after --seconds and says what
is left; its rows are printed as they are there, the most wanted first.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ratios import exit_code, judge, with_memory_kept
from torch import Tensor, multiprocessing

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_feed import dotted_shards

from hrnet_core.model import HRNet
from pipelines.config import RunConfig
from pipelines.config_file import load_config
from pipelines.shards.manifest import Manifest
from pipelines.train_settings import TrainSettings
from pipelines.training.batch import Batch, Sent, on_device_ahead
from pipelines.training.ddp import SharedGradients, wrap
from pipelines.training.loop import train_epoch
from pipelines.training.state import Job, Training, make_optimizer, set_up
from pipelines.training.step import Part, one_step, prepare, train_step

ROWS = 16
"""Of a batch on the CPU."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", nargs="*", default=["loop", "ddp", "table"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=420, help="after which the table begins no row")
    args = parser.parse_args()
    device = torch.device(args.device, *([0] if args.device == "cuda" else []))
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name(device) if args.device == "cuda" else "CPU, one thread"
    print(f"{name}; torch {torch.__version__}", flush=True)
    end = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        if "loop" in args.only:
            the_loop(device, Path(folder), args.rounds)
        if "ddp" in args.only and args.device == "cpu":
            multiprocessing.spawn(ddp_rank, (folder, args.rounds), nprocs=2)
            for way, ratio in json.loads((Path(folder) / "ratios").read_text()).items():
                judge(f"two workers, gradients exchanged {way} / not", ratio, 1.25)
        if "table" in args.only and args.device == "cuda":
            table(device, Path(folder), end)
    return exit_code()


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    return times(work, device)[0]


def times(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds on the clock, and of CPU time in this thread."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock, used = time.perf_counter(), time.thread_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - clock, time.thread_time() - used


def new_run(config: RunConfig, manifest: Manifest, folder: Path, device: torch.device) -> Training:
    job = Job(config, manifest.folder, str(folder), tracking_uri=None)
    return set_up(job, 0, 1, device, lambda figures, saved: None)


# --- the loop -------------------------------------------------------------------------------------------


def the_loop(device: torch.device, folder: Path, rounds: int) -> None:
    """Epochs of train_epoch, the feed and all, in turn with as many steps of one batch that is there. On the
    CPU what the loop adds is CPU time of the training thread: on the clock the feed's thread and whatever
    else runs would count, and waiting is judged by itself."""
    gpu = device.type == "cuda"
    config, people = (load_config("w32_256x192"), 16 * 128) if gpu else (load_config("tiny"), 24 * ROWS)
    size = config.data.input_size
    manifest = dotted_shards(folder / "loop", {"train2017": people, "val2017": 8}, group=64, size=size)
    train: dict[str, Any] = {"num_workers": 1, "epochs": 2 * rounds + 4, "views": "stored"}
    if gpu:
        train |= {"use_gpu": True, "precision": "bfloat16", "cpus_per_worker": 8, **WAYS["both"]}
    config = RunConfig(
        **{
            **config.model_dump(),
            "data": {**config.data.model_dump(), "shards": manifest.folder, "context": 1.0},
            "train": {**config.train.model_dump(), **train},
        }
    )
    run = new_run(config, manifest, folder, device)
    batches = Watched(on_device_ahead(run.feed.batches(0, 0, config.train.epochs), device))
    one_epoch(run, batches)  # the first finds its kernels, and an empty queue
    resident = next(batches)
    for _ in range(run.feed.steps - 1):
        one_step(run, *next(batches))
    batches.waits.clear()
    pairs = []
    for _ in range(rounds):
        loop = times(lambda: one_epoch(run, batches), device)
        alone = times(lambda: [one_step(run, *resident) for _ in range(run.feed.steps)], device)
        pairs.append((loop, alone))
    step = statistics.median(alone[0] for _, alone in pairs) / run.feed.steps
    waits = [batches.waits[i : i + run.feed.steps] for i in range(0, len(batches.waits), run.feed.steps)]
    rows = config.train.batch_size
    print(f"{rows / step:.0f} images/s on a resident batch of {rows}, {run.feed.steps} steps an epoch")
    inside = statistics.median(sum(epoch) for epoch in waits) / run.feed.steps
    judge("data wait of a step / the step", inside / step, 0.03)
    judge("data wait at an epoch's begin / the step", statistics.median(w[0] for w in waits) / step, 0.5)
    clock, cpu = (statistics.median(alone[i] / loop[i] for loop, alone in pairs) for i in (0, 1))
    print(f"images/s of the loop / of a resident batch: {clock:.3f} on the clock, {cpu:.3f} by CPU time")
    judge("the loop / a resident batch", clock if gpu else cpu, 0.95, at_most=False)


class Watched:
    """Batches, and how long each was waited for."""

    def __init__(self, batches: Iterator[tuple[Batch, Sent]]) -> None:
        self._batches, self.waits = batches, []

    def __iter__(self) -> Watched:
        return self

    def __next__(self) -> tuple[Batch, Sent]:
        begun = time.perf_counter()
        batch = next(self._batches)
        self.waits.append(time.perf_counter() - begun)
        return batch


def one_epoch(run: Training, batches: Watched) -> None:
    train_epoch(run, batches)
    run.standing.epoch, run.standing.step = run.standing.epoch + 1, 0


# --- two workers ----------------------------------------------------------------------------------------


def ddp_rank(rank: int, folder: str, rounds: int, steps: int = 8) -> None:
    """One of two processes (gloo): steps under DDP, and with gradients in one buffer, in turn with the same
    steps alone. tiny's network, half of its batch each."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    config = load_config("tiny")
    width, height = config.data.input_size
    settings, half = TrainSettings(), ROWS // 2
    part = Part(
        torch.randn(half, 3, height, width).to(memory_format=torch.channels_last),
        torch.rand(half, 17, height // 4, width // 4),
        torch.ones(half, 17),
        1.0,
    )
    ways: dict[str, Callable[[], Tensor]] = {}
    for way in ("by DDP", "in one buffer", "alone"):
        network = HRNet(config.model.architecture(17), "kaiming").to(memory_format=torch.channels_last)
        shared = SharedGradients(network, 2) if way == "in one buffer" else None
        model = wrap(network.train(), torch.device("cpu"), 2 if way == "by DDP" else 1)
        optimizer = make_optimizer(model, settings)
        ways[way] = functools.partial(train_step, model, optimizer, [part], settings, shared=shared)

    def some(step: Callable[[], Tensor]) -> None:
        for _ in range(steps):
            step()
        torch.distributed.barrier()  # both workers end together

    ratios: dict[str, list[float]] = {"by DDP": [], "in one buffer": []}
    for _ in range(rounds + 1):
        took = {way: seconds(lambda step=step: some(step), torch.device("cpu")) for way, step in ways.items()}
        for way, of_way in ratios.items():
            of_way.append(took[way] / took["alone"])
    if rank == 0:
        found = {way: statistics.median(of_way[1:]) for way, of_way in ratios.items()}
        (Path(folder) / "ratios").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


# --- the step on a GPU ----------------------------------------------------------------------------------

WAYS: dict[str, dict[str, bool]] = {
    "launched": {"graph": False},
    "graph": {"graph": True},
    "compiled": {"compile": True, "graph": False},
    "both": {"compile": True, "graph": True},
}
ROWS_OF_TABLE = [
    *itertools.product(("bfloat16",), (32,), (128, 256)),
    *itertools.product(("float16", "float32"), (32,), (128,)),
    *itertools.product(("bfloat16",), (48,), (128, 256)),
    *itertools.product(("float16", "float32"), (32,), (256,)),
    *itertools.product(("float16", "float32"), (48,), (128, 256)),
]
"""Precision, width, batch."""


def table(device: torch.device, folder: Path, end: float) -> None:
    """Images/s of the step on a resident batch of 256x192, its memory, and how long the first one took."""
    manifest = dotted_shards(folder / "table", {"train2017": 8, "val2017": 8}, size=(192, 256))
    print("precision  network  batch  way        images/s   GiB   first step", flush=True)
    rates: dict[tuple[str, int, int, str], float] = {}
    todo = [(*row, way) for row in ROWS_OF_TABLE for way in WAYS]
    while todo and time.monotonic() < end:
        key = precision, width, batch, way = todo.pop(0)
        settings = {"use_gpu": True, "precision": precision, "batch_size": batch, **WAYS[way]}
        try:
            rates[key], memory, first = step_rate(device, manifest, folder, width, settings)
            figures = f"{rates[key]:>8.0f}  {memory:>5.1f}  {first:>6.1f} s"
        except torch.OutOfMemoryError:
            figures = "out of memory"
        print(f"{precision:<9}  W{width:<6}  {batch:>5}  {way:<9}  {figures}", flush=True)
    if todo:
        print(f"not begun: {', '.join(' '.join(map(str, key)) for key in todo)}", flush=True)
    for way, limit in (("graph", 1.1), ("both", 1.5)):
        pair = [rates.get(("bfloat16", 32, 128, name)) for name in (way, "launched")]
        if pair[0] and pair[1]:
            judge(f"W32 bfloat16 128, {way} / launched", pair[0] / pair[1], limit, at_most=False)


def step_rate(
    device: torch.device, manifest: Manifest, folder: Path, width: int, settings: dict[str, Any]
) -> tuple[float, float, float]:
    """images/s, GiB, seconds of the first step."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    data = {"shards": manifest.folder, "input_size": (192, 256)}
    model = {"width": width, "initialization": "kaiming"}
    run = new_run(RunConfig(data=data, model=model, train=settings), manifest, folder / "runs" / "t", device)
    run.parallel.train()
    torch.backends.cudnn.benchmark = True
    rows = settings["batch_size"]
    sent = made_up(rows, device)
    begun = time.perf_counter()
    step = prepare(run, sent)
    seconds(lambda: step(sent), device)
    first = time.perf_counter() - begun
    per_step = seconds(lambda: [step(sent) for _ in range(3)], device) / 3
    count = max(5, int(2 / per_step))
    per_step = seconds(lambda: [step(sent) for _ in range(count)], device) / count
    return rows / per_step, torch.cuda.max_memory_reserved(device) / 2**30, first


def made_up(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Crops, heatmaps and weights of 256x192."""
    crops = torch.randint(0, 256, (rows, 256, 192, 3), dtype=torch.uint8, device=device)
    return crops, torch.rand(rows, 17, 64, 48, device=device), torch.ones(rows, 17, device=device)


if __name__ == "__main__":
    with_memory_kept()
    sys.exit(main())
