"""Sigmas from repeated annotations: by hand, from simulated annotators, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrnet_core.errors import DataError
from hrnet_core.skeleton import COCO17, Skeleton, load_skeleton
from pipelines.cli import main
from pipelines.estimate_sigmas import estimate_sigmas

Truth = dict[str, Any]
LIMBS = [[a + 1, b + 1] for a, b in COCO17.limbs]


def write(file: Path, people: list[dict[str, Any]], names: tuple[str, ...], **category: Any) -> Path:
    """people: {image_id, points (K, 2), area, box?, id?, visible?}; ids count from 1 where not given."""
    annotations = []
    for number, person in enumerate(people, start=1):
        points = np.asarray(person["points"], float)
        visible = np.asarray(person.get("visible", np.full(len(points), 2)))
        box = person.get("box", [*points.min(axis=0), *np.ptp(points, axis=0)])
        annotations.append(
            {
                "id": person.get("id", number), "image_id": person["image_id"], "category_id": 1,
                "bbox": [float(v) for v in box], "area": person["area"], "iscrowd": person.get("iscrowd", 0),
                "keypoints": np.concatenate([points, visible[:, None]], axis=1).ravel().tolist(),
                "num_keypoints": int((visible > 0).sum()),
            }
        )  # fmt: skip
    head = {"id": 1, "name": "person", "keypoints": list(names), **category}
    images = [{"id": i} for i in sorted({a["image_id"] for a in annotations})]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [head]}))
    return file


def annotators(folder: Path, count: int, people: int, sigmas: Any, seed: int = 0) -> list[Path]:
    """Files of people of many sizes, each keypoint off by a Gaussian with E[d²] = sigma² area."""
    rng = np.random.default_rng(seed)
    sigmas = np.asarray(sigmas)
    areas = np.exp(rng.normal(9, 1, people))
    truth = rng.uniform(0, 400, (people, len(sigmas), 2))
    names = COCO17.keypoints[: len(sigmas)]
    files = []
    for a in range(count):
        # E[d²] is the sum over both axes: half of it on each.
        noise = rng.normal(0, 1, truth.shape) * (sigmas * np.sqrt(areas)[:, None] / np.sqrt(2))[..., None]
        here = [
            {"image_id": p // 3, "points": truth[p] + noise[p], "area": float(areas[p])}
            for p in range(people)
        ]
        files.append(write(folder / f"{a}.json", here, names, skeleton=LIMBS))
    return files


def test_by_hand(tmp_path: Path) -> None:
    """Two annotators 2 px apart on a person of 100 px²: the sum of squares from the mean is 1 + 1, one degree
    of freedom, so sigma² = 2 / 100. A second person of 400 px², 6 px apart: 18 / 400. Their mean: .0325.
    By the median of d²/2 s² (.02 and .045): sqrt(.0325 / ln 2). Spread: both are .0125 off."""
    one, two = (
        write(
            tmp_path / f"{name}.json",
            [
                {"image_id": 1, "points": [[10 + x, 10], [30, 40 + x]], "area": 100.0},
                {"image_id": 2, "points": [[50, 50 + 3 * x], [90, 80]], "area": 400.0, "visible": [2, v]},
            ],
            ("a", "b"),
        )
        for name, x, v in (("one", 0, 1), ("two", 2, 0))
    )
    found = estimate_sigmas([one, two], tmp_path / "s.json")
    assert found.sigmas == pytest.approx([0.0325**0.5, 0.02**0.5])
    assert found.medians == pytest.approx([(0.0325 / np.log(2)) ** 0.5, (0.02 / np.log(2)) ** 0.5])
    # Of the mean of two values, each 0.0125 off it: 0.0125 / sqrt(2); and d sigma = d(sigma²) / 2 sigma.
    assert found.errors[0] == pytest.approx(0.0125 / 2**0.5 / (2 * 0.0325**0.5))
    assert found.counts.tolist() == [2, 1]
    assert load_skeleton(tmp_path / "s.json").oks_sigmas == pytest.approx(found.sigmas, rel=1e-3)


def test_three_annotators_are_one_sample_with_two_degrees_of_freedom(tmp_path: Path) -> None:
    """At 0, 3 and 6 px of a person of 90 px²: mean 3, squares 9 + 0 + 9, over 2 x 90: sigma² = .1."""
    person = {"image_id": 1, "area": 90, "box": [0, 0, 9, 9]}
    files = [write(tmp_path / f"{x}.json", [{**person, "points": [[x, 5]]}], ("a",)) for x in (0, 3, 6)]
    assert estimate_sigmas(files, tmp_path / "s.json").sigmas == pytest.approx([0.1**0.5])


@pytest.mark.parametrize(("count", "people"), [(2, 3000), (4, 800)])
def test_cocos_sigmas_are_recovered(tmp_path: Path, count: int, people: int) -> None:
    """Relative standard error of sigma: d² of one person is chi-squared with 2 (n - 1) degrees of freedom,
    so that of the mean of P people is 1 / sqrt(P (n - 1)), and half of it for the root: 0.9 % and 1 %."""
    files = annotators(tmp_path, count, people, COCO17.oks_sigmas)
    found = estimate_sigmas(files, tmp_path / "s.json")
    theory = 0.5 / np.sqrt(people * (count - 1))
    true = np.array(COCO17.oks_sigmas)
    assert np.abs(found.errors / true / theory - 1).max() < 0.2
    assert np.abs((found.sigmas - true) / found.errors).max() < 3.5  # the largest of 17 normal draws
    assert np.abs(found.sigmas / true - 1).mean() < 1.5 * theory  # a wrong factor anywhere is 40 % or more
    assert np.abs(found.medians / true - 1).max() < 5 * theory
    written = load_skeleton(tmp_path / "s.json")
    assert written.keypoints == COCO17.keypoints
    assert {frozenset(p) for p in written.flip_pairs} == {frozenset(p) for p in COCO17.flip_pairs}
    assert written.limbs == COCO17.limbs


def test_real_sizes_and_visibility(real_data: Path, tmp_path: Path) -> None:
    """Annotators of real people, simulated: only labelled keypoints count, crowds do not."""
    content = json.loads((real_data / "coco/annotations/person_keypoints_train2017.json").read_text())
    rng = np.random.default_rng(0)
    labelled = 0
    for name in ("a", "b"):
        made = json.loads(json.dumps(content))
        for annotation in made["annotations"]:
            triples = np.array(annotation["keypoints"], float).reshape(17, 3)
            step = np.array(COCO17.oks_sigmas) * np.sqrt(annotation["area"] / 2)
            triples[:, :2] += rng.normal(size=(17, 2)) * step[:, None] * (triples[:, 2:] > 0)
            annotation["keypoints"] = triples.ravel().tolist()
            if name == "a" and not annotation["iscrowd"]:
                labelled += int((triples[:, 2] > 0).sum())
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
    found = estimate_sigmas([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "s.json")
    assert found.counts.sum() == labelled
    assert np.abs((found.sigmas - COCO17.oks_sigmas) / found.errors).max() < 3.5
    assert np.abs(found.sigmas / COCO17.oks_sigmas - 1).max() < 0.15


def test_gross_errors_show_beside_the_median(tmp_path: Path) -> None:
    """One in 30 people with the first keypoint somewhere else: its sigma rises, the median's hardly does."""
    sigmas = (0.05, 0.05, 0.08)
    files = annotators(tmp_path, 2, 600, sigmas)
    content = json.loads(files[1].read_text())
    for annotation in content["annotations"][::30]:
        annotation["keypoints"][0] += annotation["area"] ** 0.5
    files[1].write_text(json.dumps(content))
    found = estimate_sigmas(files, tmp_path / "s.json")
    # 1/30 of the pairs adds area / 2 to the squared distance: sigma² = .05² + 1/60.
    assert found.sigmas[0] == pytest.approx((0.05**2 + 1 / 60) ** 0.5, rel=0.1)
    assert found.medians[0] == pytest.approx(0.05, rel=0.15)
    assert "sigma of nose: look for left and right" in str(found)


