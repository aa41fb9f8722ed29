"""What is said and done when a worker of a run ends before its time."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from ray.train import UserCallback

from hrnet_core.errors import PoseError, first_line
from pipelines.storage.files import BucketAway
from pipelines.training.run_folder import keep_error, no_room, place, reached_step, saved_step

DEATHS = {
    "running low on memory": "ended by Ray: its machine had no memory left",
    "node died": "its machine is gone",
    "node was terminated": "its machine is gone",
    "connection error code": "its process was killed, as by signal 9 or a machine without memory",
    "actor died": "its process ended",
}
"""Ray's words for the end of a process, the most telling first -> ours. It does not know the signal."""

PEER_GONE = ("Connection reset by peer", "Connection closed by peer")
"""What gloo says in a worker whose fellow is gone, before Ray knows of that."""


class Faults(UserCallback):
    """In Ray Train's controller: a sentence for a worker that was lost, its traceback into errors.log. What
    no restart would cure ends the run at once: an exception of `after_exception` does that."""

    def __init__(self, folder: str, steps: int, restarts: int) -> None:
        """steps: batches of an epoch. restarts: how many there may be, -1 any number."""
        self.folder, self.steps, self.restarts = folder, steps, restarts
        self.lost = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if (reason := curable(error, self.folder)) is not None:
                raise reason
        try:
            file = keep_error(self.folder, told_by_workers(worker_exceptions))
            saved, reached = saved_step(self.folder), reached_step(self.folder)
            on = f"going on from the checkpoint of {place(saved, self.steps)}" if saved else "beginning again"
            where = f" after {place(reached, self.steps)}; {on}"
        except (OSError, BucketAway) as error:  # no reason to end a run that Ray would start again
            where, file = "; going on from the last checkpoint", f"not kept: {first_line(error)}"
        self.lost += 1
        if self.lost > self.restarts >= 0:
            return  # the driver says it
        of = f" of {self.restarts}" if self.restarts >= 0 else ""
        print(f"{what_happened(worker_exceptions)}{where} (restart {self.lost}{of}; {file})", flush=True)


def what_happened(worker_exceptions: Mapping[int, Exception]) -> str:
    """ "worker 1 was lost (...)": of all that failed the one that died, else the first; the others fail only
    because it is gone."""
    died = {rank: error for rank, error in worker_exceptions.items() if "actor" in str(error)}
    rank, error = next(iter((died or worker_exceptions).items()))
    text = str(error)
    for words, why in DEATHS.items():
        if words in text:
            return f"worker {rank} was lost ({why})"
    if any(words in text for words in PEER_GONE):
        return f"worker {rank} lost the connection to another worker (its machine or process is gone)"
    return f"worker {rank} failed ({type(error).__name__}: {first_line(error)})"


def curable(error: BaseException, folder: str) -> PoseError | None:
    """What the user can cure and a restart cannot: our own errors but for a bucket's, a disk without room."""
    for cause in causes(error):
        if isinstance(cause, BucketAway):
            return None
        if isinstance(cause, PoseError):
            return cause
        if full := no_room(cause, folder):
            return full
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it came of; Ray's tasks keep that in `cause`."""
    while error is not None:
        yield error
        inner = getattr(error, "cause", None)
        error = inner if isinstance(inner, BaseException) else error.__cause__ or error.__context__


def told_by_workers(worker_exceptions: Mapping[int, Exception]) -> str:
    return "\n".join(
        f"worker {rank}:\n{''.join(traceback.format_exception(error))}"
        for rank, error in worker_exceptions.items()
    )
