"""The drawn set: valid COCO, true to its own pictures, anatomically possible, equal bytes every time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from hrnet_core.errors import ConfigError, DataError
from hrnet_core.skeleton import COCO17
from pipelines.draw import draw
from pipelines.drawn import visibility
from pipelines.drawn.body import pose_figure
from pipelines.drawn.brush import PARTS
from pipelines.drawn.looks import sample_body
from pipelines.drawn.person import Painted, View, look_at, paint_person
from pipelines.drawn.picture import ID_STEP, SPLITS, Drawing, annotate, draw_picture
from pipelines.drawn.stances import FAMILIES, sample_pose
from pipelines.sources.coco import read_coco

LEFT, RIGHT = COCO17.keypoints.index("left_shoulder"), COCO17.keypoints.index("right_shoulder")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "coco"
    summary = draw(folder, images=PICTURES, val_images=3, seed=SEED)
    assert summary.images == {"train2017": PICTURES, "val2017": 3}
    return folder


# Of this seed the first pictures hold a crowd, people without keypoints and a picture without people.
SEED, PICTURES = 3, 24


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    return [draw_picture(SEED, "train2017", index) for index in range(PICTURES)]


def annotations(root: Path, split: str = "train2017") -> list[dict[str, Any]]:
    return json.loads((root / "annotations" / f"person_keypoints_{split}.json").read_text())["annotations"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_bytes_on_any_number_of_processes(tmp_path: Path) -> None:
    draw(tmp_path / "one", images=5, val_images=2, seed=5, workers=1)
    draw(tmp_path / "two", images=5, val_images=2, seed=5, workers=2)
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert len(one) == 5 + 2 + 3
    assert one == two
    other = draw_picture(6, "train2017", 0).picture
    first = draw_picture(5, "train2017", 0).picture
    assert other.shape != first.shape or (other != first).any()
    assert (draw_picture(5, "train2017", 0).picture == first).all()


def test_pycocotools_and_our_reader_take_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, count in (("train2017", PICTURES), ("val2017", 3)):
        coco = COCO(str(root / "annotations" / f"person_keypoints_{split}.json"))
        assert len(coco.imgs) == count
        for image in coco.imgs.values():
            picture = cv2.imread(str(root / split / image["file_name"]))
            assert picture.shape == (image["height"], image["width"], 3)
            assert image["file_name"] == f"{image['id']:012d}.jpg"
        people = [a for a in coco.anns.values() if a["num_keypoints"] and not a["iscrowd"]]
        assert len(read_coco(root, split, COCO17).people) == len(people)
    category = coco.cats[1]
    assert tuple(category["keypoints"]) == COCO17.keypoints
    assert [16, 14] in category["skeleton"]  # COCO counts from 1: left ankle to left knee
    ids = [a["id"] for split in SPLITS for a in annotations(root, split)]
    assert len(ids) == len(set(ids))


def test_outlines_cover_the_area_they_claim(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = COCO(str(root / "annotations" / "person_keypoints_train2017.json"))
    ratios = [
        float(coco_mask.area(coco.annToRLE(a))) / a["area"] for a in coco.anns.values() if a["area"] > 300
    ]
    # Holes (a hand on the hip) are not part of a COCO polygon.
    assert 0.98 < np.median(ratios) < 1.04
    assert min(ratios) > 0.9
    assert max(ratios) < 1.35
    crowds = [a for a in coco.anns.values() if a["iscrowd"]]
    assert crowds
    for crowd in crowds:
        counts, size = crowd["segmentation"]["counts"], crowd["segmentation"]["size"]
        assert sum(counts) == size[0] * size[1]
        rle = coco_mask.frPyObjects(crowd["segmentation"], *size)
        assert coco_mask.area(rle) == crowd["area"]
        assert coco_mask.toBbox(rle).tolist() == crowd["bbox"]


def test_annotations_are_the_pixels_of_the_person(drawings: list[Drawing]) -> None:
    checked = 0
    for drawing in drawings:
        owner = drawing.ids // ID_STEP
        people = [p for p in drawing.people if (owner == p.number).any()]
        for annotation, person in zip(annotate(drawing, 7), people, strict=True):
            rows, columns = np.nonzero(owner == person.number)
            x, y, width, height = annotation["bbox"]
            assert annotation["area"] == len(rows)
            assert (columns.min(), rows.min()) == (x, y)
            assert (columns.max(), rows.max()) == (x + width - 1, y + height - 1)
            checked += 1
    assert checked > 1.5 * PICTURES


def test_visibility_is_what_the_picture_shows(drawings: list[Drawing]) -> None:
    counted = np.zeros(3, int)
    for drawing in drawings:
        height, width = drawing.ids.shape
        for person in drawing.people:
            if person.painted is None or not person.visible.any():
                continue
            for index, (name, (x, y), v) in enumerate(
                zip(COCO17.keypoints, person.keypoints, person.visible, strict=True)
            ):
                column, row = round(float(x)), round(float(y))
                inside = 0 <= column < width and 0 <= row < height
                counted[v] += 1
                if not inside:
                    assert v == 0
                    continue
                number, part = divmod(int(drawing.ids[row, column]), ID_STEP)
                own = number == person.number and PARTS[part - 1] in parts_of(name)
                if v == 2:
                    assert own, name
                elif v == 1 and own:
                    # The body's near side covers a joint of its far side.
                    assert behind(person.painted, name) > visibility.REACH[index] - 0.05, name
    assert counted[2] > 0.65 * counted.sum()
    assert counted[1] > 0.05 * counted.sum()


def parts_of(keypoint: str) -> set[str]:
    side, _, name = keypoint.rpartition("_")
    around = {
        "nose": ["head"], "eye": ["head"], "ear": ["ear"], "shoulder": ["torso", "upper_arm"],
        "elbow": ["upper_arm", "forearm"], "wrist": ["forearm", "hand"], "hip": ["torso", "thigh", "skirt"],
        "knee": ["thigh", "shank"], "ankle": ["shank", "foot"],
    }  # fmt: skip
    return {part for one in around[name] for part in (one, f"{side}_{one}")}


def behind(painted: Painted, keypoint: str) -> float:
    """How far, in statures, the nearest point of the body to us lies before a keypoint."""
    depth = {n: float((painted.view.turn @ p)[2]) for n, p in painted.figure.points.items()}
    return max(depth.values()) - depth[keypoint]


def test_labels_lie_in_the_picture_and_count_themselves(root: Path) -> None:
    sizes = {}
    for split in SPLITS:
        content = json.loads((root / "annotations" / f"person_keypoints_{split}.json").read_text())
        sizes |= {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        for annotation in content["annotations"]:
            x, y, v = np.array(annotation["keypoints"]).reshape(17, 3).T
            width, height = sizes[annotation["image_id"]]
            assert annotation["num_keypoints"] == (v > 0).sum()
            assert set(v) <= {0, 1, 2}
            assert not x[v == 0].any()
            assert not y[v == 0].any()
            assert (x[v > 0] >= -0.5).all()
            assert (x[v > 0] < width - 0.5 + 1e-6).all()
            assert (y[v > 0] >= -0.5).all()
            assert (y[v > 0] < height - 0.5 + 1e-6).all()


def test_there_are_crowds_empty_pictures_and_people_without_keypoints(root: Path) -> None:
    train = annotations(root)
    assert any(a["iscrowd"] and a["num_keypoints"] == 0 for a in train)
    assert any(not a["iscrowd"] and a["num_keypoints"] == 0 for a in train)
    labelled = [a for a in train if a["num_keypoints"] > 4]
    assert len(labelled) > 1.2 * PICTURES
    assert len({a["image_id"] for a in train}) < PICTURES


@pytest.mark.parametrize("family", FAMILIES)
def test_poses_keep_joint_limits_and_proportions(family: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(15):
        body, pose = sample_body(rng), sample_pose(rng, family)
        figure = pose_figure(body, pose)
        point, frame = figure.points, figure.frames
        for side in ("left", "right"):
            thigh, shank = (
                point[f"{side}_knee"] - point[f"{side}_hip"],
                point[f"{side}_ankle"] - point[f"{side}_knee"],
            )
            upper, fore = (
                point[f"{side}_elbow"] - point[f"{side}_shoulder"],
                point[f"{side}_wrist"] - point[f"{side}_elbow"],
            )
            lengths = [float(np.linalg.norm(v)) for v in (thigh, shank, upper, fore)]
            # Drillis and Contini 1966, fractions of stature; children and variety: within 13 %.
            assert lengths == pytest.approx([0.245, 0.246, 0.186, 0.146], rel=0.13)
            # Knees fold backwards only, elbows forwards only, neither folds up wholly.
            assert shank @ frame[f"{side}_thigh"][:, 2] < 1e-4
            assert fore @ frame[f"{side}_upper_arm"][:, 2] > -1e-4
            assert thigh @ shank > np.cos(np.radians(146)) * lengths[0] * lengths[1]
            assert upper @ fore > np.cos(np.radians(149)) * lengths[2] * lengths[3]
            # No thigh further back than 26 degrees behind the pelvis.
            assert thigh @ frame["pelvis"][:, 2] > -np.sin(np.radians(26)) * lengths[0]
        assert min(p[1] for p in point.values()) > -0.05  # nothing below the ground


def test_left_is_on_our_right_when_a_person_faces_us() -> None:
    rng = np.random.default_rng(2)
    light = np.array([0, -0.6, 0.8], np.float32)
    for _ in range(6):
        body = sample_body(rng)
        figure = pose_figure(body, sample_pose(rng, "walk"))
        for yaw, sign in ((0, 1), (180, -1)):
            view = View(look_at(yaw, 0, 0), 220.0, (200.0, 260.0), 5.0)
            painted = paint_person(body, figure, view, (400, 300), light, 0.5)
            assert sign * (painted.keypoints[LEFT, 0] - painted.keypoints[RIGHT, 0]) > 20
            eyes = painted.seen[1:3]
            assert (eyes == (visibility.TURNED_AWAY if yaw else visibility.VISIBLE)).all() or not yaw


@pytest.mark.parametrize(("joint", "yaw"), [("hip", 90), ("shoulder", 75)])
def test_from_the_side_the_near_joint_is_seen_and_the_far_one_is_not(joint: str, yaw: float) -> None:
    rng = np.random.default_rng(4)
    light = np.array([0, -0.6, 0.8], np.float32)
    near, far = COCO17.keypoints.index(f"right_{joint}"), COCO17.keypoints.index(f"left_{joint}")
    for _ in range(6):
        body = sample_body(rng)
        figure = pose_figure(body, sample_pose(rng, "arms_up"))
        view = View(look_at(yaw, 0, 0), 220.0, (200.0, 280.0), 5.0)
        painted = paint_person(body, figure, view, (400, 300), light, 0.5)
        assert painted.seen[near] == visibility.VISIBLE
        assert painted.seen[far] == visibility.HIDDEN


def test_a_finished_set_is_left_alone_and_a_broken_one_completed(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    first = draw(folder, images=3, val_images=1, seed=1)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert draw(folder, images=3, val_images=1, seed=1) == first
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    bytes_before = files(folder)
    (folder / "train2017" / "000001000001.jpg").unlink()
    assert draw(folder, images=3, val_images=1, seed=1) == first
    assert files(folder) == bytes_before
    with pytest.raises(DataError, match="other parameters"):
        draw(folder, images=3, val_images=1, seed=2)


def test_folders_of_others_and_impossible_counts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="mine"):
        draw(tmp_path / "mine", images=2)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigError, match=r"thesis\.txt is a file, not a folder"):
        draw(tmp_path / "mine" / "thesis.txt", images=2)
    for wrong in (
        {"images": 0},
        {"images": 2, "workers": 0},
        {"images": 2, "val_images": 0},
        {"images": 2, "seed": -1},
    ):
        with pytest.raises(ConfigError, match="must be at least"):
            draw(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()
    shutil.rmtree(tmp_path / "mine")
