"""The space of a sweep: which settings vary, and the values of each trial."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from hrnet_core.errors import ConfigError
from pipelines.settings.config import RunConfig
from pipelines.settings.config_file import explain
from pipelines.settings.train import WORKERS
from pipelines.training.run_folder import with_whole_weights

KINDS = ("uniform", "loguniform", "randint", "choice")
EXAMPLE = "for example  sweep: {space: {train.lr: {loguniform: [1.0e-4, 1.0e-2]}}}"
Space = Mapping[str, Mapping[str, Any]]


def trial_config(config: RunConfig, number: int, name: str) -> RunConfig:
    """Trial `number` of a sweep as the config of a run of that name. ConfigError: the space is not
    understood, or the values contradict other settings."""
    values = trial_values(config.sweep.space, config.sweep.seed, number)
    fields = config.model_dump()
    for setting, value in values.items():
        section, _, key = setting.partition(".")
        fields[section][key] = value
    fields["run"] |= {"name": name, "fresh": False}
    try:
        return with_whole_weights(RunConfig(**fields))
    except ValidationError as error:
        told = ", ".join(f"{setting} {value}" for setting, value in values.items())
        raise ConfigError(explain(error, f"sweep.space, trial {number} ({told})")) from None


def trial_values(space: Space, seed: int, number: int) -> dict[str, Any]:
    """{"train.lr": 0.0012}: a function of seed and number alone, so more trials can be added later."""
    if not space:
        raise ConfigError(f"sweep.space is empty: name the settings that vary in the config file, {EXAMPLE}.")
    rng = np.random.default_rng([seed, number])
    return {setting: _draw(rng, setting, how) for setting, how in sorted(space.items())}


def _draw(rng: np.random.Generator, setting: str, how: Mapping[str, Any]) -> Any:
    if setting.partition(".")[0] not in ("train", "model"):
        raise ConfigError(
            f"sweep.space: {setting} cannot vary: settings of train and model can (the shards are made with "
            f"those of data)."
        )
    if setting.partition(".")[2] in WORKERS:
        raise ConfigError(
            f"sweep.space: {setting} cannot vary: it says who trains, not what is learnt. Give it to all "
            f"trials, outside of the space."
        )
    kind, values = next(iter(how.items())) if len(how) == 1 else ("", None)
    if kind not in KINDS or not isinstance(values, list) or not values:
        raise ConfigError(
            f"sweep.space: {setting} is {dict(how)}: one of {', '.join(KINDS)} with a list, {EXAMPLE}."
        )
    if kind == "choice":
        return values[rng.integers(len(values))]
    numbers = [_number(value) for value in values]
    if len(numbers) != 2 or not numbers[0] < numbers[1] or (kind == "loguniform" and numbers[0] <= 0):
        above = " above 0" if kind == "loguniform" else ""
        raise ConfigError(f"sweep.space: {setting}: {kind} {values}: two numbers{above}, the smaller first.")
    low, high = numbers
    if kind == "randint":
        return int(rng.integers(int(low), int(high), endpoint=True))
    if kind == "uniform":
        drawn = rng.uniform(low, high)
    else:
        drawn = math.exp(rng.uniform(math.log(low), math.log(high)))
    return min(high, max(low, float(f"{drawn:.4g}")))  # short enough to be read and typed


def _number(value: Any) -> float:
    """NaN for what is none. YAML takes 1e-4 for a text: it wants 1.0e-4."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
