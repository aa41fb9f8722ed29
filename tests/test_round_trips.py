"""Round trips with the tools around us: supervision, pycocotools and ultralytics' labels, in and out."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from dots import SMALL, truth_of, write_coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from small_coco import annotation_file, edited

from hrnet_core.checkpoint import CheckpointSpec
from hrnet_core.errors import DataError
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.skeleton import COCO17
from pipelines.draw import draw
from pipelines.poses.formats import poses_of, write_all
from pipelines.poses.oks_ap import STATS, evaluate_results
from pipelines.poses.protocol import score_poses
from pipelines.settings.config import EvaluateSettings, PredictSettings
from pipelines.sources.boxes import read_boxes
from pipelines.sources.coco import read_coco
from pipelines.sources.media import list_media
from pipelines.sources.records import Split
from pipelines.sources.yolo import read_yolo

VAL = "val2017"
AGAIN = 22
"""Annotation 3 once more."""


@pytest.fixture(scope="module")
def sv() -> Any:
    import supervision

    return supervision


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures of different widths with two people each, the last without annotations; besides a
    crowd, somebody without keypoints, and one person twice."""
    root = write_coco(tmp_path_factory.mktemp("coco") / "root", photos=4)
    with edited(root, VAL) as data:
        people = [a for a in data["annotations"] if a["image_id"] != 103]
        for person in people[::2]:
            person["area"] *= 1.8  # large ones and medium ones
        alone = {"keypoints": [0] * 51, "num_keypoints": 0}
        people.append({**people[0], **alone, "id": 20, "iscrowd": 1, "bbox": [5, 5, 150, 30]})
        people.append({**people[0], **alone, "id": 21, "bbox": [1.5, 2.25, 20.5, 30.75]})
        people.append({**people[2], "id": AGAIN})
        data["annotations"] = people
    return root


@pytest.fixture(scope="module")
def results(root: Path) -> list[dict[str, Any]]:
    """Poses beside the truth, as evaluate scores and writes them."""
    split, rng = read_coco(root, VAL, COCO17), np.random.default_rng(0)
    places = split.people.keypoints[..., :2] + rng.normal(0, 4, (len(split.people), 17, 2))
    scores = rng.uniform(0.1, 1, (len(split.people), 17)).astype(np.float32)
    spec = CheckpointSpec(SMALL, HeatmapCodec("official", (96, 128)))
    poses = places.astype(np.float32), scores
    return score_poses(*poses, split.people, split.truth, spec, EvaluateSettings())[1]


def people_of(split: Split) -> list[tuple[Any, ...]]:
    """Everything of everyone but the ids."""
    names, people = {photo.image_id: photo.file_name for photo in split.photos}, split.people
    columns = people.keypoints, people.stated_xywh, people.bbox_xywh, people.area
    files = [names[image_id] for image_id in people.image_id.tolist()]
    return list(zip(files, *(column.tolist() for column in columns), strict=True))


def reasons(split: Split) -> dict[str, int]:
    return dict(Counter(r.reason for r in split.rejected))


def test_boxes_that_supervision_writes_are_read(sv: Any, root: Path, tmp_path: Path) -> None:
    """Its COCO has boxes, outlines, crowds and ids of its own, but no keypoints: who trains is told so."""
    ours, theirs = Path(shutil.copytree(root, tmp_path / "ours")), tmp_path / "theirs"
    with edited(ours, VAL) as data:  # it numbers the categories anew: bicycle becomes 1, person 2
        data["categories"] = [{**data["categories"][0], "id": 7}, {"id": 4, "name": "bicycle"}]
        for row in data["annotations"]:
            x, y, w, h = row["bbox"]
            outline = [] if row["image_id"] == 102 else [[x, y, x + w, y, x + w, y + h, x, y + h]]
            row |= {"category_id": 7, "segmentation": outline}
        data["annotations"].append({**data["annotations"][1], "id": 23, "category_id": 4})
    read = sv.DetectionDataset.from_coco(str(ours / VAL), str(annotation_file(ours, VAL)))
    read.as_coco(str(theirs / VAL), str(annotation_file(theirs, VAL)))
    written = truth_of(theirs)["annotations"]
    assert Counter(type(row["segmentation"] or None) for row in written) == {list: 7, dict: 1, type(None): 2}
    assert not any("keypoints" in row for row in written)
    expected = read_boxes(annotation_file(ours, VAL)).entries
    found, lost = read_boxes(annotation_file(theirs, VAL)).match(list_media([str(theirs / VAL)])[0])
    assert (list(found), lost) == (list(expected), [])
    counts = [(entry.image_id, len(entry.boxes)) for entry in found.values()]
    assert counts == [(1, 3), (2, 3), (3, 2), (4, 0)]
    for name, entry in found.items():
        assert (entry.size, entry.invalid) == (expected[name].size, ())
        np.testing.assert_allclose(entry.boxes, expected[name].boxes, atol=5e-5)
    with pytest.raises(DataError, match="no category that lists its keypoints"):
        read_coco(theirs, VAL, COCO17)


