"""Predict: any source in, every format out, and what becomes of everything that cannot be used."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from dots import SMALL, cut_short, rows_here, truth_of, write_solved
from numpy.typing import NDArray
from PIL import Image

from hrnet_core.checkpoint import CheckpointSpec, save_checkpoint
from hrnet_core.errors import CheckpointError, ConfigError, DataError
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.model import HRNet
from hrnet_core.predictor import PosePredictor
from hrnet_core.skeleton import Skeleton
from pipelines.cli import main
from pipelines.poses.oks_ap import evaluate_results
from pipelines.poses.plan import Still, Stretch
from pipelines.poses.units import digest_of
from pipelines.poses.worker import Worker
from pipelines.predict import Prediction, predict
from pipelines.settings.config import PredictSettings
from pipelines.sources.boxes import read_boxes
from pipelines.sources.media import Media, Video, list_media
from pipelines.sources.photos import open_photo
from pipelines.sources.records import Photo, Rejection
from pipelines.sources.rows import is_box

CODEC = HeatmapCodec("official", (96, 128))


@pytest.fixture(scope="module")
def dots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A COCO root of 6 pictures with 2 people each, and a network that finds most of them."""
    root, checkpoint = write_solved(tmp_path_factory.mktemp("dots"), CODEC)
    annotations = root / "annotations" / "person_keypoints_val2017.json"
    return {
        "pictures": root / "val2017",
        "annotations": annotations,
        "truth": truth_of(root),
        "checkpoint": checkpoint,
        "predictor": PosePredictor.load(checkpoint, device="cpu", mode="float32", threads=1),
    }


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The actors' work in this process."""
    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", rows_here)


def run(dots: dict[str, Any], sources: Any, out: Path, boxes: Any = None, **settings: Any) -> Prediction:
    sources = [str(s) for s in (sources if isinstance(sources, list) else [sources])]
    return predict(sources, dots["checkpoint"], out=out, boxes=boxes, settings=PredictSettings(**settings))


def load(file: Path) -> Any:
    return json.loads(file.read_text())


def rejected(out: Path) -> dict[str, str]:
    return {row["name"]: row["reason"] for row in load(out / "rejected.json")}


def picture(dots: dict[str, Any], index: int = 0) -> NDArray[np.uint8]:
    return cv2.imread(str(dots["pictures"] / f"picture-{index}.png"))[..., ::-1].copy()


