"""COCO in and out: the published records, a reason for each refusal, errors that say what to do."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_coco import CATEGORY, annotation_file, edited, write_coco

from hrnet_core.errors import DataError
from hrnet_core.geometry import box_to_center_scale
from hrnet_core.skeleton import COCO17
from pipelines.poses.protocol import poses_to_results
from pipelines.sources import coco as coco_module
from pipelines.sources.coco import read_coco
from pipelines.sources.detections import read_detections
from pipelines.sources.records import Split

SOURCES = Path(__file__).parents[1] / "docs" / "sources.md"

Edit = Callable[[dict[str, Any]], Any]
TRAIN = "train2017"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco") / "root", {TRAIN: [2, 1, 1]})


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    """Three pictures, four people; the test's own copy."""
    return Path(shutil.copytree(pristine, tmp_path / "coco"))


@pytest.fixture
def fixture_root(mmpose_cases: dict[str, Any], tmp_path: Path) -> Path:
    """mmpose's 14-annotation fixture as a COCO root (pictures empty: nothing here opens them)."""
    fixture = mmpose_cases["coco_fixture"]
    data = {key: fixture[key] for key in ("images", "annotations")}
    data["categories"] = [{**fixture["category"], "keypoints": list(COCO17.keypoints)}]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    annotation_file(tmp_path, "val2017").write_text(json.dumps(data))
    for image in fixture["images"]:
        (tmp_path / "val2017" / image["file_name"]).touch()
    return tmp_path


def reasons(split: Split) -> dict[str, int]:
    return dict(Counter(r.reason for r in split.rejected))


def fails(root: Path, *words: str, split: str = TRAIN) -> None:
    """read_coco refuses in one paragraph that has all the words."""
    with pytest.raises(DataError) as caught:
        read_coco(root, split, COCO17)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


# ---------------------------------------------------------------------------------- published records


def test_the_published_loaders_records(
    fixture_root: Path, reference: dict[str, Any], mmpose_cases: dict[str, Any]
) -> None:
    split = read_coco(fixture_root, "val2017", COCO17)
    people = split.people
    assert len(people) == mmpose_cases["coco_fixture"]["facts"]["topdown_valid_instances"] == 12
    center, scale = box_to_center_scale(people.bbox_xywh, (192, 256))
    labelled = (people.keypoints[..., 2] > 0).sum(axis=1)
    ours = np.column_stack([people.image_id, center, scale / 200, labelled]).tolist()
    theirs = [
        (r["image_id"], *r["center"], *r["scale"], r["nvis"])
        for r in reference["official_gt_boxes_test_coco"]["records"]
    ]
    np.testing.assert_allclose(sorted(ours), sorted(map(list, theirs)), atol=2e-6, rtol=1e-6)
    unlabelled = mmpose_cases["coco_fixture"]["facts"]["num_keypoints_zero"]
    assert sorted(r.ann_id for r in split.rejected) == sorted(unlabelled)
    assert reasons(split) == {"no_keypoints": 2}
    assert not any(r.is_defect for r in split.rejected)


@pytest.mark.parametrize(
    ("split", "photos", "people", "crowds"), [(TRAIN, 78, 281, 9), ("val2017", 25, 99, 5)]
)
def test_real_coco(real_data: Path, split: str, photos: int, people: int, crowds: int) -> None:
    """The counts that the data's own README states."""
    found = read_coco(real_data / "coco", split, COCO17)
    assert (len(found.photos), len(found.people)) == (photos, people)
    assert reasons(found)["crowd"] == crowds
    assert {r.reason for r in found.rejected} == {"crowd", "no_keypoints"}
    assert all(Path(photo.path).is_file() for photo in found.photos)


def test_records_are_in_order_and_keep_visibility(root: Path) -> None:
    with edited(root) as data:
        data["annotations"].reverse()
        data["images"].reverse()
    split = read_coco(root, TRAIN, COCO17)
    assert [photo.image_id for photo in split.photos] == [10, 20, 30]
    people = split.people
    assert people.ann_id.tolist() == [1, 2, 3, 4]
    assert people.keypoints[0, :, 2].tolist() == [1, 2, 2, 2, 2, 1, 2, 2, 2, 2, 1, 2, 2, 2, 2, 1, 2]
    assert (people.keypoints.dtype, people.keypoints.shape) == (np.float64, (4, 17, 3))
    assert (people.bbox_xywh.dtype, people.bbox_xywh.shape) == (np.float32, (4, 4))


