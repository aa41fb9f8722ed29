"""Promotion: the alias moves only for an AP that is not worse on the same data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hrnet_core.errors import CheckpointError, DataError
from pipelines.promote import promote
from pipelines.settings.config import TrackSettings
from pipelines.tracking.checkpoints import local_checkpoint
from pipelines.tracking.registry import Registry, champion_of, record_evaluation
from pipelines.tracking.store import Tracker

PROTOCOL = {"data_digest": "d" * 64, "boxes": "gt", "flip_test": True, "preset": "official"}
DETECTOR = {**PROTOCOL, "boxes": "det detections.json"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for all; each test has a registered model of its own."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def track(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TrackSettings:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return TrackSettings(registered_model=request.node.name.replace("[", "-").replace("]", ""))


def version(store: Path, track: TrackSettings, *evaluated: tuple[dict[str, Any], float]) -> str:
    """A registered version with APs as hrnet evaluate writes them; its number."""
    tracker = Tracker(track, store)
    client, name = tracker.client, track.registered_model
    if not client.search_registered_models(f"name='{name}'"):
        client.create_registered_model(name)
    number = str(client.create_model_version(name, source=str(store / "none")).version)
    for protocol, ap in evaluated:
        name_and_number = record_evaluation(number, {"AP": ap}, protocol, track=track, storage=store)
        assert name_and_number == f"{name}/{number}"
    return number


def champion(store: Path, track: TrackSettings) -> str | None:
    found = Registry(Tracker(track, store)).version(champion_of(track.registered_model))
    return None if found is None else str(found.version)


def test_the_first_evaluated_version_becomes_champion(store: Path, track: TrackSettings) -> None:
    first = version(store, track, (PROTOCOL, 0.5))
    result = promote(track=track, storage=store)
    assert (result.promoted, result.exit_code, result.previous) == (True, 0, None)
    assert champion(store, track) == first
    assert "AP 0.5000" in str(result)
    # Once more: it stays what it is.
    assert promote(first, track=track, storage=store).exit_code == 0


def test_a_champion_that_finds_nobody_is_named_so(store: Path, track: TrackSettings) -> None:
    """There is no better one to compare with; the exit code stays what scripts know."""
    version(store, track, (PROTOCOL, 0.0), (DETECTOR, 0.2))
    result = promote(track=track, storage=store)
    assert (result.promoted, result.exit_code) == (True, 0)
    assert "note: an AP of 0.0000 is that of a model that finds next to nobody" in str(result)
    version(store, track, (PROTOCOL, 0.5), (DETECTOR, 0.5))
    assert "note" not in str(promote(track=track, storage=store))
    version(store, track, (PROTOCOL, 0.01), (DETECTOR, 0.5))
    worse = promote(track=track, storage=store)
    assert not worse.promoted
    assert "note" not in str(worse)


def test_looking_for_a_version_makes_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    track, storage = TrackSettings(), tmp_path / "runs"
    with pytest.raises(DataError, match=r"no version is registered as hrnet-pose in sqlite.*--run\.storage"):
        promote(track=track, storage=storage)
    nobody = local_checkpoint(None, track, storage)
    with pytest.raises(CheckpointError, match="hrnet-pose@champion: not in the MLflow store"), nobody:
        pass
    assert record_evaluation("a" * 64, {"AP": 0.5}, PROTOCOL, track=track, storage=storage) is None
    assert not storage.exists()


def test_a_version_of_another_model_becomes_that_models_champion(store: Path, track: TrackSettings) -> None:
    first = version(store, track, (PROTOCOL, 0.5))
    name = track.registered_model
    asked = TrackSettings(registered_model="another")
    assert promote(f"models:/{name}/{first}", track=asked, storage=store).candidate == f"{name}/{first}"
    assert (champion(store, track), champion(store, asked)) == (first, None)


@pytest.mark.parametrize(("ap", "code"), [(0.6, 0), (0.5, 0), (0.4999, 3)])
def test_the_champion_changes_only_for_an_ap_that_is_not_worse(
    store: Path, track: TrackSettings, ap: float, code: int
) -> None:
    first = version(store, track, (PROTOCOL, 0.5))
    promote(first, track=track, storage=store)
    second = version(store, track, (PROTOCOL, ap))
    result = promote(second, track=track, storage=store)
    assert result.exit_code == code
    assert champion(store, track) == (second if code == 0 else first)
    (comparison,) = result.comparisons
    assert (comparison.candidate, comparison.champion) == (ap, 0.5)
    tags = Tracker(track, store).client.get_registered_model(track.registered_model).tags
    assert tags.get("previous_champion") == (first if code == 0 else None)


@pytest.mark.parametrize("field", sorted(PROTOCOL))
def test_aps_of_different_protocols_are_never_compared(store: Path, track: TrackSettings, field: str) -> None:
    first = version(store, track, (PROTOCOL, 0.5))
    promote(first, track=track, storage=store)
    version(store, track, ({**PROTOCOL, field: "other"}, 0.9))
    with pytest.raises(DataError, match="not evaluated under the same protocol"):
        promote(track=track, storage=store)
    assert champion(store, track) == first


def test_worse_under_one_of_two_common_protocols_is_worse(store: Path, track: TrackSettings) -> None:
    first = version(store, track, (PROTOCOL, 0.5), (DETECTOR, 0.45))
    promote(first, track=track, storage=store)
    version(store, track, (PROTOCOL, 0.6), (DETECTOR, 0.44), ({**PROTOCOL, "preset": "mmpose"}, 0.1))
    result = promote(track=track, storage=store)
    assert result.exit_code == 3
    assert len(result.comparisons) == 2
    assert f"{track.registered_model}/1 stays champion" in str(result)


def test_a_version_without_an_ap_or_none_at_all_is_refused(store: Path, track: TrackSettings) -> None:
    with pytest.raises(DataError, match="no version is registered"):
        promote(track=track, storage=store)
    version(store, track)
    with pytest.raises(DataError, match=r"has no AP.*hrnet evaluate"):
        promote(track=track, storage=store)
    assert champion(store, track) is None


def test_the_latest_evaluation_of_a_protocol_counts(store: Path, track: TrackSettings) -> None:
    first = version(store, track, (PROTOCOL, 0.5), (PROTOCOL, 0.7))
    promote(first, track=track, storage=store)
    second = version(store, track, (PROTOCOL, 0.6))
    assert promote(second, track=track, storage=store).exit_code == 3
    tag = next(
        json.loads(value)
        for key, value in Registry(Tracker(track, store)).version(first).tags.items()  # type: ignore[union-attr]
        if key.startswith("evaluation.")
    )
    assert tag["stats"]["AP"] == 0.7