# --- the whole way ------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_two_actors_on_ray_and_none_give_the_same_bytes(
    dots: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_ray = run(dots, dots["pictures"], tmp_path / "ray", dots["annotations"], batch_size=2, num_workers=2)
    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", rows_here)
    one = run(dots, dots["pictures"], tmp_path / "one", dots["annotations"], batch_size=2)
    for name in ("poses.json", "poses.parquet", "images.json", "rejected.json"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert on_ray.summary["plan"] == one.summary["plan"]
    assert on_ray.people_per_second > 0


def test_boxes_of_annotations_give_results_under_their_ids(
    dots: dict[str, Any], tmp_path: Path, here: None
) -> None:
    """pycocotools reads them; a person is what PosePredictor says of that box of that picture."""
    done = run(dots, dots["pictures"], tmp_path / "out", dots["annotations"])
    results = load(tmp_path / "out" / "poses.json")
    stats = evaluate_results(results, dots["truth"])
    assert 0.1 < stats["AP"] < 0.9
    assert done.summary["counts"] == {"pictures": 6, "people": 12}
    assert (done.summary["image_ids"], done.summary["exif"], done.summary["mode"]) == (
        "boxes file", "applied", "float32"
    )  # fmt: skip
    third = [a for a in dots["truth"]["annotations"] if a["image_id"] == 103]
    (poses,) = dots["predictor"](picture(dots, 3), [a["bbox"] for a in third])
    ours = [r for r in results if r["image_id"] == 103]
    expected = poses.to_coco(103)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine["keypoints"] == pytest.approx(theirs["keypoints"], abs=1e-3)
        assert mine["score"] == pytest.approx(theirs["score"], abs=1e-5)
        assert mine["bbox"] == pytest.approx(theirs["bbox"])
    images = load(tmp_path / "out" / "images.json")
    assert [(i["id"], i["file_name"], i["width"]) for i in images][:2] == [
        (100, "picture-0.png", 200),
        (101, "picture-1.png", 208),
    ]
    assert "12 people in 6 pictures, boxes: " in str(done)
    assert not (tmp_path / "out" / "unfinished").exists()


def test_every_format(dots: dict[str, Any], tmp_path: Path, here: None) -> None:
    formats = ("coco", "parquet", "openpose", "overlays")
    run(dots, dots["pictures"], tmp_path, dots["annotations"], formats=formats, draw_threshold=-9.0)
    results = load(tmp_path / "poses.json")
    table = pq.read_table(tmp_path / "poses.parquet")
    rows = table.to_pylist()
    assert [r["keypoints"] for r in rows] == [r["keypoints"] for r in results]
    assert [r["score"] for r in rows] == [r["score"] for r in results]
    assert [(r["name"], r["person"], r["frame"]) for r in rows[:3]] == [
        ("picture-0.png", 0, None),
        ("picture-0.png", 1, None),
        ("picture-1.png", 0, None),
    ]
    assert json.loads(table.schema.metadata[b"hrnet"])["skeleton"]["keypoints"][0] == "nose"
    frames = sorted(p.name for p in (tmp_path / "openpose").iterdir())
    assert frames == [f"picture-{i}_keypoints.json" for i in range(6)]
    people = load(tmp_path / "openpose" / frames[0])["people"]
    assert people[1]["pose_keypoints_2d"][:3] == pytest.approx(results[1]["keypoints"][:3])
    overlays = sorted((tmp_path / "overlays").iterdir())
    assert [p.name for p in overlays] == [f"picture-{i}.png.jpg" for i in range(6)]
    drawn = cv2.imread(str(overlays[0]))[..., ::-1]
    assert drawn.shape == picture(dots).shape
    changed = (np.abs(drawn.astype(int) - picture(dots)) > 60).any(axis=2)
    assert changed.mean() > 0.02
    x, y, w, _ = (round(v) for v in dots["truth"]["annotations"][0]["bbox"])
    assert changed[y, x : x + w].mean() > 0.8  # the box's upper edge


def test_without_boxes_each_picture_is_one_person(dots: dict[str, Any], tmp_path: Path, here: None) -> None:
    done = run(dots, dots["pictures"] / "picture-[01].png", tmp_path)
    (result, _) = load(tmp_path / "poses.json")
    assert result["bbox"] == [0, 0, 200, 160]
    assert result["image_id"] == 1
    assert {i["boxes_source"] for i in load(tmp_path / "images.json")} == {"whole_image"}
    assert done.summary["boxes"] == {"source": "whole picture"}


def test_a_call_that_was_cut_short_goes_on(
    dots: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = cut_short(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(dots, dots["pictures"], tmp_path / "a", dots["annotations"], batch_size=1)
    assert not (tmp_path / "a" / "prediction.json").exists()
    run(dots, dots["pictures"], tmp_path / "a", dots["annotations"], batch_size=1)
    run(dots, dots["pictures"], tmp_path / "b", dots["annotations"], batch_size=1)
    assert asked == [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    for name in ("poses.json", "poses.parquet", "images.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "going on, 2 of 6 units are there" in capsys.readouterr().out
    again = run(dots, dots["pictures"], tmp_path / "a", dots["annotations"], batch_size=1, num_workers=3)
    assert len(asked) == 3
    assert again.summary["counts"]["people"] == 12
    with pytest.raises(ConfigError, match=r"holds a prediction of other sources.*another --out"):
        run(dots, dots["pictures"], tmp_path / "a", batch_size=1)


def test_the_default_folder_is_the_calls_own(
    dots: dict[str, Any],
    tmp_path: Path,
    here: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    source = [str(dots["pictures"] / "picture-1.png")]
    assert main(["predict", *source, "--checkpoint", str(dots["checkpoint"])]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-3].startswith("1 people in 1 pictures, boxes: whole picture; ")
    first = predict(source, dots["checkpoint"])
    assert told[-2:] == [f"coco, parquet: {first.folder}", "image ids: numbered (images.json)"]
    assert "is there already" in capsys.readouterr().out
    other = predict(source, dots["checkpoint"], settings=PredictSettings(flip_test=False))
    assert Path(first.folder).parent == Path("runs/predictions")
    assert Path(first.folder).name.startswith("picture-1-")
    assert first.folder != other.folder
    assert (first.summary["flip_test"], other.summary["flip_test"]) == (True, False)


# --- what cannot be used ------------------------------------------------------------------------------


def test_bad_pictures_are_listed_and_the_others_answered(
    dots: dict[str, Any], tmp_path: Path, here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(dots["pictures"], folder)
    whole = (folder / "picture-0.png").read_bytes()
    bad = {
        "empty.jpg": (b"", "empty"),
        "page.jpg": (b"<html>404</html>", "not_an_image"),
        "cut.png": (whole[:900], "truncated"),
        "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(40), "truncated"),
        "scan.jp2": (b"\0\0\0\x0cjP  " + bytes(40), "unsupported_format"),
        "broken.mp4": (b"\0\0\0\x18ftypmp42" + bytes(400), "not_a_video"),
    }
    for name, (content, _) in bad.items():
        (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("no picture by its name")
    (folder / ".hidden.jpg").write_bytes(b"")
    done = run(dots, folder, tmp_path / "out")
    assert rejected(tmp_path / "out") == {name: reason for name, (_, reason) in bad.items()}
    assert done.summary["counts"] == {"pictures": 6, "people": 6}
    assert done.summary["passed_over"] == 1
    assert "left out: empty 1, not_a_video 1, not_an_image 1, truncated 2, unsupported_format 1" in str(done)
    assert "\n1 files of the folders are no pictures or videos by their names\n" in str(done)
    detail = {row["name"]: row["detail"] for row in load(tmp_path / "out" / "rejected.json")}
    assert "its end is missing" in detail["cut.png"]


def test_of_an_animation_the_first_frame_is_taken_and_told(
    dots: dict[str, Any], tmp_path: Path, here: None
) -> None:
    first, second = (Image.fromarray(np.roll(picture(dots), n, axis=1)) for n in (0, 9))
    several: dict[str, dict[str, Any]] = {"a.gif": {}, "b.webp": {"lossless": True}, "c.png": {}, "d.tif": {}}
    for name, settings in several.items():
        first.save(tmp_path / name, save_all=True, append_images=[second], **settings)
    first.save(tmp_path / "one.gif")
    done = run(dots, tmp_path, tmp_path / "out")
    images = load(tmp_path / "out" / "images.json")
    assert [i["file_name"] for i in images if i.get("first_of_several")] == list(several)
    assert all(i.get("first_of_several", True) for i in images)
    assert done.summary["counts"] == {"pictures": 5, "people": 5, "first_of_several": 4}
    assert "\n4 files hold several frames or pages: the first of each was taken\n" in str(done)


def test_avif_and_heic_are_pictures_of_a_folder(dots: dict[str, Any], tmp_path: Path, here: None) -> None:
    from test_images import HEIC, KINDS, PICTURE, save

    photos = {
        "a.HEIC": HEIC["turned-6"],
        "b.heif": HEIC["turned-1"],
        "c.avif": save(PICTURE, "AVIF", **KINDS["AVIF"]),
    }
    (tmp_path / "photos").mkdir()
    for name, content in photos.items():
        (tmp_path / "photos" / name).write_bytes(content)
    run(dots, tmp_path / "photos", tmp_path / "out")
    sizes = {
        row["file_name"]: (row["width"], row["height"]) for row in load(tmp_path / "out" / "images.json")
    }
    assert sizes == {"a.HEIC": (64, 96), "b.heif": (96, 64), "c.avif": (96, 64)}


def test_pictures_that_cannot_be_got_cost_a_row_each(
    dots: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One gone since the folder was listed, one that its bucket does not give, one of another size: by the
    words of the one function that opens pictures."""
    folder = Path(shutil.copytree(dots["pictures"], tmp_path / "photos"))
    content = load(dots["annotations"])
    content["images"][2]["width"] += 1
    (tmp_path / "boxes.json").write_text(json.dumps(content))

    def read(path: str, size: int | None = None) -> bytes:
        if path.endswith("picture-1.png"):
            raise DataError("s3://b/picture-1.png: the bucket did not give it (gone. Twice). Try again.")
        return Path(path).read_bytes()

    def later(*arguments: Any) -> Any:
        (folder / "picture-0.png").unlink()
        return rows_here(*arguments)

    monkeypatch.setattr("pipelines.sources.photos.read_file", read)
    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", later)
    done = run(dots, folder, tmp_path / "out", tmp_path / "boxes.json")
    listed = load(tmp_path / "out" / "rejected.json")
    photo = Photo(102, "picture-2.png", str(folder / "picture-2.png"), 217, 160)
    differs = open_photo(photo, 10**6)
    assert isinstance(differs, Rejection)
    assert [(row["name"], row["reason"], row["detail"]) for row in listed] == [
        ("picture-0.png", "missing_image", "no such file"),
        ("picture-1.png", "unreadable", "s3://b/picture-1.png: the bucket did not give it (gone. Twice)."),
        ("picture-2.png", "size_differs", differs.detail),
    ]
    assert done.summary["counts"] == {"pictures": 3, "people": 6}


def test_nothing_usable_at_all_is_an_error_and_still_listed(
    dots: dict[str, Any], tmp_path: Path, here: None
) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"none of 2 pictures .* a\.jpg: the file begins with b'nothing'"):
        run(dots, [tmp_path / "a.jpg", tmp_path / "b.jpg"], tmp_path / "out")
    assert set(rejected(tmp_path / "out")) == {"a.jpg", "b.jpg"}
    assert not (tmp_path / "out" / "prediction.json").exists()


def test_wrong_arguments_end_with_2_before_any_work(
    dots: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, checkpoint = str(dots["pictures"]), str(dots["checkpoint"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    (tmp_path / "b.json").write_text('{"else.jpg": [[1, 2, 3, 4]]}')
    os.mkfifo(tmp_path / "pipe.jpg")
    boxes = str(tmp_path / "b.json")
    for argv, named in (
        ([], "SOURCE is missing"),
        ([f"{tmp_path}/no/*.jpg"], "no/*.jpg: nothing there"),
        ([str(tmp_path / "empty")], "empty: nothing there"),
        ([str(tmp_path / "pipe.jpg")], "pipe.jpg: nothing there"),
        ([str(tmp_path / "texts")], "texts: no picture or video there"),
        ([f"file://{tmp_path}/none"], "none: nothing there"),
        (["nowhere://x/y"], "nowhere://x/y"),
        (
            [source, "--boxes", boxes],
            "its pictures (else.jpg ...) are none of the sources (picture-0.png ...)",
        ),
        ([source, "--boxes", boxes, "--detector", "d.onnx"], "boxes and detector are both given"),
        ([source, "--detector", "d.onnx"], "d.onnx: cannot be read"),
        ([source, "--out", boxes], f"--out {boxes}: {boxes} is a file, not a folder"),
        ([source, "--out", f"{boxes}/out"], f"--out {boxes}/out: {boxes} is a file, not a folder"),
        ([source, "--out", source], f"{source}: all 6 pictures and videos there lie in {source}, which is"),
        ([source, "--out", str(dots["pictures"].parent)], "Name another --out."),
        ([source, "--out", "nowhere://x/out"], "nowhere://x/out: not a folder that can be opened"),
    ):
        assert main(["predict", *argv, "--checkpoint", checkpoint]) == 2, argv
        error = capsys.readouterr().err
        assert named in error
        assert error.count("\n") == 1
    assert main(["predict", source, "--checkpoint", str(tmp_path / "none")]) == 2
    assert "no such checkpoint folder" in capsys.readouterr().err


def test_a_format_that_is_not_for_these_keypoints_is_refused_first(
    dots: dict[str, Any], tmp_path: Path
) -> None:
    three = Skeleton("three", ("a", "b", "c"), (), (0.1, 0.1, 0.1))
    small = replace(SMALL, num_keypoints=3)
    save_checkpoint(tmp_path / "three", HRNet(small), CheckpointSpec(small, CODEC, three))
    with pytest.raises(DataError, match="'three' has no left_ankle"):
        predict([str(dots["pictures"])], tmp_path / "three", settings=PredictSettings(formats=("openpose",)))


def test_a_diverged_network_rejects_what_it_answers(
    dots: dict[str, Any], tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*_: Any) -> Any:
        return np.full((1, 17, 2), np.nan, np.float32)

    monkeypatch.setattr("hrnet_core.predictor.place_in_image", diverged)
    with pytest.raises(DataError, match="gave NaN: its weights are damaged"):
        run(dots, dots["pictures"] / "picture-0.png", tmp_path)
    assert rejected(tmp_path) == {"picture-0.png": "not_finite"}


# --- EXIF ---------------------------------------------------------------------------------------------


def test_exif_orientation_is_applied_unless_it_is_said_otherwise(
    dots: dict[str, Any], tmp_path: Path, here: None
) -> None:
    """Stored lying, to be shown upright: the answer is that of the upright picture."""
    upright = picture(dots)
    lying = np.rot90(upright, 1)  # orientation 6 turns it clockwise to show it
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(lying)).save(tmp_path / "a.png", exif=exif)
    run(dots, tmp_path / "a.png", tmp_path / "applied")
    (expected,) = dots["predictor"](upright)
    (result,) = load(tmp_path / "applied" / "poses.json")
    assert result["keypoints"] == pytest.approx(expected.to_coco(1)[0]["keypoints"], abs=1e-3)
    (image,) = load(tmp_path / "applied" / "images.json")
    assert (image["width"], image["height"], image["exif_rotated"]) == (200, 160, True)

    run(dots, tmp_path / "a.png", tmp_path / "stored", exif=False)
    (image,) = load(tmp_path / "stored" / "images.json")
    assert (image["width"], image["height"], image["exif_rotated"]) == (160, 200, False)

    # Boxes of the stored pixels do not fit what is shown.
    content = {"images": [{"id": 5, "file_name": "a.png", "width": 160, "height": 200}]}
    content["annotations"] = [{"id": 1, "image_id": 5, "bbox": [1, 1, 50, 60]}]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"200 x 160 px once turned as its EXIF says \(--predict\.no-exif"):
        run(dots, tmp_path / "a.png", tmp_path / "c", tmp_path / "boxes.json")
    run(dots, tmp_path / "a.png", tmp_path / "d", tmp_path / "boxes.json", exif=False)
    assert load(tmp_path / "d" / "poses.json")[0]["image_id"] == 5


# --- boxes files --------------------------------------------------------------------------------------


def test_three_kinds_of_boxes_files_give_the_same_people(
    dots: dict[str, Any], tmp_path: Path, here: None
) -> None:
    folder = tmp_path / "numbered"
    folder.mkdir()
    for image in dots["truth"]["images"]:
        shutil.copy(dots["pictures"] / image["file_name"], folder / f"{image['id']:012d}.png")
    people = dots["truth"]["annotations"]
    detections = [
        {"image_id": a["image_id"], "category_id": 1, "bbox": a["bbox"], "score": 0.5} for a in people
    ]
    detections += [{"image_id": 100, "category_id": 3, "bbox": [1, 1, 9, 9], "score": 1.0}]  # no person
    detections += [{"image_id": 101, "category_id": 1, "bbox": [1, 1, 9, 9], "score": 0.1}]  # too low
    names = {
        f"{i:012d}.png": [[*a["bbox"], 0.5] for a in people if a["image_id"] == i] for i in range(100, 106)
    }
    found = {}
    for kind, content in (("detections", detections), ("names", names)):
        (tmp_path / f"{kind}.json").write_text(json.dumps(content))
        run(dots, folder, tmp_path / kind, tmp_path / f"{kind}.json", score_threshold=0.3)
        found[kind] = load(tmp_path / kind / "poses.json")
    run(dots, dots["pictures"], tmp_path / "truth", dots["annotations"])
    expected = load(tmp_path / "truth" / "poses.json")
    for results in found.values():
        assert [r["keypoints"] for r in results] == [r["keypoints"] for r in expected]
        assert [r["score"] for r in results] == pytest.approx([r["score"] / 2 for r in expected])
        assert [r["image_id"] for r in results] == [r["image_id"] for r in expected]
    # A picture without a detection keeps its id too, or the results would be of other pictures.
    shutil.copy(dots["pictures"] / "picture-0.png", folder / "000000000007.png")
    run(dots, folder, tmp_path / "more", tmp_path / "detections.json", score_threshold=0.3)
    assert load(tmp_path / "more" / "poses.json") == found["detections"]
    assert load(tmp_path / "more" / "images.json")[0]["id"] == 7


def test_detections_of_several_categories(dots: dict[str, Any], tmp_path: Path, here: None) -> None:
    """All of them are asked about, and the results have the category that they are to be scored as."""
    rows = [
        {
            "image_id": f"picture-{a['image_id'] - 100}.png",
            "category_id": 3 + 18 * (a["id"] % 2),
            "bbox": a["bbox"],
        }
        for a in dots["truth"]["annotations"]
    ]
    (tmp_path / "boxes.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"no entry has category_id 1, .*--predict\.boxes-category all"):
        run(dots, dots["pictures"], tmp_path / "none", tmp_path / "boxes.json")
    asked = {"boxes_category": "all", "category_id": 7}
    run(dots, dots["pictures"], tmp_path / "all", tmp_path / "boxes.json", **asked)
    assert [r["category_id"] for r in load(tmp_path / "all" / "poses.json")] == [7] * len(rows)


def test_boxes_that_are_none_and_pictures_that_have_none(
    dots: dict[str, Any], tmp_path: Path, here: None
) -> None:
    bad = [[1, 2, 0, 5], [1, 2, float("nan"), 5], [1, 2, 3], ["a", 2, 3, 4], [1, 2, 3, 4, "x"]]
    bad += [[1, 2, 1e-50, 5], [2e6, 2, 3, 5]]
    boxes = {"picture-0.png": [[10, 12, 70, 130], *bad], "picture-1.png": [], "other.png": [[1, 2, 3, 4]]}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    sources = [dots["pictures"] / f"picture-{i}.png" for i in range(3)]
    done = run(dots, sources, tmp_path / "out", tmp_path / "boxes.json")
    listed = load(tmp_path / "out" / "rejected.json")
    assert [(row["name"], row["reason"]) for row in listed] == [("picture-0.png", "bbox_invalid")] * 7
    assert "[1, 2, 0, 5] is not [x, y, w, h]" in listed[0]["detail"]
    assert done.summary["counts"] == {"pictures": 3, "people": 1}
    assert done.summary["boxes_unmatched"] == 1
    assert "1 entries of the boxes file fit no picture" in str(done)
    # Annotations name their pictures: another one is not theirs.
    extra = tmp_path / "extra.png"
    shutil.copy(sources[0], extra)
    run(dots, [*sources, extra], tmp_path / "b", dots["annotations"])
    assert rejected(tmp_path / "b") == {"extra.png": "not_in_boxes_file"}


@pytest.mark.parametrize("name", ["same.png", "000000000139.png"])
def test_boxes_of_a_name_that_two_sources_have_are_nobodys(
    dots: dict[str, Any], tmp_path: Path, here: None, name: str
) -> None:
    """They went to the first, and the second was answered with nobody."""
    folders, box = [tmp_path / "x", tmp_path / "y z"], [[10, 12, 70, 130]]
    for number, folder in enumerate(folders):
        folder.mkdir()
        shutil.copy(dots["pictures"] / f"picture-{number}.png", folder / name)
    boxes: Any = {name: box}
    if name != "same.png":
        boxes = [{"image_id": 139, "category_id": 1, "bbox": box[0], "score": 0.9}]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    for sources in (folders, [f"file://{str(folder).replace(' ', '%20')}" for folder in folders]):
        with pytest.raises(
            DataError, match=rf"Two sources have the name {name}; the second, .* one source at"
        ):
            run(dots, sources, tmp_path / "out", tmp_path / "boxes.json")
    second = name.replace(".png", "-2.png")
    (tmp_path / "boxes.json").write_text(json.dumps({name: box, second: box * 2}))
    done = run(dots, folders, tmp_path / "both", tmp_path / "boxes.json")
    assert done.summary["counts"] == {"pictures": 2, "people": 3}


@pytest.mark.parametrize(
    "box",
    [
        *([1, 2, 3, 4], [-7.5, 2, 3, 4], [1e6, 2, 3, 4], [1, 2, 1e-40, 4]),
        *([2e6, 2, 3, 4], [1, 2, 1e-50, 4], [1, 2, 0, 4], [1, 2, 3], [float("inf"), 2, 3, 4], "box"),
    ],
)
def test_a_box_is_what_the_predictor_takes(dots: dict[str, Any], box: Any) -> None:
    """Asked of a file before any work, by predict and evaluate alike; what else is found ends an actor."""
    taken = True
    try:
        dots["predictor"].prepare(np.zeros((9, 9, 3), np.uint8), [box])
    except DataError:
        taken = False
    assert is_box(box) == taken


def test_annotations_are_read_as_elsewhere_and_need_no_keypoints(
    dots: dict[str, Any], tmp_path: Path
) -> None:
    """Boxes in the file's order, of the category person: keypoints, categories and ids may be missing."""
    content = load(dots["annotations"])
    content["annotations"] = content["annotations"][::-1]
    boxes = [a["bbox"] for a in content["annotations"] if a["image_id"] == 103]
    for row in content["annotations"]:
        del row["keypoints"], row["num_keypoints"], row["area"], row["iscrowd"]
    content["categories"] = [{"id": 2, "name": "dog"}, {"id": 1, "name": "person"}]
    content["annotations"].append({"id": 0, "image_id": 103, "category_id": 2, "bbox": [1, 1, 5, 5]})
    for bare in (False, True):
        if bare:
            del content["categories"], content["annotations"][-1]
            for row in content["annotations"]:
                del row["id"], row["category_id"]
        (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(content).encode()))
        entry = read_boxes(tmp_path / "b.json.gz").entries["picture-3.png"]
        np.testing.assert_array_equal(entry.boxes, np.float32([[*box, 1] for box in boxes]))


def test_a_plan_has_one_digest_in_every_process(tmp_path: Path) -> None:
    """Of numbers and names alone, never of pickled bytes: a second call finds the units of the first."""
    boxes = np.float32([[10.1, 20, 30, 40, 0.5]])
    clip = Media("clip.avi", "/clip.avi", "video", 7, 8)
    asked = [Still(Media("a.jpg", "/a.jpg", "picture", 5, 6), boxes, 1, (9, 8)), Still(clip, None)]
    asked.append(Stretch(clip, boxes[:0], 0, 4, 14, {2: boxes, 11: boxes[:0]}))
    assert digest_of("spec", asked) == "a16de723fd41e665"
    again = pickle.loads(pickle.dumps(asked))
    assert digest_of("spec", again) == "a16de723fd41e665"
    assert digest_of("spec", [replace(asked[0], boxes=boxes + 1), *asked[1:]]) != "a16de723fd41e665"


def test_crowds_are_no_boxes(tmp_path: Path) -> None:
    content: dict[str, Any] = {"images": [{"id": 1, "file_name": "a.jpg", "width": 9, "height": 9}]}
    content["categories"] = [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}]
    rows = [(1, 0), (1, 1), (2, 0)]
    content["annotations"] = [
        {"id": i, "image_id": 1, "category_id": c, "iscrowd": crowd, "bbox": [i, 1, 5, 5]}
        for i, (c, crowd) in enumerate(rows)
    ]
    (tmp_path / "b.json").write_text(json.dumps(content))
    entry = read_boxes(tmp_path / "b.json").entries["a.jpg"]
    assert (entry.boxes.tolist(), entry.size, entry.image_id) == ([[0, 1, 5, 5, 1]], (9, 9), 1)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("7", "it is a number"),
        ("[]", "it is empty"),
        ("[7]", "entry 0 has no image_id and bbox: 7"),
        ('[{"image_id": 1, "keypoints": [1]}]', "entry 0 has no image_id and bbox"),
        (
            '[{"image_id": 1, "bbox": [1, 2, 3, 4], "category_id": [1]}]',
            "category_id of entry 0 is [1], no integer",
        ),
        ('{"a.jpg": 7}', "the value of 'a.jpg' is 7"),
        ('{"a.mp4": {"first": []}}', "'a.mp4' has the key 'first', which is no frame number"),
        ('{"images": [{"id": "x"}]}', "images[0].id is 'x', no integer of 64 bits"),
        ('{"images": [{"id": 1}]}', "image 1 has no file_name"),
        (
            '{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}',
            "1 ids stand more than once in 'images': 1",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2}]}',
            "the image_id of 1 annotations",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a"}, {"id": 2, "file_name": "a"}]}',
            "images 1 and 2 have one file_name, 'a'",
        ),
        ('{"images": [], "annotations": []}', "it is empty"),
        ('{"a.jpg": [', "not valid JSON at byte 11 of 11"),
    ],
)
def test_another_kind_of_file_is_one_paragraph(tmp_path: Path, content: str, named: str) -> None:
    file = tmp_path / "boxes.json"
    file.write_text(content)
    with pytest.raises(DataError) as caught:
        read_boxes(file)
    assert named in str(caught.value)
    assert "boxes.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_detector_finds_the_boxes(dots: dict[str, Any], tmp_path: Path, here: None) -> None:
    """A red patch in an else grey picture; none in another: the one person is in the patch."""
    from test_detector import RECTANGLE, picture as red_picture, rtdetr_like  # noqa: I001

    cv2.imwrite(str(tmp_path / "red.png"), red_picture()[..., ::-1])
    done = predict(
        [str(tmp_path / "red.png")],
        dots["checkpoint"],
        out=tmp_path / "out",
        detector=rtdetr_like(tmp_path),
        settings=PredictSettings(),
    )
    (result,) = load(tmp_path / "out" / "poses.json")
    assert result["bbox"] == pytest.approx(RECTANGLE.tolist(), abs=2)
    (expected,) = dots["predictor"](red_picture(), [result["bbox"]], [0.9])
    assert result["score"] == pytest.approx(expected.scores[0], abs=1e-5)
    assert load(tmp_path / "out" / "images.json")[0]["boxes_source"] == "detector"
    assert done.summary["boxes"]["declaration"]["layout"] == "boxes"


# --- videos -------------------------------------------------------------------------------------------


def write_video(file: Path, dots: dict[str, Any], frames: int, code: str = "MJPG") -> Path:
    """Frame n is picture 0, moved n px to the right."""
    image = picture(dots)
    writer = cv2.VideoWriter(str(file), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*code), 12.0, (200, 160))
    assert writer.isOpened()
    for n in range(frames):
        writer.write(np.roll(image, n, axis=1)[..., ::-1].copy())
    writer.release()
    return file


@pytest.mark.parametrize(("suffix", "code"), [(".avi", "MJPG"), (".mp4", "mp4v")])
def test_every_frame_of_a_video_is_answered_in_order(
    dots: dict[str, Any], tmp_path: Path, here: None, suffix: str, code: str
) -> None:
    """14 frames in units of 4 with one box that stays: what cv2 reads, through PosePredictor."""
    clip = write_video(tmp_path / f"clip{suffix}", dots, 14, code)
    (tmp_path / "boxes.json").write_text(json.dumps({clip.name: [[10, 12, 74, 130]]}))
    formats = ("coco", "parquet", "openpose", "videos")
    done = run(dots, clip, tmp_path / "out", tmp_path / "boxes.json", batch_size=2, formats=formats)
    assert done.summary["counts"] == {"frames": 14, "people": 14}
    rows = pq.read_table(tmp_path / "out" / "poses.parquet").to_pylist()
    assert [(r["frame"], r["image_id"]) for r in rows] == [(n, n + 1) for n in range(14)]
    capture = cv2.VideoCapture(str(clip))
    for row in rows[:9]:
        frame = capture.read()[1][..., ::-1]
        if row["frame"] in (0, 5, 8):
            (expected,) = dots["predictor"](frame.copy(), [[10, 12, 74, 130]])
            assert row["keypoints"] == pytest.approx(expected.keypoints.data.ravel().tolist(), abs=1e-3)
    assert (tmp_path / "out" / "openpose" / "clip_000000000013_keypoints.json").exists()
    name = "clip.mp4" if suffix == ".mp4" else "clip.avi.mp4"
    drawn = cv2.VideoCapture(str(tmp_path / "out" / "videos" / name))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 14
    assert drawn.get(cv2.CAP_PROP_FPS) == pytest.approx(12)
    frame = drawn.read()[1][..., ::-1].astype(int)
    assert frame.shape == (160, 200, 3)
    assert (np.abs(frame - picture(dots)) > 80).any(axis=2)[12, 14:80].mean() > 0.5  # the box's upper edge


def test_a_video_held_upright_is_read_upright(dots: dict[str, Any], tmp_path: Path, here: None) -> None:
    """As phones write it: frames stored lying, and a matrix in the track's header that turns them."""
    clip = write_video(tmp_path / "clip.mp4", dots, 3, "mp4v")
    content = bytearray(clip.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # ISO 14496-12, 8.3.2, version 0
    quarter = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 160 << 16, 0, 1 << 30], ">i4")
    content[matrix : matrix + 36] = quarter.tobytes()
    clip.write_bytes(content)
    run(dots, clip, tmp_path / "out", formats=("coco", "videos"))
    images = load(tmp_path / "out" / "images.json")
    assert [(i["width"], i["height"]) for i in images] == [(160, 200)] * 3
    drawn = cv2.VideoCapture(str(tmp_path / "out" / "videos" / "clip.mp4")).read()[1][..., ::-1]
    assert drawn.shape == (200, 160, 3)
    shown = np.rot90(picture(dots), -1)  # clockwise
    assert np.abs(drawn.astype(int) - shown).mean() < np.abs(drawn.astype(int) - shown[::-1, ::-1]).mean() / 2


