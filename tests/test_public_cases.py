"""Annotation files as people really have them (docs/bad-data.md): each kind with the AP that is owed to it.

The figures of a drawn set under a small network are taken once; whatever annotation tools change about it
that is neither a photograph, nor a person, nor a pose must leave them equal to the last digit.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import logging
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dots import rows_here, truth_of, write_solved
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hrnet_core.errors import DataError
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.skeleton import COCO17
from pipelines.evaluate import evaluate
from pipelines.poses.oks_ap import evaluate_results
from pipelines.settings.config import DataSettings, EvaluateSettings
from pipelines.sources.coco import read_coco
from pipelines.sources.findings import Validation
from pipelines.sources.yolo import read_yolo
from pipelines.validate import validate

CODEC = HeatmapCodec("official", (96, 128))
VAL = "val2017"
Content = dict[str, Any]
Edit = Callable[[Content], Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A root of 4 pictures and 8 people, a checkpoint, its figures and its results there."""
    folder = tmp_path_factory.mktemp("base")
    root, checkpoint = write_solved(folder, CODEC, photos=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.poses.units.rows_on_ray", rows_here)
        found = evaluate(checkpoint, root, out=folder / "out")
    assert 0.1 < found.stats["AP"] < 0.95
    return {"root": root, "checkpoint": checkpoint, "found": found}


@pytest.fixture
def coco(base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to change; actors work in this process."""
    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", rows_here)
    return Path(shutil.copytree(base["root"], tmp_path / "coco"))


def changed(coco: Path, edit: Edit) -> Path:
    content = truth_of(coco)
    edit(content)
    file = coco / "annotations" / f"person_keypoints_{VAL}.json"
    file.write_text(json.dumps(content))
    return file


def stats(base: dict[str, Any], root: Path, split: str = VAL, **settings: Any) -> dict[str, float]:
    out = root.parent / "out"
    return evaluate(
        base["checkpoint"], root, out=out, split=split, settings=EvaluateSettings(**settings)
    ).stats


def checked(root: Path, split: str = VAL, **settings: Any) -> Validation:
    return validate(root, DataSettings(train_split=split, val_split=split, **settings))


def kinds(found: Validation) -> set[str]:
    return {str(row["kind"]) for row in found.rows()}


def everyone(**fields: Any) -> Edit:
    return lambda content: [person.update(fields) for person in content["annotations"]]


def without(*names: str, section: str = "annotations") -> Edit:
    return lambda content: [row.pop(name) for row in content[section] for name in names]


# ---------------------------------------------------------------------------------- what decides nothing


def _ids_from_zero(content: Content) -> None:
    for number, person in enumerate(content["annotations"]):
        person["id"] = number


def _float_ids(content: Content) -> None:
    for row in (*content["annotations"], *content["images"], *content["categories"]):
        row.update({key: float(value) for key, value in row.items() if key.endswith("id")})


def _float_sizes(content: Content) -> None:
    for image in content["images"]:
        image.update(width=float(image["width"]), height=float(image["height"]))


def _second_category(content: Content) -> None:
    """A dog with a skeleton of 17 where each person is, and no person would be found by it."""
    content["categories"].append({"id": 2, "name": "dog", "keypoints": list(COCO17.keypoints)})
    for person in list(content["annotations"]):
        dog = {**person, "id": person["id"] + 1000, "category_id": 2, "keypoints": person["keypoints"][::-1]}
        content["annotations"].append({**dog, "keypoints": [5.0, 5.0, 2] * 17})


def _plain_boxes(content: Content) -> None:
    content["categories"].append({"id": 7, "name": "car"})
    for image in content["images"]:
        car = {"id": 5000 + image["id"], "image_id": image["id"], "category_id": 7, "bbox": [1, 1, 9, 9]}
        content["annotations"].append(car)


def _box_labels(content: Content) -> None:
    """CVAT: a rectangle beside each skeleton."""
    for person in list(content["annotations"]):
        box = {key: person[key] for key in ("image_id", "category_id", "bbox", "area")}
        content["annotations"].append({**box, "id": person["id"] + 1000, "keypoints": [], "num_keypoints": 0})


def _hidden(value: Any) -> Edit:
    """What stands for a place where v = 0."""

    def edit(content: Content) -> None:
        for person in content["annotations"]:
            for start in range(0, 51, 3):
                if person["keypoints"][start + 2] == 0:
                    person["keypoints"][start : start + 2] = [value, value]

    return edit


def _renamed(change: Callable[[str], str]) -> Edit:
    return lambda content: [image.update(file_name=change(image["file_name"])) for image in content["images"]]


@pytest.mark.parametrize(
    ("edit", "repaired"),
    [
        (_ids_from_zero, None),
        (lambda content: content["annotations"].reverse(), None),
        (without("num_keypoints"), None),
        (everyone(num_keypoints=0), "num_keypoints"),
        (everyone(num_keypoints=17), "num_keypoints"),
        (without("iscrowd"), None),
        (everyone(iscrowd=None), None),
        (everyone(iscrowd=float("nan")), None),
        (everyone(iscrowd="0"), None),
        (_second_category, "other_category"),
        (_plain_boxes, "other_category"),
        (_box_labels, "box_labels"),
        (_hidden(None), "null_coordinates"),
        (_hidden(float("nan")), "null_coordinates"),
        (_hidden(3.5), "hidden_coordinates"),
        (_float_ids, "whole_numbers"),
        (_float_sizes, "whole_numbers"),
        (without("width", "height", section="images"), "sizes_read"),
        (_renamed(lambda name: f"images\\{name}"), "file_names"),
        (_renamed(lambda name: f"{VAL}/{name}"), "file_names"),
        (_renamed(lambda name: f"home/me/set/{name}"), "file_names"),
    ],
)
def test_ap_is_of_photographs_people_and_poses(
    base: dict[str, Any],
    coco: Path,
    edit: Edit,
    repaired: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = changed(coco, edit)
    found = checked(coco)
    assert found.fatal == ()
    assert repaired is None or found.splits[0].split.repaired[repaired] > 0
    assert repaired is None or f"\n  {repaired} " in found.table()
    found_here = evaluate(base["checkpoint"], coco, out=coco.parent / "out")
    assert found_here.stats == base["found"].stats
    assert repaired is None or f"{repaired} " in found_here.table()
    images = {image["id"]: image["id"] for image in truth_of(coco)["images"]}
    results = json.loads(Path(base["found"].results_file).read_text())
    assert {row["image_id"] for row in results} <= set(images)
    with caplog.at_level(logging.INFO):
        assert evaluate_results(results, file) == base["found"].stats, "foreign results likewise"
    of_pictures = ("sizes_read", "file_names")  # which nobody opens to score a file
    assert repaired in (None, *of_pictures) or f"repaired: {repaired} " in caplog.text


def test_a_byte_order_mark(base: dict[str, Any], coco: Path) -> None:
    file = coco / "annotations" / f"person_keypoints_{VAL}.json"
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert checked(coco).splits[0].split.repaired == {"byte_order_mark": 1}
    assert stats(base, coco) == base["found"].stats


def test_composed_and_decomposed_names(base: dict[str, Any], coco: Path) -> None:
    """macOS unpacks é as e and an accent, JSON has it as one character."""
    changed(coco, _renamed(lambda name: unicodedata.normalize("NFC", f"é{name}")))
    for picture in list((coco / VAL).iterdir()):
        picture.rename(picture.with_name(unicodedata.normalize("NFD", f"é{picture.name}")))
    assert checked(coco).splits[0].split.repaired == {"file_names": 4}
    assert stats(base, coco) == base["found"].stats


@pytest.mark.parametrize(
    ("annotations", "pictures", "split"),
    [
        ("valid/_annotations.coco.json", "valid", "valid"),  # Roboflow
        ("annotations/person_keypoints_default.json", "images/default", "default"),  # CVAT
        ("annotations/default.json", "images", "default"),
        ("result.json", "images", "result"),  # Label Studio
    ],
)
def test_layouts(base: dict[str, Any], coco: Path, annotations: str, pictures: str, split: str) -> None:
    root = coco.parent / "root"
    (root / annotations).parent.mkdir(parents=True, exist_ok=True)
    (root / pictures).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(coco / VAL, root / pictures, dirs_exist_ok=True)
    shutil.copy(coco / "annotations" / f"person_keypoints_{VAL}.json", root / annotations)
    assert stats(base, root, split) == base["found"].stats
    assert checked(root, split).fatal == ()
    with pytest.raises(DataError, match=rf"Splits with annotations here: {split}\b.*--split"):
        stats(base, root, "train2017")


# ---------------------------------------------------------------------------------- area


@pytest.mark.parametrize("edit", [everyone(area=0), everyone(area=None), without("area")])
def test_without_areas_it_is_053_of_the_box(base: dict[str, Any], coco: Path, edit: Edit) -> None:
    """The same as if the file said so."""
    changed(coco, edit)
    found = checked(coco)
    assert (found.fatal, found.splits[0].split.repaired) == ((), {"area_from_box": 8})
    computed = stats(base, coco)
    stated = changed(
        coco, lambda c: [p.update(area=0.53 * (p["bbox"][2] * p["bbox"][3])) for p in c["annotations"]]
    )
    assert computed == stats(base, coco)
    results = json.loads((coco.parent / "out" / "results.json").read_text())
    assert computed == evaluate_results(results, stated)


def test_areas_of_the_box_are_told(base: dict[str, Any], coco: Path) -> None:
    changed(coco, lambda c: [p.update(area=p["bbox"][2] * p["bbox"][3]) for p in c["annotations"]])
    found = checked(coco)
    assert found.fatal == ()
    assert kinds(found) == {"area_is_box"}
    assert "8 of 8 areas are width x height" in found.table()
    assert stats(base, coco)["AP"] > base["found"].stats["AP"], "which is why"


# ---------------------------------------------------------------------------------- refused with the proof


def _corners(content: Content) -> None:
    for person in content["annotations"]:
        x, y, w, h = person["bbox"]
        person["bbox"] = [x, y, x + w, y + h]


def _scaled(factor: float | None) -> Edit:
    """Coordinates times `factor`; None: percent of the picture."""

    def edit(content: Content) -> None:
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        for person in content["annotations"]:
            by = [factor or 100 / side for side in sizes[person["image_id"]]]
            triples = np.array(person["keypoints"]).reshape(-1, 3) * [*by, 1]
            person["keypoints"] = triples.ravel().tolist()
            person["bbox"] = (np.array(person["bbox"]) * (by * 2)).tolist()

    return edit


def _twice(content: Content) -> None:
    content["annotations"] += [{**p, "id": p["id"] + 1000} for p in content["annotations"]]


def _two_annotators(content: Content) -> None:
    rng = np.random.default_rng(0)
    for person in list(content["annotations"]):
        moved = np.array(person["keypoints"]).reshape(-1, 3)
        moved[:, :2] += rng.uniform(-0.6, 0.6, (17, 2)) * (moved[:, 2:] > 0)
        other = {**person, "id": person["id"] + 1000, "keypoints": moved.ravel().tolist()}
        content["annotations"].append(other)


def _origin(content: Content) -> None:
    for person in content["annotations"]:
        person["keypoints"][:3] = [0, 0, 2]


@pytest.mark.parametrize(
    ("edit", "kind", "words"),
    [
        (_corners, "box_is_corners", "8 of 8 boxes hold their person as x, y, x2, y2"),
        (_scaled(None), "coordinates_scaled", "percent"),
        (_scaled(1 / 300), "bbox_degenerate", "fractions from 0 to 1"),
        (_scaled(0.5), "coordinates_scaled", "px of a smaller picture"),
        (_scaled(2), "keypoints_outside_picture", "people have labelled keypoints beyond their picture"),
        (_twice, "same_person_twice", "8 copies"),
        (_two_annotators, "same_person_twice", "16 of 16 people stand more than once"),
        (_origin, "visible_at_origin", "8 of 8 people"),
    ],
)
def test_what_most_people_prove_is_refused(
    base: dict[str, Any], coco: Path, edit: Edit, kind: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By validate, and by evaluate before its first forward pass."""
    monkeypatch.setattr("pipelines.sources.doubts.FEW", 5)
    changed(coco, edit)
    found = checked(coco)
    assert kind in kinds(found)
    assert [words in text for text in found.fatal].count(True) == 1, found.fatal
    monkeypatch.delattr("pipelines.poses.units.rows_on_ray")
    with pytest.raises(DataError, match=words):
        stats(base, coco)


def test_what_is_in_the_centre_of_all_pictures_is_not_scaled(
    coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mark on aligned pictures: from 45 to 55 % of each. Halved, it is no longer where anything is."""
    monkeypatch.setattr("pipelines.sources.doubts.FEW", 5)

    def centred(factor: float) -> Edit:
        def edit(content: Content) -> None:
            sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
            for number, mark in enumerate(content["annotations"]):
                w, h = sizes[mark["image_id"]]
                x, y = (factor * side * (0.45 + 0.1 * number / 8) for side in (w, h))
                mark.update(keypoints=[x, y, 2] + [0] * 48, area=200, bbox=[x - 10, y - 10, 20 + number, 20])

        return edit

    changed(coco, centred(1))
    assert checked(coco).fatal == ()
    changed(coco, centred(0.5))
    assert "px of a smaller picture" in checked(coco).fatal[0]


def test_a_fixed_camera_is_not_scaled_once_somebody_says_so(
    base: dict[str, Any], coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everyone passes above and left: annotations alone look as those of a smaller copy do."""
    monkeypatch.setattr("pipelines.sources.doubts.FEW", 5)
    for picture in (coco / VAL).iterdir():
        with Image.open(picture) as opened:
            size = opened.width, opened.height
            wide = opened.crop((0, 0, 2 * size[0], 2 * size[1]))  # black beyond, as a crop has it anyway
        wide.save(picture)
    file = changed(
        coco, lambda c: [i.update(width=2 * i["width"], height=2 * i["height"]) for i in c["images"]]
    )
    (text,) = checked(coco).fatal
    assert "--data.coordinates-checked, evaluate: --evaluate.coordinates-checked" in text
    with pytest.raises(DataError, match="px of a smaller picture"):
        stats(base, coco)
    found = checked(coco, coordinates_checked=True)
    assert (found.fatal, kinds(found)) == ((), {"coordinates_scaled"})
    settings = EvaluateSettings(coordinates_checked=True)
    scored = evaluate(base["checkpoint"], coco, out=coco.parent / "out", split=VAL, settings=settings)
    assert scored.stats == base["found"].stats
    assert "hrnet validate shows what looks wrong: coordinates_scaled 8" in scored.table()
    results = json.loads(Path(scored.results_file).read_text())
    assert evaluate_results(results, file, coordinates_checked=True) == scored.stats


def test_fractions_are_no_fixed_camera(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is of a pixel's size, whatever is said of the camera."""
    monkeypatch.setattr("pipelines.sources.doubts.FEW", 5)

    def fractions(content: Content) -> None:
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        for person in content["annotations"]:
            triples = np.array(person["keypoints"]).reshape(-1, 3) / [*sizes[person["image_id"]], 1]
            person.update(keypoints=triples.ravel().tolist(), bbox=[0, 0, 1.5, 1.5], area=1)

    changed(coco, fractions)
    (text,) = [t for t in checked(coco, coordinates_checked=True).fatal if "as if they were fractions" in t]
    assert "--data.coordinates-checked" not in text


def test_one_of_them_is_told_and_kept(base: dict[str, Any], coco: Path) -> None:
    def one(content: Content) -> None:
        first, second = content["annotations"][:2]
        content["annotations"].append({**first, "id": 999})
        second["keypoints"][:3] = [0, 0, 2]

    changed(coco, one)
    found = checked(coco)
    assert found.fatal == ()
    assert kinds(found) == {"same_person_twice", "visible_at_origin"}
    told = evaluate(base["checkpoint"], coco, out=coco.parent / "out").table()
    assert "hrnet validate shows what looks wrong: same_person_twice 2, visible_at_origin 1" in told
    assert stats(base, coco)["AP"] < base["found"].stats["AP"]


def test_left_and_right_exchanged(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.sources.doubts.FEW", 1)
    assert kinds(checked(coco)) == set()
    order = COCO17.flip_order.tolist()

    def exchanged(content: Content) -> None:
        for person in content["annotations"]:
            person["keypoints"] = np.array(person["keypoints"]).reshape(-1, 3)[order].ravel().tolist()

    changed(coco, exchanged)
    found = checked(coco)
    assert (kinds(found), found.fatal) == ({"left_right_exchanged"}, ())


def test_pictures_that_exif_turns(coco: Path) -> None:
    """Orientation 3 keeps the size, so nothing else would notice."""
    for picture in (coco / VAL).iterdir():
        exif = Image.Exif()
        exif[0x0112] = 3
        with Image.open(picture) as opened:
            opened.save(picture, exif=exif)
    found = checked(coco)
    assert kinds(found) == {"exif_turned"}
    assert "EXIF turns 4 of 4 pictures" in found.fatal[0]


def test_labels_of_a_phones_picture_as_it_is_shown(base: dict[str, Any], coco: Path) -> None:
    """Stored on its side, annotated upright: the original is there, and its pixels are what must change."""
    for picture in (coco / VAL).iterdir():
        exif = Image.Exif()
        exif[0x0112] = 6
        with Image.open(picture) as opened:
            stored = opened.transpose(Image.Transpose.ROTATE_90)
        stored.save(picture, exif=exif)
    (first, *_) = (row for row in checked(coco).rows() if row["kind"] == "size_differs")
    assert "as its EXIF turns it: turn the pixels, and drop the tag" in str(first["detail"])
    with pytest.raises(DataError, match="as its EXIF turns it: turn the pixels"):
        stats(base, coco)


def test_width_and_height_exchanged(coco: Path) -> None:
    changed(coco, lambda c: [i.update(width=i["height"], height=i["width"]) for i in c["images"]])
    details = {str(row["detail"]) for row in checked(coco).rows() if row["kind"] == "size_differs"}
    assert details
    assert all(detail.endswith(": width and height exchanged?") for detail in details)


@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_an_annotation_without_an_id_is_told(coco: Path, key: str) -> None:
    changed(coco, without(key))
    (text,) = checked(coco).fatal
    assert f"8 annotations have no whole number as {key}" in text
    assert "Write the id that an entry of 'images' or 'categories' has." in text


def test_the_same_picture_twice(coco: Path) -> None:
    first, second = sorted((coco / VAL).iterdir())[:2]
    size = Image.open(first).size
    shutil.copy(first, second)
    changed(coco, lambda c: c["images"][1].update(width=size[0], height=size[1]))
    assert kinds(checked(coco)) == {"same_picture_twice"}


# ---------------------------------------------------------------------------------- several categories


def test_several_categories_of_one_skeleton(base: dict[str, Any], coco: Path) -> None:
    """Animals: every second of them is of another species."""

    def species(content: Content) -> None:
        content["categories"] = [
            {"id": number, "name": name, "keypoints": list(COCO17.keypoints)}
            for number, name in ((1, "bison"), (2, "buffalo"))
        ]
        for animal in content["annotations"]:
            animal["category_id"] = 1 + animal["id"] % 2

    changed(coco, species)
    (text,) = checked(coco).fatal
    assert "bison, buffalo" in text
    assert "--data.category NAME" in text
    with pytest.raises(DataError, match=r"--evaluate\.category all"):
        stats(base, coco)
    assert stats(base, coco, category="all") == base["found"].stats
    assert checked(coco, category="all").splits[0].people == 8
    assert checked(coco, category="bison").splits[0].people == 4
    with pytest.raises(DataError, match="no category 'cow'"):
        stats(base, coco, category="cow")
    changed(coco, lambda c: [kind.update(keypoints=["head", "tail"]) for kind in c["categories"]])
    with pytest.raises(DataError, match="2 keypoints instead of 17"):
        stats(base, coco, category="all")


def test_boxes_and_results_of_several_categories(base: dict[str, Any], coco: Path) -> None:
    """Animals in ids as AP-10K's. A detector's boxes of each species are asked about, and its poses written
    under it, for pycocotools, which takes the mean over species; "all" is the AP of them as one."""
    species = {5: "bison", 0: "buffalo"}
    boxes = coco.parent / "boxes.json"
    people = truth_of(coco)["annotations"]

    def two(content: Content) -> None:
        content["categories"] = [
            {"id": number, "name": name, "keypoints": list(COCO17.keypoints)}
            for number, name in species.items()
        ]
        for animal in content["annotations"]:
            animal["category_id"] = list(species)[animal["id"] % 2]

    def detected(**fields: int) -> Path:
        rows = [{"image_id": p["image_id"], "bbox": p["bbox"], "score": 0.9, **fields} for p in people]
        for row, person in zip(rows, people, strict=True):
            row.setdefault("category_id", list(species)[person["id"] % 2])
        boxes.write_text(json.dumps(rows))
        return boxes

    def figures(category: str, **settings: Any) -> dict[str, Any]:
        of = EvaluateSettings(category=category, **settings)
        out = coco.parent / "out"
        found = evaluate(base["checkpoint"], coco, out=out, split=VAL, boxes=boxes, settings=of)
        return {"found": found, "results": json.loads((out / "results.json").read_text())}

    detected(category_id=1)
    plain = evaluate(base["checkpoint"], coco, out=coco.parent / "out", split=VAL, boxes=boxes)
    truth = changed(coco, two)
    detected()
    every = figures("all")
    assert every["found"].stats == plain.stats
    assert Counter(r["category_id"] for r in every["results"]) == {5: 4, 0: 4}
    found, apart = every["results"], np.zeros(2)
    for place, number in enumerate(species):
        own = coco.parent / f"{number}.json"
        content = json.loads(truth.read_text())
        rows = [row for row in content["annotations"] if row["category_id"] == number]
        own.write_text(json.dumps({**content, "annotations": rows, "categories": [{"id": number}]}))
        apart[place] = pycocotools_ap(own, [row for row in found if row["category_id"] == number])
    assert pycocotools_ap(truth, found) == pytest.approx(apart.mean())
    assert not np.allclose(apart, plain.stats["AP"], atol=0.01)
    assert evaluate_results(every["results"], str(truth), category="all") == plain.stats
    with pytest.raises(DataError, match=r"result \d .* is of category 5; people are 0"):
        evaluate_results(every["results"], str(truth), category="buffalo")
    each = [figures(name)["found"] for name in species.values()]
    assert [of.figures["people"] for of in each] == [4, 4]
    assert [of.protocol["preset"] for of in each] == [
        f"official category {name}" for name in species.values()
    ]
    detected(category_id=80)
    with pytest.raises(DataError, match=r"no entry has category_id 0, 5, .*--evaluate\.boxes-category all"):
        figures("all")
    for wanted in (80, "all"):
        assert figures("all", boxes_category=wanted)["found"].stats == plain.stats


def pycocotools_ap(truth: Path, results: list[dict[str, Any]]) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        annotations = COCO(str(truth))
        evaluator = COCOeval(annotations, annotations.loadRes([dict(row) for row in results]), "keypoints")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return float(evaluator.stats[0])


# ---------------------------------------------------------------------------------- YOLO-pose


def _yolo(coco: Path, *, dimensions: int = 3, first: str = "0", stretch: float = 0) -> Path:
    """The set as labels: a person a line."""
    root = coco.parent / "yolo"
    shutil.copytree(coco / VAL, root / "images" / "val")
    (root / "labels" / "val").mkdir(parents=True)
    content = truth_of(coco)
    for image in content["images"]:
        sides = np.array([image["width"], image["height"]])
        lines = []
        for person in (p for p in content["annotations"] if p["image_id"] == image["id"]):
            corner, size = np.array(person["bbox"]).reshape(2, 2) / sides
            triples = np.array(person["keypoints"]).reshape(-1, 3) / [*sides, 1]
            box = np.concatenate([corner + size / 2, size])
            box[0] = 1 + stretch if stretch else box[0]
            numbers = [*box, *triples[:, :dimensions].ravel()]
            lines.append(" ".join([first, *(f"{number:.6f}" for number in numbers)]))
        label = root / "labels" / "val" / Path(image["file_name"]).with_suffix(".txt").name
        label.write_text("\n".join(lines))
    return root


@pytest.mark.parametrize(
    ("labels", "description", "repaired"),
    [
        ({}, "val: images\\val", "file_names"),
        ({}, "val: C:\\data\\set\\images\\val", "file_names"),
        ({}, "val: /home/me/set/images/val", None),
        ({}, f"flip_idx: {list(range(17))}", "identity_flip_idx"),
        ({"dimensions": 2}, "kpt_shape: [17, 2]", "two_dimensions"),
        ({"stretch": 1e-6}, "names: [people]", "fractions_clipped"),
        ({"first": "1"}, "names: {0: dog, 1: person}", None),
        ({"first": "2"}, "names: [cat, dog, horse]\n# all", None),
    ],
)
def test_yolo_labels_as_tools_write_them(
    coco: Path, labels: dict[str, Any], description: str, repaired: str | None
) -> None:
    root = _yolo(coco, **labels)
    (root / "data.yaml").write_text(description)
    split = read_yolo(root, "val", COCO17, "all" if description.endswith("all") else None)
    assert len(split.people) == 8
    assert split.rejected == ()
    assert set(split.repaired) - {"area_from_box", "boxes_clipped"} == ({repaired} if repaired else set())
    stated = np.array([p["keypoints"] for p in truth_of(coco)["annotations"]]).reshape(-1, 17, 3)
    np.testing.assert_allclose(split.people.keypoints[..., :2], stated[..., :2], atol=2e-4)


def test_classes_counted_from_1(coco: Path) -> None:
    with pytest.raises(DataError, match=r"no line is of class 0.*8 lines of class 1.*count from 0"):
        read_yolo(_yolo(coco, first="1"), "val", COCO17)


# ---------------------------------------------------------------------------------- what a stranger tried


def _centers(content: Content) -> None:
    for person in content["annotations"]:
        x, y, w, h = person["bbox"]
        person["bbox"] = [x + w, y + h, w / 2, h / 2]


@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (lambda c: [p.update(area=p["area"] * 100) for p in c["annotations"]], "area_impossible"),
        (everyone(area=1.0), "area_impossible"),
        (_centers, "keypoints_outside_box"),
    ],
)
def test_what_nobody_can_mean(base: dict[str, Any], coco: Path, edit: Edit, kind: str) -> None:
    """AP 1.000 or .000 whatever the poses, before this was asked."""
    changed(coco, edit)
    found = checked(coco)
    assert kind in kinds(found)
    assert found.exit_code == 2
    with pytest.raises(DataError, match="of 8"):
        stats(base, coco)


def test_one_box_for_all_of_a_picture(coco: Path) -> None:
    changed(coco, everyone(bbox=[0, 0, 200, 160]))
    assert "8 of 8 people have the box of another of their picture" in " ".join(checked(coco).fatal)


@pytest.mark.parametrize("unit", ["x, y, x2, y2", "fractions from 0 to 1"])
def test_boxes_of_a_detector_that_are_none(base: dict[str, Any], coco: Path, unit: str) -> None:
    content, rows = truth_of(coco), []
    sizes = {image["id"]: np.array([image["width"], image["height"]]) for image in content["images"]}
    for person in content["annotations"]:
        corner, size = np.array(person["bbox"]).reshape(2, 2)
        box = np.concatenate([corner, corner + size])
        if unit.startswith("fractions"):
            box = np.concatenate([corner, size]) / np.tile(sizes[person["image_id"]], 2)
        row = {"image_id": person["image_id"], "category_id": 1, "score": 0.9}
        rows.append({**row, "bbox": box.tolist()})
    file = coco.parent / "boxes.json"
    file.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=f"boxes.json: .* boxes are {unit}"):
        evaluate(base["checkpoint"], coco, out=coco.parent / "out", boxes=file)


def test_who_is_not_asked_about_is_told(base: dict[str, Any], coco: Path) -> None:
    changed(coco, lambda c: c["annotations"][0].update(bbox=[90, 90, -70, -70]))
    told = evaluate(base["checkpoint"], coco, out=coco.parent / "out").table()
    assert "not asked about, counted as missed: bbox_invalid 1" in told


def test_nested_keypoints_and_two_names_for_people(base: dict[str, Any], coco: Path) -> None:
    def edit(content: Content) -> None:
        content["categories"] = [
            {**content["categories"][0], "name": "Person", "id": number} for number in (1, 2)
        ]
        for person in content["annotations"]:
            person["keypoints"] = np.array(person["keypoints"]).reshape(-1, 3).tolist()
            person["category_id"] = 1 + person["id"] % 2

    changed(coco, edit)
    assert stats(base, coco) == base["found"].stats
    assert stats(base, coco, category="person") == base["found"].stats
    assert checked(coco).splits[0].split.repaired == {"nested_keypoints": 8}


def test_nobody_to_score_against(base: dict[str, Any], coco: Path) -> None:
    file = changed(coco, everyone(iscrowd=1))
    with pytest.raises(DataError, match="nobody in it has labelled keypoints"):
        evaluate_results(json.loads(Path(base["found"].results_file).read_text()), file)


def test_annotations_without_their_pictures_folder(coco: Path) -> None:
    """labelme2coco: annotations.json beside JPEGImages/."""
    root = coco.parent / "root"
    shutil.copytree(coco / VAL, root / "JPEGImages")
    shutil.copy(coco / "annotations" / f"person_keypoints_{VAL}.json", root / "annotations.json")
    with pytest.raises(
        DataError, match="'annotations' has annotations here, but no folder with its pictures"
    ):
        read_coco(root, "annotations", COCO17)


def test_the_description_of_yolo_labels_under_another_name(coco: Path) -> None:
    root = _yolo(coco, first="1")
    (root / "dataset.yml").write_text("names: [dog, person]\nflip_idx: []\n")
    assert len(read_yolo(root, "val", COCO17).people) == 8
