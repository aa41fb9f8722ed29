"""An actor: the model, threads that read ahead of it, and the units that it works on at once.

    read, decode, cut     several threads, of all units at once, in each unit's order
    the network           on a CPU as many passes at a time as there are CPUs for, a batch each; on a GPU
                          passes of several units overlap

Batches are formed inside a unit: how many threads and units there are changes no bit of an answer. The
threads of one pass would.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hrnet_core import memory
from pipelines.process.in_order import results
from pipelines.settings.config import WorkerSettings

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec
    from hrnet_core.heatmaps import Border
    from hrnet_core.model import HRNet
    from hrnet_core.predictor import PosePredictor, Prepared
    from hrnet_core.results import Poses

READERS_PER_CPU = 4
"""Threads that wait for a disk or a bucket; no more than the CPUs of them decode."""
Unit = Any
"""A few pictures with what is asked of them: plain data of the verb's own, pickled on its way."""
Asked = TypeVar("Asked")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Outcome:
    """What became of a unit."""

    content: bytes
    """Its answers, in the verb's own format."""
    people: int
    problems: tuple[tuple[str, str], ...] = ()
    """(file, reason) of pictures without which the unit counts as not answered."""


Work = Callable[[Unit, "Threads"], Outcome]


class Threads:
    """The threads around one predictor, for units that are worked on at once.

    cpus: how many pictures are decoded at a time, and so held decoded. passes: of the network, on a CPU, at a
    time, each a batch with torch's number of threads.
    """

    def __init__(self, predictor: PosePredictor, cpus: int = 1, passes: int = 1) -> None:
        import torch

        self.predictor = predictor
        self.decoding = threading.Semaphore(cpus)
        """Held by who decodes a picture, until its people are cut out and its pixels gone."""
        self.filming = threading.Lock()
        """Held by who reads frames: those of a video come in order, from stretch to stretch."""
        self._ahead = READERS_PER_CPU * cpus
        self._readers = ThreadPoolExecutor(self._ahead, "read")
        self._network: ThreadPoolExecutor | None = None
        if predictor.device.type == "cpu":
            # More passes would fight for the same cores. OpenMP's number of threads belongs to a thread.
            ours = (torch.get_num_threads(),)
            self._network = ThreadPoolExecutor(passes, "network", torch.set_num_threads, ours)

    def read(self, one: Callable[[Asked], Found], asked: Iterable[Asked]) -> Iterator[Found]:
        """`one` of each in order, read in several threads, no further ahead than there are threads."""
        return results((self._readers.submit(one, each) for each in asked), self._ahead)

    def predict(
        self,
        prepared: Sequence[Prepared],
        flip_test: bool | None,
        batch_size: int,
        border: Border = "official",
    ) -> list[Poses]:
        """As the predictor's own call, of people who are cut out."""
        if not prepared:
            return []
        crops = np.concatenate([one.crops for one in prepared])
        predict_crops, how = self.predictor.predict_crops, (flip_test, batch_size, border)
        if self._network is None:
            keypoints, scores = predict_crops(crops, *how)
        else:  # the batches that predict_crops would make of them, each a pass
            starts = range(0, len(crops), batch_size) or [0]  # pictures without people too
            batches = [crops[first : first + batch_size] for first in starts]
            begun = [self._network.submit(predict_crops, batch, *how) for batch in batches]
            found = zip(*(one.result() for one in begun), strict=True)
            keypoints, scores = map(np.concatenate, found)
        return self.predictor.finish(prepared, keypoints, scores)


class Actor:
    """Holds the model in a Ray Data actor, which calls it in several threads. A row in is a unit, a row out
    its outcome."""

    def __init__(
        self,
        load: Callable[[], tuple[HRNet, CheckpointSpec, dict[str, bytes]]],
        work: Work,
        settings: WorkerSettings,
        cpus: int = 1,
    ) -> None:
        memory.collect_seldom()
        import cv2
        import torch

        from hrnet_core.predictor import PosePredictor

        # Threads of a pass decide the order of float additions: fixed, so that any number of actors agrees.
        cv2.setNumThreads(1)
        torch.set_num_threads(settings.threads)
        model, spec, exported = load()
        predictor = PosePredictor(
            model, spec, settings.device, settings.mode, exported, settings.compile_cache
        )
        self.threads = Threads(predictor, cpus, max(1, cpus // settings.threads))
        self.work = work
        memory.collect_as_usual()

    def __call__(self, rows: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        """A batch of one row: Ray Data wants lists."""
        start = time.monotonic()
        outcome = self.work(pickle.loads(rows["work"][0]), self.threads)
        return {
            "unit": [int(rows["unit"][0])],
            "content": [outcome.content],
            "people": [outcome.people],
            "problems": [json.dumps(outcome.problems)],
            "mode": [self.threads.predictor.mode],
            "actor": [f"{socket.gethostname()} {os.getpid()}"],
            "start": [start],
            "end": [time.monotonic()],
        }