def test_boxes_by_frame_and_every_third_frame(dots: dict[str, Any], tmp_path: Path, here: None) -> None:
    clip = write_video(tmp_path / "clip.avi", dots, 14)
    box = [10, 12, 74, 130]
    boxes = {"clip.avi": {"0": [box, box], "3": [box], "4": [box], "9": []}}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    done = run(dots, clip, tmp_path / "out", tmp_path / "boxes.json", batch_size=1, video_stride=3)
    rows = pq.read_table(tmp_path / "out" / "poses.parquet").to_pylist()
    assert [(r["frame"], r["person"]) for r in rows] == [(0, 0), (0, 1), (3, 0)]
    assert [i["frame"] for i in load(tmp_path / "out" / "images.json")] == [0, 3, 6, 9, 12]
    assert done.summary["counts"] == {"frames": 5, "people": 3}


def test_boxes_of_frames_that_are_not_there_are_told(
    dots: dict[str, Any], tmp_path: Path, here: None
) -> None:
    """After a video's end, which may lie in its last stretch or before that; and of a picture."""
    clip, box = write_video(tmp_path / "clip.avi", dots, 14), [10, 12, 74, 130]
    shutil.copy(dots["pictures"] / "picture-0.png", tmp_path / "a.png")
    boxes = {"clip.avi": {str(n): [box] for n in (0, 13, 14, 10**10)}, "a.png": {"0": [box]}}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    sources = [clip, tmp_path / "a.png"]
    done = run(dots, sources, tmp_path / "out", tmp_path / "boxes.json", batch_size=4)
    assert done.summary["counts"] == {"pictures": 1, "frames": 14, "people": 2}
    still, late = load(tmp_path / "out" / "rejected.json")
    assert (still["name"], still["reason"], late["reason"]) == ("a.png", "bbox_invalid", "bbox_invalid")
    assert "boxes by frame number belong to a video" in still["detail"]
    assert (late["name"], late["frame"]) == ("clip.avi", 14)
    assert f"2 frames, 14 to {10**10}, fit no frame: 14 can be read" in late["detail"]

    whole = write_video(tmp_path / "whole.avi", dots, 40).read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.json").write_text(json.dumps({"cut.avi": {str(n): [box] for n in range(40)}}))
    done = run(dots, tmp_path / "cut.avi", tmp_path / "cut", tmp_path / "cut.json", batch_size=4)
    listed = load(tmp_path / "cut" / "rejected.json")
    assert {row["reason"] for row in listed} == {"video_cut_off", "bbox_invalid"}
    told = [re.search(r"boxes of (?:(\d+) frames|frame)", row["detail"]) for row in listed]
    assert done.summary["counts"]["people"] + sum(int(found[1] or 1) for found in told if found) == 40


