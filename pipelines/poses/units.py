"""Fixed work units through PosePredictor on Ray Data actors: what evaluate and predict share.

    units -> Ray Data actors -> an answer each -> kept in a folder as it comes

Who works on a unit, and how many do, changes nothing: an actor has a fixed number of threads, and the
batches inside a unit follow from the unit alone. A second call asks only for the units that are not there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import ConfigError
from pipelines.cluster import on_cluster, quiet_ray_data, ray_session, require
from pipelines.config import RaySettings, WorkerSettings
from pipelines.progress import ProgressLine
from pipelines.storage import write_whole

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec
    from hrnet_core.model import HRNet
    from hrnet_core.predictor import PosePredictor


UNFINISHED = "unfinished"
"""Folder of the answers of a run that has not ended; a second call goes on from it."""
Unit = Any
"""A few pictures with what is asked of them: plain data of the verb's own, pickled on its way."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class Outcome:
    """What became of a unit."""

    content: bytes
    """Its answers, in the verb's own format."""
    people: int
    problems: tuple[tuple[str, str], ...] = ()
    """(file, reason) of pictures without which the unit counts as not answered."""


Work = Callable[[Unit, "PosePredictor"], Outcome]


def cut(items: Iterable[Item], people_of: Callable[[Item], int], most: int) -> list[list[Item]]:
    """Items in their order, in units of at most `most` people, or of one item that has more."""
    units: list[list[Item]] = []
    room = 0
    for item in items:
        count = people_of(item)
        if not units or count > room:
            units.append([])
            room = most
        room -= count
        units[-1].append(item)
    return units


class Actor:
    """Holds the model in a Ray Data actor. A row in is a unit, a row out its outcome."""

    def __init__(
        self, load: Callable[[], tuple[HRNet, CheckpointSpec]], work: Work, settings: WorkerSettings
    ) -> None:
        import cv2
        import torch

        from hrnet_core.predictor import PosePredictor

        # Threads decide the order of float additions: fixed, so that any number of actors agrees.
        cv2.setNumThreads(1)
        torch.set_num_threads(settings.cpus_per_worker)
        self.predictor = PosePredictor(*load(), settings.device, settings.mode)
        self.work = work

    def __call__(self, rows: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        """A batch of one row: Ray Data wants lists."""
        start = time.perf_counter()
        outcome = self.work(pickle.loads(rows["work"][0]), self.predictor)
        return {
            "unit": [int(rows["unit"][0])],
            "content": [outcome.content],
            "people": [outcome.people],
            "problems": [json.dumps(outcome.problems)],
            "mode": [self.predictor.mode],
            "actor": [f"{socket.gethostname()} {os.getpid()}"],
            "seconds": [time.perf_counter() - start],
        }


@dataclass(frozen=True)
class Outcomes:
    """What became of all units of a call of `run_units`."""

    answers: list[Path]
    """The files in `store`, in the order of the units."""
    mode: str
    """The execution mode of every answer, also of those that were there."""
    people_per_second: float
    """While actors were at work; 0 where all was there."""
    problems: list[tuple[str, str]]
    """Of all units, sorted; those units are not in the store."""


def run_units(
    units: list[Unit],
    work: Work,
    checkpoint: Path,
    settings: WorkerSettings,
    ray: RaySettings,
    store: Path,
    verb: str,
) -> Outcomes:
    """Answer every unit that is not in `store` yet; each answer goes there at once.

    ConfigError where the actors computed in different modes, or are more than Ray has room for.
    """
    store.mkdir(parents=True, exist_ok=True)
    done = _stored(store)
    pending = {index: unit for index, unit in enumerate(units) if index not in done}
    speed, problems = 0.0, []
    if done:
        print(f"{verb}: going on, {len(done)} of {len(units)} units are there", flush=True)
    if pending:
        rows = rows_on_ray(pending, work, checkpoint, settings, ray, verb)
        speed, problems = _collect(rows, pending, store, verb)
    answers = list(_stored(store).values())
    modes = {file.suffix[1:] for file in answers}
    if len(modes) > 1:
        raise ConfigError(
            f"the actors computed in different modes ({', '.join(sorted(modes))}), whose results differ: the "
            f"machines are not of one kind. Remove {store} and start again on machines that are."
        )
    return Outcomes(answers, next(iter(modes), ""), speed, sorted(problems))


def _stored(store: Path) -> dict[int, Path]:
    """The answers in a store by unit, in order: files named UNIT.MODE, whole because they were renamed."""
    files = (file for file in sorted(store.iterdir()) if file.stem.isdigit())
    return {int(file.stem): file for file in files}


def digest_of(*decides: Any) -> str:
    """16 hex digits of all that decides the answers of a call: JSON types, arrays, dataclasses of them."""

    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, np.ndarray) else vars(value)

    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=plain).encode()).hexdigest()[:16]


def rows_on_ray(
    pending: dict[int, Unit],
    work: Work,
    checkpoint: Path,
    settings: WorkerSettings,
    ray_settings: RaySettings,
    verb: str,
) -> Iterator[dict[str, Any]]:
    """What Actor returns for each pending unit, in the order of finishing."""
    import ray
    import ray.data

    from hrnet_core.checkpoint import load_checkpoint
    from hrnet_core.modes import unusable

    # On a cluster the actors' machines decide, not this one.
    why = "" if on_cluster() else unusable(settings.mode, settings.device)
    if why:
        raise ConfigError(f"--{verb}.mode {settings.mode} cannot run here: {why}.")
    model_and_spec = load_checkpoint(checkpoint)
    rows = [{"unit": index, "work": pickle.dumps(unit)} for index, unit in pending.items()]
    with ray_session(ray_settings, quiet=True), quiet_ray_data():
        cpus, gpus = settings.cpus_per_worker, int(settings.use_gpu)
        require(ray_settings, settings.num_workers, cpus, gpus, f"hrnet {verb} --{verb}.num-workers")
        actors = ray.data.ActorPoolStrategy(
            size=min(settings.num_workers, len(rows)), max_tasks_in_flight_per_actor=2
        )
        # The network travels through the object store: machines need not see the checkpoint folder.
        arguments = (functools.partial(ray.get, ray.put(model_and_spec)), work, settings)
        yield from (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .map_batches(
                Actor,
                batch_size=1,
                compute=actors,
                fn_constructor_args=arguments,
                num_cpus=cpus,
                num_gpus=gpus,
            )
            .iter_rows()
        )


def _collect(
    rows: Iterable[dict[str, Any]], pending: dict[int, Unit], store: Path, verb: str
) -> tuple[float, list[tuple[str, str]]]:
    """Answers into the store, each as it comes; people/s while actors were at work, and all problems."""
    seen: set[int] = set()
    problems: list[tuple[str, str]] = []
    busy: Counter[str] = Counter()
    line = ProgressLine(verb, len(pending), "units", "people", seconds=10)
    for row in rows:
        if row["unit"] in seen:
            raise RuntimeError(f"unit {row['unit']} was answered twice")
        seen.add(row["unit"])
        here = json.loads(row["problems"])
        problems += map(tuple, here)
        if not here:
            write_whole(store / f"{row['unit']:06d}.{row['mode']}", row["content"])
        busy[row["actor"]] += row["seconds"]
        line.add(row["people"])
    if seen != set(pending):
        raise RuntimeError(f"{len(pending)} units were asked and {len(seen)} answered")
    return line.work / max(busy.values()), problems
