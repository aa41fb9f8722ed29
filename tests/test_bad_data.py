"""Twenty-seven kinds of bad input and bad luck in preparing data, and the tests that stand for each."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_coco import annotation_file, edited, write_coco

from hrnet_core.errors import DataError
from hrnet_core.images import encode_jpeg, encode_png
from hrnet_core.skeleton import COCO17, Skeleton
from pipelines.cli import main
from pipelines.poses.oks_ap import evaluate_results
from pipelines.settings.config import DataSettings
from pipelines.shards.build import build_shard
from pipelines.shards.manifest import Manifest
from pipelines.shards.plan import plan_shards
from pipelines.shards.writer import write_rejected
from pipelines.sources import coco as coco_module
from pipelines.sources.coco import read_coco
from pipelines.sources.photos import check_photo, open_photo
from pipelines.sources.records import Photo, Rejection, refuse_rejected

TESTS = Path(__file__).parent
ROOT = TESTS.parent
TRAIN, VAL = "train2017", "val2017"
CASES = {
    "1 a picture of zero bytes": (
        "test_images.py::test_what_is_no_picture",
        "test_preprocess.py::test_broken_pictures_are_rows_of_rejected_parquet",
    ),
    "2 HTML or text under a picture's name": (
        "test_images.py::test_what_is_no_picture",
        "test_preprocess.py::test_broken_pictures_are_rows_of_rejected_parquet",
    ),
    "3 a JPEG cut off by one byte to 90 %: one verdict by every path": (
        "test_images.py::test_a_cut_jpeg_is_refused_wherever_it_was_cut",
        "test_bad_data.py::test_no_picture_is_read_past_the_one_verdict",
        "test_evaluate.py::test_unusable_photographs_are_all_named",
    ),
    "4 a JPEG with a flipped byte: found by a checksum alone": (
        "test_validate.py::test_a_flipped_byte_is_found_by_its_checksum_alone",
    ),
    "5 EXIF orientation 1 to 8": (
        "test_images.py::test_exif_orientation_is_ignored_or_applied_as_asked",
        "test_preprocess.py::test_exif_orientation_is_ignored",
        "test_evaluate.py::test_exif_orientation_is_ignored",
        "test_serve.py::test_boxes_are_in_px_of_the_picture_as_displayed",
    ),
    "6 a CMYK JPEG": ("test_images.py::test_kinds_of_pixels",),
    "7 16 bits, grey, palette, alpha": (
        "test_images.py::test_kinds_of_pixels",
        "test_images.py::test_sixteen_bits_keep_the_upper_eight",
        "test_images.py::test_alpha_is_dropped_and_the_colours_stay",
    ),
    "8 animations and pages: the first of a file, 415 of the endpoint": (
        "test_images.py::test_of_an_animation_the_first_frame",
        "test_serve.py::test_a_bad_request_is_a_problem_that_names_the_field",
        "test_serve.py::test_the_first_frame_of_an_animation_where_that_is_asked_for",
    ),
    "9 a bomb": (
        "test_images.py::test_a_bomb_is_refused_by_its_header",
        "test_bad_data.py::test_a_bomb_costs_no_memory",
    ),
    "10 a picture of one pixel, a box smaller than one": (
        "test_bad_data.py::test_a_picture_of_one_pixel_has_no_person",
        "test_coco.py::test_one_bad_annotation_costs_one_person",
    ),
    "11 a picture missing, or its name in another case": (
        "test_coco.py::test_one_bad_picture_costs_its_people",
        "test_coco.py::test_case_is_named_where_it_differs",
        "test_bad_data.py::test_strict_names_the_first_twenty",
    ),
    "12 annotations invalid, cut off, of gigabytes": (
        "test_coco.py::test_json_errors_name_the_byte",
        "test_bad_data.py::test_invalid_annotations_end_with_2_and_write_nothing",
        "test_bad_data.py::test_annotations_larger_than_the_memory",
    ),
    "13 boxes that are none": ("test_coco.py::test_one_bad_annotation_costs_one_person",),
    "14 boxes partly and fully outside": (
        "test_coco.py::test_a_box_partly_outside_is_clipped",
        "test_coco.py::test_one_bad_annotation_costs_one_person",
    ),
    "15 keypoints of another length, v, NaN, contradictions": (
        "test_coco.py::test_one_bad_annotation_costs_one_person",
        "test_coco.py::test_harmless_contradictions_are_repaired_and_counted",
    ),
    "16 duplicate and dangling ids": (
        "test_coco.py::test_a_file_that_cannot_be_trusted_is_refused",
        "test_bad_data.py::test_ids_that_cannot_be_stored_are_refused",
    ),
    "17 crowds and the unlabelled: not trained on, kept in evaluation": (
        "test_coco.py::test_one_bad_annotation_costs_one_person",
        "test_bad_data.py::test_crowds_stay_in_the_ground_truth_of_evaluation",
    ),
    "18 keypoints in another order than the skeleton's": (
        "test_coco.py::test_a_file_that_cannot_be_trusted_is_refused",
    ),
    "19 file names that lead out of the folder": (
        "test_coco.py::test_one_bad_picture_costs_its_people",
        "test_coco.py::test_links_out_of_the_root_are_never_followed",
        "test_bad_data.py::test_names_that_are_no_files",
    ),
    "20 archives: there is no download and nothing is unpacked": (
        "test_bad_data.py::test_no_archive_is_opened_anywhere",
    ),
    "21 a byte of a shard flipped: named, never trained on": (
        "test_shards.py::test_every_flipped_byte_is_noticed",
        "test_train.py::test_a_damaged_shard_is_refused_before_training",
        "test_preprocess.py::test_damaged_and_missing_shards_are_made_again",
    ),
    "22 shards cut off, missing, extra, of another plan; two writers": (
        "test_shards.py::test_shards_must_be_the_manifests",
        "test_preprocess.py::test_another_plan_and_foreign_files_are_refused_untouched",
        "test_recovery.py::test_two_processes_write_one_plan",
        "test_recovery.py::test_a_run_of_another_plan_in_the_same_moment",
        "test_recovery.py::test_another_plans_manifest_at_the_end",
    ),
    "23 kill -9 while shards are written": (
        "test_recovery.py::test_kill_9_of_the_command_and_again",
        "test_recovery.py::test_kill_9_at_any_moment",
        "test_preprocess.py::test_a_killed_run_is_gone_on_with",
    ),
    "24 a full disk, no rights, read-only": (
        "test_recovery.py::test_a_full_disk_and_room_again",
        "test_recovery.py::test_a_full_disk_under_the_command",
        "test_recovery.py::test_a_file_that_may_not_grow_is_a_paragraph",
        "test_recovery.py::test_a_target_that_became_read_only",
        "test_bad_data.py::test_folders_without_rights",
    ),
    "25 one digest at any parallelism and after a kill": (
        "test_recovery.py::test_one_digest_for_one_two_and_four_tasks",
        "test_recovery.py::test_kill_9_at_any_moment",
        "test_preprocess.py::test_on_ray_and_again",
    ),
    "26 a schema version newer or older than the reader": (
        "test_shards.py::test_manifests_that_cannot_be_read",
        "test_bad_data.py::test_an_older_schema_is_explained",
    ),
    "27 storage that fails for a moment: on local disks there is no second try, an error ends the run": (
        "test_recovery.py::test_a_full_disk_and_room_again",
    ),
}


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("case", CASES)
def test_each_case_has_its_tests(case: str) -> None:
    for name in CASES[case]:
        file, test = name.split("::")
        assert test in names_in(file), name


def test_no_case_is_missing() -> None:
    assert [int(case.split()[0]) for case in CASES] == list(range(1, 28))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco") / "root", {TRAIN: [2, 1], VAL: [1]})


@pytest.fixture
def coco(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "coco"))


def sources() -> list[Path]:
    rooms = ("hrnet_core", "pipelines", "serve", "infra")
    return [file for room in rooms for file in sorted((ROOT / room).rglob("*.py"))]


# ---------------------------------------------------------------------------------- pictures


def test_no_picture_is_read_past_the_one_verdict(tmp_path: Path) -> None:
    """cv2.imread takes a JPEG that lacks nine tenths, imdecode None: all bytes go through images.py. The
    exception are shards, whose own crops are checked by sha256 before."""
    calls = {
        (file.stem, found)
        for file in sources()
        for found in re.findall(r"cv2\.imread\b|cv2\.imdecode\b|Image\.open\b", file.read_text())
        if f"{found}(" in file.read_text()
    }
    assert calls == {("images", "cv2.imdecode"), ("rows", "cv2.imdecode")}
    asked = {
        (file.relative_to(ROOT).as_posix(), ast.unparse(node.func).rpartition(".")[2])
        for file in sources()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and file.is_relative_to(ROOT / "pipelines")
    }
    verdicts = {"decode_image", "decode_checked", "check_image"}
    assert {file for file, called in asked if called in verdicts} == {
        "pipelines/sources/photos.py",  # whoever opens a picture of a stage asks here
        "pipelines/tracking/mlflow_model.py",  # bytes in a request, no file
    }

    content = encode_jpeg(np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8))
    for lost in (1, 2, len(content) // 2, len(content) * 9 // 10):
        (tmp_path / "a.jpg").write_bytes(content[:-lost])
        photo = Photo(1, "a.jpg", str(tmp_path / "a.jpg"), 160, 120)
        verdicts = [open_photo(photo, 10**6), check_photo(photo, 10**6)]
        assert [v.reason for v in verdicts if isinstance(v, Rejection)] == ["truncated"] * 2


BOMB = """
import resource, struct, sys, zlib
from hrnet_core.errors import ImageError
from hrnet_core.images import decode_image

