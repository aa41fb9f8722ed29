"""Both sides of a ratio in turn, and its limit: what the benchmarks share."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from hrnet_core import memory

missed: list[str] = []


def with_memory_kept(variables: dict[str, str] = memory.KEPT) -> None:
    """This command, begun anew with the variables that a stage's processes have if it has them not: glibc
    reads them once."""
    if not variables.keys() <= os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **variables})


def compare(
    ours: Callable[[], Any],
    other: Callable[[], Any],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float, float]:
    """(median of the ratios of ours to other, both medians in s): B A B A ..., after one call of each: other
    work on the machine meets both alike."""
    ours(), other()
    pairs = []
    for _ in range(rounds):
        start = clock()
        other()
        middle = clock()
        ours()
        pairs.append((clock() - middle, middle - start))
    ratio = statistics.median(a / b for a, b in pairs)
    return ratio, statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def judge(text: str, value: float, limit: float, at_most: bool = True) -> None:
    """Print a figure beside its limit; what misses it is kept."""
    good = value <= limit if at_most else value >= limit
    line = f"{text}: {value:.3g} (limit {'at most' if at_most else 'at least'} {limit:g})"
    print(f"{'ok  ' if good else 'MISS'}  {line}", flush=True)
    if not good:
        missed.append(line)


def exit_code() -> int:
    """Of a benchmark, after the list of what was missed: 1 where there is any."""
    for text in missed:
        print(f"MISSED: {text}")
    return 1 if missed else 0
