"""Poses: order, formats of others, and scores as they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hrnet_core.errors import DataError
from hrnet_core.results import Boxes, Keypoints, Poses
from hrnet_core.skeleton import COCO17, Skeleton


@pytest.fixture
def poses() -> Poses:
    rng = np.random.default_rng(0)
    data = np.concatenate([rng.uniform(20, 300, (2, 17, 2)), rng.uniform(0.3, 1, (2, 17, 1))], axis=2)
    data[0, 4, 2] = -0.01  # a network's score may be below 0 and stays so
    data[1, :, 2] = 0.1
    boxes = np.array([[10, 20, 300, 290], [15.5, 18, 280, 290]], np.float32)
    return Poses(
        Keypoints(data.astype(np.float32)), Boxes(boxes, np.array([0.9, 0.5], np.float32)), (400, 500)
    )


def test_views_of_the_arrays(poses: Poses) -> None:
    assert poses.keypoints.xy.shape == (2, 17, 2)
    assert poses.keypoints.conf[0, 4] == np.float32(-0.01)
    assert poses.keypoints.visible(0.3)[0].sum() == 16
    assert poses.keypoints.visible(0.3)[1].sum() == 0
    assert poses.boxes.xyxy.tolist() == [[10, 20, 310, 310], [15.5, 18, 295.5, 308]]
    assert poses.names == {0: "person"}
    assert (len(poses), len(poses.keypoints), len(poses.boxes)) == (2, 2, 2)


def test_the_fields_of_ultralytics_results(poses: Poses) -> None:
    """By hand, of an image 500 wide and 400 high."""
    assert poses.keypoints.shape == (2, 17, 3)
    assert poses.keypoints.xyn[1, 3].tolist() == pytest.approx(
        [poses.keypoints.xy[1, 3, 0] / 500, poses.keypoints.xy[1, 3, 1] / 400]
    )
    assert poses.boxes.xyxyn[0].tolist() == pytest.approx([10 / 500, 20 / 400, 310 / 500, 310 / 400])
    assert poses.boxes.cls.tolist() == [0, 0]
    assert poses.names[int(poses.boxes.cls[0])] == "person"
    assert poses.boxes.id is None
    assert poses.keypoints.has_visible
    # As it is written for torch results.
    assert (poses.keypoints.cpu().numpy().data == poses.keypoints.data).all()
    assert poses.cpu().numpy() is poses
    assert poses.boxes.cpu().numpy().xyxy.shape == (2, 4)
    one = poses[1]
    assert (one.orig_shape, one.keypoints.orig_shape, one.boxes.orig_shape) == ((400, 500),) * 3
    assert one.keypoints.xyn.tolist() == poses.keypoints.xyn[1:].tolist()
    assert poses.keypoints[0].data.tolist() == poses.keypoints.data[:1].tolist()


def test_a_table_with_a_row_a_person(poses: Poses) -> None:
    table = Poses(poses.keypoints, poses.boxes, (400, 500), path="a.jpg").to_df()
    assert table.shape == (2, 3 + 5 + 51)
    assert table["path"].tolist() == ["a.jpg", "a.jpg"]
    assert table["nose_x"].tolist() == poses.keypoints.xy[:, 0, 0].tolist()
    assert table["right_ear_score"].iloc[0] == np.float32(-0.01)  # index 4, never zeroed
    assert table["box_w"].tolist() == [300, 280]
    assert table["score"].tolist() == poses.scores.tolist()
    assert len(poses[:0].to_df()) == 0


def test_supervision_gets_its_new_field_names(poses: Poses, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the constructor of supervision 0.29 and newer: unknown names are refused."""

    class KeyPoints:
        def __init__(
            self,
            xy: Any,
            class_id: Any = None,
            keypoint_confidence: Any = None,
            detection_confidence: Any = None,
            visible: Any = None,
            data: Any = None,
        ) -> None:
            self.__dict__.update(locals())

    supervision = ModuleType("supervision")
    supervision.KeyPoints = KeyPoints  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "supervision", supervision)
    found: Any = poses.to_supervision()
    assert (found.xy == poses.keypoints.xy).all()
    assert (found.keypoint_confidence == poses.keypoints.conf).all()
    assert found.detection_confidence.tolist() == poses.boxes.conf.tolist()
    assert (found.class_id.tolist(), found.data["class_name"].tolist()) == ([0, 0], ["person"] * 2)
    found.xy[:] = 0
    assert (poses.keypoints.xy != 0).all()


def test_score_is_box_times_mean_of_what_is_above_0_2(poses: Poses) -> None:
    conf = poses.keypoints.conf[0].astype(np.float64)
    assert poses.scores[0] == pytest.approx(0.9 * np.delete(conf, 4).mean(), rel=1e-6)
    assert poses.scores[1] == 0


def test_some_of_the_people(poses: Poses) -> None:
    assert poses[1].boxes.xywh.tolist() == poses.boxes.xywh[1:].tolist()
    assert len(poses[:0]) == 0
    assert (poses[poses.boxes.conf > 0.6].keypoints.data == poses.keypoints.data[:1]).all()
    assert (poses[-1].keypoints.data == poses.keypoints.data[1:]).all()
    assert [p.boxes.conf.tolist() for p in poses] == [
        poses.boxes.conf[:1].tolist(),
        poses.boxes.conf[1:].tolist(),
    ]
    with pytest.raises(IndexError):
        _ = poses[2]


