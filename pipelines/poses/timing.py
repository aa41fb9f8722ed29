"""How fast modes answer, side by side: each in a process of its own (mode_process.py), asked in turn.

    a batch size -> a first look at every mode -> ROUNDS rounds through all modes -> seconds of each call

Rounds, so that other work on the machine does not meet one mode alone; processes, so that memory and threads
are those of one mode.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hrnet_core.choices import MODES
from hrnet_core.errors import ConfigError
from pipelines.poses.mode_process import ModeProcess
from pipelines.process.progress import Every
from pipelines.process.stop import exit_code

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROUNDS = 5
MOST, LEAST = 100, 10
"""Calls at a batch size: MOST for batches of one and where they fit into SECONDS, never fewer than LEAST."""
SECONDS = 5.0
LONGEST_PASS = 2.0
"""Seconds. A mode is not asked for batches that take longer, nor for larger ones."""
NEEDED = {50: 1, 90: 10, 99: 100}
"""Percentile: calls that it takes; of fewer it would be the slowest one under another name."""


@dataclass
class AtSize:
    """Calls with batches of one size."""

    plain: list[float] = field(default_factory=list)
    """Seconds of each call without flip test."""
    flip: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    """By the last turn, as ModeProcess.turn gives it."""


@dataclass
class Speed:
    """What was measured of one mode."""

    start_seconds: float
    """Reading the checkpoint, building the network and warming it up, after torch was imported; compiled code
    of earlier runs is not used."""
    sizes: dict[int, AtSize] = field(default_factory=dict)
    left_out: str = ""
    """Which batch sizes were not measured, and why."""

    def fastest(self, size: int) -> float:
        """ms a crop of the fastest call without flip test."""
        return 1000 * min(self.sizes[size].plain) / size

    def percentile(self, size: int, percent: int) -> float | None:
        """ms a crop without flip test; None where there were too few calls for it."""
        calls = self.sizes[size].plain
        enough = len(calls) >= NEEDED[percent]
        return 1000 * float(np.percentile(calls, percent)) / size if enough else None

    def as_dict(self) -> dict[str, Any]:
        """Columns, an entry a batch size, of JSON types: what stands in checkpoint.json and --json FILE."""
        columns: dict[str, list[Any]] = {"batch_size": [*self.sizes]}
        columns["calls"] = [len(at.plain) for at in self.sizes.values()]
        for percent in NEEDED:
            every = [self.percentile(size, percent) for size in self.sizes]
            columns[f"ms_per_crop_p{percent}"] = [None if value is None else _short(value) for value in every]
        columns["people_per_second"] = [_rate(size, at.plain) for size, at in self.sizes.items()]
        columns["people_per_second_flip"] = [_rate(size, at.flip) for size, at in self.sizes.items()]
        for name in dict.fromkeys(name for at in self.sizes.values() for name in at.memory):
            columns[name] = [at.memory.get(name) for at in self.sizes.values()]
        return {"start_seconds": _short(self.start_seconds), **columns, "left_out": self.left_out}


def _rate(size: int, seconds: Sequence[float]) -> float | None:
    """People a second, by the median call."""
    return _short(size / float(np.median(seconds))) if seconds else None


def _short(value: float) -> float:
    """Four digits: more are noise."""
    return float(f"{value:.4g}")


@dataclass
class Timings:
    """Modes as far as they were measured."""

    modes: dict[str, Speed] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """Modes that cannot run here, with the reason."""
    stopped: int = 0
    """Exit code of the signal that ended it before the end, 130 for Ctrl-C; 0: none."""

    def __str__(self) -> str:
        """Markdown: a table with a row for each batch size of a mode, then what is not in it."""
        lines = [f"- `{mode}` not measured: {why}" for mode, why in self.left_out.items()]
        lines += [f"- `{mode}`, {speed.left_out}" for mode, speed in self.modes.items() if speed.left_out]
        if self.stopped:
            lines.append("- stopped before the end: there are fewer calls, or sizes and modes are missing")
        return "\n".join([*_table(self.modes), *([""] if lines else []), *lines])


def _table(modes: dict[str, Speed]) -> list[str]:
    speeds = {mode: speed.as_dict() for mode, speed in modes.items()}
    memory = list(dict.fromkeys(key for speed in speeds.values() for key in speed if key.endswith("_mib")))
    shown = [f"peak {key.removesuffix('_mib').replace('_', ' ')}, MiB" for key in memory]
    head = ["mode", "first answer, s", "batch", "calls", "ms/crop p50", "p90", "p99"]
    head += ["people/s", "with flip test", *shown]
    columns = ["batch_size", "calls", "ms_per_crop_p50", "ms_per_crop_p90", "ms_per_crop_p99"]
    columns += ["people_per_second", "people_per_second_flip", *memory]
    rows = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for mode, speed in speeds.items():
        cells = [[_cell(speed[key][row]) for key in columns] for row in range(len(speed["batch_size"]))]
        for row, figures in enumerate(cells or [["-"] * len(columns)]):
            start = f"{speed['start_seconds']:.1f}" if row == 0 else ""
            rows.append([f"`{mode}`", start, *figures])
    return [f"| {' | '.join(row)} |" for row in rows]


def _cell(value: float | None) -> str:
    """A number as a person reads it: three digits, and "-" where there is none."""
    if value is None:
        return "-"
    if isinstance(value, int) or value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def time_modes(
    folder: str | Path,
    modes: Iterable[str],
    device: str,
    threads: int,
    sizes: Iterable[int] = SIZES,
    always: int = 1,
) -> Timings:
    """Measure a checkpoint folder's modes on "cpu" or "cuda", with so many CPU threads each.

    always: up to this batch size a mode is measured however long a pass takes. Ctrl-C ends measuring; what
    there is by then is returned. ConfigError: an unknown mode, or none that runs here.
    """
    wanted = list(dict.fromkeys(modes))
    if unknown := [mode for mode in wanted if mode not in MODES]:
        raise ConfigError(f"mode {unknown[0]!r} is unknown: choose of {', '.join(MODES)}.")
    timings = Timings()
    with tempfile.TemporaryDirectory(prefix="hrnet-compiled-") as cache:

        def begin(mode: str) -> ModeProcess:
            return ModeProcess(str(folder), mode, device, threads, cache)

        try:
            take_turns(begin, wanted, sorted(set(sizes)), always, timings)
        except KeyboardInterrupt as error:
            timings.stopped = exit_code(error)
    if not timings.modes and not timings.stopped:
        reasons = "; ".join(f"{mode}: {why}" for mode, why in timings.left_out.items())
        raise ConfigError(f"no mode could be measured on {device}: {reasons}")
    return timings


def take_turns(
    begin: Callable[[str], ModeProcess],
    modes: Sequence[str],
    sizes: Sequence[int],
    always: int,
    timings: Timings,
) -> None:
    """Start every mode, one after the other, then measure size after size; `timings` fills up on the way."""
    with contextlib.ExitStack() as processes:
        running: dict[str, ModeProcess] = {}
        for mode in modes:
            process = processes.enter_context(contextlib.closing(begin(mode)))
            try:
                timings.modes[mode] = Speed(process.start())
            except ConfigError as error:
                timings.left_out[mode] = str(error)
                print(f"{mode}: not measured: {error}", flush=True)
                continue
            running[mode] = process
            print(f"{mode}: first answer after {timings.modes[mode].start_seconds:.1f} s", flush=True)
        for size in sizes:
            failed = _measure_size(running, timings, size, size <= always)
            larger = " and larger" if size < sizes[-1] else ""
            for mode, why in failed.items():
                timings.modes[mode].left_out = f"batch {size}{larger}: {why}"
                del running[mode]


def _measure_size(
    running: dict[str, ModeProcess], timings: Timings, size: int, always: bool
) -> dict[str, str]:
    """A first look at every mode, then the rounds. Returns the modes that are too slow (unless `always`) or
    fail at this size, with the reason.

    A turn's first call, which finds the caches full of another mode's data, is not counted. A flip test,
    twice as long, is called a quarter as often.
    """
    calls: dict[str, int] = {}
    failed: dict[str, str] = {}
    for mode, process in running.items():
        try:
            (_, took), _ = process.turn(size, False, 2)
            if took > LONGEST_PASS and not always:
                failed[mode] = f"a pass takes {took:.1f} s, longer than {LONGEST_PASS:g} s"
                continue
            process.turn(size, True, 1)
        except ConfigError as error:
            failed[mode] = str(error)
            continue
        wanted = MOST if size == 1 else min(MOST, max(LEAST, SECONDS / took))
        calls[mode] = math.ceil(wanted / ROUNDS)
    due = Every(10)
    for turn, mode in itertools.product(range(ROUNDS), calls):
        if mode in failed:
            continue
        if due():
            print(f"batch {size}: round {turn + 1} of {ROUNDS}, {mode}", flush=True)
        try:
            seconds, _ = running[mode].turn(size, False, calls[mode] + 1)
            at = timings.modes[mode].sizes.setdefault(size, AtSize())
            at.plain += seconds[1:]
            seconds, at.memory = running[mode].turn(size, True, max(1, calls[mode] // 4))
            at.flip += seconds
        except ConfigError as error:
            failed[mode] = str(error)
    measured = {mode: timings.modes[mode] for mode in calls if size in timings.modes[mode].sizes}
    if measured:
        told = (f"{mode} {speed.percentile(size, 50):.1f}" for mode, speed in measured.items())
        print(f"batch {size}, ms/crop: {', '.join(told)}", flush=True)
    return failed


def processor(device: str) -> str:
    """Name of the CPU, or of the GPU on "cuda"."""
    import torch

    cpu = torch.cpu.get_capabilities().get("cpu_name", "?")
    return torch.cuda.get_device_name() if device == "cuda" else str(cpu)
