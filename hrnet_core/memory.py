"""What glibc is told of memory in processes that compute on a CPU. It reads these variables once, when a
process starts.

As it is, glibc gives each block above 32 MB back when it is freed, and the kernel clears the memory anew for
the next pass or step: a sixth of a training step of a small network. With KEPT a process keeps up to 1 GB.

In a thread that is not the main one glibc does so above 64 MB whatever it is told, unless all threads share
one arena: a fifth of a pass of W32 with 32 people. PASSES says that too. It is not for processes whose
threads allocate all the time, as those of a training feed do: they wait for each other.
"""

from __future__ import annotations

KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
"""For training."""
PASSES = {**KEPT, "MALLOC_ARENA_MAX": "1"}
"""For passes of a network, which run in one thread."""
