"""The ten figures against pycocotools' published ones, MMPose's own tests and hand-made cases."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrnet_core.errors import DataError
from hrnet_core.oks import oks_nms, rescore, soft_oks_nms
from hrnet_core.skeleton import COCO17, Skeleton
from pipelines.cli import main
from pipelines.poses.oks_ap import STATS, evaluate_results
from pipelines.poses.protocol import poses_to_results

Truth = dict[str, Any]
# MMPose's and the fixtures' names of the ten figures.
NAMES = dict(
    zip(
        STATS,
        ("AP", "AP .5", "AP .75", "AP (M)", "AP (L)", "AR", "AR .5", "AR .75", "AR (M)", "AR (L)"),
        strict=True,
    )
)
LONG = {"APm": "AP_medium", "APl": "AP_large", "ARm": "AR_medium", "ARl": "AR_large"}


@pytest.fixture
def truth(mmpose_cases: dict[str, Any]) -> Truth:
    """MMPose's COCO fixture: 14 annotations of 4 pictures of val2017."""
    fixture = mmpose_cases["coco_fixture"]
    category = {**fixture["category"], "keypoints": list(COCO17.keypoints)}
    return {"images": fixture["images"], "annotations": fixture["annotations"], "categories": [category]}


def predictions(
    truth: Truth, factors: list[tuple[float, float, float, float]], box_scores: list[float], offset: int = 0
) -> dict[str, np.ndarray]:
    """Each annotation's keypoints times (x, y, score factor), float32 as MMPose's; factors by annotation."""
    annotations = truth["annotations"]
    triples = np.array([a["keypoints"] for a in annotations], np.float32).reshape(-1, 17, 3)
    triples = (triples * np.array(factors, np.float32)[:, None]).astype(np.float32)
    boxes = np.array([a["bbox"] for a in annotations])
    return {
        "image_id": np.array([a["image_id"] for a in annotations]),
        "id": np.array([a["id"] for a in annotations]) + offset,
        "keypoints": triples[..., :2],
        "scores": triples[..., 2],
        "areas": 1.25**2 * boxes[:, 2] * boxes[:, 3],
        "box_scores": np.array(box_scores),
    }


def suppressed(found: dict[str, np.ndarray], totals: np.ndarray, suppress: Any) -> list[dict[str, Any]]:
    """COCO results as MMPose writes them: by picture, best first, of equal scores the later person first
    (its argsort is reversed). Our own files are sorted by instance id instead; ties rank by this order."""
    results = []
    for image_id in np.unique(found["image_id"]):
        rows = np.flatnonzero(found["image_id"] == image_id)
        _, first = np.unique(found["id"][rows], return_index=True)  # a repeated id counts once
        rows = rows[first][::-1]
        kept = suppress(found["keypoints"][rows], totals[rows], found["areas"][rows], COCO17.oks_sigmas, 0.9)
        for row in rows[kept]:
            triple = np.concatenate([found["keypoints"][row], found["scores"][row][:, None]], axis=1)
            results.append(
                {
                    "image_id": int(image_id),
                    "category_id": 1,
                    "keypoints": triple.astype(np.float64).ravel().tolist(),
                    "score": float(totals[row]),
                }
            )
    return results


def expected_of(case: dict[str, Any]) -> dict[str, float]:
    return {ours: case["expected"][theirs] for ours, theirs in NAMES.items()}


def test_mmpose_align1_ties_and_float64(mmpose_cases: dict[str, Any], truth: Truth) -> None:
    case = mmpose_cases["coco_metric"]["cases"][0]
    found = predictions(truth, [(0.98, 1.02, 0.8)] * 14, [0.98] * 14)
    results = suppressed(found, rescore(found["scores"], found["box_scores"]), oks_nms)
    assert evaluate_results(results, truth) == pytest.approx(expected_of(case), abs=1e-12)


def test_mmpose_align2_other_scores(mmpose_cases: dict[str, Any], truth: Truth) -> None:
    case = mmpose_cases["coco_metric"]["cases"][1]
    found = predictions(truth, [(0.98, 1.02, 0.8)] * 14, [0.98] * 14)
    # The published figure comes from a float32 mean; float64 breaks two ties otherwise (AP .4975).
    totals = found["box_scores"] + found["scores"].mean(axis=1) + found["scores"].max(axis=1)
    assert evaluate_results(suppressed(found, totals, oks_nms), truth) == pytest.approx(
        expected_of(case), abs=1e-12
    )


