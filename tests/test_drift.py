"""Drift of keypoint scores: the index, and the way from evaluate through deploy to the replica's gauge."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from dots import fitted_network, rows_here, write_coco
from test_evaluate import CODEC, SPEC
from test_serve import Direct, call, form

from hrnet_core.checkpoint import save_checkpoint
from hrnet_core.errors import CheckpointError
from hrnet_core.images import encode_png
from hrnet_core.score_drift import LITTLE, MUCH, SCORE_BOUNDS, score_counts, stability_index
from pipelines.deploy import serve_args
from pipelines.evaluate import evaluate
from pipelines.serving.expected import expected_scores
from pipelines.settings.config import EvaluateSettings, RunSettings, ServeSettings, TrackSettings
from pipelines.tracking.checkpoints import LocalCheckpoint, evaluation_folder, local_checkpoint
from serve.model import load_model
from serve.routes import make_app
from serve.service import PoseService
from serve.settings import LiveSettings, ModelChoice, ServeArgs

ROOT = Path(__file__).parents[1]


def test_the_index_is_the_textbooks() -> None:
    """Shares of .5 and .5 that become .75 and .25: (.25 ln 1.5) + (-.25 ln .5), of so many that half a score
    more or less does not show."""
    expected, found = np.zeros(12, np.int64), np.zeros(12, np.int64)
    expected[[2, 7]] = 10**9
    found[[2, 7]] = (15 * 10**8, 5 * 10**8)
    by_hand = 0.25 * np.log(1.5) - 0.25 * np.log(0.5)
    assert stability_index(expected, found) == pytest.approx(by_hand, abs=1e-6)
    assert stability_index(expected, 3 * expected) == pytest.approx(0, abs=1e-6)
    assert stability_index(expected, found) == pytest.approx(stability_index(found, expected), abs=1e-12)
    with pytest.raises(ValueError, match="12 counts"):
        stability_index([1, 2, 3], found)


def test_chance_alone_stays_far_below_the_thresholds() -> None:
    """Its mean is (buckets - 1)(1/n + 1/m) for independent scores."""
    rng = np.random.default_rng(0)
    draws = [score_counts(rng.uniform(0, 1.1, 5000).astype(np.float32)) for _ in range(200)]
    indices = [stability_index(one, other) for one, other in zip(draws[::2], draws[1::2], strict=True)]
    assert np.mean(indices) == pytest.approx(11 * 2 / 5000, rel=0.15)
    assert max(indices) < LITTLE / 5


def test_scores_are_counted_as_prometheus_counts_them() -> None:
    scores = np.array([[-0.2, 0.05, 0.051], [0.95, 1.0, 1.7]], np.float32)
    counts = score_counts(scores)
    assert counts.tolist() == [2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 1]
    assert len(counts) == len(SCORE_BOUNDS) + 1


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A network that finds the people of a COCO root, and what hrnet evaluate leaves beside it."""
    folder = tmp_path_factory.mktemp("drift")
    root = write_coco(folder / "coco")
    save_checkpoint(folder / "best", fitted_network(root, CODEC), SPEC)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pipelines.poses.units.rows_on_ray", rows_here)
        out = evaluation_folder(str(folder / "best"), "gt", "runs")
        found = evaluate(folder / "best", root, out=out, settings=EvaluateSettings(batch_size=4))
    return {"folder": folder, "root": root, "checkpoint": folder / "best", "figures": found.figures}


def args_of(evaluated: dict[str, Any], **settings: Any) -> ServeArgs:
    run, track = RunSettings(storage=str(evaluated["folder"] / "runs")), TrackSettings()
    with local_checkpoint(str(evaluated["checkpoint"]), track, run.storage) as found:
        return serve_args(found, ServeSettings(**settings), run, track)[0]


def test_deploy_hands_on_what_evaluate_has_counted(evaluated: dict[str, Any]) -> None:
    counted = evaluated["figures"]["keypoint_scores"]
    assert counted["up_to"] == list(SCORE_BOUNDS)
    assert sum(counted["counts"]) == 17 * evaluated["figures"]["people"]
    assert list(args_of(evaluated).expected_scores) == counted["counts"]
    # The flip test lowers scores: those of the other kind are no measure.
    assert args_of(evaluated, flip_test=False).expected_scores == ()


def test_an_evaluation_of_other_weights_or_buckets_is_no_measure(
    evaluated: dict[str, Any], tmp_path: Path
) -> None:
    file = evaluated["folder"] / "evaluation_gt" / "evaluation.json"
    written = json.loads(file.read_text())
    place = tmp_path / "evaluation_gt" / "evaluation.json"
    place.parent.mkdir()

    def expected(**changes: Any) -> tuple[int, ...]:
        place.write_text(json.dumps({**written, **changes}))
        found = LocalCheckpoint(str(tmp_path / "best"), tmp_path / "best")
        return expected_scores(found, written["weights_sha256"], True, str(tmp_path))

    assert list(expected()) == written["figures"]["keypoint_scores"]["counts"]
    assert expected(weights_sha256="0" * 64) == ()
    assert expected(figures={}) == ()
    assert expected(figures={"keypoint_scores": {"up_to": [1], "counts": [3, 4]}}) == ()
    place.write_text("{")
    assert (
        expected_scores(
            LocalCheckpoint(str(tmp_path / "best"), tmp_path), written["weights_sha256"], True, "runs"
        )
        == ()
    )


