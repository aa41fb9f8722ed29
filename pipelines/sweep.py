"""Sweep: trials of a declared space under Ray Tune's ASHA, each a training run of its own.

A trial is a run like any other (STORAGE/NAME-00, NAME-01, ...): it goes on to the batch, and `hrnet train`
can go on with it. Its values follow from `sweep.seed` and its number (sweeps/space.py), what came of it lies
in its folder (sweeps/trials.py): the same command goes on with a sweep. Who goes on: sweeps/tuning.py.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import yaml

from hrnet_core.errors import ConfigError, Failure
from hrnet_core.locations import is_uri
from pipelines.cluster.session import ray_session, require, room_for, selector
from pipelines.process.code_version import code_version
from pipelines.process.stop import begun, waited
from pipelines.settings.config import RunConfig
from pipelines.shards.manifest import Manifest
from pipelines.storage.files import absolute, join, write_json, write_whole
from pipelines.sweeps.trials import Sweep, table
from pipelines.tracking.store import StoreAway, Tracker, made_by, store_of
from pipelines.train import begun_check, check_settings, check_start, end_check, refuse_unshared_run
from pipelines.training.followed import PARENT
from pipelines.training.run_folder import (
    check_same_run,
    only_one,
    read_record,
    run_folder,
    run_id_of,
    storage_of,
    whole_storage,
    with_whole_weights,
)


def sweep(config: RunConfig) -> str:
    """Try `sweep.trials` points of `sweep.space`; the table of trials. STORAGE/NAME/best.yaml trains with the
    best.

    ConfigError before anything starts: a space that is not understood, a point whose settings contradict each
    other, another sweep of that name. Failure where a trial ended with an error, or none came to an AP.
    """
    store_of(config.track, config.run.storage)
    if config.run.fresh:
        raise ConfigError("--run.fresh: trials are runs, which stay. Give the sweep another --run.name.")
    manifest = Manifest.load(config.data.shards)
    config = _with_whole_paths(config)
    this = Sweep(config, manifest, run_folder(config, manifest.digest))
    for trial in this.configs:
        check_settings(trial, manifest)
    with only_one(this.folder):
        _check_same_sweep(this)
        for number, trial in enumerate(this.configs):  # a run of that name may be another's
            check_same_run(this.trial_folder(number), trial, manifest.digest)
        if not all(trial.state for trial in this.trials()):
            whole = begun_check(config, manifest)
            for model in {trial.model: trial for trial in this.configs}.values():
                check_start(model, manifest)
            _run(this, whole)
        trials = this.trials()
        best = max(trials, key=lambda trial: trial.ap)
        if best.ap < 0:
            raise Failure(
                f"{this.folder}: no trial came to an AP; why, is in errors.log of each.\n{table(trials)}"
            )
        _write_best(this, trials.index(best))
    file = join(this.folder, "best.yaml")
    way = f"hrnet train {file}"
    if is_uri(file):  # configs are paths
        way = f"a copy of {file} on this machine: hrnet train best.yaml"
    told = f"{table(trials)}\nbest: {best.name}, AP {best.ap:.3f}. {way} --run.name NAME"
    if left := sum(not trial.state for trial in trials):
        raise Failure(
            f"{this.folder}: {left} trials ended with an error, which is in errors.log of each; the same "
            f"command goes on.\n{told}"
        )
    return told


def _with_whole_paths(config: RunConfig) -> RunConfig:
    """Trials stand in folders of their own."""
    run = {"name": config.run.name or "sweep", "storage": whole_storage(config)}
    return with_whole_weights(config).model_copy(
        update={
            "run": config.run.model_copy(update=run),
            "data": config.data.model_copy(update={"shards": absolute(config.data.shards)}),
        }
    )


def _decides(this: Sweep) -> dict[str, Any]:
    """What makes it another sweep. More trials may come later."""
    space = {"space": this.config.sweep.space, "seed": this.config.sweep.seed}
    return {"dataset_digest": this.manifest.digest, "sweep": space, **this.config.decides()}


def _check_same_sweep(this: Sweep) -> None:
    """sweep.json says what it is: ConfigError where that differs."""
    now, known = _decides(this), read_record(this.folder, "sweep.json")
    if known is None:
        if read_record(this.folder, "run.json"):
            raise ConfigError(f"{this.folder} is a training run. Choose another --run.name for the sweep.")
        return
    differ = [f"{k} was {v}, now {now.get(k)}" for k, v in known["decides"].items() if now.get(k) != v]
    if differ:
        raise ConfigError(
            f"{this.folder}: this sweep was begun with other settings: {'; '.join(differ)}. Choose another "
            f"--run.name."
        )


def _write_best(this: Sweep, number: int) -> None:
    fields = this.configs[number].model_dump(mode="json", exclude={"config_name", "sweep"})
    fields["run"] |= {"name": None}
    head = f"# the best trial of the sweep {this.config.run.name}: {this.configs[number].run.name}"
    write_whole(join(this.folder, "best.yaml"), f"{head}\n{yaml.safe_dump(fields, sort_keys=False)}")


# --- on Ray, in MLflow ----------------------------------------------------------------------------


def _run(this: Sweep, whole: Future[None]) -> None:
    """All trials that are not through, below one MLflow run. whole: of `begun_check`."""
    settings, train = this.config.sweep, this.config.train
    gpus = 1.0 if train.use_gpu else 0.0
    parent, status = Parent(None, None), "FAILED"
    try:
        # The dashboard tells Ray Train that a stopped trial's controller is gone: else its CPUs stay taken.
        with ray_session(this.config.ray, quiet=True, workers_shown=False, dashboard=True, train=True):
            from pipelines.sweeps.tuning import tune_trials

            require(this.config.ray, train.num_workers, train.cpus_per_worker, gpus, "a trial of hrnet sweep")
            for trial in {(trial.model, trial.train.teacher): trial for trial in this.configs}.values():
                refuse_unshared_run(trial)
            if read_record(this.folder, "sweep.json") is None:
                write_json(join(this.folder, "sweep.json"), {"run_id": None, "decides": _decides(this)})
            parent, tags = Parent.open(this), made_by()
            if parent.tracker:  # a trial would take the Ray that it is started by for a cluster
                track = this.config.track.model_copy(update={"uri": parent.tracker.uri})
                config = this.config.model_copy(update={"track": track})
                tags[PARENT] = str(parent.run_id)
                this = replace(this, config=config)
            this = replace(this, tags=tags)
            labels = selector(this.config.ray)
            at_once = (
                settings.concurrent or room_for(train.cpus_per_worker, gpus, labels) // train.num_workers
            )
            print(f"sweep {this.config.run.name}: {settings.trials} trials, {at_once} at a time", flush=True)
            # Tune takes Ctrl-C for itself where it runs in the main thread.
            waited(begun(functools.partial(tune_trials, this, at_once, parent.stopped)), whole)
            end_check(whole)
        status = "FINISHED"
    except KeyboardInterrupt as error:
        status = "KILLED"
        logging.getLogger("ray").setLevel(logging.CRITICAL)  # Tune's thread goes on, and misses its Ray
        through = sum(bool(trial.state) for trial in this.trials())
        error.add_note(f"{this.folder}: {through} of {settings.trials} trials are through.")
        raise
    finally:
        parent.close(this, status)


@dataclass(frozen=True)
class Parent:
    """The MLflow run above those of the trials. None and None where the server is away."""

    tracker: Tracker | None
    run_id: str | None

    @classmethod
    def open(cls, this: Sweep) -> Parent:
        """The earlier one where there is one."""
        config, manifest = this.config, this.manifest
        known = read_record(this.folder, "sweep.json") or {}
        try:
            tracker = Tracker(config.track, storage_of(this.folder))
        except StoreAway as error:
            print(f"{error} The sweep goes on without it.", flush=True)
            return cls(None, None)
        run_id = tracker.open_run(
            str(config.run.name),
            config.model_dump(mode="json", include={"data", "model", "train", "sweep"}),
            {"stage": "sweep", "dataset_digest": manifest.digest, "code_version": code_version()},
            {
                "source": manifest.folder,
                "digest": manifest.digest,
                "training": config.data.train_split,
                "validation": config.data.val_split,
            },
            known.get("run_id"),
        )
        write_json(join(this.folder, "sweep.json"), {**known, "run_id": run_id})
        return cls(tracker, run_id)

    def stopped(self, folder: str, when: str) -> None:
        """ASHA ended the trial of this folder."""
        self._end_trial(folder, "FINISHED", {"stopped_by_sweep": when})

    def close(self, this: Sweep, status: str) -> None:
        """With what came out, as far as it did. What MLflow does not take now, the folders have."""
        trials = this.trials()
        for number, trial in enumerate(trials):
            if not trial.state:
                self._end_trial(this.trial_folder(number), "KILLED", {})
            elif trial.state == "stopped":  # a process that Tune ends may say FAILED last
                self._end_trial(this.trial_folder(number), "FINISHED", {})
        if self.tracker is None or self.run_id is None:
            return
        with contextlib.suppress(Exception):
            self.tracker.client.log_text(self.run_id, table(trials) + "\n", "trials.txt")
            self.tracker.log_metrics(self.run_id, {"best_ap": max(trial.ap for trial in trials)})
        self.tracker.close_run(self.run_id, status)

    def _end_trial(self, folder: str, status: str, tags: dict[str, str]) -> None:
        run_id = run_id_of(folder)
        if self.tracker is None or run_id is None:
            return
        with contextlib.suppress(Exception):  # a server that is away: the run stays RUNNING there
            for name, value in tags.items():
                self.tracker.client.set_tag(run_id, name, value)
            self.tracker.close_run(run_id, status)