def test_predictions_open_in_supervision(sv: Any, root: Path, tmp_path: Path) -> None:
    """As KeyPoints, which its annotators draw where we say; and images.json with poses.json as a set."""
    rng, rows, listed = np.random.default_rng(1), [], list_media([str(root / VAL)])[0]
    for media, photo in zip(listed, truth_of(root)["images"], strict=True):
        points = rng.uniform([20, 20, 0.1], [180, 140, 1], (2, 17, 3)).ravel().tolist()
        row = {"name": media.name, "uri": media.uri, "frame": None, "image_id": photo["id"], "reason": None}
        row |= {"width": photo["width"], "height": photo["height"], "exif_rotated": False}
        row |= {"boxes_source": "boxes", "boxes_xywh": [10, 12, 70.5, 130, 105, 12, 70, 130.25]}
        rows.append(row | {"box_scores": [0.9, 0.5], "keypoints": points})
    write_all(rows, listed, str(tmp_path), PredictSettings(formats=("coco",)), COCO17)
    images, poses = (json.loads((tmp_path / name).read_text()) for name in ("images.json", "poses.json"))
    for row in rows:
        theirs = poses_of(row, COCO17).to_supervision()
        triples = [pose["keypoints"] for pose in poses if pose["image_id"] == row["image_id"]]
        same = np.dstack([theirs.xy, theirs.keypoint_confidence]).reshape(2, 51)
        np.testing.assert_array_equal(same, np.array(triples, np.float32))
        assert theirs.as_detections().confidence.tolist() == pytest.approx([0.9, 0.5])
        assert theirs.select(theirs.detection_confidence > 0.7).xy.tolist() == theirs.xy[:1].tolist()
        black = np.zeros((row["height"], row["width"], 3), np.uint8)
        dots = sv.VertexAnnotator(radius=2).annotate(black.copy(), theirs).any(axis=2)
        lines = sv.EdgeAnnotator(thickness=1).annotate(black.copy(), theirs).any(axis=2)
        x, y = theirs.xy.reshape(-1, 2).astype(int).T
        assert dots[y, x].all()
        assert dots.sum() <= 34 * 25 < lines.sum()
    together = {"categories": [{"id": 1, "name": "person"}], "images": images, "annotations": poses}
    (tmp_path / "set.json").write_text(json.dumps(together))
    opened = sv.DetectionDataset.from_coco(str(root / VAL), str(tmp_path / "set.json"))
    assert [Path(path).name for path in opened.image_paths] == [media.name for media in listed]
    for found in opened.annotations.values():
        assert found.xyxy.tolist() == [[10, 12, 80.5, 142], [105, 12, 175, 142.25]]


def test_drawn_people_open_in_supervision(sv: Any, tmp_path: Path) -> None:
    """The COCO set that we write: boxes, outlines as masks, and a crowd's run lengths to the pixel."""
    draw(tmp_path, 1, seed=3, val_images=4)
    opened = sv.DetectionDataset.from_coco(str(tmp_path / VAL), str(annotation_file(tmp_path, VAL)))
    found = [one for detections in opened.annotations.values() for one in detections]
    annotations, crowds = truth_of(tmp_path)["annotations"], 0
    for (box, mask, *_, data), row in zip(found, annotations, strict=True):
        x, y, w, h = row["bbox"]
        assert (box.tolist(), data["iscrowd"]) == ([x, y, x + w, y + h], row["iscrowd"])
        crowds += row["iscrowd"]
        # It fills polygons with their edge: by less than the box's own is long.
        assert 0 <= mask.sum() - row["area"] <= (0 if row["iscrowd"] else 2 * (w + h))
    assert (crowds, len(found)) == (1, 10)


def test_a_file_filtered_with_pycocotools_has_the_same_people(root: Path, tmp_path: Path) -> None:
    coco = COCO(str(annotation_file(root, VAL)))
    kept = [i for i in coco.getImgIds(catIds=coco.getCatIds(catNms=["person"])) if i != 101]
    people = coco.loadAnns(coco.getAnnIds(imgIds=kept, iscrowd=False))
    content = {"info": {}, "images": coco.loadImgs(kept), "annotations": people}
    annotation_file(tmp_path, VAL).parent.mkdir()
    annotation_file(tmp_path, VAL).write_text(json.dumps(content | {"categories": coco.loadCats([1])}))
    shutil.copytree(root / VAL, tmp_path / VAL)
    split, everyone = read_coco(tmp_path, VAL, COCO17), people_of(read_coco(root, VAL, COCO17))
    assert people_of(split) == [person for person in everyone if person[0] != "picture-1.png"]
    assert (sorted(kept), len(split.people), len(everyone)) == ([100, 102], 4, 7)
    assert reasons(split) == {"no_keypoints": 1}


