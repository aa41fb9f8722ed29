"""Preprocess: the published crops and targets, the same bytes however it runs, nothing lost to bad input."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_coco import annotation_file, edited, write_coco
from test_shards import rows, whole_table

from hrnet_core.errors import DataError
from hrnet_core.geometry import apply_affine, box_to_center_scale, crop_people, invert_affine
from hrnet_core.images import ImageHeader, decode_checked, decode_image, encode_jpeg
from hrnet_core.skeleton import COCO17
from pipelines import preprocess as preprocess_module
from pipelines.preprocess import Task, TaskLog, build_timed, preprocess, run_preprocess, summary
from pipelines.settings.config import DataSettings, RunConfig
from pipelines.shards.build import build_shard
from pipelines.shards.manifest import Manifest
from pipelines.shards.plan import BuiltShard, plan_shards
from pipelines.shards.rows import decode_pictures, decode_rows
from pipelines.sources import photos
from pipelines.sources.coco import read_coco
from pipelines.storage import files as files_module

TRAIN, VAL = "train2017", "val2017"
SMALL = {"input_size": (64, 96), "people_per_shard": 4, "row_group_people": 2, "image_format": "png"}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 people in 7 pictures, 3 in 2."""
    return write_coco(tmp_path_factory.mktemp("coco") / "root", {TRAIN: [2, 3, 1, 2, 1, 3, 1], VAL: [2, 1]})


@pytest.fixture
def coco(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "coco"))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Shards are built one after the other in this process; gives the names of those that were."""
    return without_ray(monkeypatch)


def without_ray(patch: pytest.MonkeyPatch) -> list[str]:
    built: list[str] = []

    def one_by_one(pending: list[Any], *_: Any) -> Iterator[Any]:
        for work in pending:
            built.append(work.names[0])
            yield build_timed(work)._replace(start=0.0, end=1.0, worker="here", peak_bytes=10**8)

    patch.setattr(preprocess_module, "_on_ray", one_by_one)
    patch.setattr(preprocess_module, "ray_session", lambda _, quiet: contextlib.nullcontext())
    for name in ("require", "cpus_each", "room_for"):
        patch.setattr(preprocess_module, name, lambda *_: 1)
    return built


def config(coco: Path, shards: Path, **data: Any) -> RunConfig:
    return RunConfig(data=DataSettings(root=str(coco), shards=str(shards), **{**SMALL, **data}))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(run: Callable[[], Any], *words: str) -> None:
    with pytest.raises(DataError) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


# ---------------------------------------------------------------------------------- published numbers


def test_the_published_loaders_samples(
    real_data: Path, reference: dict[str, Any], tmp_path: Path, plain: list[str]
) -> None:
    """Crops and targets of mmpose's four test pictures, as the official val loader makes them."""
    source = real_data / "evaluator" / "mmpose_test_coco"
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    for split in (TRAIN, VAL):
        shutil.copytree(source, tmp_path / "coco" / split)
        shutil.copy(source / "test_coco.json", annotation_file(tmp_path / "coco", split))
    run = config(tmp_path / "coco", tmp_path / "s", input_size=(192, 256), people_per_shard=100)
    found = rows(preprocess(run), VAL)
    samples = reference["official_val_samples_test_images"]["samples"]
    nose = apply_affine(found["image_to_crop"], found["keypoints"][:, :1, :2])[:, 0]
    nose *= found["keypoints"][:, 0, 2:] > 0
    assert len(nose) == len(samples) == 12
    for sample in samples:
        same_nose = np.abs(nose - sample["nose_input_xy"]).max(axis=1) < 1e-2
        (row,) = np.flatnonzero((found["image_id"] == sample["image_id"]) & same_nose)
        crop = found["images"][row]
        np.testing.assert_allclose(crop.mean((0, 1)), sample["crop_mean_rgb"], atol=0.2)
        np.testing.assert_allclose(crop.std((0, 1)), sample["crop_std_rgb"], atol=0.2)
        assert (crop == 0).all(axis=-1).mean() == pytest.approx(sample["black_fraction"], abs=2e-3)
        # The reference's 1e-2 is for float32; float16 keeps 11 bits of each cell.
        assert found["heatmaps"][row].sum() == pytest.approx(sample["target_sum"], rel=1e-4)
        assert found["weights"][row].sum() == sample["weight_sum"]


