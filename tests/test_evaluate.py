"""Evaluate: units, the published protocol, Ray actors that agree to the byte, and what bad input gets."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dots import SMALL, cut_short, fitted_network, rows_here, truth_of, write_coco, write_detections
from PIL import Image
from published_protocol import published_stats
from test_tracking import answering

from hrnet_core.architecture import HRNetConfig
from hrnet_core.checkpoint import CheckpointSpec, save_checkpoint
from hrnet_core.errors import CheckpointError, ConfigError, DataError
from hrnet_core.geometry import apply_affine, box_to_center_scale, place_in_image
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.skeleton import COCO17, Skeleton
from pipelines import evaluate as module
from pipelines.evaluate import answer, evaluate, group_photos, read_answers
from pipelines.measure_modes import measure_modes
from pipelines.pages.evaluation import _oks_bars, _tile, _worst, truth_and_prediction
from pipelines.poses.actor import Threads
from pipelines.poses.oks_ap import STATS, evaluate_results
from pipelines.poses.protocol import _preset, match_people, score_poses
from pipelines.process.code_version import code_version
from pipelines.settings.config import EvaluateSettings, RaySettings, TrackSettings
from pipelines.sources.evaluation_set import EvaluationSet, read_evaluation_set
from pipelines.sources.records import GroundTruth, People, Photo, Split
from pipelines.tracking.store import StoreAway

CODEC = HeatmapCodec("official", (96, 128))
SPEC = CheckpointSpec(SMALL, CODEC)


@pytest.fixture(scope="module")
def dots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A COCO root, a detector's file, and a network that finds most of the people."""
    folder = tmp_path_factory.mktemp("dots")
    root = write_coco(folder / "coco")
    network = fitted_network(root, CODEC)
    save_checkpoint(folder / "checkpoint", network, SPEC)
    boxes = write_detections(root, folder / "boxes.json")
    return {"root": root, "boxes": boxes, "checkpoint": folder / "checkpoint", "network": network}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The actors' work in this process."""
    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", rows_here)


# --- the whole way ------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_one_and_two_actors_give_the_same_bytes(dots: dict[str, Any], tmp_path: Path) -> None:
    """12 people in 6 photographs, 3 units of 4 people: the same results.json, and pycocotools' figures."""
    found = {}
    for actors in (1, 2):
        settings = EvaluateSettings(batch_size=2, num_workers=actors)
        found[actors] = evaluate(
            dots["checkpoint"], dots["root"], out=tmp_path / str(actors), settings=settings
        )
    one, two = (Path(found[n].results_file).read_bytes() for n in (1, 2))
    assert one == two
    assert found[1].stats == found[2].stats
    truth = dots["root"] / "annotations" / "person_keypoints_val2017.json"
    assert found[1].stats == evaluate_results(json.loads(one), truth)
    assert 0.1 < found[1].stats["AP"] < 0.9
    ids = [r["image_id"] for r in json.loads(one)]
    assert ids == sorted(ids)
    assert found[2].figures["people"] == 12
    assert found[2].figures["people_per_second"] > 0


def test_detector_boxes_by_the_published_protocol(dots: dict[str, Any], tmp_path: Path, here: None) -> None:
    """Against tests/published_protocol.py: the same figures from other code, one person at a time."""
    settings = EvaluateSettings(batch_size=3)
    found = evaluate(dots["checkpoint"], dots["root"], out=tmp_path, boxes=dots["boxes"], settings=settings)
    expected = published_stats(dots["network"], dots["root"], dots["boxes"], CODEC.input_size)
    assert list(found.stats.values()) == pytest.approx(expected, abs=1e-9)
    assert found.figures["people"] == 22  # 12, 4 of them twice, and a false one in each picture
    assert found.figures["results"] == 18
    assert found.metric == "eval_det"
    assert found.protocol["boxes"].startswith("det boxes.json ")
    assert "detector boxes boxes.json, flip test" in found.table()
    without = evaluate(
        dots["checkpoint"],
        dots["root"],
        out=tmp_path / "plain",
        boxes=dots["boxes"],
        settings=EvaluateSettings(batch_size=3, flip_test=False),
    )
    assert without.stats != found.stats
    assert without.protocol["data_digest"] == found.protocol["data_digest"]
    assert found.protocol["preset"] == "official"
    changed = _preset(EvaluateSettings(soft_nms=True, keypoint_threshold=0.3))
    assert changed == "official keypoint_threshold 0.3 soft_nms True"


