"""`hrnet validate`: preprocess's own verdicts before any work, and what no single row shows."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from small_coco import annotation_file, edited, write_coco
from test_preprocess import without_ray

from hrnet_core.errors import DataError, ImageError
from hrnet_core.images import encode_png
from hrnet_core.skeleton import COCO17
from pipelines.cli import main
from pipelines.pages.findings import _drawn, write_findings
from pipelines.preprocess import preprocess
from pipelines.settings.config import DataSettings, RunConfig
from pipelines.sources import records
from pipelines.sources.findings import WAY_OUT, Validation, wrapped
from pipelines.sources.records import LEFT_OUT_AS_PUBLISHED, Rejection
from pipelines.validate import read_checksums, validate

TRAIN, VAL = "train2017", "val2017"
DOCS = Path(__file__).parents[1] / "docs" / "bad-data.md"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 people in 8 pictures, 3 in 2."""
    return write_coco(tmp_path_factory.mktemp("coco") / "root", {TRAIN: [2] * 8, VAL: [2, 1]})


@pytest.fixture
def coco(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "coco"))


def check(coco: Path, decode: bool = True, checksums: Path | None = None, **data: Any) -> Validation:
    return validate(coco, DataSettings(**data), decode=decode, checksums=checksums, workers=2)


def kinds(found: Validation) -> list[str]:
    return [str(row["kind"]) for row in found.rows()]


def picture(coco: Path, index: int, split: str = TRAIN) -> Path:
    return coco / split / f"{split}-{index}.jpg"


def flip(file: Path, part: float) -> None:
    """One byte of a file, at this part of it."""
    content = bytearray(file.read_bytes())
    content[int(len(content) * part)] ^= 0x55
    file.write_bytes(content)


def damaged_png(coco: Path, index: int) -> None:
    """A PNG of the right size with its end in place and a chunk whose checksum does not hold."""
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    picture(coco, index).write_bytes(encode_png(noise))
    flip(picture(coco, index), 0.5)


def spoil(coco: Path) -> None:
    """Something of each kind: rows, pictures, protocol, repairs; 5 of the 16 people stay."""
    with edited(coco) as data:
        people, images = data["annotations"], data["images"]
        people[0]["iscrowd"] = 1
        people[1]["keypoints"] = [0] * 51
        people[2]["bbox"] = [1, 2, 3]
        people[3]["keypoints"][2] = 7
        images[2]["file_name"] = "../secret.jpg"
        people[15]["num_keypoints"] = 3
        people[15]["bbox"][2] = 500
    picture(coco, 3).write_bytes(picture(coco, 3).read_bytes()[:-200])
    picture(coco, 4).unlink()
    cv2.imwrite(str(picture(coco, 5)), np.zeros((20, 30, 3), np.uint8))
    damaged_png(coco, 6)
    picture(coco, 0, VAL).write_bytes(b"")


# ---------------------------------------------------------------------------------- one verdict