def test_mmpose_align3_soft_nms(mmpose_cases: dict[str, Any], truth: Truth) -> None:
    case = mmpose_cases["coco_metric"]["cases"][2]
    steps = [i / 100 for i in range(14)]
    one = predictions(truth, [(1 - s, 1 + s, 1 - s) for s in steps], [1.0] * 14)
    two = predictions(truth, [(1 + s, 1 - s, 1 - 2 * s) for s in steps], [1 - 2 * s for s in steps], offset=1)
    found = {name: np.concatenate([one[name], two[name]]) for name in one}
    results = suppressed(found, rescore(found["scores"], found["box_scores"]), soft_oks_nms)
    assert evaluate_results(results, truth) == pytest.approx(expected_of(case), abs=1e-12)


def test_perfect_predictions_and_order(truth: Truth) -> None:
    """pycocotools counts the two people without keypoints as false alarms: .8939 with, 1 without."""
    found = predictions(truth, [(1, 1, 1)] * 14, [1.0] * 14)
    everyone = poses_to_results(*[found[n] for n in ("image_id", "id", "keypoints", "scores", "box_scores")])
    assert evaluate_results(everyone, truth)["AP"] == pytest.approx(0.8939, abs=5e-5)
    labelled = [r for r in everyone if any(r["keypoints"])]
    assert len(labelled) == 12
    assert evaluate_results(labelled, truth) == dict.fromkeys(STATS, pytest.approx(1.0))
    # All scores are equal, so the ranking is the order of the list: a foreign file's must be kept.
    assert evaluate_results(everyone[::-1], truth)["AP"] != evaluate_results(everyone, truth)["AP"]


def test_nothing_found_and_nothing_changed(truth: Truth) -> None:
    before = copy.deepcopy(truth)
    assert evaluate_results([], truth) == dict.fromkeys(STATS, 0.0)
    results = [{"image_id": 785, "category_id": 1, "keypoints": [1.0] * 51, "score": 0.5}]
    evaluate_results(results, truth)
    assert truth == before
    assert "ignore" not in truth["annotations"][0]  # pycocotools writes this into what it is given
    assert set(results[0]) == {"image_id", "category_id", "keypoints", "score"}


def hand_made(error_px: float, num_keypoints: int = 1) -> tuple[Truth, list[dict[str, Any]]]:
    """One person of area 10,000 with every keypoint off by `error_px` in x."""
    points = [100.0, 100.0, 2] * num_keypoints
    annotation = {
        "id": 1, "image_id": 5, "category_id": 1, "bbox": [50, 50, 200, 100], "area": 10_000.0,
        "iscrowd": 0, "num_keypoints": num_keypoints, "keypoints": points,
    }  # fmt: skip
    found = [100.0 + error_px, 100.0, 1.0] * num_keypoints
    return (
        {"images": [{"id": 5}], "annotations": [annotation], "categories": [{"id": 1, "name": "person"}]},
        [{"image_id": 5, "category_id": 1, "keypoints": found, "score": 1.0}],
    )


def test_the_skeletons_constants_and_the_area_decide() -> None:
    """OKS = exp(-d² / (2 area (2 sigma)²)): sigma 0.1, area 10,000, d 20 px gives exp(-0.5) = .607, so the
    thresholds .50, .55, .60 are met: AP .3. Area 0.53 x 200 x 100 = 10,600 gives .624: the same; d 21: .576
    and .595, sigma 0.2 and d 20: exp(-1/8) = .882, eight thresholds."""
    wide, narrow = (Skeleton("one", ("a",), (), (s,)) for s in (0.2, 0.1))
    truth, results = hand_made(20)
    assert evaluate_results(results, truth, skeleton=narrow)["AP"] == pytest.approx(0.3)
    assert evaluate_results(results, truth, skeleton=wide)["AP"] == pytest.approx(0.8)
    # d² = 430: exp(-430 / 800) = .584 with the area, exp(-430 / 848) = .602 with the box.
    truth, results = hand_made(430**0.5)
    assert evaluate_results(results, truth, skeleton=narrow)["AP"] == pytest.approx(0.2)
    assert evaluate_results(results, truth, skeleton=narrow, use_area=False)["AP"] == pytest.approx(0.3)


ONE = Skeleton("one", ("a",), (), (0.1,))
BAD_RESULTS = {
    "a list of objects": lambda r: {"annotations": r},
    "has no score": lambda r: [{k: v for k, v in r[0].items() if k != "score"}],
    "image 6, which the ground truth does not have": lambda r: [{**r[0], "image_id": 6}],
    "image '5'": lambda r: [{**r[0], "image_id": "5"}],
    "category 2": lambda r: [{**r[0], "category_id": 2}],
    "has 51 numbers in keypoints": lambda r: [{**r[0], "keypoints": [1.0] * 51}],
    "result 1 .* not a finite number": lambda r: [r[0], {**r[0], "score": float("nan")}],
    "not a finite number": lambda r: [{**r[0], "keypoints": [1.0, None, 1.0]}],
    "has a bbox and others": lambda r: [r[0], {**r[0], "bbox": [1, 2, 3, 4]}],
}