def test_what_is_written(
    dots: dict[str, Any], tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: dict[str, Any] = {}

    def record(ref: str, stats: Any, protocol: Any, artifacts: Any, **places: Any) -> str:
        recorded.update(ref=ref, stats=stats, protocol=protocol, artifacts=artifacts, **places)
        return "hrnet-pose/3"

    monkeypatch.setattr("pipelines.tracking.registry.record_evaluation", record)
    page = tmp_path / "deep" / "report.html"
    track = TrackSettings(uri=f"sqlite:///{tmp_path}/elsewhere.db")
    found = evaluate(
        dots["checkpoint"], dots["root"], out=tmp_path / "out", report=page, track=track, storage="store"
    )

    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert summary["stats"] == found.stats
    assert list(summary["stats"]) == list(STATS)
    assert summary["metric"] == "eval_gt"
    assert summary["protocol"]["oks_sigmas"] == list(COCO17.oks_sigmas)
    assert summary["protocol"]["evaluator"].startswith("pycocotools 2")
    description = json.loads((dots["checkpoint"] / "checkpoint.json").read_text())
    assert summary["protocol"]["weights_sha256"] == description["weights_sha256"]
    assert summary["code_version"] == code_version()
    for name in ("data_digest", "boxes", "flip_test", "preset", "score_threshold", "mode", "codec"):
        assert name in summary["protocol"]
    assert summary["protocol"]["boxes"] == "gt"
    results = json.loads(Path(found.results_file).read_text())
    assert set(results[0]) == {"image_id", "category_id", "keypoints", "score"}
    assert not (tmp_path / "out" / "unfinished").exists()

    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 3
    assert not re.search(r"(src|href)=.(?!data:)|@import|url\(", text)  # nothing from elsewhere
    assert f"AP {found.stats['AP']:.3f}, val2017" in text
    assert "ground-truth boxes, flip test" in text
    assert "left ankle" in text
    for name in STATS:
        assert f"<span>{name}</span>" in text

    table = found.table().splitlines()
    assert table[1].split() == list(STATS)
    assert [float(v) for v in table[2].split()] == pytest.approx(list(found.stats.values()), abs=5e-4)

    assert recorded["ref"] == description["weights_sha256"]
    assert recorded["stats"] == found.stats
    assert recorded["protocol"] == found.protocol
    assert (recorded["track"], recorded["storage"]) == (track, "store")
    assert {Path(f).name for f in recorded["artifacts"]} == {
        "results.json", "evaluation.json", "best.jpg", "median.jpg", "worst.jpg", "report.html"
    }  # fmt: skip
    assert found.version == "hrnet-pose/3"


def test_a_run_that_was_cut_short_goes_on(
    dots: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = cut_short(monkeypatch)
    settings = EvaluateSettings(batch_size=1)  # six units of two people
    with pytest.raises(KeyboardInterrupt):
        evaluate(dots["checkpoint"], dots["root"], out=tmp_path / "a", settings=settings)
    again = evaluate(dots["checkpoint"], dots["root"], out=tmp_path / "a", settings=settings)
    whole = evaluate(dots["checkpoint"], dots["root"], out=tmp_path / "b", settings=settings)
    assert asked == [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert Path(again.results_file).read_bytes() == Path(whole.results_file).read_bytes()


def test_an_interrupted_run_of_other_settings_is_not_taken_over(dots: dict[str, Any]) -> None:
    of = read_evaluation_set(dots["root"], "val2017", None, EvaluateSettings(), COCO17)
    digests = {
        module._plan_digest(of, SPEC, EvaluateSettings()),
        module._plan_digest(of, SPEC, EvaluateSettings(flip_test=False)),
        module._plan_digest(replace(of, asked=of.asked[:-1]), SPEC, EvaluateSettings()),
        module._plan_digest(of, replace(SPEC, weights_sha256="other"), EvaluateSettings()),
    }
    assert len(digests) == 4
    more_actors = module._plan_digest(of, SPEC, EvaluateSettings(num_workers=7))
    assert more_actors == module._plan_digest(of, SPEC, EvaluateSettings())
    # Threads of a network on the CPU decide how it rounds; with a GPU they only read.
    threads = {module._plan_digest(of, SPEC, EvaluateSettings(cpus_per_worker=n)) for n in (None, 1, 2)}
    assert len(threads) == 2
    assert more_actors in threads
    gpu = [EvaluateSettings(use_gpu=True, cpus_per_worker=n) for n in (None, 4)]
    assert module._plan_digest(of, SPEC, gpu[0]) == module._plan_digest(of, SPEC, gpu[1])


def test_annotations_are_read_once_and_their_ids_decide_nothing(
    dots: dict[str, Any], tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pycocotools takes annotation id 0 for nobody, and a wrong num_keypoints for a person without any."""
    root = Path(shutil.copytree(dots["root"], tmp_path / "coco"))
    truth = truth_of(root)
    for number, annotation in enumerate(truth["annotations"]):
        annotation |= {"id": number, "num_keypoints": 0}
    file = root / "annotations" / "person_keypoints_val2017.json"
    file.write_text(json.dumps(truth))
    opened, original = [], open

    def counted(name: Any, *rest: Any, **more: Any) -> Any:
        opened.append(str(name))
        return original(name, *rest, **more)

    monkeypatch.setattr("builtins.open", counted)
    plain = evaluate(dots["checkpoint"], dots["root"], out=tmp_path / "plain")
    opened.clear()
    found = evaluate(dots["checkpoint"], root, out=tmp_path / "renumbered")
    assert opened.count(str(file)) == 1
    assert found.stats == plain.stats


# --- units and counts ---------------------------------------------------------------------------------


def asked(ids: dict[int, list[int]], scores: list[float] | None = None) -> People:
    """People of image id -> their ids: all have one box, area 500 and their keypoints at (0, 0), v = 1."""
    pairs = [(image_id, i) for image_id, own in ids.items() for i in own]
    boxes = np.tile([10.0, 10, 20, 40], (len(pairs), 1))
    return People(
        image_id=np.array([image_id for image_id, _ in pairs]),
        ann_id=np.array([i for _, i in pairs]),
        category_id=np.ones(len(pairs), np.int64),
        keypoints=np.tile([0.0, 0, 1], (len(pairs), 17, 1)),
        bbox_xywh=boxes.astype(np.float32),
        stated_xywh=boxes,
        area=np.full(len(pairs), 500.0),
        score=np.array(scores if scores is not None else [1.0] * len(pairs)),
        crowd=np.zeros(len(pairs), bool),
    )


def set_of(
    people: People, boxes: tuple[str, str] | None = None, found: People | None = None
) -> EvaluationSet:
    """People on photographs of 100 x 80 px; a detector's boxes are `found`."""
    photos = tuple(Photo(i, f"{i}.png", f"/x/{i}.png", 100, 80) for i in np.unique(people.image_id).tolist())
    truth = GroundTruth("a.json", np.unique(people.image_id), people)
    split = Split("val2017", "a.json", "0", photos, people, truth, ())
    return EvaluationSet(split, people if found is None else found, (), boxes)


def test_units_hold_whole_photographs_and_at_most_so_many_people() -> None:
    of = set_of(asked({1: [1, 2], 2: [3], 3: [4, 5, 6, 7, 8], 4: [9], 5: [10, 11]}))
    groups = group_photos(of, 3)
    assert [[p.image_id for p in photos] for photos, _ in groups] == [[1, 2], [3], [4, 5]]
    assert [people.ann_id.tolist() for _, people in groups] == [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10, 11]]


def test_every_box_is_answered_exactly_once_or_it_is_an_error() -> None:
    people = asked({1: [1, 2], 2: [1]})
    kinds = [("image_id", "<i8"), ("id", "<i8"), ("keypoints", "<f4", (17, 2)), ("scores", "<f4", (17,))]
    answers = np.zeros(3, kinds)
    answers["image_id"], answers["id"] = people.image_id, people.ann_id

    def read(*units: np.ndarray) -> np.ndarray:
        files = [io.BytesIO() for _ in units]
        for file, unit in zip(files, units, strict=True):
            np.save(file, unit)
        return read_answers((file.getvalue() for file in files), people)

    assert read(answers[2:], answers[:2])["id"].tolist() == [1, 2, 1]
    with pytest.raises(RuntimeError, match=r"3 boxes .* 2 answers .*: 1 are missing \[\(1, 2\)\]"):
        read(answers[[0, 2]])
    with pytest.raises(RuntimeError, match=r"1 came twice or unasked \[\(1, 1\)\]"):
        read(answers[:1], answers)
    answers["keypoints"][1, 3, 0] = np.nan
    with pytest.raises(
        CheckpointError, match="NaN or infinite keypoints for 1 of 3 people, the first in image 1"
    ):
        read(answers)


class Spy:
    """A predictor that keeps what it is asked, and answers nothing."""

    spec, device = SPEC, torch.device("cpu")

    def __init__(self) -> None:
        self.images: list[Any] = []

    def prepare(self, image: Any, boxes_xywh: Any) -> list[Any]:
        self.images.append(image)
        return [SimpleNamespace(crops=np.zeros((len(boxes_xywh), 128, 96, 3), np.uint8))]

    def predict_crops(self, crops: Any, *arguments: Any) -> Any:
        self.arguments = arguments
        raise LookupError


def test_exif_orientation_is_ignored(dots: dict[str, Any], tmp_path: Path) -> None:
    """COCO's annotations live on stored pixels: turned by 90 degrees the photograph would not fit them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.open(dots["root"] / "val2017" / "picture-0.png")
    stored.save(tmp_path / "0.jpg", quality=100, subsampling=0, exif=exif)
    group = (Photo(1, "0.jpg", str(tmp_path / "0.jpg"), 200, 160),), asked({1: [1]})
    spy = Spy()
    with pytest.raises(LookupError):
        answer(group, Threads(spy), EvaluateSettings())
    assert np.abs(spy.images[0].astype(int) - np.asarray(stored.convert("RGB"))).mean() < 3


# --- from answers to results --------------------------------------------------------------------------


def test_results_are_rescored_suppressed_and_sorted() -> None:
    """Three boxes of one picture: 5 and 9 are the same pose, 7 another. Box scores .5, .9, .8; keypoints
    score .6 and .1 (not counted): .3, .54, .48. The better of the two stays; order is by id."""
    boxes = asked({2: [4], 8: [5, 7, 9]}, [1.0, 0.5, 0.8, 0.9])
    keypoints = np.tile(np.arange(34, dtype=np.float32).reshape(17, 2), (4, 1, 1))
    keypoints[2] += 30  # id 7
    scores = np.tile(np.where(np.arange(17) < 9, 0.6, 0.1).astype(np.float32), (4, 1))

    def results_of(**settings: Any) -> list[dict[str, Any]]:
        truth = set_of(boxes).split.truth
        return score_poses(keypoints, scores, boxes, truth, SPEC, EvaluateSettings(**settings))[1]

    results = results_of()
    assert [(r["image_id"], r["score"]) for r in results] == [
        (2, pytest.approx(0.6)),
        (8, pytest.approx(0.48)),
        (8, pytest.approx(0.54)),
    ]
    assert results[1]["keypoints"][:3] == [30, 31, pytest.approx(0.6)]
    assert all(r["category_id"] == 1 for r in results)
    assert len(results_of(oks_nms=1.0)) == len(results_of(soft_nms=True)) == 4
    assert results_of(keypoint_threshold=0.05)[0]["score"] == pytest.approx((9 * 0.6 + 8 * 0.1) / 17)


def test_people_are_matched_with_their_own_or_the_best_prediction() -> None:
    people = asked({3: [1, 2]})
    keypoints, scores = np.zeros((2, 17, 2), np.float32), np.zeros((2, 17), np.float32)
    keypoints[0] += 9.0
    own = match_people(keypoints, scores, set_of(people), COCO17)
    # OKS by hand: mean of exp(-(81 + 81) / (8 sigma² 500)).
    expected = np.mean(np.exp(-162 / (8 * np.array(COCO17.oks_sigmas) ** 2 * 500)))
    assert own.oks == pytest.approx([expected, 1.0])
    assert own.similarity[0].mean() == pytest.approx(expected)
    of = set_of(asked({3: [1, 2], 4: [3]}), ("boxes.json", "1"), found=people)
    best = match_people(keypoints, scores, of, COCO17)
    assert best.people.ann_id.tolist() == [1, 2, 3]
    assert best.oks.tolist() == [1.0, 1.0, 0.0]  # nobody was looked for in picture 4
    assert np.isnan(best.predicted[2]).all()


def test_the_page_says_who_is_worst_and_how(tmp_path: Path) -> None:
    """Person 1 is predicted with left and right exchanged, 2 with its nose 30 px away, in picture 4 nothing;
    there is nobody of medium size."""
    people, found = asked({3: [1, 2], 4: [3]}), asked({3: [1, 2]})
    people.keypoints[..., :2] = np.arange(34).reshape(17, 2) * 7 % 90
    predicted = people.keypoints[:2, :, :2].astype(np.float32)
    predicted[0] = predicted[0][COCO17.flip_order]
    predicted[1, 0] += [18, 24]
    of = set_of(people, ("boxes.json", "1"), found=found)
    matched = match_people(predicted, np.ones((2, 17), np.float32), of, COCO17)
    matched.oks[:], matched.predicted[:2], matched.similarity[:2] = [0.2, 0.9, 0.0], predicted, 0.9
    matched.similarity[1, 0] = 0.1
    stats = {**dict.fromkeys(STATS, 0.5), "APm": -1.0}
    paths = {3: "there/three.jpg", 4: "there/four <b>.jpg"}
    worst = re.sub("<[^>]+>", " ", _worst(matched, paths, COCO17))
    rows = [r"four &lt;b&gt;.jpg +3 +0\.00 +17 +nothing predicted in this photograph"]
    rows.append(r"three.jpg +1 +0\.20 +17 +left and right exchanged \(OKS 1\.00 the other way round\)")
    rows.append(r"three.jpg +2 +0\.90 +17 +nose 30 px off")
    assert re.search(" +".join(rows), worst), worst
    assert "1 of 3 people fit better" in worst
    assert _tile(stats["APm"], "APm", "medium people")[0] == "–"
    assert _tile(0.0, "AP", "")[0] == "0.000"
    bars = _oks_bars(matched.oks)
    assert bars.count('class="missed"') == 5
    assert [f">{i / 10:g}</text>" in bars for i in range(11)] == [True] * 11


def test_a_hand_is_not_said_to_have_a_left_and_a_right() -> None:
    hand = Skeleton("hand", tuple(f"joint_{i}" for i in range(21)), (), (0.05,) * 21)
    assert "green" in truth_and_prediction(COCO17)
    assert "green" not in truth_and_prediction(hand)


def test_mmpose_preset_boxes_and_border(dots: dict[str, Any], tmp_path: Path) -> None:
    """mmpose clips both corners to [0, W - 1] and takes no pixel off; official takes one off, then clips."""
    root = shutil.copytree(dots["root"], tmp_path / "coco")
    truth = truth_of(root)
    width, height = truth["images"][0]["width"], truth["images"][0]["height"]
    truth["annotations"][0]["bbox"] = [-5, 20, 50, 60]
    truth["annotations"][1]["bbox"] = [150, 100, 1000, 1000]
    (root / "annotations" / "person_keypoints_val2017.json").write_text(json.dumps(truth))
    boxes = {}
    for preset in ("official", "mmpose"):
        of = read_evaluation_set(root, "val2017", None, EvaluateSettings(preset=preset), COCO17)
        boxes[preset] = of.asked.bbox_xywh[:2].tolist()
    assert boxes["official"] == [[0, 20, 49, 59], [150, 100, width - 151, height - 101]]
    assert boxes["mmpose"] == [[0, 20, 45, 60], [150, 100, width - 151, height - 101]]

    spy = Spy()
    with pytest.raises(LookupError):
        answer(group_photos(of, 4)[0], Threads(spy), EvaluateSettings(preset="mmpose", batch_size=5))
    assert spy.arguments == (True, 5, "mmpose")  # flip test, batch, border


# --- what bad input gets ------------------------------------------------------------------------------


def test_a_server_that_refuses_is_met_before_the_work_and_one_that_is_away_after_it(
    dots: dict[str, Any],
    tmp_path: Path,
    here: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = TrackSettings(uri="http://127.0.0.1:9")
    with pytest.raises(StoreAway, match=r"Connection refused.*not recorded.*the same command records them"):
        evaluate(dots["checkpoint"], dots["root"], out=tmp_path / "out", track=away)
    said = capsys.readouterr().out
    assert "The evaluation goes on: its files are written" in said
    assert "AP50" in said  # the table
    assert (tmp_path / "out" / "results.json").exists()

    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", lambda *_, **__: pytest.fail("asked again"))
    evaluate(dots["checkpoint"], dots["root"], out=tmp_path / "out")  # from the units that were kept
    assert not (tmp_path / "out" / "unfinished").exists()

    monkeypatch.setattr(module, "run_units", None)  # would fail if it were called
    with answering(code=401, said="You are not authenticated.", to="/") as server:
        refused = TrackSettings(uri=f"http://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(ConfigError, match="asks for a user and password"):
            evaluate(dots["checkpoint"], dots["root"], out=tmp_path / "none", track=refused)
        server.shutdown()
    assert not (tmp_path / "none").exists()


def test_unusable_photographs_are_all_named(dots: dict[str, Any], tmp_path: Path, here: None) -> None:
    """Left out in silence they would raise the AP."""
    root = shutil.copytree(dots["root"], tmp_path / "coco")
    pictures = root / "val2017"
    (pictures / "picture-1.png").write_bytes((pictures / "picture-1.png").read_bytes()[:900])
    shutil.copy(pictures / "picture-0.png", pictures / "picture-5.png")
    with pytest.raises(DataError) as caught:
        evaluate(dots["checkpoint"], root, out=tmp_path / "out", settings=EvaluateSettings(batch_size=1))
    text = str(caught.value)
    assert text.startswith("2 photographs cannot be used")
    assert "picture-1.png: " in text
    assert "picture-5.png: size_differs, 200 x 160 px, the annotations are for 240 x 160" in text
    assert "\n" not in text
    (pictures / "picture-3.png").unlink()
    with pytest.raises(DataError, match=r"1 photographs cannot be used.*picture-3\.png: missing_image"):
        evaluate(dots["checkpoint"], root, out=tmp_path / "out")


def test_wrong_input_is_one_paragraph(dots: dict[str, Any], tmp_path: Path, here: None) -> None:
    checkpoint, root = dots["checkpoint"], dots["root"]

    def refused(error: type[Exception], match: str, *arguments: Any, **named: Any) -> None:
        with pytest.raises(error, match=match) as caught:
            evaluate(*arguments, out=tmp_path / "out", **named)
        assert "\n" not in str(caught.value)

    refused(DataError, "nowhere is not a folder", checkpoint, tmp_path / "nowhere")
    refused(DataError, r"person_keypoints_test2017\.json: no such file", checkpoint, root, split="test2017")
    refused(CheckpointError, "no such checkpoint folder", tmp_path / "none", root)
    refused(DataError, "cannot be read", checkpoint, root, boxes=tmp_path / "none.json")

    # Before anything is read: there is neither checkpoint nor COCO.
    nothing, file = (tmp_path / "none", tmp_path / "nowhere"), tmp_path / "file"
    file.touch()
    refused(ConfigError, rf"--report {tmp_path}: is a folder. Name a file", *nothing, report=tmp_path)
    for out in (file, file / "out"):
        with pytest.raises(ConfigError, match=rf"--out {out}: {file} is a file, not a folder"):
            evaluate(*nothing, out=out)
        with pytest.raises(ConfigError, match=rf"--out {out}: {file} is a file, not a folder"):
            measure_modes(*nothing, out=out)

    others = tmp_path / "others.json"
    others.write_text(json.dumps([{"image_id": 9, "category_id": 1, "bbox": [1, 1, 5, 5], "score": 1}]))
    refused(DataError, r"others\.json: 1 image ids are not in", checkpoint, root, boxes=others)
    threshold = EvaluateSettings(score_threshold=2.0)
    refused(DataError, "no box is left", checkpoint, root, boxes=dots["boxes"], settings=threshold)

    three = Skeleton("three", ("a", "b", "c"), (), (0.1, 0.1, 0.1))
    small = replace(SMALL, num_keypoints=3)
    save_checkpoint(tmp_path / "three", _random_network(small), CheckpointSpec(small, CODEC, three))
    refused(
        DataError,
        r"is not skeleton 'three': 17 keypoints instead of 3 .* the skeleton that .*three was trained for",
        tmp_path / "three",
        root,
    )


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_more_actors_than_there_are_cpus(dots: dict[str, Any], tmp_path: Path) -> None:
    settings = EvaluateSettings(num_workers=3, batch_size=1)
    with pytest.raises(ConfigError, match=r"hrnet evaluate --evaluate\.num-workers wants 3 workers"):
        evaluate(dots["checkpoint"], dots["root"], out=tmp_path, settings=settings, ray=RaySettings())


def _random_network(config: HRNetConfig) -> torch.nn.Module:
    from hrnet_core.model import HRNet

    return HRNet(config)


# --- real people --------------------------------------------------------------------------------------

# AP of the best that an `official` network can do: its heatmaps perfect, read back by its own decode.
CEILING = {
    ("train2017", (192, 256)): 0.960,
    ("train2017", (96, 128)): 0.870,
    ("val2017", (192, 256)): 0.986,
    ("val2017", (96, 128)): 0.887,
}


@pytest.mark.parametrize(("split", "input_size"), CEILING)
def test_perfect_heatmaps_of_real_people(real_data: Path, split: str, input_size: tuple[int, int]) -> None:
    """Ground truth -> crop -> heatmaps -> decode -> image -> results -> AP, against the same done by hand:
    a perfect official heatmap is symmetric about the cell round(x / 4), so no quarter step is taken; of a
    keypoint outside the map the tail within 3 sigma is left, beyond that nothing: (0, 0)."""
    spec = CheckpointSpec(HRNetConfig(), HeatmapCodec("official", input_size))
    of = read_evaluation_set(real_data / "coco", split, None, EvaluateSettings(), COCO17)
    people = of.asked
    keypoints, visible = people.keypoints[..., :2], people.keypoints[..., 2]
    center, scale = box_to_center_scale(people.bbox_xywh, input_size)
    matrices = spec.codec.image_to_crop_matrix(center, scale)
    heatmaps, _ = spec.codec.encode(apply_affine(matrices, keypoints), visible)
    decoded, scores = spec.codec.decode(heatmaps)
    answers = place_in_image(decoded, matrices), scores
    stats, _ = score_poses(*answers, people, of.split.truth, spec, EvaluateSettings())

    by_hand = []
    (width, height), sigma = input_size, input_size[1] / 128
    for row, box in enumerate(people.bbox_xywh.astype(float)):
        x, y, w, h = box
        factor = width / (1.25 * max(w, h * width / height))  # crop px per photo px
        left, top = x + w / 2 - width / 2 / factor, y + h / 2 - height / 2 / factor
        rounded = np.trunc((keypoints[row] - [left, top]) * factor / 4 + 0.5)
        cells = np.clip(rounded, 0, [width / 4 - 1, height / 4 - 1])  # the nearest that the map has
        reached = (np.abs(rounded - cells) <= 3 * sigma).all(axis=1) & (visible[row] > 0)
        places = np.where(reached[:, None], cells * 4, 0) / factor + [left, top]
        peaks = np.exp(-((rounded - cells) ** 2).sum(axis=1) / (2 * sigma**2)) * reached
        counted = peaks[peaks > 0.2]
        by_hand.append(
            {
                "image_id": int(people.image_id[row]),
                "category_id": 1,
                "keypoints": np.concatenate([places, peaks[:, None]], axis=1).ravel().tolist(),
                "score": float(counted.mean()) if len(counted) else 0.0,
            }
        )
    expected = evaluate_results(by_hand, of.split.truth)
    assert stats == pytest.approx(expected, abs=1e-6)
    assert stats["AP"] == pytest.approx(CEILING[split, input_size], abs=0.001)
