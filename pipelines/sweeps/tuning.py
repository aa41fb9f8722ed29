"""Ray Tune over the trials of a sweep: how many at a time, and which ASHA ends.

Tune keeps no state of ours: a trial that went before tells ASHA its figures again, from its own folder, and
ends there or trains on from its checkpoint.
"""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from hrnet_core.locations import open_folder
from pipelines.process.progress import Every
from pipelines.storage.files import base_name, join, write_json
from pipelines.sweeps.trials import FAILED, STOPPED, Sweep, Trial
from pipelines.tracking.metric_log import MetricLog
from pipelines.train import fit
from pipelines.training.loop import Diverged
from pipelines.training.run_folder import check_same_run, keep_error, only_one

TUNE_DEFAULTS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # figures lie in the trials' own folders
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints its settings and where it writes
}
"""Ray Tune's own settings where the environment does not say otherwise."""


def tune_trials(sweep: Sweep, at_once: int, stopped: Callable[[str, str], None]) -> None:
    """All trials that are not through, `at_once` at a time. stopped: told the folder of a trial that ASHA
    ended, and when."""
    for name, value in TUNE_DEFAULTS.items():
        os.environ.setdefault(name, value)
    settings = sweep.config.sweep
    files, place = open_folder(sweep.folder)
    tuner = tune.Tuner(
        # A trial's workers are Ray Train's own; what starts them must take no CPU from them.
        tune.with_resources(functools.partial(run_trial, sweep=sweep), {"memory": 1e6}),
        param_space={"trial": tune.grid_search(list(range(settings.trials)))},
        tune_config=tune.TuneConfig(
            metric="best_ap",
            mode="max",
            max_concurrent_trials=at_once,
            scheduler=WhoGoesOn(sweep),
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=place,
            storage_filesystem=files,
            verbose=0,
            callbacks=[Lines(sweep, stopped)],
        ),
    )
    tuner.fit()


def run_trial(point: dict[str, Any], sweep: Sweep) -> None:
    """What Ray Tune runs for each trial, in a process of its own."""
    number = point["trial"]
    config, folder = sweep.configs[number], sweep.trial_folder(number)
    for epoch, ap in [(0, -1.0), *sweep.aps(number)]:
        tune.report({"epoch": epoch, "best_ap": ap})
    if sweep.trial(number).state:
        return
    try:
        with only_one(folder):
            check_same_run(folder, config, sweep.manifest.digest)
            result, followed = fit(config, sweep.manifest, folder, sweep.tags, [TuneReportCallback()])
            if followed:
                file = join(folder, "metrics.jsonl")
                MetricLog(file, result.step, followed.tracker.uri, followed.run_id).flush(force=True)
                followed.close("FINISHED")
            result.write()
    except Diverged as error:  # of these values, to the same end each time
        write_json(join(folder, FAILED), {"why": str(error)})
    except Exception:
        keep_error(folder, traceback.format_exc())
        raise


class WhoGoesOn(ASHAScheduler):
    """ASHA, which ends no trial at its last epoch: there is no time to be saved, and what follows that report
    is a trial's too."""

    def __init__(self, sweep: Sweep) -> None:
        self.epochs = [config.train.epochs for config in sweep.configs]
        settings, most = sweep.config.sweep, max(self.epochs)
        super().__init__(
            time_attr="epoch",
            max_t=most,
            grace_period=min(settings.grace_epochs, most),
            reduction_factor=settings.reduction,
            stop_last_trials=False,
        )

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if result["epoch"] >= self.epochs[_number(trial)] else decision


class Lines(tune.Callback):
    """In the driver: says how far the trials are, and notes which ASHA ended."""

    def __init__(self, sweep: Sweep, stopped: Callable[[str, str], None]) -> None:
        self.sweep, self.stopped = sweep, stopped
        self.due = Every(30)
        self.through = {number for number, trial in enumerate(sweep.trials()) if trial.state}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **_: Any) -> None:
        if result["epoch"] and self.due():
            name = self.sweep.configs[_number(trial)].run.name
            print(f"  {name}: epoch {result['epoch']}, best AP {result['best_ap']:.3f}", flush=True)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        number = _number(trial)
        if number in self.through:
            return
        if not self.sweep.trial(number).state:
            epoch = (trial.last_result or {}).get("epoch", 0)
            folder = self.sweep.trial_folder(number)
            write_json(join(folder, STOPPED), {"epoch": epoch})
            self.stopped(folder, f"after epoch {epoch} of {self.sweep.configs[number].train.epochs}")
        self.through.add(number)
        self._say(self.sweep.trial(number))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        folder = self.sweep.trial_folder(_number(trial))
        print(f"{base_name(folder)} failed: {join(folder, 'errors.log')}", flush=True)

    def _say(self, trial: Trial) -> None:
        ap = f", best AP {trial.ap:.3f}" if trial.ap >= 0 else ""
        of = f"{len(self.through)} of {self.sweep.config.sweep.trials}"
        print(f"{trial.name} is {trial.told}{ap} ({of})", flush=True)


def _number(trial: Any) -> int:
    """Ours, of Tune's trial."""
    return int(trial.config.get("trial"))