def test_nothing_wrong(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = check(coco)
    assert (found.fatal, found.rows(), found.exit_code) == ((), [], 0)
    assert [(c.photos, c.people) for c in found.splits] == [(8, 16), (2, 3)]
    assert "nothing is left out" in found.table()
    assert capsys.readouterr().out == "", "a short set needs no progress"


def test_what_is_found_is_what_preprocess_leaves_out(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil(coco)

    without_ray(monkeypatch)
    settings = DataSettings(root=str(coco), shards=str(tmp_path / "s"), input_size=(64, 96))
    manifest = preprocess(RunConfig(data=settings))
    left_out = pq.read_table(tmp_path / "s" / "rejected.parquet").to_pylist()

    found = check(coco)
    ours = [{**row, "reason": row["kind"], "ann_id": row["ann_id"] or None} for row in found.rows()]
    assert [{k: v for k, v in row.items() if k != "kind"} for row in ours] == left_out
    assert {row["reason"] for row in left_out} == {
        "crowd", "no_keypoints", "bbox_invalid", "visibility_invalid", "path_outside_root",
        "truncated", "missing_image", "size_differs", "decode_failed", "empty",
    }  # fmt: skip
    assert [c.people for c in found.splits] == [manifest.people(TRAIN), manifest.people(VAL)] == [2, 1]
    assert [c.photos for c in found.splits] == [manifest.split(s)["photos"] for s in (TRAIN, VAL)]
    assert dict(found.splits[0].split.repaired) == {"boxes_clipped": 1, "num_keypoints": 1}
    capfd.readouterr()  # the decoder's own words


def test_a_set_that_is_good_says_whom_an_ap_counts_as_missed(coco: Path, tmp_path: Path) -> None:
    """evaluate asks about nobody without a box, and says so only after the inference."""
    with edited(coco) as data:
        data["annotations"][0]["bbox"] = None
    assert "as missed" not in check(coco).table()
    with edited(coco, VAL) as data:
        data["annotations"][0]["bbox"] = [0, 0, 0, 0]
    found = check(coco)
    assert found.exit_code == 0
    assert "2 people are left out" in found.table()
    assert "Evaluate counts 1 of them, of val2017, as missed" in found.table()
    page = tmp_path / "page.html"  # said "This set is good" alone
    write_findings(page, found, COCO17, 10**8)
    assert "2 people are left out" in page.read_text()
    assert "Evaluate counts 1 of them, of val2017, as missed" in page.read_text()


def test_the_first_of_a_lost_split_is_a_defect(coco: Path) -> None:
    with edited(coco) as data:
        data["annotations"][0]["keypoints"] = []
        for annotation in data["annotations"][1:]:
            del annotation["bbox"]
    (told,) = check(coco).fatal
    assert told.endswith("The first: train2017-0.jpg, bbox_invalid, bbox is absent or null, not 4 numbers.")


def test_without_decoding_only_damage_in_between_is_not_seen(
    coco: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil(coco)
    whole, quick = kinds(check(coco)), kinds(check(coco, decode=False))
    assert "decode_failed" in whole
    assert [kind for kind in whole if kind != "decode_failed"] == quick
    capfd.readouterr()


def test_the_table_names_kinds_counts_examples_and_ways_out(
    coco: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil(coco)
    table = check(coco).table(examples=1)
    for words in (
        "train2017: 8 pictures",
        "2 people on 1 of them can be used",
        "train2017-3.jpg: the JPEG file is cut off",
        "train2017-1.jpg, annotation 3: bbox is 3 entries, not 4 numbers",
        "left out by the protocol: " + WAY_OUT["crowd"],
        "repaired: " + WAY_OUT["boxes_clipped"],
        "1 pictures of val2017 cannot be used, the first is val2017-0.jpg (empty)",
        "evaluation is refused",
    ):
        assert words in table, table
    assert re.search(r"\n  size_differs +1 +2  left out: the picture was scaled", table)
    with edited(coco) as data:
        for annotation in data["annotations"][4:8]:
            annotation["bbox"] = None
    table = check(coco).table(examples=1)
    assert re.search(
        r"\n  bbox_invalid +5 +5  left out.*\n.*annotation 3: bbox is 3 entries.*\n +and 4 more\n", table
    )
    capfd.readouterr()


def test_the_table_fits_a_terminal(coco: Path) -> None:
    """Of 80 columns; what becomes of a kind goes on below where it began."""
    with edited(coco) as data:
        data["annotations"][0]["bbox"] = None
    table = check(coco).table(examples=1)
    narrow = wrapped(table, 80)
    assert narrow.split() == table.split()
    assert max(len(line) for line in narrow.splitlines() if "/" not in line) <= 80
    lines = narrow.splitlines()
    (head,) = {line for line in lines if line.startswith("  kind ")}
    (row,) = (number for number, line in enumerate(lines) if line.startswith("  bbox_invalid "))
    assert head.index("what becomes of it") == lines[row].index("left out: ")
    assert lines[row + 1][: head.index("what")].isspace()
    assert not lines[row + 1][head.index("what")].isspace()


def test_every_kind_has_a_way_out_and_a_row_in_the_docs() -> None:
    """The reasons as the types that carry them list them."""
    listed = (Rejection.__doc__ or "") + Path(records.__file__).read_text()
    reasons = re.search(r'reason: str\n    """(.*?)"""', listed, re.DOTALL)
    assert reasons
    told = set(re.findall(r"\b[a-z]+_[a-z_]+\b", reasons[1])) | {"crowd", "unreadable"}
    of_pictures = re.findall(r"\b[a-z_]+\b", (ImageError.__doc__ or "").split("`reason`:")[1])
    assert len(told) > 10
    assert len(of_pictures) == 6
    assert (told | set(of_pictures) | LEFT_OUT_AS_PUBLISHED) - set(WAY_OUT) == set()
    page = DOCS.read_text()
    assert [kind for kind in WAY_OUT if f"`{kind}`" not in page] == []


def test_real_coco_can_be_trained_on(real_data: Path) -> None:
    """Three of 281 people have a box around what is seen, and hidden joints guessed far outside of it."""
    found = validate(real_data / "coco", DataSettings(), workers=2)
    assert found.fatal == ()
    assert [c.people for c in found.splits] == [281, 99]
    assert set(kinds(found)) == {"crowd", "no_keypoints", "keypoints_outside_box"}
    assert kinds(found).count("crowd") == 9 + 5
    assert kinds(found).count("keypoints_outside_box") == 3


# ---------------------------------------------------------------------------------- fatal


def _everyone(**fields: Any) -> Callable[[Path], None]:
    def change(coco: Path) -> None:
        with edited(coco) as data:
            for annotation in data["annotations"]:
                annotation.update(fields)

    return change


def _relative_numbers(coco: Path) -> None:
    with edited(coco) as data:
        for annotation in data["annotations"]:
            annotation["keypoints"] = [
                v if i % 3 == 2 else v / (160, 120)[i % 3] for i, v in enumerate(annotation["keypoints"])
            ]


def _without_most_pictures(coco: Path) -> None:
    for index in range(5):
        picture(coco, index).unlink()


def _same_pictures(coco: Path) -> None:
    for index in range(2):
        shutil.copy(picture(coco, index), picture(coco, index, VAL))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_everyone(bbox=None), ["no person of train2017 can be used"]),
        (_relative_numbers, ["16 of 16 people", "0 to 1"]),
        (_without_most_pictures, ["10 people of train2017", "only 6 are kept"]),
        (_same_pictures, ["2 of 2 pictures of val2017", "training split too"]),
        (lambda coco: annotation_file(coco, TRAIN).write_text("{"), ["at byte 1 of 1"]),
        (lambda coco: shutil.rmtree(coco / VAL), ["val2017", "no such folder"]),
    ],
)
def test_what_makes_training_wrong_ends_with_2(
    coco: Path, change: Callable[[Path], Any], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    change(coco)
    assert main(["validate", str(coco)]) == 2
    told = capsys.readouterr().out
    assert "This set is not good as it is:" in told
    assert [word for word in words if word not in told] == [], told


def test_a_few_of_them_do_not(coco: Path) -> None:
    """One of two pictures shared, one person of 16 whose keypoints lie elsewhere: told, no verdict."""
    shutil.copy(picture(coco, 0), picture(coco, 0, VAL))
    with edited(coco) as data:
        data["annotations"][5]["keypoints"] = [2.0, 2.0, 2] * 17
        data["annotations"][5].update(bbox=[100, 80, 40, 30], area=600)
    found = check(coco)
    assert found.fatal == ()
    assert sorted(kinds(found)) == ["in_both_splits", "keypoints_outside_box"]
    rows = {row["kind"]: row for row in found.rows()}
    assert rows["keypoints_outside_box"]["ann_id"] == 6
    assert "17 of 17 labelled keypoints" in str(rows["keypoints_outside_box"]["detail"])
    assert rows["in_both_splits"]["detail"] == "the bytes of train2017/train2017-0.jpg"


def test_one_split_for_both_is_meant_so(coco: Path) -> None:
    found = check(coco, val_split=TRAIN)
    assert (found.fatal, found.rows(), len(found.splits)) == ((), [], 1)


def test_the_other_split_is_looked_at_too(coco: Path) -> None:
    annotation_file(coco, TRAIN).write_text("[]")
    picture(coco, 0, VAL).write_bytes(b"<html>")
    found = check(coco)
    assert len(found.fatal) == 3, "the file of train2017; 2 of 3 people of val2017 lost; no AP without them"
    assert kinds(found) == ["not_an_image"]
    assert len(check(coco / "nowhere").fatal) == 1, "said once, not once for each split"


def test_strict_makes_any_defect_fatal(coco: Path) -> None:
    assert check(coco, strict=True).exit_code == 0
    with edited(coco) as data:
        data["annotations"][0]["iscrowd"] = 1
    assert check(coco, strict=True).exit_code == 0, "no defect"
    picture(coco, 7).write_bytes(b"")
    assert check(coco).exit_code == 0
    (text,) = check(coco, strict=True).fatal
    assert "train2017-7.jpg (empty)" in text


# ---------------------------------------------------------------------------------- checksums


def listed(coco: Path) -> Path:
    import hashlib

    files = [*(coco / TRAIN).iterdir(), *(coco / VAL).iterdir()]
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(coco)}" for f in files]
    (coco / "SHA256SUMS").write_text("# of the publisher\n\n" + "\n".join(lines) + "\n")
    return coco / "SHA256SUMS"


def test_a_flipped_byte_is_found_by_its_checksum_alone(coco: Path) -> None:
    """E.3 case 4: a JPEG with another byte in its scan decodes without an error."""
    checksums = listed(coco)
    assert check(coco, checksums=checksums).fatal == ()
    flip(picture(coco, 2), 0.6)
    assert check(coco).rows() == []
    for decode in (True, False):
        found = check(coco, decode=decode, checksums=checksums)
        assert [(row["kind"], row["file"]) for row in found.rows()] == [
            ("checksum_differs", "train2017-2.jpg")
        ]
        assert found.exit_code == 2
        assert "1 pictures are not those of the checksum list" in found.fatal[0]


def test_checksum_lists_that_are_none(coco: Path, tmp_path: Path) -> None:
    file = tmp_path / "sums"
    file.write_text("d41d8cd98f00b204e9800998ecf8427e  train2017/train2017-0.jpg\n")
    with pytest.raises(DataError, match="line 1 is 'd41d8"):
        check(coco, checksums=file)
    file.write_text(f"{'0' * 64}  elsewhere/a.jpg\n")
    with pytest.raises(DataError, match="no line is of a picture of"):
        check(coco, checksums=file)
    with pytest.raises(DataError, match="cannot be read"):
        check(coco, checksums=tmp_path / "none")
    file.write_text(f"{'A' * 64} *./train2017/a b.jpg\n")
    assert read_checksums(file) == {"train2017/a b.jpg": "a" * 64}


# ---------------------------------------------------------------------------------- as a command


def test_the_command(coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "problems.csv"
    assert main(["validate", str(coco), "--out", str(out)]) == 0
    assert "This set is good" in capfd.readouterr().out
    picture(coco, 3).write_bytes(b"")
    argv = ["validate", str(coco), "--out", str(out), "--no-decode", "--workers", "1", "--examples", "0"]
    assert main(argv) == 0
    assert "2 people are left out" in capfd.readouterr().out
    (row,) = csv.DictReader(out.open())
    assert (row["split"], row["kind"], row["file"], row["people"]) == (TRAIN, "empty", "train2017-3.jpg", "2")
    assert main([*argv, "--data.strict"]) == 2
    (tmp_path / "no").touch()
    assert main(["validate", str(coco), "--out", str(tmp_path / "no" / "where.csv")]) == 2
    assert "where.csv" in capfd.readouterr().err
    assert main(["validate", str(coco), "--page", str(tmp_path / "no" / "page.html")]) == 2
    assert f"page.html: {tmp_path}/no is a file" in capfd.readouterr().err
    page = tmp_path / "page.html"
    main([*argv, "--page", str(page)])
    assert "train2017: empty" in page.read_text()
    capfd.readouterr()
    assert main(["validate", str(coco), "--data.root", "elsewhere"]) == 2
    assert "first argument" in capfd.readouterr().err
    assert main(["validate", str(coco), "--data.skeleton", "nobody"]) == 2


def test_examples_stand_side_by_side_with_what_is_drawn_in_them(coco: Path, tmp_path: Path) -> None:
    """They stood one below the other, each as wide as the page, and nothing said what the colours mean."""
    with edited(coco) as data:
        for annotation in data["annotations"][5:7]:
            annotation["keypoints"] = [2.0, 2.0, 2] * 17
            annotation.update(bbox=[100, 80, 40, 30], area=600)
    page = tmp_path / "page.html"
    main(["validate", str(coco), "--page", str(page)])
    (photos,) = re.findall(r'<div class="photos">(.*?)<div class="scroll">', page.read_text(), re.DOTALL)
    assert photos.count("<img ") == photos.count("<div><h3>") == 2
    assert "boxes as they are read. The person&#x27;s left is green, the right orange." in page.read_text()


def test_a_box_that_is_wrong_does_not_make_blots_of_small_people(
    coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limbs were as thick as for a person as large as the box: boxes read as corners hid whom they held."""
    checked, drawn = check(coco).splits[0], list[np.ndarray]()

    def keep(shown: np.ndarray, quality: int) -> bytes:
        drawn.append(shown)
        return b""

    monkeypatch.setattr("pipelines.pages.findings.encode_jpeg", keep)
    people = checked.split.people
    people.keypoints[0] = np.stack([np.arange(60, 77), np.arange(40, 57), np.full(17, 2)], axis=-1)
    photo = next(p for p in checked.split.photos if p.image_id == people.image_id[0])
    row = Rejection("bbox_invalid", "a.jpg", photo.image_id, int(people.ann_id[0]), "")
    for box in ([55, 35, 30, 30], [0, 0, 159, 119]):
        people.stated_xywh[0] = box
        _drawn(photo, people, row, COCO17, 10**8)
    close, wide = (picture[42:56, 62:76] for picture in drawn)
    np.testing.assert_array_equal(close, wide)


def test_where_nothing_can_be_written_is_told_before_any_work(
    coco: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_late(*args: Any, **how: Any) -> None:
        raise AssertionError("pictures were read")

    monkeypatch.setattr("pipelines.validate.validate", too_late)
    file = str(annotation_file(coco, VAL))
    for argv, words in (
        (["--page", str(coco)], "is a folder"),
        (["--out", f"{file}/found.csv"], "is a file, not a folder"),
    ):
        assert main(["validate", str(coco), *argv]) == 2
        told = capsys.readouterr().err
        assert argv[0] in told
        assert words in told


def test_names_do_not_steer_the_terminal(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that others made may hold names that clear the screen, or write a line of their own."""
    file = coco / "annotations" / f"person_keypoints_{TRAIN}.json"
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = "a\x1b[2J\rThis set is good\n\u202egpj.jpg"
    content["categories"][0]["keypoints"][0] = "\x1b]0;title\x07"
    file.write_text(json.dumps(content))
    assert main(["validate", str(coco)]) == 2
    content["categories"][0]["keypoints"][0] = "nose"
    file.write_text(json.dumps(content))
    assert main(["validate", str(coco)]) == 0
    said = capsys.readouterr()
    assert "\\x1b]0;title\\x07" in said.err + said.out
    assert "a\\x1b[2J\\rThis set is good\\n\\u202egpj.jpg" in said.out
    assert all(c.isprintable() or c == "\n" for c in said.out + said.err)
