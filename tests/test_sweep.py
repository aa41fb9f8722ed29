"""Sweeps: the space, the table, going on, and (slow) real trials under ASHA."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from test_feed import dotted_shards
from test_train import small_config

from hrnet_core.errors import CheckpointError, ConfigError, Failure
from pipelines import sweep as verb
from pipelines.settings.config import RunConfig
from pipelines.settings.config_file import load_config
from pipelines.shards.manifest import Manifest
from pipelines.storage.files import write_json
from pipelines.sweep import Parent, sweep
from pipelines.sweeps.space import trial_config, trial_values
from pipelines.sweeps.trials import FAILED, STOPPED, Sweep, table
from pipelines.tracking.store import Tracker, quiet_mlflow
from pipelines.training.followed import follow_run
from pipelines.training.run_folder import TrainResult, write_run
from pipelines.training.state import Job

SPACE = {"train.lr": {"loguniform": ["1e-4", 0.01]}, "train.loss": {"choice": ["official", "linear"]}}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return dotted_shards(tmp_path_factory.mktemp("shards"), {"train2017": 37, "val2017": 12})


def sweep_config(manifest: Manifest, storage: Path, space: Any = SPACE, **settings: Any) -> RunConfig:
    config = small_config(manifest, storage, epochs=4)
    fields = config.model_dump() | {"sweep": {"space": space, "trials": 3, **settings}}
    return RunConfig(**fields)


# --- the space ----------------------------------------------------------------------------------------


def test_values_are_a_function_of_seed_and_number() -> None:
    drawn = [trial_values(SPACE, 0, number) for number in range(200)]
    assert drawn == [trial_values(SPACE, 0, number) for number in range(200)]
    assert drawn[:5] != [trial_values(SPACE, 1, number) for number in range(5)]
    rates = np.array([values["train.lr"] for values in drawn])
    assert 1e-4 <= rates.min() < 1.5e-4
    assert 0.007 < rates.max() <= 0.01
    assert np.median(rates) == pytest.approx(1e-3, rel=0.4), "as many below as above the geometric mean"
    assert {values["train.loss"] for values in drawn} == {"official", "linear"}
    whole = [trial_values({"train.ohkm": {"randint": [0, 3]}}, 0, n)["train.ohkm"] for n in range(100)]
    assert set(whole) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({}, r"sweep\.space is empty.*loguniform"),
        ({"data.sigma": {"uniform": [1, 2]}}, r"data\.sigma cannot vary"),
        ({"train.num_workers": {"choice": [1, 2]}}, r"train\.num_workers cannot vary.*who trains"),
        ({"train.lr": {"normal": [1, 2]}}, r"train\.lr is .*normal.*one of uniform"),
        ({"train.lr": {"loguniform": [0, 1]}}, r"train\.lr: loguniform \[0, 1\]: two numbers above 0"),
        ({"train.lr": {"uniform": [2, 1]}}, "the smaller first"),
        ({"train.lr": {"uniform": ["a", 1]}}, "two numbers"),
        ({"train.rate": {"uniform": [1, 2]}}, r"trial 0 .*unknown key 'train\.rate'"),
        (
            {"train.batch_size": {"choice": [12]}},
            r"trial 0 \(train\.batch_size 12\).*multiple of train\.lanes",
        ),
        ({"train.loss": {"choice": ["hinge"]}}, r"train\.loss.*hinge"),
    ],
)
def test_what_is_wrong_with_a_space_is_told_before_anything_starts(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: Any, told: str
) -> None:
    monkeypatch.setattr(verb, "ray_session", None)  # would fail if it were called
    with pytest.raises(ConfigError, match=told):
        sweep(sweep_config(manifest, tmp_path, space))
    assert not (tmp_path / "r").exists()


def test_a_space_stands_in_the_config_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("sweep: {trials: 2, space: {train.lr: {loguniform: [1e-4, 1.0e-2]}}}")
    config = load_config(str(file))
    assert 1e-4 <= trial_config(config, 1, "s-01").train.lr <= 1e-2
    assert config.decides() == RunConfig().decides()  # a sweep's section changes no run


# --- what came out ------------------------------------------------------------------------------------


def with_outcomes(this: Sweep) -> None:
    """Trial 0 through, 1 stopped by ASHA after epoch 2, 2 failed."""
    for number, aps in enumerate([[0.1, 0.3, 0.2, 0.25], [0.05, 0.1]]):
        rows = [{"step": 3 * epoch, "val_gt/AP": ap} for epoch, ap in enumerate(aps, start=1)]
        folder = Path(this.trial_folder(number))
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = dict.fromkeys(TrainResult.__dataclass_fields__)
    write_json(Path(this.trial_folder(0)) / "result.json", fields)
    write_json(Path(this.trial_folder(1)) / STOPPED, {"epoch": 2})
    write_json(Path(this.trial_folder(2)) / FAILED, {"why": "the loss is not finite"})


def test_trials_that_are_through_are_a_table_and_a_config_to_train_with(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "ray_session", None)
    config = sweep_config(manifest, tmp_path)
    this = Sweep(config, manifest, str(tmp_path / "r"))
    with_outcomes(this)
    told = sweep(config)
    lines = [line.split() for line in told.splitlines()]
    values = [trial_values(SPACE, 0, number) for number in range(3)]
    named = [[f"r-{n:02d}", str(v["train.loss"]), str(v["train.lr"])] for n, v in enumerate(values)]
    assert lines[0] == ["trial", "train.loss", "train.lr", "epochs", "best", "AP"]
    assert lines[1] == [*named[0], "4", "0.300", "through"]
    assert lines[2] == [*named[1], "2", "0.100", *["stopped", "after", "epoch", "2"]]
    assert lines[3] == [*named[2], "0", "-", *["failed", "the", "loss", "is", "not", "finite"]]
    assert lines[4][:4] == ["best:", "r-00,", "AP", "0.300."]
    best = load_config(str(tmp_path / "r" / "best.yaml"))
    assert best.train == this.configs[0].train
    assert (best.run.name, best.sweep) == (None, RunConfig().sweep)
    assert yaml.safe_load((tmp_path / "r" / "best.yaml").read_text())["train"]["lr"] == values[0]["train.lr"]


def test_a_run_that_is_called_as_a_trial_is_not_taken_for_it(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished or not: neither its AP nor its run in MLflow is the trial's."""
    monkeypatch.setattr(verb, "_run", None)  # would fail if it were called
    other = small_config(manifest, tmp_path, lr=0.5)
    write_run(str(tmp_path / "r-01"), other, manifest.digest, "0" * 32)
    with pytest.raises(ConfigError, match=r"r-01: this run was started with other settings: .*train\.lr"):
        sweep(sweep_config(manifest, tmp_path))