def test_other_ids_are_matched_by_their_boxes(tmp_path: Path) -> None:
    """The second annotator numbered otherwise, missed a person, and drew one whom the first has not."""
    places = np.array([[0, 0], [60, 0], [0, 200], [300, 300]])
    shape = np.array([[10, 10], [20, 60]])

    def people(order: list[int], shift: float) -> list[dict[str, Any]]:
        return [
            {
                "image_id": 7, "points": places[i] + shape + [shift * (i + 1), 0], "area": 100.0,
                "box": [*(places[i] + shift), 50, 80],
            }
            for i in order
        ]  # fmt: skip

    one = write(tmp_path / "one.json", people([0, 1, 2], 0.0), ("a", "b"))
    two = write(tmp_path / "two.json", people([3, 2, 0], 2.0), ("a", "b"))
    found = estimate_sigmas([one, two], tmp_path / "s.json")
    assert (found.repeated.how, found.repeated.labelled.shape) == ("box", (2, 2, 2))
    # Person 0 is 2 px off, person 2 is 6 px off: (2 + 18) / 2 / 100.
    assert found.sigmas == pytest.approx([0.1**0.5] * 2)
    by_id = estimate_sigmas(
        [one, write(tmp_path / "b.json", people([0, 1, 2], 2.0), ("a", "b"))], tmp_path / "s"
    )
    assert by_id.repeated.how == "annotation id"  # fmt: skip


