"""A run that ends before its last epoch, as its AP does not rise any more."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_feed import dotted_shards
from test_train import losses, one_worker, small_config

from pipelines.settings.train import TrainSettings
from pipelines.shards.manifest import Manifest
from pipelines.training.loop import stop_early, train_epochs
from pipelines.training.state import Standing, Training

APS = [0.30, 0.40, 0.405, 0.408, 0.409, 0.50]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return dotted_shards(tmp_path_factory.mktemp("shards"), {"train2017": 37, "val2017": 12})


def with_aps(run: Training) -> Training:
    """The run, whose validation of epoch n gives the n-th AP."""
    score = run.val.score

    def scored(*what: Any) -> Any:
        stats, results = score(*what)
        return {**stats, "AP": APS[run.standing.epoch - 1]}, results

    run.val.score = scored  # type: ignore[method-assign]
    return run


def pretended(**settings: Any) -> Training:
    """What stop_early looks at, of one worker (two: test_train.py, end to end)."""
    how = SimpleNamespace(train=TrainSettings(**settings))
    device = torch.device("cpu")
    run: Any = SimpleNamespace(standing=Standing(), config=how, rank=0, world=1, device=device)
    return run


@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        ({}, None),
        ({"early_stop": 1}, 7),
        ({"early_stop": 2, "early_stop_min_delta": 0.01}, 4),  # .405 and .408 are near .40
        ({"early_stop": 2, "early_stop_min_delta": 0.0079}, None),  # small steps add up: .408 is above .40
        ({"early_stop": 2, "early_stop_min_delta": 0.2}, 3),
    ],
)
def test_a_run_stops_where_its_ap_rises_no_more(settings: dict[str, Any], stops: int | None) -> None:
    run, stopped = pretended(**settings), []
    for ap in [*APS, 0.409]:
        stop_early(run, ap)
        stopped.append(run.standing.stopped_early)
    assert stopped.index(True) + 1 == stops if stops else not any(stopped)


def test_a_run_that_goes_on_stops_where_it_would_have(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After epoch 3, whose AP was the first that did not count; and after the end, where nothing is left."""
    config = small_config(manifest, tmp_path, epochs=6, early_stop=2, early_stop_min_delta=0.01)
    run, reports = one_worker(config, tmp_path / "r")
    train_epochs(with_aps(run))
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == (
        "stopped early: in 2 validations AP has not risen by more than 0.01 above 0.400 (train.early_stop)"
    )
    assert [" left" in line for line in said[-3:-1]] == [True, False], "after the end no time is left"
    assert run.standing.best_ap == 0.408
    assert (tmp_path / "r" / "pictures" / "people-epoch-0004.png").exists()
    again, _ = one_worker(config, tmp_path / "again", Path(reports[2]["folder"]))
    train_epochs(with_aps(again))
    assert again.standing.epoch == run.standing.epoch == 4
    assert losses(again) == {step: loss for step, loss in losses(run).items() if step > 9}
    ended, more = one_worker(config, tmp_path / "ended", Path(reports[3]["folder"]))
    train_epochs(ended)
    assert (ended.standing.epoch, more) == (4, [])