@pytest.mark.parametrize("message", BAD_RESULTS)
def test_bad_results_are_refused(message: str) -> None:
    truth, results = hand_made(0)
    assert evaluate_results(results, truth, skeleton=ONE)["AP"] == pytest.approx(1.0)
    with pytest.raises(DataError, match=message) as caught:
        evaluate_results(BAD_RESULTS[message](results), truth, skeleton=ONE)
    assert "the results" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_ground_truth_and_files_are_refused(tmp_path: Path) -> None:
    truth, results = hand_made(0)
    with pytest.raises(DataError, match="keypoints is 3 entries, not 51 numbers"):
        evaluate_results(results, truth)
    with pytest.raises(DataError, match="field 'annotations' is missing"):
        evaluate_results(results, {"images": []}, skeleton=ONE)
    del truth["annotations"][0]["area"]
    with pytest.raises(DataError, match=r"every annotation has no area.*--no-use-area"):
        evaluate_results(results, truth, skeleton=ONE)
    assert evaluate_results(results, truth, skeleton=ONE, use_area=False)["AP"] == pytest.approx(1.0)
    broken = tmp_path / "r.json"
    broken.write_text('[{"image_id": 1')
    with pytest.raises(DataError, match=r"r\.json: not valid JSON at byte 15 of 15"):
        evaluate_results(broken, truth, skeleton=ONE, use_area=False)
    with pytest.raises(DataError, match=r"gone\.json: cannot be read \(No such file"):
        evaluate_results(tmp_path / "gone.json", truth, skeleton=ONE, use_area=False)
    packed = tmp_path / "r.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(results).encode()))
    assert evaluate_results(packed, truth, skeleton=ONE, use_area=False)["AP"] == pytest.approx(1.0)


def test_crowding_and_no_area_by_hand() -> None:
    """Three pictures with one person each, d = 0, 20 and 500 px. Box 200 x 100, no area: 0.53 x 20,000 is
    10,600; sigma 0.1: OKS 1, exp(-400 / 848) = .624 (three thresholds) and 0. By crowdIndex: 1, .3 and 0."""
    images, annotations, results = [], [], []
    for image_id, (crowding, error) in enumerate([(0.1, 0), (0.5, 20), (0.9, 500)], start=1):
        truth, found = hand_made(error)
        images.append({"id": image_id, "crowdIndex": crowding})
        annotation = {**truth["annotations"][0], "id": image_id, "image_id": image_id}
        annotation.pop("area")
        annotations.append(annotation)
        results.append({**found[0], "image_id": image_id})
    truth = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    stats = evaluate_results(results, truth, skeleton=ONE, use_area=False)
    assert (stats["AP_easy"], stats["AP_medium"], stats["AP_hard"]) == (1.0, 0.3, 0.0)
    assert stats["AR"] == pytest.approx((1 + 0.3 + 0) / 3)
    del images[0]["crowdIndex"]
    assert set(evaluate_results(results, truth, skeleton=ONE, use_area=False)) == set(STATS)


