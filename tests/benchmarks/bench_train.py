"""What a training run adds to its step, and on a GPU what the step gains: ratios against stated limits.

    python tests/benchmarks/bench_train.py                   the loop on the CPU: some minutes
    python tests/benchmarks/bench_train.py --device cuda     the table and the loop on a GPU: 8 minutes

Both sides of a ratio run in turn (A B A B ...) and the median of the pairs counts, so that other work on the
machine meets both alike. Exit code 1 where a limit is missed. On a GPU the most wanted comes first: compiled
and recorded steps of W32, the loop over them, W48, then what they are held against. All of it is printed as
it is there; after --seconds nothing more is begun, and what is left is said.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from ratios import exit_code, judge, missed, with_memory_kept
from torch import Tensor, multiprocessing

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_feed import dotted_shards

from hrnet_core.errors import first_line
from hrnet_core.model import HRNet
from pipelines.settings.config import RunConfig
from pipelines.settings.config_file import load_config
from pipelines.settings.train import TrainSettings
from pipelines.shards.manifest import Manifest
from pipelines.training import recording
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
    parser.add_argument("--seconds", type=float, default=420, help="on a GPU: after which nothing is begun")
    args = parser.parse_args()
    device = torch.device(args.device, *([0] if args.device == "cuda" else []))
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name(device) if args.device == "cuda" else "CPU, one thread"
    print(f"{name}; torch {torch.__version__}", flush=True)
    end = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        if args.device == "cuda":
            on_a_gpu(device, Path(folder), args.only, args.rounds, end)
            return exit_code()
        if "loop" in args.only:
            the_loop(device, Path(folder), args.rounds)
        if "ddp" in args.only:
            multiprocessing.spawn(ddp_rank, (folder, args.rounds), nprocs=2)
            for way, ratio in json.loads((Path(folder) / "ratios").read_text()).items():
                judge(f"two workers, gradients exchanged {way} / not", ratio, 1.25)
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


def shards_in(folder: Path, people: int, size: tuple[int, int], group: int = 8) -> Manifest:
    """Made once: so many people to train on, eight to validate."""
    if (folder / "manifest.json").exists():
        return Manifest.load(folder)
    return dotted_shards(folder, {"train2017": people, "val2017": 8}, group=group, size=size)


# --- the loop -------------------------------------------------------------------------------------------


def the_loop(device: torch.device, folder: Path, rounds: int, batch: int = 128) -> None:
    """Epochs of train_epoch, the feed and all, in turn with as many steps of one batch that is there. On the
    CPU what the loop adds is CPU time of the training thread: on the clock the feed's thread and whatever
    else runs would count, and waiting is judged by itself. batch: rows, on a GPU."""
    gpu = device.type == "cuda"
    config, people = (load_config("w32_256x192"), 16 * 128) if gpu else (load_config("tiny"), 24 * ROWS)
    manifest = shards_in(folder / "loop", people, config.data.input_size, group=64)
    train: dict[str, Any] = {"num_workers": 1, "epochs": 2 * rounds + 4, "views": "stored"}
    if gpu:
        train |= {"use_gpu": True, "precision": "bfloat16", "cpus_per_worker": 8, **WAYS["both"]}
        train |= {"batch_size": batch}
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
    if gpu:
        must_be_recorded(run.full_step)
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
    looped = statistics.median(loop[0] for loop, _ in pairs) / run.feed.steps
    print(
        f"batch {rows}: {rows / looped:.0f} images/s in the loop, {rows / step:.0f} on a resident batch; "
        f"{run.feed.steps} steps an epoch"
    )
    inside = statistics.median(sum(epoch) for epoch in waits) / run.feed.steps
    judge(f"data wait of a step / the step, batch {rows}", inside / step, 0.02 if gpu else 0.03)
    first = statistics.median(epoch[0] for epoch in waits)
    judge(f"data wait at an epoch's begin / the step, batch {rows}", first / step, 0.5)
    clock, cpu = (statistics.median(alone[i] / loop[i] for loop, alone in pairs) for i in (0, 1))
    print(f"images/s of the loop / of a resident batch: {clock:.3f} on the clock, {cpu:.3f} by CPU time")
    judge(f"the loop / a resident batch, batch {rows}", clock if gpu else cpu, 0.95, at_most=False)


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
Row = tuple[str, int, tuple[int, int], int, str]
"""Precision, width, (width, height) of the input, batch, way."""
W32, W48 = (32, (192, 256)), (48, (288, 384))
WANTED: list[Row] = [
    *(("bfloat16", *W32, batch, "both") for batch in (128, 256)),
    ("bfloat16", *W48, 64, "both"),
]
BESIDE: list[Row] = [
    *(("bfloat16", *W32, batch, way) for batch in (128, 256) for way in ("launched", "graph")),
    *(("bfloat16", *W48, 64, way) for way in ("launched", "graph")),
    *(("bfloat16", *W32, batch, "compiled") for batch in (128, 256)),
    *(("float16", *W32, batch, "both") for batch in (128, 256)),
    *((precision, *W32, 128, way) for precision in ("float32", "float16") for way in ("launched", "graph")),
    ("float32", *W32, 128, "both"),
]
Rates = dict[Row, float]


def on_a_gpu(device: torch.device, folder: Path, only: Sequence[str], rounds: int, end: float) -> None:
    """The most wanted first. What fails is said, and the rest goes on."""
    print("precision  network  input    batch  way       images/s    GiB  first step", flush=True)
    rates: Rates = {}
    rows = [
        (name_of(row), functools.partial(table_row, device, folder, rates, row)) for row in WANTED + BESIDE
    ]
    loops = [
        (f"the loop, batch {batch}", functools.partial(the_loop, device, folder, rounds, batch))
        for batch in (128, 256)
    ]
    rows, loops = rows if "table" in only else [], loops if "loop" in only else []
    left = [*rows[:2], *loops, *rows[2:]]  # what was compiled for the first two rows runs in the loop
    while left and time.monotonic() < end:
        name, work = left.pop(0)
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            missed.append(f"{' '.join(name.split())}: {first_line(error)}")
            print(f"MISS  {missed[-1]}", flush=True)
        gc.collect()  # a run and its recorded step hold each other, and their memory
        torch.cuda.empty_cache()
    if left:
        print(f"not begun: {', '.join(' '.join(name.split()) for name, _ in left)}", flush=True)
    for way, limit in (("graph", 1.1), ("both", 1.5)):
        pair = [rates.get(("bfloat16", *W32, 128, name)) for name in (way, "launched")]
        if pair[0] and pair[1]:
            judge(f"W32 bfloat16 128, {way} / launched", pair[0] / pair[1], limit, at_most=False)


def name_of(row: Row) -> str:
    precision, width, (across, down), batch, way = row
    return f"{precision:<9}  W{width:<6}  {down}x{across}  {batch:>5}  {way:<8}"


def table_row(device: torch.device, folder: Path, rates: Rates, row: Row) -> None:
    """Images/s of the step on a resident batch, its memory, and how long the first one took."""
    rates[row], memory, first = step_rate(device, folder, row)
    print(f"{name_of(row)}  {rates[row]:>8.0f}  {memory:>5.1f}  {first:>8.1f} s", flush=True)


def step_rate(device: torch.device, folder: Path, row: Row) -> tuple[float, float, float]:
    """images/s, GiB, seconds of the first step."""
    torch.cuda.reset_peak_memory_stats(device)
    precision, width, size, batch, way = row
    manifest = shards_in(folder / f"table-{size[0]}", 8, size)
    data = {"shards": manifest.folder, "input_size": size}
    model = {"width": width, "initialization": "kaiming"}
    train = {"use_gpu": True, "precision": precision, "batch_size": batch, **WAYS[way]}
    run = new_run(RunConfig(data=data, model=model, train=train), manifest, folder / "runs" / "t", device)
    run.parallel.train()
    torch.backends.cudnn.benchmark = True
    sent = made_up(batch, size, device)
    begun = time.perf_counter()
    step = prepare(run, sent)
    if train["graph"]:
        must_be_recorded(step)
    seconds(lambda: step(sent), device)
    first = time.perf_counter() - begun
    per_step = seconds(lambda: [step(sent) for _ in range(3)], device) / 3
    count = max(5, int(2 / per_step))
    per_step = seconds(lambda: [step(sent) for _ in range(count)], device) / count
    return batch / per_step, torch.cuda.max_memory_reserved(device) / 2**30, first


def must_be_recorded(step: Callable[[Sent], Tensor] | None) -> None:
    """Figures of launches would be others than their name."""
    if getattr(step, "__module__", None) != recording.__name__:
        raise RuntimeError("the step was not recorded; a line of train.graph above says why")


def made_up(rows: int, size: tuple[int, int], device: torch.device) -> Sent:
    """Crops, heatmaps and weights. Not by the GPU's own chance: a recording that fails leaves it unusable."""
    chance, (width, height) = torch.Generator().manual_seed(0), size
    crops = torch.randint(0, 256, (rows, height, width, 3), dtype=torch.uint8, generator=chance)
    heatmaps = torch.rand(rows, 17, height // 4, width // 4, generator=chance)
    return crops.to(device), heatmaps.to(device), torch.ones(rows, 17, device=device)


if __name__ == "__main__":
    with_memory_kept()
    sys.exit(main())