# ---------------------------------------------------------------------------------- on Ray, and again


def test_on_ray_and_again(coco: Path, tmp_path: Path, ray_local: None, capsys: Any) -> None:
    """Ray's tasks write what the plain loop writes; a second run finds it all and starts nothing."""
    manifest, log = run_preprocess(config(coco, tmp_path / "ray", variants=2))
    assert (len(log.tasks), log.people) == (5, 16)
    assert log.at_once >= 1
    assert all(50e6 < task.peak_bytes < 2e9 for task in log.tasks)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("preprocess:")]
    assert lines[0] == "preprocess: 16 people in 5 shards to make"
    manifest.verify()
    head, *splits = (line.split() for line in summary(manifest, log).splitlines()[:3])
    files = sum(int(split[head.index("files")]) for split in splits)  # of a shard one for each view
    assert files == len(list((tmp_path / "ray").glob("data/*.parquet"))) > 5

    again, nothing = run_preprocess(config(coco, tmp_path / "ray", variants=2))
    assert (nothing.tasks, nothing.people) == ([], 0)
    assert "preprocess: 5 of 5 shards are there already" in capsys.readouterr().out
    assert again == manifest
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        alone = preprocess(config(coco, tmp_path / "plain", variants=2))
    assert alone.digest == manifest.digest
    assert contents(tmp_path / "plain") == contents(tmp_path / "ray")


