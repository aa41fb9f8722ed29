"""A predictor in one mode and in a process of its own, asked over a pipe: timing.py takes turns with them.

A call is PosePredictor.predict_crops: crops in host memory -> keypoints in host memory.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import ConfigError, PoseError, first_line

if TYPE_CHECKING:
    import torch

PATIENCE = 3.0
"""Seconds that a process has to end by itself."""


class ModeProcess:
    """A predictor in a process of its own. ConfigError where it cannot be built or does not answer."""

    def __init__(self, folder: str, mode: str, device: str, threads: int, cache: str) -> None:
        """cache: folder for what torch.compile makes: an empty one shows what a first start takes."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, folder, mode, device, threads, cache)
        self._process = context.Process(target=_answer, args=arguments)
        with _ctrl_c_for_us_alone():
            self._process.start()
        theirs.close()

    def start(self) -> float:
        """Seconds until it could answer; returns when it can."""
        seconds: float = self._receive()
        return seconds

    def turn(self, size: int, flip: bool, calls: int) -> tuple[list[float], dict[str, int]]:
        """Seconds of so many calls in a row with batches of `size`, and MiB by then: "memory_mib" is the
        process's largest resident set so far; on a GPU "gpu_allocated_mib" and "gpu_reserved_mib" are torch's
        largest at this size."""
        with contextlib.suppress(ConnectionError):  # receiving tells
            self._pipe.send((size, flip, calls))
        answer: tuple[list[float], dict[str, int]] = self._receive()
        return answer

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            killed = " (killed: was there enough memory?)" if code == -signal.SIGKILL else ""
            raise ConfigError(f"its process ended with code {code}{killed}") from None
        if isinstance(answer, str):
            raise ConfigError(answer)
        return answer

    def close(self) -> None:
        """End it. One that waits for a question ends by itself; one that still compiles is killed."""
        self._pipe.close()
        self._process.join(PATIENCE)
        self._process.kill()
        self._process.join()


@contextlib.contextmanager
def _ctrl_c_for_us_alone() -> Iterator[None]:
    """A process that is started in the block never hears Ctrl-C: it is for the asker, who ends that process.
    From its first moment on, not only when Python runs there and has imported what it needs."""
    resource_tracker.ensure_running()  # else started with the process, which would end the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- in that process --------------------------------------------------------------------------------------


def _answer(pipe: Connection, folder: str, mode: str, device: str, threads: int, cache: str) -> None:
    """Seconds until the predictor is ready, then each question's answer; why not, as text."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    cv2.setNumThreads(1)
    import torch

    from hrnet_core.predictor import PosePredictor

    with contextlib.suppress(EOFError, ConnectionError):  # the asker is gone; reset: an answer lay unread
        try:
            start = time.perf_counter()
            predictor = PosePredictor.load(folder, device, mode, threads)
            predictor.warm_up()
            pipe.send(time.perf_counter() - start)
        except Exception as error:  # whatever a runtime throws is why it cannot be measured
            pipe.send(_reason(error))
            return
        width, height = predictor.spec.input_size
        crops: NDArray[np.uint8] = np.zeros((0, height, width, 3), np.uint8)
        while True:
            size, flip, calls = pipe.recv()
            try:
                if len(crops) != size:
                    crops = np.random.default_rng(0).integers(0, 256, (size, height, width, 3), np.uint8)
                    if device != "cpu":
                        torch.cuda.reset_peak_memory_stats()
                seconds = []
                for _ in range(calls):
                    start = time.perf_counter()
                    predictor.predict_crops(crops, flip, batch_size=size)
                    seconds.append(time.perf_counter() - start)
                pipe.send((seconds, _memory(predictor.device)))
            except Exception as error:
                pipe.send(_reason(error))


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, PoseError) else f"{type(error).__name__}: {first_line(error)}"


def _memory(device: torch.device) -> dict[str, int]:
    """As of ModeProcess.turn. A GPU's cache is handed back: other modes' processes share the card."""
    if device.type == "cpu":
        return {"memory_mib": _peak_resident() // 2**20}
    import torch

    most = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    torch.cuda.empty_cache()
    return {"gpu_allocated_mib": most[0] // 2**20, "gpu_reserved_mib": most[1] // 2**20}


def _peak_resident() -> int:
    """Bytes. Not getrusage where /proc is: on Linux that keeps the peak of the process this one was forked
    from."""
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