def test_the_path_comes_from_file_name_not_from_the_id(root: Path) -> None:
    (root / TRAIN / "sub").mkdir()
    (root / TRAIN / f"{TRAIN}-1.jpg").rename(root / TRAIN / "sub" / "some photo.jpg")
    with edited(root) as data:
        data["images"][1]["file_name"] = "sub/some photo.jpg"
    photo = read_coco(root, TRAIN, COCO17).photos[1]
    assert photo.path == str(root / TRAIN / "sub" / "some photo.jpg")
    assert photo.file_name == "sub/some photo.jpg"


# ---------------------------------------------------------------------------------- one person rejected


def _set(**fields: Any) -> Edit:
    return lambda annotation: annotation.update(fields)


def _drop(field: str) -> Edit:
    return lambda annotation: annotation.pop(field)


def _put(field: str, index: int, value: Any) -> Edit:
    return lambda annotation: annotation[field].__setitem__(index, value)


@pytest.mark.parametrize(
    ("reason", "edit"),
    [
        ("crowd", _set(iscrowd=1)),
        ("no_keypoints", _set(keypoints=[0] * 51, num_keypoints=0)),
        ("keypoints_length", _set(keypoints=[1, 1, 2] * 16)),
        ("no_keypoints", _drop("keypoints")),
        ("no_keypoints", _set(keypoints=[])),
        ("no_keypoints", _set(keypoints=None)),
        ("keypoints_length", _set(keypoints="1 1 2")),
        ("keypoints_invalid", _put("keypoints", 3, "12")),
        ("keypoints_invalid", _put("keypoints", 3, None)),
        ("keypoints_invalid", _put("keypoints", 3, True)),
        ("keypoints_invalid", _put("keypoints", 4, float("nan"))),
        ("keypoints_invalid", _put("keypoints", 4, 10**400)),
        ("visibility_invalid", _put("keypoints", 2, 3)),
        ("visibility_invalid", _put("keypoints", 2, 0.5)),
        ("bbox_invalid", _set(bbox=[1, 2, 3])),
        ("bbox_invalid", _set(bbox=[1, 2, 3, 4, 5])),
        ("bbox_invalid", _drop("bbox")),
        ("bbox_invalid", _set(bbox=[1, 2, "3", 4])),
        ("bbox_invalid", _set(bbox=[1, 2, float("nan"), 4])),
        ("bbox_invalid", _set(bbox=[1, 2, float("inf"), 4])),
        ("bbox_invalid", _set(bbox=[50, 20, -10, 30])),
        ("bbox_invalid", _set(bbox=[50, 20, 10, 0])),
        ("bbox_degenerate", _set(bbox=[500, 20, 10, 30])),
        ("bbox_degenerate", _set(bbox=[50.0, 20.0, 0.5, 0.5])),
    ],
)
def test_one_bad_annotation_costs_one_person(root: Path, reason: str, edit: Edit) -> None:
    with edited(root) as data:
        edit(data["annotations"][1])
    split = read_coco(root, TRAIN, COCO17)
    assert split.people.ann_id.tolist() == [1, 3, 4]
    (rejection,) = split.rejected
    assert (rejection.reason, rejection.image_id, rejection.ann_id) == (reason, 10, 2)
    assert rejection.file == f"{TRAIN}-0.jpg"
    assert rejection.detail
    assert rejection.is_defect == (reason not in ("crowd", "no_keypoints"))


@pytest.mark.parametrize(
    "edit",
    [
        _set(area=0),
        _set(area=-3.5),
        _set(area=float("nan")),
        _set(area="large"),
        _set(area=None),
        _drop("area"),
    ],
)
def test_without_an_area_above_0_it_is_the_boxs(root: Path, edit: Edit) -> None:
    with edited(root) as data:
        edit(data["annotations"][1])
        box = data["annotations"][1]["bbox"]
    split = read_coco(root, TRAIN, COCO17)
    assert split.people.area[1] == 0.53 * (box[2] * box[3])
    assert split.repaired == {"area_from_box": 1}