def test_of_a_version_the_registry_says_it_people_before_a_detectors_boxes() -> None:
    def evaluation(boxes: str, flip_test: bool, count: int) -> dict[str, Any]:
        counts = [count, *[0] * len(SCORE_BOUNDS)]
        scores = {"up_to": list(SCORE_BOUNDS), "counts": counts}
        return {"protocol": {"boxes": boxes, "flip_test": flip_test}, "keypoint_scores": scores}

    known = (
        evaluation("det boxes.json", True, 9000),
        evaluation("gt", False, 8000),
        evaluation("gt", True, 100),
        evaluation("gt", True, 200),
        {"protocol": {"boxes": "gt", "flip_test": True}},  # of an earlier version of this program
    )
    found = LocalCheckpoint("models:/mine/3", Path("nowhere"), "mine/3", True, known)
    assert expected_scores(found, "a", True, "runs")[0] == 200
    assert expected_scores(found, "a", False, "runs")[0] == 8000


class Shown:
    """A gauge that keeps what it was set to, by its labels."""

    def __init__(self, name: str, _: str, labels: tuple[str, ...] = ()) -> None:
        self.labels, self.values = labels, dict[tuple[str, ...], float]()

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.values[tuple((tags or {})[label] for label in self.labels)] = value


def ask(service: PoseService, evaluated: dict[str, Any], change: Any) -> None:
    """The people that were evaluated, each picture once, as a client would ask about them."""
    truth = json.loads((evaluated["root"] / "annotations" / "person_keypoints_val2017.json").read_text())
    for image in truth["images"]:
        picture = cv2.imread(str(evaluated["root"] / "val2017" / image["file_name"]))[..., ::-1]
        boxes = [a["bbox"] for a in truth["annotations"] if a["image_id"] == image["id"]]
        answer = call(service, "POST", "/v1/poses", **form(encode_png(change(picture)), boxes=boxes))
        assert answer.status_code == 200, answer.text


def test_the_same_pictures_show_none_and_noisy_ones_show_much(
    evaluated: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.drift.Gauge", Shown)
    monkeypatch.setattr("serve.drift.LEAST", 17 * evaluated["figures"]["people"])
    args, noise = args_of(evaluated), np.random.default_rng(0)
    choice = args.choice()
    service = Direct(args.model_copy(update={"hosts": ("*",)}), make_app)
    asyncio.run(service.reconfigure(args.model_dump(include=set(LiveSettings.model_fields))))
    ask(service, evaluated, lambda picture: picture)
    service.metrics.show(service.room, at_once=True)
    assert service.metrics.drift._gauge.values[(choice.version,)] < LITTLE / 10, "as Serve starts it"

    def measured(change: Any) -> float | None:
        service.metrics.drift.watch(choice.model_copy(update={"version": "other"}))
        service.metrics.drift.watch(choice)
        gauge = service.metrics.drift._gauge
        gauge.values.clear()
        ask(service, evaluated, change)
        service.metrics.show(service.room, at_once=True)
        return gauge.values.get((choice.version,))

    same = measured(lambda picture: picture)
    assert same is not None
    assert same < LITTLE / 10
    noisy = measured(lambda p: np.clip(p + noise.normal(0, 80, p.shape), 0, 255).astype(np.uint8))
    assert noisy is not None
    assert noisy > MUCH
    blurred = measured(lambda p: cv2.GaussianBlur(np.ascontiguousarray(p), (0, 0), 4))
    assert blurred is not None
    assert blurred > LITTLE
    (model,) = call(service, "GET", "/v1/models").json()["models"]
    assert model["expected_scores"] == list(choice.expected_scores)


def test_the_gauge_is_of_the_version_that_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from serve import drift as module

    monkeypatch.setattr(module, "Gauge", Shown)
    drift, counts = module.Drift(), (0, 0, 0, 0, 0, 5000, 5000, 0, 0, 0, 0, 0)
    one = ModelChoice(checkpoint="a", version="1", expected_scores=counts)
    two = one.model_copy(update={"version": "2"})
    halves = np.tile(np.array([0.45, 0.55], np.float32), module.LEAST // 4)
    drift.watch(one)
    drift.found(halves, "1")
    drift.show()
    assert drift._gauge.values == {}, "too few"
    drift.found(halves, "1")
    drift.found(np.full(10**5, 0.01, np.float32), "2")  # an answer of another model
    drift.show()
    assert drift._gauge.values[("1",)] < 0.05
    drift.watch(two)
    drift.show()
    assert drift._gauge.values == {("1",): 0}, "nobody watches it any more"
    low = np.full(module.BLOCK, 0.01, np.float32)
    for _ in range(module.BLOCKS):
        drift.found(low, "2")
    drift.show()
    assert drift._gauge.values[("2",)] > 1
    for _ in range(module.BLOCKS):  # what is over is forgotten
        drift.found(halves[: module.BLOCK], "2")
    drift.show()
    assert drift._gauge.values[("2",)] < 0.05
    drift.watch(ModelChoice(checkpoint="a", version="3"))
    drift.found(low.repeat(20), "3")
    drift.show()
    assert set(drift._gauge.values) == {("1",), ("2",)}, "no evaluation, no gauge"


def test_counts_of_other_buckets_are_refused(evaluated: dict[str, Any]) -> None:
    args = args_of(evaluated)
    with pytest.raises(CheckpointError, match="expected_scores: 3 counts"):
        load_model(args.choice().model_copy(update={"expected_scores": (1, 2, 3)}), args)


def test_the_alert_has_the_threshold_of_the_index() -> None:
    groups = yaml.safe_load((ROOT / "infra/watch/alerts.yaml").read_text())["groups"]
    (rule,) = [r for group in groups for r in group["rules"] if r["alert"] == "ScoresHaveDrifted"]
    assert rule["expr"].endswith(f"> {MUCH}")