def test_pycocotools_takes_the_results(poses: Poses) -> None:
    """The answers as their own ground truth give AP 1."""
    people = [
        {
            "id": i + 1,
            "image_id": 7,
            "category_id": 1,
            "iscrowd": 0,
            "bbox": box.tolist(),
            "area": 40_000.0,
            "num_keypoints": 17,
            "keypoints": np.c_[person[:, :2], np.full(17, 2)].reshape(-1).tolist(),
        }
        for i, (box, person) in enumerate(
            zip(poses.boxes.xywh.astype(float), poses.keypoints.data.astype(float), strict=True)
        )
    ]
    truth = COCO()
    truth.dataset = {"images": [{"id": 7}], "categories": [{"id": 1}], "annotations": people, "info": {}}
    truth.createIndex()
    results = poses.to_coco(7)
    json.dumps(results)
    assert results[0]["keypoints"][14] == pytest.approx(-0.01)
    assert results[0]["bbox"] == [10, 20, 300, 290]
    evaluator = COCOeval(truth, truth.loadRes(results), "keypoints")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    assert evaluator.stats[0] == pytest.approx(1)


def test_json_is_one_entry_of_the_http_answer(poses: Poses) -> None:
    answer = json.loads(poses.to_json())
    assert answer["image"] == {"width": 500, "height": 400}
    assert answer["boxes_source"] == "given"
    person = answer["persons"][0]
    assert set(person) == {"bbox", "score", "keypoints"}
    assert np.array(person["keypoints"], np.float32).tolist() == poses.keypoints.data[0].tolist()
    assert person["score"] == poses.scores[0]


def test_openpose_order_by_name(poses: Poses) -> None:
    """OpenPose's COCO-18: 0 nose, 1 neck, 2-4 right arm, 5-7 left arm, 8-10 right leg, 11-13 left leg,
    14 right eye, 15 left eye, 16 right ear, 17 left ear; COCO's own starts with nose, left eye."""
    frame = poses.to_openpose()
    json.dumps(frame)
    assert frame["converted"] == {"from": "coco17", "layout": "COCO_18", "synthetic": ["neck"]}
    ours = poses.keypoints.data[0]
    theirs = np.array(frame["people"][0]["pose_keypoints_2d"]).reshape(18, 3)
    coco_index = [0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]
    for row, index in enumerate(coco_index):
        if index is not None:
            assert theirs[row].tolist() == ours[index].tolist()
    assert theirs[1, :2].tolist() == pytest.approx(((ours[5, :2] + ours[6, :2]) / 2).tolist())
    assert theirs[1, 2] == min(ours[5, 2], ours[6, 2])
    assert len(frame["people"]) == 2
    assert poses[:0].to_openpose()["people"] == []


def test_openpose_needs_cocos_names(poses: Poses) -> None:
    three = Skeleton("three", ("a", "b", "nose"), (), (0.1, 0.1, 0.1))
    some = Poses(Keypoints(poses.keypoints.data[:, :3]), poses.boxes, (400, 500), three)
    with pytest.raises(DataError, match=r"'three' has no left_ankle"):
        some.to_openpose()


def test_plot_draws_on_a_copy(poses: Poses) -> None:
    image = np.full((400, 500, 3), 128, np.uint8)
    drawn = poses.plot(image)
    assert (image == 128).all()
    assert (drawn != 128).any()
    without = Poses(poses.keypoints, poses.boxes, (400, 500), COCO17, "whole_image").plot(image, threshold=2)
    assert (without == 128).all()  # nothing scores 2, and a box that nobody gave is not drawn


def test_plot_and_save_read_the_file_again(poses: Poses, tmp_path: Path) -> None:
    """EXIF is applied, as it was when the path was predicted: stored 400 wide, shown 500 wide."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (400, 500), (128, 128, 128)).save(tmp_path / "a.png", exif=exif)
    known = Poses(poses.keypoints, poses.boxes, (400, 500), path=str(tmp_path / "a.png"))
    image = np.full((400, 500, 3), 128, np.uint8)
    assert (known.plot() == poses.plot(image)).all()
    saved = known.save(tmp_path / "deep" / "drawn.png")
    assert (np.asarray(Image.open(saved)) == poses.plot(image)).all()
    assert Image.open(poses.save(tmp_path / "drawn.jpg", image)).size == (500, 400)
    with pytest.raises(DataError, match="know no file"):
        poses.plot()
    with pytest.raises(DataError, match=r"image is \(height, width\) \(10, 20\).*\(400, 500\)"):
        poses.plot(np.zeros((10, 20, 3), np.uint8))
    with pytest.raises(
        DataError, match=r"plot: the image must be a uint8 array .* got float64 \(400, 500, 3\)"
    ):
        poses.plot(image / 255.0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"plot: the image must be .* got str\. hrnet_core.images.read_image"):
        poses.plot("a.png")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"drawn\.webp: poses are drawn into a \.png or a \.jpg"):
        poses.save(tmp_path / "drawn.webp", image)
    with pytest.raises(DataError, match=r"gone\.png: cannot be read"):
        Poses(poses.keypoints, poses.boxes, (400, 500), path=str(tmp_path / "gone.png")).plot()