def test_a_box_partly_outside_is_clipped(root: Path) -> None:
    """x1 = max(0, -10) = 0, x2 = min(159, 0 + 79) = 79; y1 = 100, y2 = min(119, 100 + 49) = 119."""
    with edited(root) as data:
        data["annotations"][2]["bbox"] = [-10, 100, 80, 50]
    assert read_coco(root, TRAIN, COCO17).people.bbox_xywh[2].tolist() == [0, 100, 79, 19]


def test_harmless_contradictions_are_repaired_and_counted(root: Path) -> None:
    with edited(root) as data:
        first, second = data["annotations"][:2]
        first["keypoints"][2] = 0  # not labelled, yet with a place
        first["num_keypoints"] = 16
        second["num_keypoints"] = 3
        data["categories"].append({"id": 2, "name": "dog"})
        data["annotations"].append({**second, "id": 99, "category_id": 2})
    split = read_coco(root, TRAIN, COCO17)
    assert split.people.keypoints[0, 0].tolist() == [0, 0, 0]
    assert split.repaired == {"hidden_coordinates": 1, "num_keypoints": 1, "other_category": 1}
    assert len(split.people) == 4


# ---------------------------------------------------------------------------------- one picture rejected


@pytest.mark.parametrize(
    ("reason", "fields"),
    [
        ("missing_image", {"file_name": "nowhere.jpg"}),
        ("missing_image", {"file_name": "no/where.jpg"}),
        ("missing_image", {"file_name": f"{TRAIN}-0.JPG"}),
        ("missing_image", {"file_name": None}),
        ("path_outside_root", {"file_name": f"../{TRAIN}/{TRAIN}-0.jpg"}),
        ("path_outside_root", {"file_name": "/etc/passwd"}),
        ("path_outside_root", {"file_name": "C:/photos/a.jpg"}),
        ("path_outside_root", {"file_name": "..\\secret.jpg"}),
        ("path_outside_root", {"file_name": "a\0.jpg"}),
        ("image_size_invalid", {"width": 0}),
        ("image_size_invalid", {"height": "120"}),
        ("image_size_invalid", {"height": None}),
    ],
)
def test_one_bad_picture_costs_its_people(root: Path, reason: str, fields: dict[str, Any]) -> None:
    with edited(root) as data:
        data["images"][0].update(fields)
    split = read_coco(root, TRAIN, COCO17)
    assert [photo.image_id for photo in split.photos] == [20, 30]
    (rejection,) = split.rejected
    assert (rejection.reason, rejection.image_id, rejection.ann_id, rejection.people) == (reason, 10, None, 2)


@pytest.mark.parametrize("folder", ["/home/me/set/", "C:\\set\\", "../other/"])
def test_a_file_of_foreign_paths_alone_is_refused_once(root: Path, folder: str) -> None:
    """As labelme's exports have them: a sentence, not a row of each picture."""
    with edited(root) as data:
        for image in data["images"]:
            image["file_name"] = folder + image["file_name"]
        first = data["images"][0]["file_name"]
    told = re.escape(f"the first is {first!r}.") + f".*{root / TRAIN} is opened.*such as '{TRAIN}-0.jpg'"
    with pytest.raises(DataError, match=told):
        read_coco(root, TRAIN, COCO17)


def test_links_out_of_the_root_are_never_followed(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / TRAIN / f"{TRAIN}-0.jpg").rename(outside / "secret.jpg")
    (root / TRAIN / f"{TRAIN}-0.jpg").symlink_to(outside / "secret.jpg")
    (root / TRAIN / "door").symlink_to(outside)
    (root / TRAIN / "twin.jpg").symlink_to(root / TRAIN / f"{TRAIN}-2.jpg")
    with edited(root) as data:
        data["images"][1]["file_name"] = "door/secret.jpg"
        data["images"][2]["file_name"] = "twin.jpg"
    split = read_coco(root, TRAIN, COCO17)
    assert [(r.reason, r.image_id) for r in split.rejected] == [
        ("path_outside_root", 10),
        ("path_outside_root", 20),
    ]
    assert [photo.file_name for photo in split.photos] == ["twin.jpg"]
    assert "cp -rL" in split.rejected[0].detail, "the way out of a set that is made of links"