def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

pack = zlib.compressobj(9, zlib.DEFLATED, -15)
part = pack.compress(bytes(500 * 20_001)) + pack.flush(zlib.Z_FULL_FLUSH)  # 500 rows, to be repeated
rows = b"\\x78\\xda" + 40 * part + b"\\x03" + bytes(5)
header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
data = b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode_image(data, apply_exif=False)
except ImageError as error:
    print(error.reason, len(data), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_bomb_costs_no_memory() -> None:
    """400 million pixels in 390 KB, which cv2 alone decodes into gigabytes: the process does not grow."""
    done = subprocess.run([sys.executable, "-c", BOMB], capture_output=True, text=True, check=True)
    reason, size, grown_kib = done.stdout.split()
    assert (reason, int(size) < 500_000) == ("too_large", True)
    assert int(grown_kib) < 20_000


def test_a_picture_of_one_pixel_has_no_person(coco: Path) -> None:
    with edited(coco) as data:
        data["images"][1] |= {"width": 1, "height": 1}
        data["annotations"][2]["bbox"] = [0, 0, 1, 1]
    (coco / TRAIN / f"{TRAIN}-1.jpg").write_bytes(encode_png(np.zeros((1, 1, 3), np.uint8)))
    split = read_coco(coco, TRAIN, COCO17)
    assert [(r.reason, r.ann_id) for r in split.rejected] == [("bbox_degenerate", 3)]
    assert split.people.ann_id.tolist() == [1, 2]


def test_strict_names_the_first_twenty() -> None:
    rejected = [Rejection("missing_image", f"{i}.jpg", i, None, "no such file") for i in range(25)]
    with pytest.raises(DataError) as caught:
        refuse_rejected([Rejection("crowd", "c.jpg", 1, 1, "iscrowd"), *rejected])
    text = str(caught.value)
    assert text.startswith("data.strict: 25 pictures or people cannot be used: 0.jpg (missing_image), 1.jpg")
    assert "19.jpg (missing_image) ..." in text
    assert "20.jpg" not in text
    assert "c.jpg" not in text


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda data: data["images"][0].update(file_name="nowhere.jpg"), "missing_image"),
        (lambda data: data["images"][0].update(file_name="/etc/passwd"), "path_outside_root"),
        (lambda data: data["images"][0].update(width=0), "image_size_invalid"),
        (lambda data: data["annotations"][0].update(bbox=None), "bbox_invalid"),
        (lambda data: data["annotations"][0].update(bbox=[900, 900, 9, 9]), "bbox_degenerate"),
        (lambda data: data["annotations"][0].update(keypoints=[5, 5, 2]), "keypoints_length"),
        (lambda data: data["annotations"][0].update(keypoints=["a"] * 51), "keypoints_invalid"),
        (lambda data: data["annotations"][0].update(keypoints=[5.0, 5.0, 9] * 17), "visibility_invalid"),
    ],
)
def test_strict_makes_each_kind_fatal_before_any_work(
    coco: Path,
    tmp_path: Path,
    edit: Callable[[dict[str, Any]], Any],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with edited(coco) as data:
        edit(data)
    argv = ["preprocess", "tiny", "--data.root", str(coco), "--data.shards", str(tmp_path / "s")]
    assert main([*argv, "--data.strict"]) == 2
    told = capsys.readouterr().err
    assert reason in told
    assert f"({reason}" in told
    assert "Traceback" not in told
    assert not (tmp_path / "s").exists()


# ---------------------------------------------------------------------------------- annotations


@pytest.mark.parametrize("content", ['{"images": [', "", "[]", '{"images": 1}'])
def test_invalid_annotations_end_with_2_and_write_nothing(
    coco: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    annotation_file(coco, VAL).write_text(content)
    argv = ["preprocess", "tiny", "--data.root", str(coco), "--data.shards", str(tmp_path / "s")]
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert f"hrnet preprocess: {annotation_file(coco, VAL)}: " in told
    assert "Traceback" not in told
    assert not (tmp_path / "s").exists()


HUGE = """
import resource, sys
from hrnet_core.errors import DataError
from hrnet_core.skeleton import COCO17
from pipelines.sources.coco import read_coco

resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, resource.RLIM_INFINITY))
try:
    read_coco(sys.argv[1], "train2017", COCO17)
except DataError as error:
    print(error)
"""


def test_annotations_larger_than_the_memory(coco: Path) -> None:
    """4 GB (a sparse file) for a process that may have 3."""
    os.truncate(annotation_file(coco, TRAIN), 2**32)
    done = subprocess.run([sys.executable, "-c", HUGE, str(coco)], capture_output=True, text=True)
    assert "4,294,967,296 bytes, more than the memory here can hold" in done.stdout, done.stderr
    assert str(annotation_file(coco, TRAIN)) in done.stdout


@pytest.mark.parametrize("section", ["images", "annotations"])
@pytest.mark.parametrize("identity", [2**63, -(2**63) - 1, 10**400, 1.5, None, True])
def test_ids_that_cannot_be_stored_are_refused(coco: Path, section: str, identity: Any) -> None:
    with edited(coco) as data:
        data[section][1]["id"] = identity
    with pytest.raises(DataError, match=rf"{section}\[1\]\.id is .*64 bits"):
        read_coco(coco, TRAIN, COCO17)


def test_the_largest_and_negative_ids_go_through(coco: Path, tmp_path: Path) -> None:
    ids = [-(2**63), 2**63 - 1, -1]
    with edited(coco) as data:
        data["images"] = data["images"][:1]
        data["images"][0]["id"] = 2**63 - 1
        data["annotations"] = [
            {**data["annotations"][0], "id": identity, "image_id": 2**63 - 1} for identity in ids
        ]
    settings = DataSettings(root=str(coco), shards=str(tmp_path), input_size=(64, 96), variants=2)
    (work,) = plan_shards(read_coco(coco, TRAIN, COCO17), settings)
    (tmp_path / "data").mkdir()
    build_shard(work)
    for name in work.names:
        assert pq.read_table(tmp_path / name)["ann_id"].to_pylist() == sorted(ids)


def test_crowds_stay_in_the_ground_truth_of_evaluation() -> None:
    """Found where the crowd is, a person is neither right nor wrong; without the crowd it is wrong."""
    one = Skeleton("one", ("a",), (), (0.1,))
    person = {
        "id": 1, "image_id": 5, "category_id": 1, "bbox": [50, 50, 100, 100], "area": 1e4,
        "iscrowd": 0, "num_keypoints": 1, "keypoints": [100.0, 100.0, 2],
    }  # fmt: skip
    crowd = {**person, "id": 2, "bbox": [300, 300, 200, 200], "iscrowd": 1}
    crowd |= {"num_keypoints": 0, "keypoints": [0, 0, 0]}
    truth = {
        "images": [{"id": 5}],
        "annotations": [person, crowd],
        "categories": [{"id": 1, "name": "person"}],
    }
    found = [
        {"image_id": 5, "category_id": 1, "keypoints": [100.0, 100.0, 1.0], "score": 0.5},
        {"image_id": 5, "category_id": 1, "keypoints": [400.0, 400.0, 1.0], "score": 0.9},
    ]
    assert evaluate_results(found, truth, skeleton=one)["AP"] == pytest.approx(1)
    alone = {**truth, "annotations": [person]}
    assert evaluate_results(found, alone, skeleton=one)["AP"] == pytest.approx(0.5, abs=0.01)


# ---------------------------------------------------------------------------------- names, rights, archives


def test_names_that_are_no_files(coco: Path, tmp_path: Path) -> None:
    """A pipe would never end, a link to itself never begin, half a character not be stored."""
    os.mkfifo(coco / TRAIN / "pipe.jpg")
    (coco / TRAIN / "loop.jpg").symlink_to("loop.jpg")
    (coco / TRAIN / "folder.jpg").mkdir()
    names = ["pipe.jpg", "loop.jpg", "folder.jpg", "\ud800.jpg", f"{TRAIN}-0.jpg/x.jpg", "a" * 5000]
    with edited(coco) as data:
        image, person = data["images"][0], data["annotations"][0]
        for number, name in enumerate(names):
            data["images"].append({**image, "id": 100 + number, "file_name": name})
            data["annotations"].append({**person, "id": 100 + number, "image_id": 100 + number})
    split = read_coco(coco, TRAIN, COCO17)
    assert [(r.reason, r.image_id) for r in split.rejected] == [
        ("missing_image", 100 + i) for i in range(len(names)) if names[i] != "loop.jpg"
    ]
    (loop,) = [photo for photo in split.photos if photo.file_name == "loop.jpg"]
    opened = open_photo(loop, 10**6)
    assert isinstance(opened, Rejection)
    assert (opened.reason, opened.detail) == ("unreadable", "Too many levels of symbolic links")
    from dataclasses import asdict

    rows = [{"split": TRAIN, **asdict(rejection)} for rejection in split.rejected]
    write_rejected(str(tmp_path / "rejected.parquet"), rows)
    stored = pq.read_table(tmp_path / "rejected.parquet")["file"].to_pylist()
    assert "\\ud800.jpg" in stored


def test_folders_without_rights(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(coco_module.os, "scandir", denied)
        with pytest.raises(
            DataError, match=r"train2017/?: the pictures cannot be listed \(Permission denied"
        ):
            read_coco(coco, TRAIN, COCO17)
    photo = read_coco(coco, TRAIN, COCO17).photos[0]
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", denied)
        refused = check_photo(photo, 10**6)
    assert isinstance(refused, Rejection)
    assert (refused.reason, refused.detail) == ("unreadable", "Permission denied")


def test_no_archive_is_opened_anywhere() -> None:
    opening = {"zipfile", "tarfile", "shutil.unpack_archive", "urllib.request.urlretrieve"}
    for file in sources():
        tree = ast.parse(file.read_text())
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        names |= {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        assert names & opening == set(), file.name


def test_an_older_schema_is_explained(tmp_path: Path) -> None:
    fields = {"schema_version": 0, "digest": "", "config": {}, "splits": {}, "code": {"hrnet": "0.0.1"}}
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match=r"schema_version 0, this code reads 1\..*0\.0\.1.*preprocess again"):
        Manifest.load(tmp_path)
