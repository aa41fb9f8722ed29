"""YOLO-pose labels in: the same people as from COCO, a reason for each one left out, and no AP."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_coco import annotation_file, write_coco
from test_preprocess import TRAIN, VAL, config, rows, without_ray

from hrnet_core.errors import DataError
from hrnet_core.images import encode_jpeg
from hrnet_core.skeleton import COCO17, load_skeleton
from pipelines.preprocess import preprocess
from pipelines.settings.config import DataSettings, EvaluateSettings
from pipelines.sources.coco import read_coco
from pipelines.sources.evaluation_set import read_evaluation_set
from pipelines.sources.findings import WAY_OUT
from pipelines.sources.records import Split
from pipelines.sources.yolo import read_yolo
from pipelines.validate import validate

WIDTH, HEIGHT = 160, 120


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco") / "root", {TRAIN: [2, 1, 1], VAL: [1]})


@pytest.fixture
def root(coco: Path, tmp_path: Path) -> Path:
    """The same pictures with their annotations as YOLO-pose labels, six digits as its tools write."""
    root = tmp_path / "yolo"
    for split, name in ((TRAIN, "train"), (VAL, "val")):
        shutil.copytree(coco / split, root / "images" / name)
        (root / "labels" / name).mkdir(parents=True)
        data = json.loads(annotation_file(coco, split).read_text())
        files = {image["id"]: image["file_name"] for image in data["images"]}
        for annotation in data["annotations"]:
            label = root / "labels" / name / Path(files[annotation["image_id"]]).with_suffix(".txt")
            with open(label, "a") as stream:
                stream.write(line(annotation["bbox"], annotation["keypoints"]) + "\n")
    return root


def line(bbox: list[float], keypoints: list[float], kind: str = "0") -> str:
    x, y, w, h = bbox
    values = [(x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT]
    for px, py, v in np.array(keypoints).reshape(-1, 3).tolist():
        values += [px / WIDTH, py / HEIGHT, v]
    return " ".join([kind, *(f"{value:.6f}" for value in values)])


def label(root: Path, index: int = 0, split: str = "train") -> Path:
    return sorted((root / "labels" / split).glob("*.txt"))[index]


def reasons(split: Split) -> dict[str, int]:
    return dict(Counter(r.reason for r in split.rejected))


def fails(root: Path, *words: str, split: str = "train", skeleton: str = "coco17") -> None:
    with pytest.raises(DataError) as caught:
        read_yolo(root, split, load_skeleton(skeleton))
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


# ---------------------------------------------------------------------------------- the same people


def test_the_people_are_cocos(root: Path, coco: Path) -> None:
    """Beside read_coco on the same annotations: half a digit of six is 8e-5 px."""
    ours, theirs = read_yolo(root, "train", COCO17), read_coco(coco, TRAIN, COCO17)
    assert (len(ours.photos), len(ours.people), ours.rejected) == (3, 4, ())
    assert [p.file_name for p in ours.photos] == [p.file_name for p in theirs.photos]
    assert [(p.width, p.height) for p in ours.photos] == [(WIDTH, HEIGHT)] * 3
    assert [p.image_id for p in ours.photos] == [1, 2, 3]
    for mine, other in zip(ours.photos, theirs.photos, strict=True):
        assert Path(mine.path).read_bytes() == Path(other.path).read_bytes()
    assert ours.people.ann_id.tolist() == theirs.people.ann_id.tolist()
    np.testing.assert_allclose(ours.people.keypoints, theirs.people.keypoints, atol=1e-4)
    np.testing.assert_array_equal(ours.people.keypoints[..., 2], theirs.people.keypoints[..., 2])
    np.testing.assert_allclose(ours.people.bbox_xywh, theirs.people.bbox_xywh, atol=2.5e-4)
    assert ours.repaired == {"area_from_box": 4}


def test_the_area_is_that_of_the_box_by_the_stated_rule(root: Path) -> None:
    label(root).write_text(line([8, 6, 80, 60], [40, 30, 2] * 17) + "\n")
    assert read_yolo(root, "train", COCO17).people.area[0] == pytest.approx(0.53 * 80 * 60, rel=1e-5)


def test_the_rule_fits_real_people(real_data: Path) -> None:
    """COCO's segments fill 0.5 of their boxes in the median: what stands in for them is of their size."""
    people = json.loads((real_data / "coco/annotations/person_keypoints_train2017.json").read_text())
    ratios = [a["area"] / (a["bbox"][2] * a["bbox"][3]) for a in people["annotations"] if a["num_keypoints"]]
    assert 0.43 < np.median(ratios) < 0.63


