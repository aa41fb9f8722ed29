"""The trials of a sweep as their folders tell: what each is, how far it came, which is the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipelines.settings.config import RunConfig
from pipelines.shards.manifest import Manifest
from pipelines.storage.files import join
from pipelines.sweeps.space import trial_config, trial_values
from pipelines.tracking.metric_log import read_rows
from pipelines.training.run_folder import read_record, run_folder

STOPPED, FAILED = "stopped.json", "failed.json"
"""In the folder of a trial that ASHA ended, {"epoch"}, and of one whose loss did not stay finite, {"why"}."""


@dataclass(frozen=True)
class Trial:
    """One point of the space, and what came of it so far."""

    name: str
    """Of its run."""
    values: dict[str, Any]
    state: str
    """"through", "stopped", "failed", or "" for one that is to be trained on."""
    why: str
    epoch: int
    """The last that was validated."""
    ap: float
    """Best val_gt/AP; -1 before the first."""

    @property
    def told(self) -> str:
        return f"{self.state} {self.why}".strip() or "not through"


@dataclass(frozen=True)
class Sweep:
    """What a sweep is, as it is sent to its trials."""

    config: RunConfig
    manifest: Manifest
    folder: str
    """STORAGE/NAME, path or URI: sweep.json, best.yaml, and Tune's ray/."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """In MLflow, of the trials' runs: the run above them, and what the sweep's own process is, which makes
    them in others."""

    @cached_property
    def configs(self) -> list[RunConfig]:
        """Of the trials: NAME-00, NAME-01, ..."""
        return [
            trial_config(self.config, number, f"{self.config.run.name}-{number:02d}")
            for number in range(self.config.sweep.trials)
        ]

    def trial_folder(self, number: int) -> str:
        return run_folder(self.configs[number], self.manifest.digest)

    def aps(self, number: int) -> list[tuple[int, float]]:
        """(epoch, best AP until then) of each validation in a trial's metrics."""
        people = sum(self.manifest.row_groups(self.config.data.train_split).values())
        steps = -(-people // self.configs[number].train.batch_size)
        found: list[tuple[int, float]] = []
        for row in read_rows(join(self.trial_folder(number), "metrics.jsonl")):
            if "val_gt/AP" in row:
                found.append((row["step"] // steps, max(row["val_gt/AP"], found[-1][1] if found else -1.0)))
        return found

    def trial(self, number: int) -> Trial:
        folder, config = self.trial_folder(number), self.configs[number]
        epoch, ap = (self.aps(number) or [(0, -1.0)])[-1]
        state, why = "", ""
        if read_record(folder, "result.json"):
            state = "through"
        elif stopped := read_record(folder, STOPPED):
            state, why = "stopped", f"after epoch {stopped['epoch']}"
        elif failed := read_record(folder, FAILED):
            state, why = "failed", failed["why"]
        values = trial_values(config.sweep.space, config.sweep.seed, number)
        return Trial(str(config.run.name), values, state, why, epoch, ap)

    def trials(self) -> list[Trial]:
        return [self.trial(number) for number in range(self.config.sweep.trials)]


def table(trials: Sequence[Trial]) -> str:
    """A line a trial, best AP first."""
    rows = [["trial", *trials[0].values, "epochs", "best AP", ""]]
    for trial in sorted(trials, key=lambda trial: -trial.ap):
        ap = f"{trial.ap:.3f}" if trial.ap >= 0 else "-"
        rows.append([trial.name, *map(str, trial.values.values()), str(trial.epoch), ap, trial.told])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
