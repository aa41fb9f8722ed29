"""What glibc and Python are told of memory in processes that import much or compute on a CPU.

glibc reads its variables once, when a process starts. As it is, it gives each block above 32 MB back when
that is freed, and the kernel clears the memory anew for the next pass or step: a sixth of a training step of
a small network. With KEPT a process keeps up to 1 GB.

In a thread that is not the main one glibc does so above 64 MB whatever it is told, unless all threads share
one arena: a fifth of a pass of W32 with 32 people. PASSES says that too. It is not for processes whose
threads allocate all the time, as those of a training feed do: they wait for each other.

Python looks for cycles among its objects whenever 700 more were made than freed, and all of them now and
then. Imports make objects that stay: with torch and Ray Train 400,000 of them, looked through in vain for a
twelfth of the time that the imports take.
"""

from __future__ import annotations

import gc

KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
"""For training."""
PASSES = {**KEPT, "MALLOC_ARENA_MAX": "1"}
"""For passes of a network, which run in one thread."""
SELDOM = (100_000, 10, 10)
"""Objects until Python looks for cycles, as gc.set_threshold takes them: while packages are imported."""
USUAL = (700, 10, 10)
"""Python's own."""


def collect_seldom() -> None:
    """For a process that is about to import."""
    gc.set_threshold(*SELDOM)


def collect_as_usual() -> None:
    """For a process that has what it works with: no cycles are looked for among that any more, so that a step
    or a request does not wait for it (.17 s with all of Ray Train and torch), and as usual among the rest."""
    gc.freeze()
    gc.set_threshold(*USUAL)
