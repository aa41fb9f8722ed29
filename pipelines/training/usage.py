"""What a worker uses of its machine, for the figures of a run: memory, CPUs, its device's time.

The names below system/node0/ are those of MLflow's own monitors, so that its page shows them under "System
metrics". Not those monitors: each would send its figures to MLflow by itself, and import it in each worker.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import psutil
import torch

from pipelines.process.progress import Every

SECONDS = 10
"""Between two looks, as MLflow's monitors do."""
MB = 1e6
NAMES = (
    "system/node{node}/cpu_utilization_percentage",
    "system/node{node}/system_memory_usage_percentage",
    "system/node{node}/system_memory_usage_megabytes",
    "system/worker{rank}/memory_usage_megabytes",
    "system/worker{rank}/cpus",
    "system/node{node}/gpu_{local}_utilization_percentage",
    "system/node{node}/gpu_{local}_memory_usage_megabytes",
    "system/worker{rank}/gpu_peak_memory_megabytes",
)
"""Of the figures of a worker; the last three only where it has a GPU."""


class Usage:
    """Of this process and its machine. node: number of the machine in the run; local: of the worker there."""

    def __init__(self, rank: int, device: torch.device, node: int = 0, local: int = 0) -> None:
        self.rank, self.device, self.node, self.local = rank, device, node, local
        self.process = psutil.Process()
        self.process.cpu_percent()  # CPU figures are of the time since they were last asked for
        psutil.cpu_percent()
        self._due = Every(SECONDS, at_once=True)
        self._latest: list[float] = []

    def look(self) -> bool:
        """Look again if it is time to; whether it was."""
        if due := self._due():
            memory, own = psutil.virtual_memory(), self.process
            used = [psutil.cpu_percent(), memory.percent, memory.used / MB]
            self._latest = [self.node, self.local, *used, own.memory_info().rss / MB, own.cpu_percent() / 100]
            self._latest += self._gpu() if self.device.type == "cuda" else [torch.nan] * 3
        return due

    def _gpu(self) -> list[float]:
        free, total = torch.cuda.mem_get_info(self.device)
        try:
            busy = float(torch.cuda.utilization(self.device))  # of the last second or less, by the driver
        except Exception:  # nvidia-ml-py is not installed, or its own errors: the driver does not tell
            busy = torch.nan
        return [busy, (total - free) / MB, torch.cuda.max_memory_allocated(self.device) / MB]

    def row(self, world: int) -> list[float]:
        """The latest figures in this worker's place among those of all workers: the sum over workers is all
        of theirs."""
        size = len(self._latest)
        return [0.0] * (size * self.rank) + self._latest + [0.0] * (size * (world - self.rank - 1))


def named(row: Sequence[float], world: int) -> dict[str, float]:
    """Usage.row, summed over workers, as metrics. What a machine has once is said by its worker 0."""
    size, figures = len(row) // world, {}
    for rank in range(world):
        node, local, *values = row[rank * size : (rank + 1) * size]
        for name, value in zip(NAMES, values, strict=True):
            if value == value and (local == 0 or "{rank}" in name or "{local}" in name):
                figures[name.format(node=int(node), local=int(local), rank=rank)] = value
    return figures


class DeviceClock:
    """Seconds in which the device was at steps, measured without waiting for it.

    On a GPU by events before and after each step in its own queue: idle moments between two kernels of a step
    count as the step's, waiting for data, metrics and validation does not. On a CPU the time of the calls.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        self._begun = time.perf_counter()
        if self.cuda:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self._events[-1][1].record()
        else:
            self.seconds += time.perf_counter() - self._begun

    def read(self) -> float:
        """Once the device is through with all of them."""
        return self.seconds + sum(begun.elapsed_time(ended) for begun, ended in self._events) / 1000