def test_a_sweep_that_is_refused_has_not_begun(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sweep] = []
    monkeypatch.setattr(verb, "_run", lambda this, whole: asked.append(this))
    config = sweep_config(manifest, tmp_path)
    gone = config.model_copy(update={"model": config.model.model_copy(update={"init": "gone.pth"})})
    with pytest.raises(CheckpointError, match=r"gone\.pth"):
        sweep(gone)
    with pytest.raises(Failure, match="no trial came to an AP"):  # as none was run
        sweep(config)
    assert len(asked) == 1


def test_trials_say_which_job_made_them_and_a_refused_sweep_leaves_nothing(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their runs are opened by other processes than the job's driver."""
    from pipelines.sweeps import tuning

    def no_room(*_: Any) -> None:
        raise ConfigError("no room")

    asked: list[Sweep] = []
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "sweep-7"}}')
    monkeypatch.setattr(verb, "ray_session", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(verb, "refuse_unshared_run", lambda *_: None)
    monkeypatch.setattr(tuning, "tune_trials", lambda this, *_: asked.append(this))
    config = sweep_config(manifest, tmp_path / "runs", concurrent=1)
    monkeypatch.setattr(verb, "require", no_room)
    with pytest.raises(ConfigError, match="no room"):
        sweep(config)
    assert not (tmp_path / "runs").exists()

    monkeypatch.setattr(verb, "require", lambda *_: None)
    with pytest.raises(Failure, match="no trial came to an AP"):
        sweep(config)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    this = asked[0]
    followed = follow_run(this.configs[0], manifest, this.trial_folder(0), this.tags)
    assert followed is not None
    tags = followed.tracker.client.get_run(followed.run_id).data.tags
    above = json.loads((tmp_path / "runs" / "r" / "sweep.json").read_text())["run_id"]
    assert (tags["ray_job"], tags["mlflow.parentRunId"]) == ("sweep-7", above)
    assert followed.tracker.client.get_run(above).data.tags["ray_job"] == "sweep-7"


def test_asha_ends_no_trial_at_its_last_epoch(manifest: Manifest, tmp_path: Path) -> None:
    """Nor any where all are shorter than the grace."""
    from pipelines.sweeps.tuning import WhoGoesOn

    def decisions(epoch: int, **settings: Any) -> list[str]:
        this = Sweep(sweep_config(manifest, tmp_path, **settings), manifest, str(tmp_path / "r"))
        asha = WhoGoesOn(this)
        asha.set_search_properties("best_ap", "max")
        trials = [SimpleNamespace(trial_id=str(n), config={"trial": n}) for n in range(2)]
        for trial in trials:
            asha.on_trial_add(None, trial)
        aps = ({"epoch": epoch, "best_ap": 0.3 - 0.1 * n} for n in range(2))
        return [asha.on_trial_result(None, trial, told) for trial, told in zip(trials, aps, strict=True)]

    assert decisions(2, grace_epochs=2) == ["CONTINUE", "STOP"]
    assert decisions(4, grace_epochs=2, reduction=2) == ["CONTINUE", "CONTINUE"]
    assert decisions(4, grace_epochs=9) == ["CONTINUE", "CONTINUE"]


def test_trials_find_weights_by_relative_paths(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stand in folders of their own."""
    asked: list[Sweep] = []
    monkeypatch.setattr(verb, "_run", lambda this, whole: asked.append(this))
    monkeypatch.setattr(verb, "check_start", lambda *_: None)
    config = sweep_config(manifest, tmp_path, {"model.init": {"choice": ["some.pth"]}})
    config = config.model_copy(update={"train": config.train.model_copy(update={"teacher": "heavier"})})
    with pytest.raises(Failure):
        sweep(config)
    for trial in asked[0].configs:
        assert (trial.model.init, trial.train.teacher) == (
            str(Path("some.pth").absolute()), str(Path("heavier").absolute())
        )  # fmt: skip


def test_another_sweep_of_that_name_is_refused_and_more_trials_are_not(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sweep] = []
    monkeypatch.setattr(verb, "_run", lambda this, whole: asked.append(this))
    config = sweep_config(manifest, tmp_path)
    this = Sweep(config, manifest, str(tmp_path / "r"))
    with_outcomes(this)
    write_json(tmp_path / "r" / "sweep.json", {"run_id": None, "decides": verb._decides(this)})
    sweep(config)
    assert not asked, "nothing was left to do"
    with pytest.raises(Failure, match=r"2 trials ended with an error, .* the same command goes on"):
        sweep(sweep_config(manifest, tmp_path, trials=5))
    assert [trial.state for trial in asked[0].trials()] == ["through", "stopped", "failed", "", ""]
    with pytest.raises(ConfigError, match=r"sweep was .*'seed': 0.* now .*'seed': 1"):
        sweep(sweep_config(manifest, tmp_path, seed=1))
    with pytest.raises(Failure, match="no trial came to an AP"):
        sweep(sweep_config(manifest, tmp_path / "other"))


# --- on Ray -------------------------------------------------------------------------------------------


def worker_of_known_ap(job: Job) -> Any:
    """The real worker, but an epoch's AP is ten times the rate, and from the second on it takes a while."""
    from pipelines.training import epoch_ap, loop

    original, rate = epoch_ap.ValSplit.score, job.config.train.lr

    def score(self: Any, *what: Any) -> Any:
        stats, results = original(self, *what)
        time.sleep(0 if score.calls == 0 else 4)
        score.calls += 1
        return {**stats, "AP": 10 * rate}, results

    score.calls = 0  # type: ignore[attr-defined]
    epoch_ap.ValSplit.score = score
    return loop.train_worker(job)


def trial_of_known_aps(point: dict[str, Any], sweep: Sweep) -> None:
    """The real trial with those workers, in Tune's process."""
    from pipelines.sweeps import tuning
    from pipelines.training import loop

    loop.train_worker = worker_of_known_ap
    tuning.run_trial(point, sweep)


def known_sweep(manifest: Manifest, storage: Path) -> RunConfig:
    """Three trials whose rates, and so their APs, are middle, low, high; each takes both CPUs."""
    space = {"train.lr": {"loguniform": [1e-3, 1e-2]}}

    def rates(seed: int) -> list[float]:
        return [float(trial_values(space, seed, number)["train.lr"]) for number in range(3)]

    def is_middle_low_high(found: list[float]) -> bool:
        low, middle, high = sorted(found)
        return found == [middle, low, high] and low < 0.7 * middle < 0.5 * high

    seed = next(seed for seed in range(99) if is_middle_low_high(rates(seed)))
    config = sweep_config(manifest, storage, space, seed=seed, reduction=2, concurrent=1)
    train = config.train.model_copy(update={"num_workers": 2})
    return config.model_copy(update={"train": train, "ray": config.ray.model_copy(update={"num_cpus": 2})})


def sweep_of_known_aps(shards: str, storage: str) -> None:
    """In a process of its own, on the Ray that the sweep starts."""
    from pipelines.sweeps import tuning

    tuning.run_trial = trial_of_known_aps
    print(sweep(known_sweep(Manifest.load(shards), Path(storage))))


def test_a_stopped_trial_whose_process_says_failed_last_is_finished(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    this = Sweep(known_sweep(manifest, tmp_path), manifest, str(tmp_path / "r"))
    tracker = Tracker(this.config.track, tmp_path)
    above, trial = (tracker.new_run(name, {}) for name in ("r", "r-01"))
    folder = Path(this.trial_folder(1))
    write_json(str(folder / "run.json"), {"run_id": trial, "decides": {}})
    write_json(str(folder / STOPPED), {"epoch": 1})
    tracker.close_run(trial, "FAILED")
    Parent(tracker, above).close(this, "FINISHED")
    assert [tracker.client.get_run(run).info.status for run in (above, trial)] == ["FINISHED"] * 2


@pytest.mark.slow
def test_asha_stops_the_worse_trial_and_the_same_command_goes_on(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third trial starts only when the workers of the second, which was stopped, are gone. Then the first
    has lost its result, and goes on alone."""
    from mlflow import MlflowClient

    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, __file__, manifest.folder, str(tmp_path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900).stdout
    config = known_sweep(manifest, tmp_path)
    this = Sweep(config, manifest, str(tmp_path / "r"))
    trials = this.trials()
    assert [trial.told for trial in trials] == ["through", "stopped after epoch 1", "through"]
    assert [trial.ap for trial in trials] == [10 * trial.values["train.lr"] for trial in trials]
    assert table(trials) in said
    assert "best: r-02" in said

    parent = json.loads((tmp_path / "r" / "sweep.json").read_text())["run_id"]
    with quiet_mlflow():
        client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_run(parent).info.experiment_id])
    below = {r.info.run_name: r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent}
    assert sorted(below) == ["r-00", "r-01", "r-02"]
    assert {run.info.status for run in below.values()} == {"FINISHED"}
    assert below["r-01"].data.tags["stopped_by_sweep"] == "after epoch 1 of 4"
    assert client.get_run(parent).data.metrics["best_ap"] == trials[2].ap

    weights = Path(this.trial_folder(2)) / "best" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    Path(this.trial_folder(0), "result.json").unlink()
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    assert this.trials() == trials
    assert weights.stat().st_mtime_ns == written


if __name__ == "__main__":
    sweep_of_known_aps(*sys.argv[1:])