def test_the_pictures_folder_may_itself_be_a_link(root: Path, tmp_path: Path) -> None:
    (root / TRAIN).rename(tmp_path / "disk")
    (root / TRAIN).symlink_to(tmp_path / "disk")
    assert read_coco(root, TRAIN, COCO17).people.ann_id.tolist() == [1, 2, 3, 4]


def test_case_is_named_where_it_differs(root: Path) -> None:
    os.rename(root / TRAIN / f"{TRAIN}-0.jpg", root / TRAIN / f"{TRAIN}-0.JPG")
    (rejection,) = read_coco(root, TRAIN, COCO17).rejected
    assert rejection.reason == "missing_image"
    assert f"{TRAIN}-0.JPG" in rejection.detail


def test_another_suffix_is_named_and_the_folder_gone_through_once(root: Path) -> None:
    """A set whose pictures were all converted: at COCO's size a walk through the names for each took half an
    hour. Counted is how many names of files are asked to become lower case."""
    asked = []

    class Name(str):
        def lower(self) -> str:
            asked.append(str(self))
            return super().lower()

    listing = coco_module._Listing(str(root / TRAIN))
    listing._folders[""] = {Name(f"{i}.webp"): False for i in range(50)}
    found = [listing.find(f"{i}.jpg", needed=True) for i in range(50)]
    assert found[7] == ("missing_image", "no such file, but there is '7.webp'")
    assert listing.find("7", needed=True) == found[7]
    assert len(asked) <= 4 * 50


def test_a_missing_picture_without_people_costs_nothing(root: Path) -> None:
    with edited(root) as data:
        data["images"].append({"id": 40, "file_name": "nobody.jpg", "width": 9, "height": 9})
    split = read_coco(root, TRAIN, COCO17)
    assert split.rejected == ()
    assert [(photo.image_id, rows.stop - rows.start) for photo, rows in split.by_photo()] == [
        (10, 2),
        (20, 1),
        (30, 1),
    ]


# ---------------------------------------------------------------------------------- the file as a whole


def test_what_is_not_there_is_named(root: Path) -> None:
    fails(root / "elsewhere", "elsewhere", "--data.root")
    fails(
        root,
        "person_keypoints_val2017.json",
        "Splits with annotations here: train2017",
        "--data.root",
        split="val2017",
    )
    for inside in ("annotations", TRAIN):
        fails(root / inside, f"Give the folder that holds annotations/ and the pictures: {root}")
    file = annotation_file(root, TRAIN)
    packed = file.rename(f"{file}.gz")
    fails(root, f"there is {packed}", "gunzip")
    packed.rename(file)
    shutil.rmtree(root / TRAIN)
    fails(root, str(root / TRAIN), "no such folder")


def test_json_errors_name_the_byte(root: Path) -> None:
    file = annotation_file(root, TRAIN)
    text = file.read_text()
    file.write_text(text[:700])
    fails(root, str(file), "at byte", "of 700")
    file.write_text('{"images": "éé", oops}')  # two bytes each: the offset is in bytes, not characters
    fails(root, "at byte 19 of 24")
    file.write_bytes(b'{"images": "\xff"}')
    fails(root, "UTF-8", "byte 12")
    file.write_text("")
    fails(root, "at byte 0 of 0")
    file.write_text("[" * 100_000)
    fails(root, str(file))


def _renamed(names: list[str]) -> Edit:
    return lambda data: data["categories"][0].update(keypoints=names)