def test_long_annotations_are_read_while_ray_starts(
    coco: Path, tmp_path: Path, plain: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the dataset is there already; and Ray is ended where the annotations are refused."""
    started, seen = threading.Event(), []

    @contextlib.contextmanager
    def session(settings: Any, quiet: bool) -> Iterator[None]:
        seen.append("started")
        started.set()
        try:
            yield
        finally:
            seen.append("ended")

    def read(*arguments: Any) -> Any:
        assert started.wait(60)
        return read_coco(*arguments)

    monkeypatch.setattr(preprocess_module, "LONG_ANNOTATIONS", 100)
    monkeypatch.setattr(preprocess_module, "ray_session", session)
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.sources.splits.read_coco", read)
        first = preprocess(config(coco, tmp_path / "s"))
    assert seen[0] == "started"
    assert seen.count("started") == seen.count("ended")
    seen.clear()
    assert preprocess(config(coco, tmp_path / "s")) == first
    assert seen == []

    annotation_file(coco, TRAIN).write_text(annotation_file(coco, TRAIN).read_text()[:-50])
    refused(lambda: preprocess(config(coco, tmp_path / "other")), "not valid JSON", TRAIN)
    assert seen == ["started", "ended"]


def test_the_summary_names_what_matters(coco: Path, tmp_path: Path, plain: list[str], capsys: Any) -> None:
    with edited(coco) as data:
        data["annotations"][0]["iscrowd"] = 1
    manifest = preprocess(config(coco, tmp_path / "s"))
    told = capsys.readouterr().out
    for word in (
        "train2017",
        "val2017",
        "1 crowd",
        "people/s",
        manifest.digest,
        manifest.folder,
        "at once",
        "100 MB",
    ):
        assert word in told


def test_each_photo_is_decoded_once_for_all_its_people_and_views(
    coco: Path, tmp_path: Path, plain: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[tuple[int, ...]] = []

    def counted(content: bytes, header: ImageHeader, **settings: Any) -> Any:
        image = decode_checked(content, header, **settings)
        decoded.append(image.shape)
        return image

    monkeypatch.setattr(photos, "decode_checked", counted)
    manifest = preprocess(config(coco, tmp_path / "s", variants=3))
    assert sum(shard.rows for v in range(3) for shard in manifest.shards(TRAIN, v)) == 39
    assert len(decoded) == 7 + 2
    decoded.clear()
    preprocess(config(coco, tmp_path / "cuts", variants=2, context=2.0))
    assert len(decoded) == 7 + 2


def test_memory_is_bounded_by_the_row_group(tmp_path: Path) -> None:
    """A shard of three times the people keeps no more pictures: only their numbers, less than 1 KB a
    person (measured 0.54), where a picture has 12 KB."""
    coco = write_coco(tmp_path / "coco", {TRAIN: [3] * 120, VAL: [1]})
    split = read_coco(coco, TRAIN, COCO17)
    peaks = {}
    for people in (120, 360):
        data = config(coco, tmp_path / str(people), people_per_shard=people, row_group_people=6).data
        work = plan_shards(split, data)[0]
        assert len(work.people) == people
        if people == 120:
            build_shard(replace(work, folder=f"{tmp_path}/first"))  # what is made once in a process
        tracemalloc.start()
        build_shard(work)
        peaks[people] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[360] - peaks[120] < 240 * 1_000


def test_most_at_once_is_counted_from_starts_and_ends() -> None:
    log = TaskLog([])
    for start, end, worker in [(0, 4, "a"), (1, 2, "b"), (2, 5, "b"), (6, 7, "c")]:
        log.done(Task((TRAIN, 0), 1, BuiltShard((), ()), start, end, worker, 0))
    assert (log.at_once, log.seconds) == (2, 7)
    assert (TaskLog([]).at_once, TaskLog([]).seconds) == (0, 0)


# ---------------------------------------------------------------------------------- recovery

KILLED = """
import os, signal, sys
from pipelines.shards import build
from pipelines.settings.config import DataSettings, RunConfig
from pipelines.shards.writer import ShardWriter

finish, count = ShardWriter.finish, 0

def finish_or_die(writer, *figures):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return finish(writer, *figures)

ShardWriter.finish = finish_or_die
settings = DataSettings.model_validate_json(sys.argv[1])
from pipelines.sources.coco import read_coco
from pipelines.shards.plan import finished_shards, plan_shards
from hrnet_core.skeleton import COCO17
works = plan_shards(read_coco(settings.root, "train2017", COCO17), settings)
finished_shards(works, settings.shards)
for work in works:
    build.build_shard(work)
"""


def test_a_killed_run_is_gone_on_with(coco: Path, tmp_path: Path, plain: list[str]) -> None:
    run = config(coco, tmp_path / "s", variants=2)
    whole = preprocess(config(coco, tmp_path / "whole", variants=2))
    killed = subprocess.run([sys.executable, "-c", KILLED, run.data.model_dump_json()], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = sorted(os.listdir(tmp_path / "s" / "data"))
    # Shard 0 is there in both variants; of shard 1 only what it was writing, under no final name.
    assert [n for n in left if not n.startswith(".")] == [
        "train2017-00000-of-00004.parquet",
        "train2017-v1-00000-of-00004.parquet",
    ]
    assert len(left) == 4
    refused(lambda: Manifest.load(tmp_path / "s"), "no manifest.json")
    plain.clear()
    manifest = preprocess(run)
    assert "data/train2017-00000-of-00004.parquet" not in plain
    assert len(plain) == 4
    assert manifest.digest == whole.digest
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_damaged_and_missing_shards_are_made_again(coco: Path, tmp_path: Path, plain: list[str]) -> None:
    manifest = preprocess(config(coco, tmp_path / "s"))
    before = contents(tmp_path / "s")
    names = [shard.path for shard in manifest.shards(TRAIN)]
    os.remove(tmp_path / "s" / names[0])
    damaged = bytearray(before[names[2]])
    damaged[len(damaged) // 3] ^= 1
    (tmp_path / "s" / names[2]).write_bytes(damaged)
    plain.clear()
    assert preprocess(config(coco, tmp_path / "s")) == manifest
    assert plain == [names[0], names[2]]
    assert contents(tmp_path / "s") == before


def test_two_writers_of_one_plan_do_no_harm(coco: Path, tmp_path: Path, plain: list[str]) -> None:
    whole = preprocess(config(coco, tmp_path / "whole"))
    data = config(coco, tmp_path / "s").data
    (tmp_path / "s" / "data").mkdir(parents=True)
    works = plan_shards(read_coco(coco, TRAIN, COCO17), data)
    writers = [threading.Thread(target=lambda: [build_shard(work) for work in works]) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(os.listdir(tmp_path / "s" / "data")) == len(works)
    plain.clear()
    assert preprocess(config(coco, tmp_path / "s")).digest == whole.digest
    assert plain == ["data/val2017-00000-of-00001.parquet"]


def test_a_full_disk_leaves_what_was_whole(
    coco: Path, tmp_path: Path, plain: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:  # a file and its folder for each shard
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "fsync", full)
        refused(lambda: preprocess(config(coco, tmp_path / "s")), str(tmp_path / "s"), "No space", "again")
    assert os.listdir(tmp_path / "s" / "data") == ["train2017-00000-of-00004.parquet"]
    plain.clear()
    preprocess(config(coco, tmp_path / "s")).verify()
    assert "data/train2017-00000-of-00004.parquet" not in plain


# ---------------------------------------------------------------------------------- targets


def test_another_plan_and_foreign_files_are_refused_untouched(
    coco: Path, tmp_path: Path, plain: list[str]
) -> None:
    target = tmp_path / "s"
    preprocess(config(coco, target))
    before = contents(target)
    refused(lambda: preprocess(config(coco, target, seed=1)), str(target), "another dataset", "settings seed")
    refused(lambda: preprocess(config(coco, target, codec="udp", sigma=1.5)), "settings codec, sigma")
    with edited(coco) as data:
        data["annotations"][0]["area"] += 1
    refused(lambda: preprocess(config(coco, target)), "another dataset", "annotations or pictures")
    os.remove(target / "manifest.json")  # an unfinished one
    refused(lambda: preprocess(config(coco, target)), "another dataset", "train2017-00000-of-00004.parquet")
    refused(
        lambda: preprocess(config(coco, target, people_per_shard=100)), "train2017-00000-of-00004.parquet"
    )
    assert contents(target) == {name: c for name, c in before.items() if name != "manifest.json"}
    assert len(plain) == 5

    # One file of a shard's two that lies there under its name, but is somebody else's.
    mine = tmp_path / "mine" / "data" / "train2017-00001-of-00004.parquet"
    mine.parent.mkdir(parents=True)
    pq.write_table(pa.table({"a": [1]}), mine)
    refused(lambda: preprocess(config(coco, tmp_path / "mine", variants=2)), mine.name)
    assert pq.read_table(mine).to_pydict() == {"a": [1]}

    holiday = tmp_path / "holiday"
    holiday.mkdir()
    (holiday / "beach.jpg").write_bytes(b"sand")
    refused(lambda: preprocess(config(coco, holiday)), str(holiday), "beach.jpg")
    refused(lambda: preprocess(config(coco, holiday / "beach.jpg")), "beach.jpg is a file")
    assert contents(holiday) == {"beach.jpg": b"sand"}


def test_a_replaced_picture_is_another_plan(coco: Path, tmp_path: Path, plain: list[str]) -> None:
    preprocess(config(coco, tmp_path / "s"))
    picture = coco / TRAIN / f"{TRAIN}-0.jpg"
    picture.write_bytes(picture.read_bytes() + b"\0")
    refused(lambda: preprocess(config(coco, tmp_path / "s")), "annotations or pictures")


def test_targets_that_cannot_be_written(coco: Path, tmp_path: Path, plain: list[str]) -> None:
    (tmp_path / "file").touch()
    refused(
        lambda: preprocess(config(coco, tmp_path / "file" / "s")), str(tmp_path / "file" / "s"), "written"
    )
    assert plain == []


# ---------------------------------------------------------------------------------- bad pictures


def _header_only(path: Path) -> None:
    """A PNG that promises 60000 x 60000 pixels in a few bytes."""
    size = (60_000).to_bytes(4, "big")
    header = b"IHDR" + size + size + b"\x08\x02\0\0\0"
    checked = header + zlib.crc32(header).to_bytes(4, "big")
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\r" + checked + b"\0\0\0\0IEND\xaeB`\x82")


SPOIL: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "not_an_image": lambda path: path.write_text("<html>404</html>"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "too_large": _header_only,
    "size_differs": lambda path: path.write_bytes(encode_jpeg(np.zeros((40, 40, 3), np.uint8))),
}


def test_broken_pictures_are_rows_of_rejected_parquet(coco: Path, tmp_path: Path, plain: list[str]) -> None:
    """E.3 cases 1, 2, 3, 9 and a picture of another size; five of seven pictures, nine of 13 people."""
    people = [2, 3, 1, 2, 1]
    for index, spoil in enumerate(SPOIL.values()):
        spoil(coco / TRAIN / f"{TRAIN}-{index}.jpg")
    manifest = preprocess(config(coco, tmp_path / "s"))
    table = pq.read_table(tmp_path / "s" / "rejected.parquet").to_pylist()
    assert [(r["reason"], r["file"], r["image_id"], r["ann_id"], r["people"]) for r in table] == [
        (reason, f"{TRAIN}-{i}.jpg", 10 * (i + 1), None, people[i]) for i, reason in enumerate(SPOIL)
    ]
    assert all(row["split"] == TRAIN and row["detail"] for row in table)
    assert manifest.people(TRAIN) == 13 - sum(people)
    assert manifest.split(TRAIN)["photos"] == 2
    assert manifest.split(TRAIN)["rejected"]["truncated"] == {"rows": 1, "people": 1}
    assert rows(manifest)["image_id"].tolist() == [60, 60, 60, 70]
    assert str(tmp_path) not in str(table)
    # Found again with the shards on the next run.
    assert preprocess(config(coco, tmp_path / "s")) == manifest


def test_a_split_without_a_usable_picture_is_refused(coco: Path, tmp_path: Path, plain: list[str]) -> None:
    for picture in (coco / VAL).iterdir():
        picture.write_bytes(b"")
    refused(lambda: preprocess(config(coco, tmp_path / "s")), VAL, "empty")
    assert not (tmp_path / "s" / "manifest.json").exists()
    with edited(coco, VAL) as data:
        for annotation in data["annotations"]:
            annotation["iscrowd"] = 1
    refused(lambda: preprocess(config(coco, tmp_path / "t")), VAL, "3 crowd")


def test_strict_makes_any_defect_fatal(coco: Path, tmp_path: Path, plain: list[str]) -> None:
    strict = {"strict": True}
    with edited(coco) as data:
        data["annotations"][0]["iscrowd"] = 1  # no defect
    preprocess(config(coco, tmp_path / "a", **strict))
    SPOIL["truncated"](coco / TRAIN / f"{TRAIN}-3.jpg")
    broken = f"{TRAIN}-3.jpg (truncated)"
    refused(lambda: preprocess(config(coco, tmp_path / "b", **strict)), broken, "--data.strict")
    assert not (tmp_path / "b" / "manifest.json").exists()
    preprocess(config(coco, tmp_path / "b"))
    refused(lambda: preprocess(config(coco, tmp_path / "b", **strict)), broken)
    with edited(coco) as data:
        data["annotations"][5]["bbox"] = [1, 2, 3]
    plain.clear()
    refused(lambda: preprocess(config(coco, tmp_path / "c", **strict)), "bbox_invalid", "annotation 6")
    assert plain == []
    assert not (tmp_path / "c").exists()


def test_exif_orientation_is_ignored(coco: Path, tmp_path: Path, plain: list[str]) -> None:
    """The annotations belong to the stored pixels (E.3 case 5)."""
    straight = rows(preprocess(config(coco, tmp_path / "a")))
    from PIL import Image

    for orientation, path in enumerate(sorted((coco / TRAIN).iterdir()), start=2):
        content = path.read_bytes()
        exif = Image.Exif()
        exif[0x0112] = orientation
        app1 = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
        path.write_bytes(content[:2] + b"\xff\xe1" + (len(app1) + 2).to_bytes(2, "big") + app1 + content[2:])
        assert Image.open(path).getexif()[0x0112] == orientation
    turned = rows(preprocess(config(coco, tmp_path / "b")))
    np.testing.assert_array_equal(turned["images"], straight["images"])


# ---------------------------------------------------------------------------------- stored views


def test_a_mirrored_view_is_flip_pixels_flip_keypoints_encode(
    coco: Path, tmp_path: Path, plain: list[str]
) -> None:
    """The published order of steps, done by hand on the mirrored photo; not the flip of a heatmap."""
    manifest = preprocess(config(coco, tmp_path / "s", variants=3, codec="dark"))
    codec, order = manifest.recipe.codec, COCO17.flip_order
    mirrored = 0
    for variant in (1, 2):
        found = rows(manifest, TRAIN, variant)
        for i in np.flatnonzero(found["flipped"]):
            mirrored += 1
            photo = cv2.imread(str(coco / TRAIN / f"{TRAIN}-{found['image_id'][i] // 10 - 1}.jpg"))[
                :, ::-1, ::-1
            ]
            places = found["keypoints"][i, :, :2].copy()
            places[:, 0] = 160 - 1 - places[:, 0]
            center = found["center"][i] * [-1, 1] + [160 - 1, 0]
            matrix = codec.image_to_crop_matrix(center, found["scale"][i], found["rotation_deg"][i])
            crop = cv2.warpAffine(np.ascontiguousarray(photo), matrix, (64, 96), flags=cv2.INTER_LINEAR)
            difference = np.abs(crop.astype(int) - found["images"][i])
            assert np.quantile(difference, 0.99) <= 2
            heatmaps, weights = codec.encode(
                apply_affine(matrix, places)[order], found["keypoints"][i, order, 2]
            )
            np.testing.assert_allclose(found["heatmaps"][i], heatmaps, atol=2e-3)
            np.testing.assert_array_equal(found["weights"][i], weights)
    assert mirrored >= 5


@pytest.mark.parametrize(("codec", "bound"), [("official", 3.0), ("dark", 0.2), ("udp", 0.2)])
def test_stored_heatmaps_decode_to_the_keypoints_of_their_own_crop(
    coco: Path, tmp_path: Path, plain: list[str], codec: str, bound: float
) -> None:
    run = config(coco, tmp_path / "s", variants=2, codec=codec, input_size=(96, 128), sigma=2.0)
    manifest = preprocess(run)
    for variant in range(2):
        found = rows(manifest, TRAIN, variant)
        decoded, _ = manifest.recipe.codec.decode(found["heatmaps"])
        crop = apply_affine(found["image_to_crop"], found["keypoints"][..., :2])
        flipped = found["flipped"][:, None, None]
        crop = np.where(flipped, crop[:, COCO17.flip_order], crop)
        inside = ((crop > 20) & (crop < np.array([96, 128]) - 20)).all(axis=-1)
        assert inside.sum() > 60
        assert np.abs(decoded - crop)[inside].max() < bound


def test_views_do_not_depend_on_shards_and_neighbours(coco: Path, tmp_path: Path, plain: list[str]) -> None:
    """Seed, person and variant alone; the validation split has the plain view only."""
    whole = preprocess(config(coco, tmp_path / "a", variants=3))
    assert whole.variants(VAL) == 1
    with edited(coco) as data:
        data["annotations"] = [a for a in data["annotations"] if a["id"] % 2]
    half = preprocess(config(coco, tmp_path / "b", variants=2, people_per_shard=100))
    ours, theirs = rows(half, TRAIN, 1), rows(whole, TRAIN, 1)
    same = np.isin(theirs["ann_id"], ours["ann_id"])
    assert 0 < same.sum() < len(same)
    for name in ("images", "heatmaps", "image_to_crop", "rotation_deg", "flipped"):
        np.testing.assert_array_equal(ours[name], theirs[name][same], err_msg=name)
    again = rows(whole, TRAIN, 2)
    assert (again["image_to_crop"] != theirs["image_to_crop"]).any(axis=(1, 2)).all()
    plain_view = rows(whole, TRAIN, 0)
    center, scale = box_to_center_scale(plain_view["bbox_xywh"], (64, 96))
    np.testing.assert_array_equal(plain_view["center"], center)
    np.testing.assert_array_equal(plain_view["scale"], scale)


# ---------------------------------------------------------------------------------- cuts


def photo_of(coco: Path, split: str, name: str) -> Any:
    return decode_image((coco / split / name).read_bytes(), apply_exif=False)


def inside_the_cut(row: dict[str, Any], i: int, size: tuple[int, int]) -> Any:
    """Pixels of the view (h, w) that lie wholly on the stored cut."""
    places = np.stack(np.meshgrid(np.arange(size[0]), np.arange(size[1])), axis=-1).reshape(-1, 2)
    photo = apply_affine(invert_affine(row["image_to_crop"][i]), places)
    cut = apply_affine(row["image_to_picture"][i], photo)
    height, width = row["pictures"][i].shape[:2]
    return ((cut >= 0) & (cut <= [width - 1, height - 1])).all(axis=-1).reshape(size[1], size[0])


def rows_with_cuts(manifest: Manifest, split: str, variant: int) -> dict[str, Any]:
    table = whole_table(manifest, split, variant)
    pictures = list(decode_pictures(table["image"]))
    return {**decode_rows(table, manifest), "pictures": pictures}


def test_a_view_from_the_cut_is_the_view_from_the_photo(tmp_path: Path, plain: list[str]) -> None:
    """Stored without loss, and wherever the cut reaches: whole pixels are cut, so the same four neighbours
    are weighed. OpenCV rounds the places it samples, from the photo's corner or from the cut's."""
    coco = write_coco(tmp_path / "coco", {TRAIN: [2, 1, 3], VAL: [1]}, size=(400, 300))
    run = config(coco, tmp_path / "s", variants=4, context=2.0)
    manifest = preprocess(run)
    plain_crops = preprocess(config(coco, tmp_path / "crops", variants=4))
    lacking = 0
    for variant in range(4):
        found, crops = rows_with_cuts(manifest, TRAIN, variant), rows(plain_crops, TRAIN, variant)
        for name in ("heatmaps", "weights", "image_to_crop", "center", "scale", "flipped", "ann_id"):
            np.testing.assert_array_equal(found[name], crops[name], err_msg=name)
        for i in range(6):
            assert max(found["pictures"][i].shape[:2]) < 300  # a part of the photo
            inside = inside_the_cut(found, i, (64, 96))
            difference = np.abs(found["images"][i].astype(int) - crops["images"][i])
            assert difference[inside].max() <= 1
            lacking += int((~inside & (difference > 1).any(axis=-1)).sum())
    assert lacking <= 0.001 * 4 * 6 * 64 * 96


def test_a_cut_larger_than_the_cap_is_made_smaller(tmp_path: Path, plain: list[str]) -> None:
    """At 32x32 a side has 128 px at most. Where it lies is still told: keypoints keep their place, so views
    are those of the photo but for the sharpness; half a pixel's error would differ by 3 levels."""
    coco = write_coco(tmp_path / "coco", {TRAIN: [2, 1], VAL: [1]}, size=(400, 300))
    run = config(coco, tmp_path / "s", context=2.0, input_size=(32, 32))
    found = rows_with_cuts(preprocess(run), TRAIN, 0)
    crops = rows(preprocess(config(coco, tmp_path / "crops", input_size=(32, 32))))
    for i in range(3):
        assert max(found["pictures"][i].shape[:2]) == 128
        assert found["image_to_picture"][i, 0, 0] < 0.8
        difference = found["images"][i].astype(int) - crops["images"][i]
        assert np.abs(difference)[inside_the_cut(found, i, (32, 32))].mean() < 1.5


def test_real_photographs_as_cuts(real_data: Path, tmp_path: Path, plain: list[str]) -> None:
    """Plain views from stored JPEG cuts against those from the photographs, where nothing is lacking."""
    cuts = {"context": 2.0, "image_format": "jpeg", "input_size": (192, 256), "train_split": VAL}
    run = config(real_data / "coco", tmp_path / "s", **cuts)
    found = rows(preprocess(run), VAL)
    split = read_coco(real_data / "coco", VAL, COCO17)
    names = {photo.image_id: photo.file_name for photo in split.photos}
    errors = []
    for i in range(0, 99, 5):
        photo = photo_of(real_data / "coco", VAL, names[int(found["image_id"][i])])
        (crop,) = crop_people(photo, found["image_to_crop"][i][None], (192, 256))
        errors.append(np.abs(found["images"][i].astype(int) - crop).mean())
    assert np.mean(errors) < 1.1  # of 255 levels; measured .95
    assert max(errors) < 1.8  # measured 1.44


def test_real_coco(real_data: Path, tmp_path: Path, plain: list[str]) -> None:
    manifest = preprocess(
        config(real_data / "coco", tmp_path / "s", people_per_shard=128, image_format="jpeg")
    )
    assert [manifest.people(split) for split in manifest.splits] == [281, 99]
    assert manifest.split(TRAIN)["rejected"] == {
        "crowd": {"rows": 9, "people": 9},
        "no_keypoints": {"rows": 143, "people": 143},
    }
    fields = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert str(real_data) not in json.dumps(fields)
    assert str(tmp_path) not in json.dumps(fields)