def test_a_given_skeleton_keeps_its_other_fields(tmp_path: Path) -> None:
    files = annotators(tmp_path, 2, 200, COCO17.oks_sigmas)
    estimate_sigmas(files, tmp_path / "s.json", skeleton="coco17")
    written = load_skeleton(tmp_path / "s.json")
    assert written.upper_body == COCO17.upper_body
    assert written.joint_weights == COCO17.joint_weights
    assert written.oks_sigmas != COCO17.oks_sigmas
    other = tmp_path / "other.json"
    other.write_text(json.dumps(Skeleton("three", ("a", "b", "c"), (), (0.1, 0.1, 0.1)).as_dict()))
    with pytest.raises(DataError, match=r"'three' has the keypoints a, b, c, but the category of .*0\.json"):
        estimate_sigmas(files, tmp_path / "s.json", skeleton=other)


def test_what_is_refused(tmp_path: Path) -> None:
    person = {"image_id": 1, "points": [[1.0, 2], [3, 4]], "area": 50.0, "box": [0, 0, 9, 9]}
    moved = {**person, "points": [[2.0, 2], [3, 5]]}
    one = write(tmp_path / "one.json", [person], ("a", "b"))
    out = tmp_path / "s.json"

    def refused(match: str, *files: Path, **named: Any) -> None:
        with pytest.raises(DataError, match=match) as caught:
            estimate_sigmas(files, out, **named)
        assert "\n" not in str(caught.value)
        assert not out.exists()

    def other(*people: dict[str, Any], names: tuple[str, ...] = ("a", "b")) -> Path:
        return write(tmp_path / "two.json", list(people), names)

    refused("name two or more annotation files", one)
    refused("agree to the last digit on a, b: a copy is no second annotator", one, other(person))
    refused(r"two\.json: its category has the keypoints b, a, but", one, other(moved, names=("b", "a")))
    refused("have no person in common", one, other({**moved, "image_id": 2}))
    refused("have no person in common", one, other({**moved, "box": [100, 100, 9, 9], "id": 5}))
    refused("b: nobody's was labelled by two", one, other({**moved, "visible": [2, 0]}))
    refused("have no person in common", one, other({**moved, "iscrowd": 1}))
    refused("no annotation has an area", one, other({**moved, "area": 0}))
    nobody = {**moved, "image_id": 3, "area": 0, "id": 9}
    refused("1 people have no area above 0: distances are measured by it", one, other(moved, nobody))
    refused("cannot be read", one, tmp_path / "gone.json")
    refused("keypoints is 3 entries, not 6 numbers", one, other({**moved, "points": [[1, 2]]}))
    bare = json.loads(one.read_text())
    del bare["annotations"][0]["area"]
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    refused(r"bare\.json: no annotation has an area.*--no-use-area", tmp_path / "bare.json", other(moved))
    # 1 px apart on 0.53 x 9 x 9 px².
    found = estimate_sigmas([tmp_path / "bare.json", other(moved)], out, use_area=False)
    assert found.sigmas == pytest.approx([(0.5 / (0.53 * 81)) ** 0.5] * 2)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = annotators(tmp_path, 2, 50, COCO17.oks_sigmas)
    out = tmp_path / "made" / "mine.json"
    assert main(["estimate-sigmas", *map(str, files), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "50 people by 2 annotators, matched by annotation id" in said
    assert "left_ankle" in said
    assert load_skeleton(out).num_keypoints == 17
    assert main(["estimate-sigmas", str(files[0]), "--out", str(out)]) == 2
    assert "two or more" in capsys.readouterr().err


def test_a_category_of_several(tmp_path: Path) -> None:
    files = annotators(tmp_path, 2, 30, (0.05, 0.1))
    plain = estimate_sigmas(files, tmp_path / "plain.json")
    for file in files:
        content = json.loads(file.read_text())
        (known,) = content["categories"]
        content["categories"] = [
            {**known, "name": "king cheetah"},
            {**known, "id": 2, "name": "dog"},
            {**known, "id": 3, "name": "fish", "keypoints": ["mouth", "tail"]},
        ]
        for animal in content["annotations"][::2]:
            animal["category_id"] = 2
        content["annotations"].append({**content["annotations"][0], "id": 999, "category_id": 3})
        file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="--category NAME"):
        estimate_sigmas(files, tmp_path / "none.json")
    every = estimate_sigmas(files, tmp_path / "all.json", category="all")
    assert every.sigmas.tolist() == plain.sigmas.tolist()
    dogs = estimate_sigmas(files, tmp_path / "dogs.json", category="dog")
    people = [of.repeated.labelled.shape[1] for of in (plain, every, dogs)]
    assert people[0] == people[1] > people[2] > 0