SWAPPED = ["nose", "right_eye", "left_eye", *COCO17.keypoints[3:]]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda data: data.pop("images"), ["'images'", "missing"]),
        (lambda data: data.update(annotations={}), ["'annotations'", "list"]),
        (lambda data: data.update(categories=[]), ["'categories'", "person_keypoints"]),
        (lambda data: data["categories"][0].pop("keypoints"), ["'categories'", "keypoint names"]),
        (
            lambda data: data["categories"].append(
                {**CATEGORY, "id": 2, "name": "person", "keypoints": SWAPPED}
            ),
            ["2 categories"],
        ),
        (_renamed(SWAPPED), ["another order", "position 1 has 'right_eye' instead of 'left_eye'", "coco17"]),
        (_renamed(list(COCO17.keypoints[:14])), ["14 keypoints instead of 17", "right_knee"]),
        (
            _renamed([f"k{i}" for i in range(133)]),
            ["missing 'left_ankle', ", "and 7 more; unknown 'k0', ", "and 123 more"],
        ),
        (_renamed(["snout", *COCO17.keypoints[1:]]), ["position 0 has 'snout'"]),
        (lambda data: data["images"][1].update(id=10), ["1 ids", "'images'", ": 10"]),
        (lambda data: data["annotations"][1].update(id=4), ["1 ids", "'annotations'", ": 4"]),
        (lambda data: data["annotations"][1].pop("id"), ["annotations[1].id"]),
        (lambda data: data["images"][2].update(id="30"), ["images[2].id", "'30'"]),
        (lambda data: data["annotations"][2].update(image_id=77), ["image_id", "ids 3"]),
        (lambda data: data["annotations"][2].update(category_id=7), ["category_id", "ids 3"]),
        (lambda data: data["annotations"][2].pop("category_id"), ["category_id", "annotation 3 has None"]),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused(root: Path, edit: Edit, words: list[str]) -> None:
    with edited(root) as data:
        edit(data)
    fails(root, str(annotation_file(root, TRAIN)), *words)


def test_results_are_no_annotations(root: Path) -> None:
    annotation_file(root, TRAIN).write_text("[]")
    fails(root, "list", "not annotations")


# ---------------------------------------------------------------------------------- detections


@pytest.fixture
def detections(mmpose_cases: dict[str, Any], tmp_path: Path) -> Path:
    rows = mmpose_cases["detector_fixture"]["all_records"]
    file = tmp_path / "detections.json"
    file.write_text(
        json.dumps([{"image_id": r[0], "category_id": 1, "bbox": r[1:5], "score": r[5]} for r in rows])
    )
    return file


def test_detections_of_the_published_fixture(
    fixture_root: Path, detections: Path, mmpose_cases: dict[str, Any]
) -> None:
    truth = mmpose_cases["detector_fixture"]
    split = read_coco(fixture_root, "val2017", COCO17)
    found, _ = read_detections(detections, split)
    assert len(found) == truth["records"] == 118
    assert dict(Counter(map(str, found.image_id.tolist()))) == truth["per_image"]
    assert len(read_detections(detections, split, 0.3)[0]) == truth["records_score_gt_0.3"] == 33
    # As given: no pixel is taken off, nothing is clipped.
    np.testing.assert_allclose(found.bbox_xywh[0], truth["first_record"]["bbox"], atol=1e-4)
    assert found.score[0] == pytest.approx(truth["first_record"]["score"], abs=1e-6)
    assert (found.ann_id[0], found.keypoints.any(), found.keypoints.shape) == (0, False, (118, 17, 3))


def test_detections_out_of_reach(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "boxes.json"
    good = {"image_id": 10, "category_id": 1, "bbox": [-5, 1, 400, 30], "score": 0.5}
    os.remove(root / TRAIN / f"{TRAIN}-2.jpg")
    split = read_coco(root, TRAIN, COCO17)
    gone, other, empty = {**good, "image_id": 30}, {**good, "category_id": 3}, {**good, "bbox": [1, 2, 0, 5]}
    file.write_text(json.dumps([good, gone, other, empty]))
    found, rejected = read_detections(file, split)
    assert (found.image_id.tolist(), found.ann_id.tolist()) == ([10], [0])
    assert found.bbox_xywh.tolist() == [[-5, 1, 400, 30]]
    assert [(r.reason, r.image_id, r.ann_id) for r in rejected] == [("bbox_invalid", 10, 3)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"annotations": []}, ["list", "annotation file"]),
        ([], ["no entries"]),
        ([[1, 2, 3, 4]], ["entry 0", "list"]),
        (
            [{"image_id": 10, "category_id": 1, "score": 1, "keypoints": []}],
            ["entry 0", "'bbox'", "keypoint results"],
        ),
        ([{"image_id": 10, "category_id": 1, "score": None, "bbox": [1, 1, 2, 2]}], ["'score'", "None"]),
        (
            [{"image_id": 10, "category_id": 1, "score": float("nan"), "bbox": [1, 1, 2, 2]}],
            ["'score'", "nan"],
        ),
        ([{"image_id": "10", "category_id": 1, "score": 1, "bbox": [1, 1, 2, 2]}], ["'image_id'", "'10'"]),
        (
            [{"image_id": 11, "category_id": 1, "score": 1, "bbox": [1, 1, 2, 2]}],
            ["1 image ids", ": 11", TRAIN],
        ),
        ([{"image_id": 10, "category_id": 1, "score": 0.1, "bbox": [1, 1, 2, 2]}], ["no box", "0.5"]),
    ],
)
def test_files_that_are_no_detections(root: Path, tmp_path: Path, content: Any, words: list[str]) -> None:
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(content))
    split = read_coco(root, TRAIN, COCO17)
    with pytest.raises(DataError) as caught:
        read_detections(file, split, 0.5)
    message = str(caught.value)
    assert [w for w in [str(file), *words] if w not in message] == [], message