def test_on_the_command_line_with_all_digits(
    tmp_path: Path, truth: Truth, mmpose_cases: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    case = mmpose_cases["coco_metric"]["cases"][0]
    found = predictions(truth, [(0.98, 1.02, 0.8)] * 14, [0.98] * 14)
    results = suppressed(found, rescore(found["scores"], found["box_scores"]), oks_nms)
    for name, content in (("r.json", results), ("gt.json", truth)):
        (tmp_path / name).write_text(json.dumps(content))
    argv = ["evaluate", "--results", str(tmp_path / "r.json"), "--ground-truth", str(tmp_path / "gt.json")]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert "0.5287" in capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert told == pytest.approx(expected_of(case), abs=1e-12)
    # What would be passed by in silence is refused; so is a skeleton of another number of keypoints.
    one = tmp_path / "one.json"
    one.write_text(json.dumps(ONE.as_dict()))
    for more, why in (
        (["--report", "x.html"], "--report"),
        (["--measure-modes"], "--measure-modes"),
        (["--skeleton", str(one)], "17 keypoints instead of 1"),
    ):
        assert main([*argv, *more]) == 2
        assert why in capsys.readouterr().err


# --- real files with published figures (not part of the project) --------------------------------------


def long_names(expected: dict[str, float]) -> dict[str, float]:
    return {name: expected[LONG.get(name, name)] for name in STATS}


@pytest.mark.parametrize("model", ["lightweight_a_being-aerys", "lightweight_b_ax642511", "greenpose_beubax"])
def test_val_subset_to_the_last_digit(real_data: Path, model: str) -> None:
    folder = real_data / "evaluator" / "val_subset250"
    expected = json.loads((folder / "expected_pycocotools_2.0.11.json").read_text())[model]
    stats = evaluate_results(folder / f"detections_{model}.json.gz", folder / "val_subset.json.gz")
    assert stats == long_names(expected)


def test_litehrnet_to_the_last_digit(real_data: Path) -> None:
    """Medium has no instance: -1, not 0."""
    folder = real_data / "evaluator" / "litehrnet_1000"
    expected = json.loads((folder / "expected_pycocotools_2.0.11.json").read_text())
    stats = evaluate_results(folder / "result_keypoints.json.gz", folder / "gt.json.gz")
    assert stats == long_names(expected)
    assert stats["APm"] == -1


def test_faster_coco_eval_to_the_last_digit(real_data: Path) -> None:
    """128 detections of one picture with boxes: medium and large go by the box."""
    folder = real_data / "evaluator" / "faster_coco_eval_139099"
    expected = json.loads((folder / "expected.json").read_text())["published_exact"]
    stats = evaluate_results(folder / "dt_dataset.json", folder / "gt_dataset.json")
    assert stats == pytest.approx(long_names(expected), abs=1e-15)


def test_crowdpose_without_area(real_data: Path) -> None:
    """14 keypoints, no areas; easy, medium and hard by crowdIndex."""
    folder = real_data / "evaluator" / "crowdpose_example"
    expected = json.loads((folder / "expected.json").read_text())
    sigmas = [
        0.079,
        0.079,
        0.072,
        0.072,
        0.062,
        0.062,
        0.107,
        0.107,
        0.087,
        0.087,
        0.089,
        0.089,
        0.079,
        0.079,
    ]
    names = tuple(json.loads((folder / "gt.json").read_text())["categories"][0]["keypoints"])
    crowdpose = Skeleton("crowdpose", names, (), tuple(sigmas))
    stats = evaluate_results(folder / "preds.json", folder / "gt.json", skeleton=crowdpose, use_area=False)
    theirs = {
        "AP": "AP_all",
        "AR": "AR_all",
        "AP50": "AP_50",
        "AP75": "AP_75",
        "AR50": "AR_50",
        "AR75": "AR_75",
    }
    for name in (*theirs, "AP_easy", "AP_medium", "AP_hard"):
        assert stats[name] == expected[theirs.get(name, name)]
    with pytest.raises(DataError, match="area"):
        evaluate_results(folder / "preds.json", folder / "gt.json", skeleton=crowdpose)


def test_tinypose_on_the_real_val_photographs(real_data: Path) -> None:
    """Published for this results file: AP .6867 AP50 .8822 AP75 .7648 APm .6886 APl .6990 AR .7152."""
    stats = evaluate_results(
        real_data / "evaluator" / "tinypose_dev" / "results_gtbox.json",
        real_data / "coco" / "annotations" / "person_keypoints_val2017.json",
    )
    published = {"AP": 0.6867, "AP50": 0.8822, "AP75": 0.7648, "APm": 0.6886, "APl": 0.6990, "AR": 0.7152}
    assert {name: stats[name] for name in published} == pytest.approx(published, abs=5.1e-5)


@pytest.mark.parametrize("case", ["align1", "align2", "perfect"])
def test_mmposes_own_files(real_data: Path, case: str) -> None:
    """The files as MMPose ships them. "perfect" is 1 there because xtcocotools drops what scores nothing."""
    folder = real_data / "evaluator" / "mmpose_test_coco"
    truth = json.loads((folder / "test_coco.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())
    if case == "perfect":
        found = predictions(truth, [(1, 1, 1)] * 14, [1.0] * 14)
        totals = rescore(found["scores"], found["box_scores"])
        results = [r for r in suppressed(found, totals, oks_nms) if r["score"] > 0]
    else:
        found = predictions(truth, [(0.98, 1.02, 0.8)] * 14, [0.98] * 14)
        totals = rescore(found["scores"], found["box_scores"])
        if case == "align2":
            totals = found["box_scores"] + found["scores"].mean(axis=1) + found["scores"].max(axis=1)
        results = suppressed(found, totals, oks_nms)
    assert evaluate_results(results, truth) == pytest.approx(
        long_names(expected[case]["expected"]), abs=1e-12
    )