def test_real_labels(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts that the data's own README states, and through preprocess: all pictures decode."""
    source = real_data / "coco_extra" / "yolo_pose"
    without_ray(monkeypatch)
    run = config(source, tmp_path / "s", format="yolo_pose", train_split="all", val_split="all")
    manifest = preprocess(run)
    split = manifest.split("all")
    assert (split["photos"], split["people"], split["rejected"]) == (35, 236, {})
    assert split["repaired"] == {"area_from_box": 236}
    assert split["annotation_file"] == "labels"
    crop = rows(manifest, "all")
    points = np.einsum("nij,nkj->nki", crop["image_to_crop"][..., :2], crop["keypoints"][..., :2])
    points += crop["image_to_crop"][:, None, :, 2]
    inside = ((points >= 0) & (points < [64, 96])).all(-1)
    assert inside[crop["keypoints"][..., 2] > 0].mean() > 0.98  # 0.985: COCO's boxes leave some joints out


# ---------------------------------------------------------------------------------- rejections


def _field(index: int, text: str) -> Callable[[str], str]:
    def change(first: str) -> str:
        fields = first.split()
        fields[index] = text
        return " ".join(fields)

    return change


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("keypoints_length", lambda first: " ".join(first.split()[:-3])),
        ("no_keypoints", lambda first: " ".join(first.split()[:5])),
        ("keypoints_length", lambda first: "0"),
        ("keypoints_invalid", _field(5, "abc")),
        ("keypoints_invalid", _field(5, "nan")),
        ("keypoints_invalid", _field(5, "1.2")),
        ("keypoints_invalid", _field(6, "-0.1")),
        ("visibility_invalid", _field(7, "0.5")),
        ("bbox_invalid", _field(1, "inf")),
        ("bbox_invalid", _field(1, "80.5")),
        ("bbox_invalid", _field(3, "0")),
        ("bbox_degenerate", lambda first: _field(1, "1")(_field(3, "0.000001")(first))),
        ("class_invalid", _field(0, "person")),
        ("no_keypoints", lambda first: " ".join(first.split()[:5] + ["0"] * 51)),
    ],
)
def test_a_line_is_rejected_by_its_kind(root: Path, reason: str, change: Callable[[str], str]) -> None:
    first, second = label(root).read_text().splitlines()
    label(root).write_text(f"{second}\n{change(first)}\n")
    split = read_yolo(root, "train", COCO17)
    assert reasons(split) == {reason: 1}
    (rejection,) = split.rejected
    assert (rejection.file, rejection.image_id, rejection.ann_id) == (f"{TRAIN}-0.jpg", 1, 2)
    assert rejection.detail.startswith(f"{TRAIN}-0.txt line 2: ")
    assert len(split.people) == 3


def test_fields_with_commas_are_told_in_a_line(root: Path) -> None:
    """All of the line is then one field: its start is shown, not 51 numbers."""
    first, _ = label(root).read_text().splitlines()
    label(root).write_text(",".join(first.split()))
    (rejection,) = read_yolo(root, "train", COCO17).rejected
    assert rejection.reason == "class_invalid"
    assert len(rejection.detail) < 90
    assert "spaces between its fields" in WAY_OUT[rejection.reason]


def test_a_value_outside_the_picture_says_so(root: Path) -> None:
    first, _ = label(root).read_text().splitlines()
    label(root).write_text(_field(5, "63.5")(first))
    assert "63.5, outside 0 to 1" in read_yolo(root, "train", COCO17).rejected[0].detail


def _exif(path: Path) -> None:
    content = path.read_bytes()
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    app1 = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
    path.write_bytes(content[:2] + b"\xff\xe1" + (len(app1) + 2).to_bytes(2, "big") + app1 + content[2:])