# ---------------------------------------------------------------------------------- results


def test_results_are_sorted_float64_and_what_pycocotools_reads(root: Path) -> None:
    from pycocotools.coco import COCO

    rng = np.random.default_rng(1)
    keypoints = rng.uniform(0, 100, (4, 17, 2)).astype(np.float32)
    conf = rng.uniform(0, 1, (4, 17)).astype(np.float32)
    scores = np.array([0.1, 0.2, 0.3, 0.4]) / 3
    results = poses_to_results([20, 10, 10, 10], [5, 30, 4, 200], keypoints, conf, scores)
    assert [r["image_id"] for r in results] == [10, 10, 10, 20]
    assert [r["score"] for r in results] == [scores[2], scores[1], scores[3], scores[0]]  # ids 4, 30, 200; 5
    triples = np.array(results[0]["keypoints"]).reshape(17, 3)
    assert (triples[:, :2] == keypoints[2].astype(np.float64)).all()
    assert (triples[:, 2] == conf[2].astype(np.float64)).all()
    assert json.loads(json.dumps(results)) == results
    truth = COCO(str(annotation_file(root, TRAIN)))
    assert sorted(truth.loadRes(results).getImgIds()) == [10, 20, 30]


def test_results_that_are_not_finite_are_refused() -> None:
    keypoints, conf = np.zeros((2, 17, 2)), np.zeros((2, 17))
    keypoints[1, 3, 0] = np.nan
    with pytest.raises(DataError, match=r"1 poses.*image 8"):
        poses_to_results([7, 8], [1, 2], keypoints, conf, [0.5, 0.5])


# ---------------------------------------------------------------------------------- the docs


def test_the_example_of_the_docs_joins_exports_and_splits_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two exports with the same ids and names of files: everyone is there once, on their own picture."""
    (example,) = re.findall(r"```python\n(.*?)```", SOURCES.read_text(), re.DOTALL)
    boxes = Counter()
    for name, counts in (("one", [2] * 20), ("two", [1] * 15)):
        made = write_coco(tmp_path / name, {TRAIN: counts})
        (tmp_path / "exports").mkdir(exist_ok=True)
        annotation_file(made, TRAIN).rename(tmp_path / "exports" / f"{name}.json")
        (made / TRAIN).rename(tmp_path / "exports" / name)
        data = json.loads((tmp_path / "exports" / f"{name}.json").read_text())
        files = {image["id"]: f"{name}/{image['file_name']}" for image in data["images"]}
        boxes.update((files[a["image_id"]], *a["bbox"]) for a in data["annotations"])
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(SOURCES), "exec"), {})
    found: Counter[Any] = Counter()
    splits = [read_coco(tmp_path / "coco", name, COCO17) for name in ("train", "val")]
    for split in splits:
        assert split.rejected == ()
        names = {photo.image_id: photo.file_name for photo in split.photos}
        people = zip(split.people.image_id.tolist(), split.people.stated_xywh.tolist(), strict=True)
        found.update((names[image_id], *box) for image_id, box in people)
        assert all(Path(photo.path).is_file() for photo in split.photos)
    assert found == boxes
    assert len(splits[1].photos) > 0, "a tenth of 35 by their names"