def test_a_video_that_is_cut_off_is_answered_up_to_there(
    dots: dict[str, Any], tmp_path: Path, here: None
) -> None:
    whole = write_video(tmp_path / "whole.avi", dots, 40).read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    done = run(dots, tmp_path / "cut.avi", tmp_path / "out", batch_size=4)
    (row,) = load(tmp_path / "out" / "rejected.json")
    assert row["reason"] == "video_cut_off"
    assert 15 < done.summary["counts"]["frames"] == row["frame"] < 25
    assert f"no frame can be read after {row['frame']}, its header promises 40" in row["detail"]


@pytest.mark.parametrize("stride", [1, 3])
def test_a_video_that_is_cut_off_is_told_once_wherever_it_ends(
    dots: dict[str, Any], tmp_path: Path, here: None, stride: int
) -> None:
    """In stretches of so many frames: it ends inside of one, at its edge, or between that and a frame."""
    whole = write_video(tmp_path / "whole.avi", dots, 40).read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    ends = set()
    for batch in range(1, 9):
        out = tmp_path / str(batch)
        done = run(dots, tmp_path / "cut.avi", out, batch_size=batch, video_stride=stride, flip_test=False)
        (row,) = load(out / "rejected.json")
        assert row["reason"] == "video_cut_off"
        assert done.summary["counts"]["frames"] == -(-row["frame"] // stride)
        ends.add(row["frame"])
    assert len(ends) == 1


def write_matroska(file: Path, dots: dict[str, Any], kept: list[int], frames: int = 40) -> Path:
    """Of so many frames, each a JPEG, those `kept` at their times; the others become padding (EBML Void)."""
    content = bytearray(write_video(file, dots, frames).read_bytes())
    blocks, at = [], content.index(b"\x1f\x43\xb6\x75")  # the first cluster
    while (at := content.find(b"\xa3", at)) >= 0:  # SimpleBlock: its size, track 1, time, keyframe, a JPEG
        if b"\xff\xd8\xff" in content[at + 5 : at + 12]:
            blocks.append(at)
        at += 1
    assert len(blocks) == frames
    for block in (block for n, block in enumerate(blocks) if n not in kept):
        content[block] = 0xEC
    file.write_bytes(content)
    return file


def test_a_video_of_another_pace_is_not_said_to_be_cut_off(
    dots: dict[str, Any], tmp_path: Path, here: None
) -> None:
    """As screens and browsers record: fewer frames than length and rate promise, up to the end."""
    uneven = write_matroska(tmp_path / "uneven.mkv", dots, [0, 1, 2, 3, 10, 17, 24, 31, 38])
    cut = write_matroska(tmp_path / "cut.mkv", dots, list(range(9)))
    done = run(dots, [uneven, cut], tmp_path / "out", batch_size=4)
    assert done.summary["counts"]["frames"] == 18
    told = {row["name"]: row for row in load(tmp_path / "out" / "rejected.json")}
    assert {name: row["reason"] for name, row in told.items()} == {
        "uneven.mkv": "frames_missing",
        "cut.mkv": "video_cut_off",
    }
    assert told["uneven.mkv"]["detail"].startswith("9 frames can be read up to its end")


@pytest.mark.parametrize("stride", [1, 3])
def test_frames_after_damage_are_answered_whoever_works_on_them(
    dots: dict[str, Any], tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    """Five frames in the middle are gone. An actor that comes new to each stretch says the same as one that
    keeps the video open, and both as what decodes on."""
    content = bytearray(write_video(tmp_path / "clip.mp4", dots, 40, "mp4v").read_bytes())
    middle = len(content) // 2
    content[middle : middle + len(content) // 10] = bytes(len(content) // 10)
    (tmp_path / "clip.mp4").write_bytes(content)
    capture = cv2.VideoCapture(str(tmp_path / "clip.mp4"), cv2.CAP_FFMPEG)
    given = [capture.grab() for _ in range(60)]
    hole, there = given.index(False), sum(given)
    assert True in given[hole:]
    assert 30 < there < 40

    settings: dict[str, Any] = {"batch_size": 2, "video_stride": stride, "flip_test": False}
    run(dots, tmp_path / "clip.mp4", tmp_path / "kept", **settings)
    read = Worker._read_frames

    def anew(self: Worker, *rest: Any) -> Any:
        self._video = None
        return read(self, *rest)

    monkeypatch.setattr(Worker, "_read_frames", anew)
    run(dots, tmp_path / "clip.mp4", tmp_path / "anew", **settings)
    # Not poses.json: what FFmpeg fills damaged parts of a frame with may be another thing each time.
    for name in ("images.json", "rejected.json"):
        assert load(tmp_path / "anew" / name) == load(tmp_path / "kept" / name)
    answered = [image["frame"] for image in load(tmp_path / "kept" / "images.json")]
    assert answered == list(range(0, there, stride))
    first, *_ = load(tmp_path / "kept" / "rejected.json")
    assert (first["reason"], first["frame"]) == ("frames_missing", hole)
    assert f"before frame {hole} something is damaged" in first["detail"]


def test_a_video_without_one_frame_that_can_be_read_is_none(
    dots: dict[str, Any], tmp_path: Path, here: None
) -> None:
    """As one of a codec that OpenCV's FFmpeg does not decode (AV1): it opens, and nothing comes."""
    clip = write_matroska(tmp_path / "clip.mkv", dots, [], 14)
    write_video(tmp_path / "good.avi", dots, 3)
    done = run(dots, [clip, tmp_path / "good.avi"], tmp_path / "out", batch_size=2)
    assert done.summary["counts"]["frames"] == 3
    (row,) = load(tmp_path / "out" / "rejected.json")
    assert (row["reason"], row["frame"]) == ("not_a_video", None)
    assert "its codec (MJPG) is not read here: save it again as H.264" in row["detail"]


def test_what_a_header_cannot_mean_does_not_plan_a_million_units(
    dots: dict[str, Any], tmp_path: Path, here: None
) -> None:
    """A length of 30 years, as a damaged header has it. (An audio file's cover has 90,000 frames/s.)"""
    clip = write_matroska(tmp_path / "clip.mkv", dots, list(range(14)), 14)
    content = bytearray(clip.read_bytes())
    length = content.index(b"\x44\x89\x88") + 3  # Duration, a double, ms
    content[length : length + 8] = struct.pack(">d", 1e12)
    clip.write_bytes(content)
    assert cv2.VideoCapture(str(clip), cv2.CAP_FFMPEG).get(cv2.CAP_PROP_FRAME_COUNT) > 1e9
    assert Video(str(clip), 10**6).expected == 0
    done = run(dots, clip, tmp_path / "out", batch_size=4)
    assert done.summary["counts"]["frames"] == 14
    assert not done.summary["rejected"]


# --- sources ------------------------------------------------------------------------------------------


def test_folders_globs_and_uris_name_their_files(dots: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "my photos"
    (folder / "deep" / ".cache").mkdir(parents=True)
    for name in ("b.JPG", "a.png", "deep/c.webp", "deep/d.mp4", "deep/.cache/e.jpg", "x.txt", "100%.jpg"):
        (folder / name).write_bytes(b"x")

    def names(*sources: Any, exclude: Any = None) -> list[str]:
        return [m.name for m in list_media([str(s) for s in sources], exclude)[0]]

    everything = ["100%.jpg", "a.png", "b.JPG", "deep/c.webp", "deep/d.mp4"]
    uri = f"file://{folder}".replace(" ", "%20")
    assert names(folder) == names(uri) == everything
    assert list_media([str(folder)])[1] == 1
    assert [m.kind for m in list_media([str(folder)])[0]][-2:] == ["picture", "video"]
    assert names(f"{folder}/*.png", f"{folder}/**/*.webp") == ["a.png", "c.webp"]
    assert names(f"{uri}/*.*g", f"{uri}/**/*.webp") == ["100%.jpg", "a.png", "deep/c.webp"]
    assert names(f"{uri}/a.png", folder / "x.txt") == ["a.png", "x.txt"]
    assert names(folder, folder / "a.png", f"{folder}/*") == [*everything, "x.txt"]  # each file once
    assert names(folder, exclude=folder / "deep") == ["100%.jpg", "a.png", "b.JPG"]
    shutil.copytree(folder, tmp_path / "other")
    assert names(folder / "a.png", tmp_path / "other" / "a.png") == ["a.png", "a-2.png"]


def test_pictures_and_videos_behind_a_uri(
    dots: dict[str, Any], tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """file:// goes the way of every bucket: pyarrow reads pictures, videos are copied to be read, and no copy
    is left behind."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    folder = tmp_path / "a b"
    folder.mkdir()
    shutil.copy(dots["pictures"] / "picture-0.png", folder / "p 1.png")
    write_video(folder / "clip.avi", dots, 3)
    formats = ("coco", "overlays", "videos")
    run(dots, f"file://{tmp_path}/a%20b", tmp_path / "uri", formats=formats)
    run(dots, folder, tmp_path / "path", formats=formats)
    for name in ("poses.json", "images.json"):
        assert (tmp_path / "uri" / name).read_bytes() == (tmp_path / "path" / name).read_bytes()
    assert (tmp_path / "uri" / "overlays" / "p 1.png.jpg").exists()
    assert (tmp_path / "uri" / "videos" / "clip.avi.mp4").exists()
    assert not list((tmp_path / "temporary").iterdir())


def test_a_link_to_a_folder_above_is_followed_once(dots: dict[str, Any], tmp_path: Path) -> None:
    """pyarrow lists what lies there 41 times."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    shutil.copy(dots["pictures"] / "picture-0.png", folder / "a.png")
    shutil.copy(dots["pictures"] / "picture-1.png", folder / "deep" / "b.png")
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "linked.png").symlink_to(folder / "a.png")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(dots["pictures"] / "picture-2.png", elsewhere / "c.png")
    (folder / "more").symlink_to(elsewhere)
    for source in (str(folder), f"file://{folder}"):
        media, _ = list_media([source])
        assert [one.name for one in media] == ["a.png", "deep/b.png", "linked.png", "more/c.png"]


def test_sources_from_python_are_a_list(dots: dict[str, Any], tmp_path: Path, here: None) -> None:
    """A path alone was taken letter by letter: / is the whole disk."""
    for alone in (str(tmp_path / "nothing"), tmp_path / "nothing"):
        with pytest.raises(TypeError, match=r"sources are a list of paths and URIs, got '.*nothing' alone"):
            list_media(alone)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no source is named"):
        list_media([])
    shutil.copy(dots["pictures"] / "picture-0.png", tmp_path / "a.png")
    assert (
        predict([tmp_path / "a.png"], dots["checkpoint"], out=tmp_path / "out").summary["counts"]["people"]
        == 1
    )


def test_results_inside_a_source_are_no_sources(dots: dict[str, Any], tmp_path: Path, here: None) -> None:
    shutil.copy(dots["pictures"] / "picture-0.png", tmp_path / "a.png")
    first = run(dots, tmp_path, tmp_path / "out", formats=("coco", "overlays"))
    again = run(dots, tmp_path, tmp_path / "out", formats=("coco", "overlays"))
    assert first.summary == again.summary


def test_a_checkpoint_by_its_uri(dots: dict[str, Any], tmp_path: Path, here: None) -> None:
    source = [str(dots["pictures"] / "picture-0.png")]
    predict(source, f"file://{dots['checkpoint']}", out=tmp_path / "a")
    predict(source, dots["checkpoint"], out=tmp_path / "b")
    assert (tmp_path / "a" / "poses.json").read_bytes() == (tmp_path / "b" / "poses.json").read_bytes()
    with pytest.raises(CheckpointError, match="none: cannot be read"):
        predict(source, f"file://{tmp_path}/none", out=tmp_path / "c")