@pytest.mark.parametrize(
    ("reason", "people", "spoil"),
    [
        ("empty", 2, lambda picture, label: picture.write_bytes(b"")),
        ("not_an_image", 2, lambda picture, label: picture.write_text("<html>")),
        ("exif_rotated", 2, lambda picture, label: _exif(picture)),
        ("label_unreadable", 1, lambda picture, label: label.write_bytes(b"\xff\xfe\x00")),
        ("label_shared", 2, lambda picture, label: shutil.copy(picture, picture.with_suffix(".jpeg"))),
        ("no_label", 0, lambda picture, label: label.unlink()),
        ("empty_label", 0, lambda picture, label: label.write_text("\n")),
        ("missing_image", 2, lambda picture, label: picture.unlink()),
    ],
)
def test_a_picture_is_rejected_by_its_kind(
    root: Path, reason: str, people: int, spoil: Callable[[Path, Path], Any]
) -> None:
    picture = root / "images" / "train" / f"{TRAIN}-0.jpg"
    spoil(picture, label(root))
    split = read_yolo(root, "train", COCO17)
    found = [r for r in split.rejected if r.reason == reason]
    assert len(found) == len(split.rejected) == (2 if reason == "label_shared" else 1)
    assert (found[0].ann_id, found[0].people) == (None, people)
    assert found[0].is_defect == (reason not in ("no_label", "empty_label"))
    assert len(split.people) == 2


def test_other_classes_and_repeated_lines_are_counted(root: Path) -> None:
    first, second = label(root).read_text().splitlines()
    dog = " ".join(["1", *first.split()[1:]])
    label(root).write_text(f"{first}\n{dog}\n\n{second}\n{first}\n")
    split = read_yolo(root, "train", COCO17)
    assert (len(split.people), split.rejected) == (4, ())
    assert split.repaired == {"area_from_box": 4, "other_category": 1, "duplicates": 1}
    (root / "data.yaml").write_text("names: {0: dog, 1: person}\n")
    assert len(read_yolo(root, "train", COCO17).people) == 1


def test_a_place_that_is_not_labelled_is_dropped(root: Path) -> None:
    first = label(root).read_text().splitlines()[0].split()
    first[5:8] = ["7.5", "0.5", "0"]
    label(root).write_text(" ".join(first))
    split = read_yolo(root, "train", COCO17)
    assert split.repaired["hidden_coordinates"] == 1
    assert split.people.keypoints[0, 0].tolist() == [0, 0, 0]


# ---------------------------------------------------------------------------------- data.yaml and folders

ULTRALYTICS = """
path: ../datasets/mine   # where it lay for ultralytics
train: images/train
val: images/val
kpt_shape: [17, 3]
flip_idx: [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
names:
  0: person
"""


def test_data_yaml_as_ultralytics_writes_it(root: Path) -> None:
    plain = read_yolo(root, "train", COCO17)
    (root / "data.yaml").write_text(ULTRALYTICS)
    split = read_yolo(root, "train", COCO17)
    assert len(split.people) == 4
    assert split.annotation_sha256 != plain.annotation_sha256
    names = "\n".join(["kpt_names:", "  0:", *(f"    - {name}" for name in COCO17.keypoints)])
    (root / "data.yaml").write_text(ULTRALYTICS + names)
    assert len(read_yolo(root, "val", COCO17).people) == 1
    # Roboflow's layout: train/images beside train/labels, and a path that leaves the folder.
    (root / "train").mkdir()
    (root / "images" / "train").rename(root / "train" / "images")
    (root / "labels" / "train").rename(root / "train" / "labels")
    (root / "data.yaml").write_text(ULTRALYTICS.replace("images/train", "../train/images"))
    assert len(read_yolo(root, "train", COCO17).people) == 4
    fails(root, "images/valid: no such folder", "names the splits train, val", split="valid")


def test_folders_below_are_read_too(root: Path, tmp_path: Path) -> None:
    """As ultralytics does. They were passed over, and the set called good."""
    everyone = read_yolo(root, "train", COCO17)
    first = label(root)
    for kind, name in (("images", f"{first.stem}.jpg"), ("labels", first.name)):
        (root / kind / "train" / "clip 1").mkdir()
        (root / kind / "train" / name).rename(root / kind / "train" / "clip 1" / name)
    moved = read_yolo(root, "train", COCO17)
    assert sorted(photo.file_name for photo in moved.photos)[0] == f"clip 1/{first.stem}.jpg"
    assert all(Path(photo.path).is_file() for photo in moved.photos)
    assert moved.rejected == ()
    assert sorted(moved.people.bbox_xywh.tolist()) == sorted(everyone.people.bbox_xywh.tolist())
    # A folder may be a link, also one that leads back.
    (root / "images" / "train" / "clip 1").rename(tmp_path / "disk")
    (root / "images" / "train" / "clip 1").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "back").symlink_to(root / "images" / "train")
    assert read_yolo(root, "train", COCO17).photos == moved.photos