@pytest.mark.parametrize(("first", "number"), [(0, int), (1, np.int64), (0, np.int64)])
def test_ids_from_0_and_floats_for_whole_numbers(
    root: Path, results: list[dict[str, Any]], tmp_path: Path, first: int, number: Any
) -> None:
    """json.dump refuses NumPy's integers, and default=float makes 1.0 of them: people and figures stay."""
    ours = Path(shutil.copytree(root, tmp_path / "coco"))
    data = truth_of(ours)
    ids = {image["id"]: first + index for index, image in enumerate(data["images"])}
    for index, row in enumerate(data["annotations"]):
        row |= {"id": first + index, "image_id": ids[row["image_id"]], "category_id": first}
    for row in data["images"]:
        row["id"] = ids[row["id"]]
    data["categories"][0]["id"] = first
    for row in (row for section in data.values() for row in section):
        row |= {key: number(value) for key, value in row.items() if type(value) is int}
    text = json.dumps(data, default=float)
    assert f'"image_id": {first if number is int else float(first)},' in text
    annotation_file(ours, VAL).write_text(text)
    split, before = read_coco(ours, VAL, COCO17), read_coco(root, VAL, COCO17)
    assert people_of(split) == people_of(before)
    assert reasons(split) == reasons(before) == {"crowd": 1, "no_keypoints": 1}
    renumbered = [r | {"image_id": number(ids[r["image_id"]]), "category_id": number(first)} for r in results]
    (tmp_path / "results.json").write_text(json.dumps(renumbered, default=float))
    found = evaluate_results(tmp_path / "results.json", annotation_file(ours, VAL))
    assert found == evaluate_results(results, annotation_file(root, VAL))


@pytest.mark.parametrize("boxes", [False, True], ids=["evaluate's", "predict's"])
def test_results_score_the_same_in_pycocotools(
    root: Path, results: list[dict[str, Any]], tmp_path: Path, boxes: bool
) -> None:
    """loadRes opens the file, and its own evaluation gives our ten figures to the last digit."""
    file = tmp_path / "results.json"
    box = {"bbox": [10.0, 12.0, 70.0, 130.0]} if boxes else {}
    file.write_text(json.dumps([result | box for result in results]))
    truth = COCO(str(annotation_file(root, VAL)))
    evaluator = COCOeval(truth, truth.loadRes(str(file)), "keypoints")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    ours = evaluate_results(file, annotation_file(root, VAL))
    assert ours == dict(zip(STATS, evaluator.stats.tolist(), strict=True))
    assert all(0 < ours[name] < 1 for name in ("AP", "APm", "APl", "AR"))


def write_as_ultralytics(truth: dict[str, Any], folder: Path) -> None:
    """What ultralytics' convert_coco(use_keypoints=True) leaves, told in our own words: a line a person with
    the class (category_id - 1), centre and size of the box, then x, y, v of each keypoint, places as
    fractions of the picture, every number with six digits as %g has it. Crowds are left out, and so is all
    but the first of equal boxes in a picture; a picture without annotations has no file."""
    folder.mkdir(parents=True)
    for image in truth["images"]:
        size, lines = np.array([image["width"], image["height"]]), {}
        for a in truth["annotations"]:
            if a["image_id"] == image["id"] and not a["iscrowd"]:
                corner, extent = np.array(a["bbox"], float).reshape(2, 2)
                places = np.array(a["keypoints"], float).reshape(-1, 3) / [*size, 1]
                values = a["category_id"] - 1, *(corner + extent / 2) / size, *extent / size, *places.flat
                lines.setdefault(tuple(a["bbox"]), " ".join(f"{value:g}" for value in values) + "\n")
        if lines:
            (folder / image["file_name"]).with_suffix(".txt").write_text("".join(lines.values()))


def test_labels_that_ultralytics_converted_have_the_same_people(root: Path, tmp_path: Path) -> None:
    """Within the rounding: half a unit of the sixth digit, times the side of the picture."""
    name = annotation_file(root, VAL).stem  # its folders are called as the annotation file is
    shutil.copytree(root / VAL, tmp_path / "images" / name)
    write_as_ultralytics(truth_of(root), tmp_path / "labels" / name)
    description = {"path": "../datasets/coco-pose", "train": "images/train2017", "val": f"images/{name}"}
    description |= {"test": None, "kpt_shape": [17, 3], "flip_idx": COCO17.flip_order.tolist()}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(description | {"names": {0: "person"}}))
    ours, theirs = read_coco(root, VAL, COCO17), read_yolo(tmp_path, "val", COCO17)
    ours = replace(ours, people=ours.people[ours.people.ann_id != AGAIN])
    one, other = ([(p.file_name, p.width, p.height) for p in split.photos] for split in (ours, theirs))
    assert one == other
    assert [person[0] for person in people_of(ours)] == [person[0] for person in people_of(theirs)]
    assert (len(theirs.people), reasons(theirs)) == (6, {"no_keypoints": 1, "no_label": 1})
    sizes = np.array([(p.width, p.height) for p in theirs.photos])[theirs.people.image_id - 1]
    half, off = 0.5e-6 * sizes + 1e-9, np.abs(theirs.people.keypoints - ours.people.keypoints)
    assert (off[..., :2] <= half[:, None]).all()
    assert (off[..., 2] == 0).all()
    # The corner is the centre less half the size: both were rounded.
    off = np.abs(theirs.people.stated_xywh - ours.people.stated_xywh)
    assert (off <= np.hstack([1.5 * half, half])).all()
