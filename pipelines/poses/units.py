"""Fixed work units through PosePredictor on Ray Data actors: what evaluate and predict share.

    units -> Ray Data actors -> an answer each -> kept in a folder as it comes

Who works on a unit, and how many do, changes nothing: a pass has a fixed number of threads, and the batches
inside a unit follow from the unit alone. A second call asks only for the units that are not there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import pickle
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hrnet_core import memory
from hrnet_core.errors import ConfigError
from pipelines.cluster.session import (
    cpus_each,
    cpus_per_gpu,
    on_cluster,
    quiet_ray_data,
    ray_session,
    require,
    room_for,
    selector,
)
from pipelines.cluster.shared_paths import refuse_unshared
from pipelines.poses.actor import Actor, Unit, Work
from pipelines.process.progress import ProgressLine
from pipelines.settings.config import RaySettings, WorkerSettings
from pipelines.storage.files import join, list_files, writing_many

UNFINISHED = "unfinished"
"""Folder of the answers of a run that has not ended; a second call goes on from it."""
Item = TypeVar("Item")
UNITS_AT_ONCE = 2
"""Of an actor: one in the network, one that is read."""
BATCHES = 2
"""Of a unit: passes that it has for as many CPUs."""


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


@dataclass(frozen=True)
class Outcomes:
    """What became of all units of a call of `run_units`."""

    answers: list[str]
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
    store: str,
    verb: str,
    reads: Sequence[tuple[str, str]] = (),
) -> Outcomes:
    """Answer every unit that is not in `store` (path or URI of a folder) yet; each answer goes there at once.

    reads: what actors read, as `refuse_unshared` takes it, whose errors are raised. ConfigError where the
    actors computed in different modes, or are more than Ray has room for. DataError where the store cannot be
    written.
    """
    done = _stored(store)
    pending = {index: unit for index, unit in enumerate(units) if index not in done}
    speed, problems = 0.0, list[tuple[str, str]]()
    if done:
        print(f"{verb}: going on, {len(done)} of {len(units)} units are there", flush=True)
    if pending:
        # Closed here: Ray's session redirects stderr, and an error that is told while it lasts is not seen.
        with contextlib.closing(rows_on_ray(pending, work, checkpoint, settings, ray, verb, reads)) as rows:
            speed, problems = _collect(rows, pending, store, verb)
    answers = list(_stored(store).values())
    modes = {file.partition("?")[0].rpartition(".")[2] for file in answers}
    if len(modes) > 1:
        raise ConfigError(
            f"the actors computed in different modes ({', '.join(sorted(modes))}), whose results differ: the "
            f"machines are not of one kind. Remove {store} and start again on machines that are."
        )
    return Outcomes(answers, next(iter(modes), ""), speed, sorted(problems))


def _stored(store: str) -> dict[int, str]:
    """The answers in a store by unit, in order: files named UNIT.MODE, which are whole."""
    names = (name for name in sorted(list_files(store)) if name.partition(".")[0].isdigit())
    return {int(name.partition(".")[0]): join(store, name) for name in names}


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
    reads: Sequence[tuple[str, str]] = (),
) -> Generator[dict[str, Any], None, None]:
    """What Actor returns for each pending unit, in the order of finishing."""
    import ray
    import ray.data

    from hrnet_core.checkpoint import load_checkpoint, read_exported
    from hrnet_core.modes import files_of, unusable

    model, spec = load_checkpoint(checkpoint)
    exported = read_exported(checkpoint, files_of(settings.mode, spec.modes))
    # On a cluster the actors' machines decide, not this one.
    why = "" if on_cluster() else unusable(settings.mode, settings.device, exported)
    if why:
        raise ConfigError(f"--{verb}.mode {settings.mode} cannot run here: {why}.")
    rows = [{"unit": index, "work": pickle.dumps(unit)} for index, unit in pending.items()]
    with ray_session(ray_settings, quiet=True), quiet_ray_data():
        cpus, gpus = settings.cpus_per_worker or 1, int(settings.use_gpu)
        labels = selector(ray_settings)
        require(ray_settings, settings.num_workers or 1, cpus, gpus, f"hrnet {verb} --{verb}.num-workers")
        refuse_unshared(reads)
        if not (settings.num_workers or settings.cpus_per_worker or gpus):
            cpus = cpus_each([1] * len(rows), BATCHES, labels)
        workers = min(settings.num_workers or room_for(cpus, gpus, labels), len(rows))
        # A GPU answers a unit before Ray brings the next. Who starts first must not take all of a few units.
        waiting = UNITS_AT_ONCE * (2 if gpus else 1)
        actors = ray.data.ActorPoolStrategy(
            size=workers,
            max_tasks_in_flight_per_actor=min(waiting, math.ceil(len(rows) / workers)),
            max_concurrent_calls_per_actor=UNITS_AT_ONCE,
            enable_true_multi_threading=True,
        )
        # The network travels through the object store, with the files that its mode runs from: machines need
        # not see the checkpoint folder.
        stored = ray.put((model, spec, exported))
        reading = cpus if settings.cpus_per_worker or not gpus else cpus_per_gpu()
        arguments = (functools.partial(ray.get, stored), work, settings, reading)
        # A Ray that is started here has handed the variables on, and an environment would cost a second.
        kept: dict[str, Any] = {}
        if on_cluster() and not gpus:
            kept["runtime_env"] = {"env_vars": memory.PASSES}
        yield from (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .map_batches(
                Actor,
                batch_size=1,
                compute=actors,
                fn_constructor_args=arguments,
                num_cpus=cpus,
                num_gpus=gpus,
                label_selector=labels,
                **kept,
            )
            .iter_rows()
        )


def _collect(
    rows: Iterable[dict[str, Any]], pending: dict[int, Unit], store: str, verb: str
) -> tuple[float, list[tuple[str, str]]]:
    """Answers into the store, each as it comes; people/s while actors were at work, and all problems."""
    seen: set[int] = set()
    problems: list[tuple[str, str]] = []
    spans: dict[str, list[float]] = {}
    line = ProgressLine(verb, len(pending), "units", "people", seconds=10)
    with writing_many() as put:
        for row in rows:
            if row["unit"] in seen:
                raise RuntimeError(f"unit {row['unit']} was answered twice")
            seen.add(row["unit"])
            here = json.loads(row["problems"])
            problems += map(tuple, here)
            if not here:
                put(join(store, f"{row['unit']:06d}.{row['mode']}"), row["content"])
            spans.setdefault(row["actor"], []).extend([row["start"], row["end"]])
            line.add(row["people"])
    if seen != set(pending):
        raise RuntimeError(f"{len(pending)} units were asked and {len(seen)} answered")
    return line.work / max(max(times) - min(times) for times in spans.values()), problems