def test_pictures_without_a_label_are_counted_once(root: Path) -> None:
    label(root).unlink()
    data = DataSettings(format="yolo_pose", train_split="train", val_split="val")
    assert "train: 3 pictures in" in validate(root, data).table()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kpt_shape: [17, 4]", ["kpt_shape is [17, 4]", "[17, 3]"]),
        ("kpt_shape: [14, 3]", ["[14, 3]", "--data.skeleton"]),
        ("flip_idx: [0, 1]", ["flip_idx", "not 17 indices"]),
        (
            "flip_idx: [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 15, 16]",
            ["left_ankle (15) becomes left_ankle (15) instead of right_ankle (16)"],
        ),
        ("kpt_names: {0: [nose, left_eye]}", ["2 keypoints instead of 17", "missing"]),
        ("names: [cat, dog]", ["cat", "dog", "'person'"]),
        ("names: 3", ["names is 3"]),
        ("train: [images/a, images/b]", ["train is", "no list"]),
        ("train: train.txt", ["train.txt", "no list"]),
        ("train: /data/images/other", ["/data/images/other", "inside it"]),
        ("train: images/../../secret", ["inside it"]),
        ("train: pictures", ["'images'", "'labels'"]),
        ("train: images/other", ["images/other: no such folder"]),
        ("[1", ["not a readable YAML file"]),
        ("- a", ["mapping"]),
    ],
)
def test_a_description_that_contradicts_is_refused(root: Path, text: str, words: list[str]) -> None:
    (root / "data.yaml").write_text(text)
    fails(root, "data.yaml" if "no such" not in words[0] else "images", *words)


def test_an_order_like_cvats_is_shown_name_by_name(root: Path) -> None:
    names = list(COCO17.keypoints)
    names[5], names[6] = names[6], names[5]
    (root / "data.yaml").write_text(f"kpt_names: {{0: {names}}}")
    fails(
        root,
        "the same names in another order",
        "position 5 has 'right_shoulder' instead of 'left_shoulder'",
        "position 6 has 'left_shoulder' instead of 'right_shoulder'",
    )


def test_folders(root: Path, tmp_path: Path) -> None:
    fails(root, "images/test: no such folder", "labels/test/", split="test")
    fails(tmp_path / "nowhere", "nowhere: no such folder")
    fails(root, f"{root}/images: no pictures", "--data.train-split", split="all")
    shutil.move(str(root / "images" / "val"), root / "flat" / "images")
    shutil.move(str(root / "labels" / "val"), root / "flat" / "labels")
    assert len(read_yolo(root / "flat", "all", COCO17).people) == 1
    fails(root, "images/val: no such folder", split="val")
    split = read_yolo(root, "train", load_skeleton("crowdpose14"))
    assert reasons(split) == {"keypoints_length": 4}


# ---------------------------------------------------------------------------------- downstream


def test_preprocess_says_where_the_area_is_from(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    without_ray(monkeypatch)
    (root / "images" / "train" / "nobody.jpg").write_bytes(encode_jpeg(np.zeros((40, 40, 3), np.uint8)))
    run = config(root, tmp_path / "s", format="yolo_pose", train_split="train", val_split="val")
    manifest = preprocess(run)
    assert manifest.split("train")["repaired"] == {"area_from_box": 4}
    assert manifest.split("train")["annotation_file"] == "labels/train"
    assert manifest.split("train")["rejected"] == {"no_label": {"rows": 1, "people": 0}}
    assert "the annotations have no areas" in capsys.readouterr().out
    card = (tmp_path / "s" / "README.md").read_text()
    assert "train: 4 people have no annotated area" in card
    assert (rows(manifest, "train")["area"] > 0).all()
    preprocess(
        config(root, tmp_path / "s", format="yolo_pose", train_split="train", val_split="val", strict=True)
    )


def test_no_ap_on_such_labels(root: Path) -> None:
    for read in (
        lambda: read_coco(root, "val", COCO17),
        lambda: read_evaluation_set(root, "val", None, EvaluateSettings(), COCO17),
    ):
        with pytest.raises(DataError, match=r"YOLO-pose labels.*--data\.format yolo_pose.*AP"):
            read()
