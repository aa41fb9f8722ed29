"""`hrnet inspect`: figures against counts by hand, damage named, pictures that show what is stored."""

from __future__ import annotations

import functools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_coco import edited, write_coco
from test_shards import make

from hrnet_core.images import decode_image
from hrnet_core.skeleton import COCO17
from pipelines import inspect_shards
from pipelines.cli import main
from pipelines.inspect_shards import make_card, output_folder
from pipelines.pages import dataset, gallery
from pipelines.pages.dataset import write_figures
from pipelines.pages.gallery import heaviest_rejections, read_rows, rejected_sheet, spread_rows, view_sheet
from pipelines.process.progress import ProgressLine
from pipelines.settings.config import TrackSettings
from pipelines.shards.figures import Histogram, figures_of
from pipelines.shards.manifest import Manifest
from pipelines.shards.rows import decode_rows
from pipelines.tracking.store import Tracker

TRAIN, VAL = "train2017", "val2017"


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Person 1 has three keypoints only, person 4 none, person 6 is a crowd; a picture of two is gone."""
    root = write_coco(tmp_path_factory.mktemp("coco") / "root", {TRAIN: [2, 3, 1, 2, 3, 2], VAL: [2, 1]})
    with edited(root) as data:
        people = {annotation["id"]: annotation for annotation in data["annotations"]}
        people[1]["keypoints"][9:] = [0] * 42
        people[4]["keypoints"] = [0] * 51
        people[6]["iscrowd"] = 1
    (root / TRAIN / f"{TRAIN}-5.jpg").unlink()
    return root


@pytest.fixture(scope="module")
def pristine(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """9 people with three views in two shards, and 3 people in one."""
    folder = tmp_path_factory.mktemp("shards") / "set"
    return make(coco, folder, people_per_shard=5, row_group_people=3, variants=3)


@pytest.fixture
def copy(pristine: Manifest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine.folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def card(pristine: Manifest) -> dict[str, Any]:
    return make_card(pristine, {split: figures_of(pristine, split) for split in pristine.splits})


# ---------------------------------------------------------------------------------- figures


def test_counts_are_the_annotations(card: dict[str, Any], coco: Path) -> None:
    train = card["splits"][TRAIN]
    assert (train["people"], train["photos"], train["shards"], train["variants"]) == (9, 4, 6, 3)
    assert train["rejected"] == {
        "crowd": {"rows": 1, "people": 1},
        "missing_image": {"rows": 1, "people": 2},
        "no_keypoints": {"rows": 1, "people": 1},
    }
    # Nine people; keypoints 0, 5, 10, 15 are hidden; person 1 keeps keypoints 0, 1 and 2.
    assert train["keypoints"]["nose"] == {"not_labelled": 0, "hidden": 9, "seen": 0}
    assert train["keypoints"]["left_eye"] == {"not_labelled": 0, "hidden": 0, "seen": 9}
    assert train["keypoints"]["left_shoulder"] == {"not_labelled": 1, "hidden": 8, "seen": 0}
    assert train["keypoints"]["right_ankle"] == {"not_labelled": 1, "hidden": 0, "seen": 8}
    assert train["labelled_keypoints"]["people_with"] == [0, 0, 0, 1, *[0] * 13, 8]
    assert train["labelled_keypoints"]["mean"] == round((3 + 8 * 17) / 9, 2)
    # 2, 2 (of 3), none (of 1), 2, 3 people in the photos whose picture is there.
    assert train["people_per_photo"] == {"mean": 2.25, "most": 3, "photos_with": [0, 0, 3, 1]}
    annotations = json.loads((coco / "annotations" / f"person_keypoints_{TRAIN}.json").read_text())
    kept = [a for a in annotations["annotations"] if a["id"] not in (4, 6, 12, 13)]
    sizes = [sum(1024 <= a["area"] < 9216 for a in kept), sum(a["area"] >= 9216 for a in kept)]
    assert list(train["segment_area"].values()) == [len(kept) - sum(sizes), *sizes]
    heights = np.sort([a["bbox"][3] - 1 for a in kept])  # sanitised: one pixel less
    assert train["box_height"]["median"] == pytest.approx(np.median(heights), rel=0.03)
    assert (
        heights[0] * 0.98 <= train["box_height"]["5 %"] <= train["box_height"]["95 %"] <= heights[-1] * 1.02
    )
    assert sum(train["box_height"]["counts"]) == 9


def test_views_are_counted_from_their_rows(card: dict[str, Any], pristine: Manifest) -> None:
    for variant, view in enumerate(card["splits"][TRAIN]["views"]):
        tables = [pq.read_table(f"{pristine.folder}/{s.path}") for s in pristine.shards(TRAIN, variant)]
        flipped = sum(sum(table["flipped"].to_pylist()) for table in tables)
        rotations = [angle for table in tables for angle in table["rotation_deg"].to_pylist()]
        weights = sum(sum(map(sum, table["weights"].to_pylist())) for table in tables)
        assert (view["rows"], view["labelled"]) == (9, 3 + 8 * 17)
        assert (view["flipped"], view["targets"]) == (flipped, weights)
        assert view["rotated"] == sum(angle != 0 for angle in rotations)
        if view["rotated"]:
            assert min(rotations) - 0.1 <= view["rotation_deg"]["5 %"] <= view["rotation_deg"]["95 %"]
    plain, augmented = card["splits"][TRAIN]["views"][:2]
    assert (plain["flipped"], plain["rotated"], plain["zoom"]["5 %"], plain["zoom"]["95 %"]) == (0, 0, 1, 1)
    assert augmented["zoom"]["5 %"] < augmented["zoom"]["95 %"]


def test_figures_do_not_touch_pictures_or_heatmaps(
    pristine: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory: a row group at a time, and of that the small columns."""
    seen = []

    def watched(table: Any, manifest: Manifest) -> Any:
        seen.append((table.num_rows, set(table.column_names)))
        return decode_rows(table, manifest)

    monkeypatch.setattr("pipelines.shards.figures.decode_rows", watched)
    figures_of(pristine, TRAIN)
    assert max(rows for rows, _ in seen) == 3
    assert sum(rows for rows, _ in seen) == 27
    assert not {"image", "heatmaps"} & set.union(*(names for _, names in seen))


def test_histogram_quantiles_are_numpys_within_a_bin() -> None:
    values = np.random.default_rng(0).lognormal(4, 1, 10_000)
    histogram = Histogram(np.geomspace(1, 20_000, 501))
    for part in np.array_split(values, 7):
        histogram.add(part)
    for share in (0.05, 0.5, 0.95):
        assert histogram.quantile(share) == pytest.approx(np.quantile(values, share), rel=0.02)
    histogram.add([0.1, 1e6])  # outside the edges, not lost
    assert histogram.counts.sum() == 10_002
    assert histogram.as_dict()["counts"] == histogram.counts.tolist()
    assert Histogram([0, 1]).as_dict() == {"edges": [], "counts": []}


# ---------------------------------------------------------------------------------- whole, or named


def damage_mismatch(folder: Path) -> str:
    file = folder / "data" / f"{TRAIN}-v1-00001-of-00002.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file.name


def damage_missing(folder: Path) -> str:
    file = folder / "data" / f"{VAL}-00000-of-00001.parquet"
    file.unlink()
    return file.name


def damage_extra(folder: Path) -> str:
    shutil.copy(folder / "data" / f"{VAL}-00000-of-00001.parquet", folder / "data" / "stray.parquet")
    return "stray.parquet"


def damage_rejected(folder: Path) -> str:
    (folder / "rejected.parquet").unlink()
    return "rejected.parquet is missing"


def damage_rejected_content(folder: Path) -> str:
    (folder / "rejected.parquet").write_bytes(b"PAR1")
    return "rejected.parquet is not as written"


@pytest.mark.parametrize(
    "damage", [damage_mismatch, damage_missing, damage_extra, damage_rejected, damage_rejected_content]
)
def test_damage_ends_with_2_and_the_name(
    damage: Any, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = damage(copy)
    assert main(["inspect", str(copy), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert name in told.err
    assert "hrnet preprocess" in told.err  # the way out
    assert "digest" not in told.out
    assert not (tmp_path / "out").exists()


def test_no_dataset_and_a_place_inside_it_are_refused(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    for inside in (copy, copy / "data", copy / "look" / "here"):
        assert main(["inspect", str(copy), "--out", str(inside)]) == 2
        assert "--out" in capsys.readouterr().err
    assert main(["inspect", str(copy), "--coco", str(tmp_path)]) == 2
    assert f"--coco {tmp_path}: no folder {TRAIN}, {VAL}" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["inspect", str(copy), "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err
    assert sorted(p.name for p in (copy / "data").iterdir() if p.suffix != ".parquet") == []


def test_pictures_go_beside_the_dataset_or_into_the_storage(pristine: Manifest) -> None:
    assert output_folder(pristine, None, "runs") == f"{pristine.folder}_inspection"
    bucket = replace(pristine, folder="s3://bucket/some/set")
    assert output_folder(bucket, None, "/runs") == "/runs/inspections/s3_bucket_some_set"
    assert output_folder(bucket, "/here", "/runs") == "/here"


def test_a_long_check_says_how_far_it_is(
    pristine: Manifest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter(range(0, 1000, 2))
    line = functools.partial(ProgressLine, clock=lambda: next(times))
    monkeypatch.setattr(inspect_shards, "ProgressLine", line)
    inspect_shards.verify(pristine)
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in out] == ["1", "2", "3", "4", "5", "6", "7", "7"]
    assert out[-2].startswith("inspect: 7 of 7 shards, 0 MB")


# ---------------------------------------------------------------------------------- pictures


def test_people_of_a_sheet_are_spread_and_the_same_in_every_view(pristine: Manifest) -> None:
    # Three of nine people: rows 1, 4 and 7.
    assert [s.row_groups for s in pristine.shards(TRAIN)] == [(3, 3), (3,)]
    places = spread_rows(pristine, TRAIN, 3)
    assert places == [(0, 0, 1), (0, 1, 1), (1, 0, 1)]
    assert len(spread_rows(pristine, TRAIN, 100)) == len(set(spread_rows(pristine, TRAIN, 100))) == 9
    plain, second = (read_rows(pristine, TRAIN, variant, places) for variant in (0, 2))
    assert plain["ann_id"].tolist() == second["ann_id"].tolist()
    whole = [
        pq.read_table(f"{pristine.folder}/{s.path}")["ann_id"].to_pylist() for s in pristine.shards(TRAIN)
    ]
    flat = [ann_id for part in whole for ann_id in part]
    assert plain["ann_id"].tolist() == [flat[i] for i in (1, 4, 7)]


def test_a_sheet_shows_the_crop_and_the_heat_where_the_keypoints_are(pristine: Manifest) -> None:
    """In the first pair: the stored pixels on the left, and dark red (turbo's end) at a peak on the right."""
    place = spread_rows(pristine, TRAIN, 1)
    sheet = view_sheet(pristine, TRAIN, 1, place)
    rows = read_rows(pristine, TRAIN, 1, place)
    width = 2 * 3 * 64 + 4  # enlarged three times, two pictures and the gap
    gap = width // 40
    left = sheet[gap : gap + 288 : 3, gap : gap + 192 : 3]
    same = (np.abs(left.astype(int) - rows["images"][0]) <= 2).all(axis=-1)
    assert same.mean() > 0.5  # all but limbs and dots
    heat = rows["heatmaps"][0]
    y, x = np.unravel_index(heat[np.argmax(rows["weights"][0])].argmax(), heat.shape[1:])
    red, green, blue = sheet[gap + 12 * y, gap + 192 + 4 + 12 * x].tolist()
    assert red > 90
    assert max(green, blue) < 80


def test_the_heaviest_of_each_reason_with_pictures_or_words(pristine: Manifest, coco: Path) -> None:
    rows = heaviest_rejections(pristine)
    told = [(row["reason"], row["ann_id"], row["people"]) for row in rows if row["split"] == TRAIN]
    assert told == [("missing_image", None, 2), ("crowd", 6, 1), ("no_keypoints", 4, 1)]
    boxes = gallery._annotated_boxes(rows, str(coco), COCO17)
    assert set(boxes) == {(TRAIN, 4), (TRAIN, 6)}
    missing, crowd, _ = (gallery._rejected_picture(row, str(coco), 10**6, None) for row in rows[:3])
    photo = decode_image((coco / TRAIN / rows[1]["file"]).read_bytes(), apply_exif=False)
    assert crowd.shape == (256, 341, 3)  # 160 x 120 px enlarged to the height
    assert np.abs(crowd.mean(axis=(0, 1)) - photo.mean(axis=(0, 1))).max() < 3
    assert (missing == 225).any(axis=-1).mean() > 0.8
    outside = {**rows[1], "file": f"../{VAL}/{VAL}-0.jpg"}
    assert (gallery._rejected_picture(outside, str(coco), 10**6, None)[0, 0] == (225, 227, 231)).all()
    # A person's part of the photo: at 160 x 120 px with a box of 10 x 10 it is 50 px wide and high.
    part, left, top = gallery._surroundings(photo, (60, 40, 10, 10))
    np.testing.assert_array_equal(part, photo[20:70, 40:90])
    assert (left, top) == (40, 20)
    assert gallery._surroundings(photo, (500, 500, 10, 10))[0] is photo
    assert rejected_sheet(rows, str(coco), 10**6, COCO17).shape[2] == 3


@pytest.mark.filterwarnings("error")
def test_names_of_any_kind_leave_room_for_their_bars(tmp_path: Path) -> None:
    """A third of the figure is bars of people who show all; names are no formulas, in any script."""
    names = [r"$\foo$", "x" * 60, "鼻", *map(str, range(17))]
    card = {"people": 4, "keypoints": {name: {"seen": 4, "hidden": 0, "not_labelled": 0} for name in names}}
    file = dataset._keypoints({"train": card, "val": card}, str(tmp_path / "figure.png"))
    picture = decode_image(Path(file).read_bytes(), apply_exif=False)
    assert (np.abs(picture - np.array([0x2F, 0x6F, 0xDE])) < 3).all(axis=-1).mean() > 0.33


def test_what_was_left_out_of_several_categories(coco: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(coco, tmp_path / "coco"))
    with edited(root) as data:
        data["categories"] = [{**data["categories"][0], "id": n, "name": f"animal {n}"} for n in (1, 2)]
        data["annotations"][3]["category_id"] = 2
    rows = [{"split": TRAIN, "ann_id": ann_id} for ann_id in (4, 6)]
    assert set(gallery._annotated_boxes(rows, str(root), COCO17)) == {(TRAIN, 4), (TRAIN, 6)}


@pytest.mark.parametrize("box", [None, [1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, float("nan")], [0, 0, 1e9, 1]])
def test_what_is_no_box_is_not_drawn(coco: Path, tmp_path: Path, box: Any) -> None:
    root = Path(shutil.copytree(coco, tmp_path / "coco"))
    with edited(root) as data:
        data["annotations"][3]["bbox"] = box
    rows = [{"split": TRAIN, "ann_id": ann_id} for ann_id in (4, 6)]
    assert set(gallery._annotated_boxes(rows, root, COCO17)) == {(TRAIN, 6)}


@pytest.mark.parametrize("folder", ["images/{}", "images"])
def test_a_root_of_another_layout_is_found(
    pristine: Manifest, coco: Path, tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As preprocess finds it: layout.py."""
    root = Path(shutil.copytree(coco / "annotations", tmp_path / "root" / "annotations")).parent
    for split in (TRAIN, VAL):
        shutil.copytree(coco / split, root / folder.format(split), dirs_exist_ok=True)
    assert main(["inspect", pristine.folder, "--out", str(tmp_path / "out"), "--coco", str(root)]) == 0
    assert "are not those that the dataset was made from" not in capsys.readouterr().out
    main(["inspect", pristine.folder, "--out", str(tmp_path / "plain"), "--coco", str(coco)])
    shown, plain = ((tmp_path / out / "rejected.jpg").read_bytes() for out in ("out", "plain"))
    assert shown == plain


@pytest.mark.parametrize("gone", [True, False])
def test_another_root_is_told(
    pristine: Manifest, coco: Path, tmp_path: Path, gone: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders of the splits' names are in every COCO root."""
    root = Path(shutil.copytree(coco, tmp_path / "root"))
    file = root / "annotations" / f"person_keypoints_{VAL}.json"
    if gone:
        file.unlink()
    else:
        file.write_text(file.read_text() + " ")
    assert main(["inspect", pristine.folder, "--out", str(tmp_path / "out"), "--coco", str(root)]) == 0
    told = f"--coco {root}: the annotations of {VAL} there are not those that the dataset was made from."
    assert told in capsys.readouterr().out


def test_the_page_holds_everything_and_is_the_same_again(
    pristine: Manifest, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for out in (first, second):
        assert main(["inspect", pristine.folder, "--out", str(out), "--coco", str(coco)]) == 0
    out = capsys.readouterr().out
    assert pristine.digest in out
    assert re.search(r"^left_shoulder +89% \(100%\) +100% \(100%\)$", out, re.MULTILINE)
    assert re.search(r"^box height, px \*( +\d+ \d+ \d+){2}\n", out, re.MULTILINE)
    assert "\n* 5th, 50th and 95th percentile\n" in out
    views = re.search(r"^views of train2017:\n(.*\n){4}", out, re.MULTILINE)
    assert views is not None
    head, *lines = views[0].splitlines()[1:]
    for line in lines:  # each figure ends where the name of its column ends
        assert [line[: head.index(name) + len(name)][-1] for name in ("mirrored", "rotated")] == ["%", "%"]
        assert len(line) == len(head)
    names = sorted(p.name for p in first.iterdir())
    assert names == sorted(
        [
            *("card.json", "index.html", "figure-keypoints.png", "figure-people.png", "figure-views.png"),
            *(f"{TRAIN}.jpg", f"{TRAIN}-v1.jpg", f"{TRAIN}-v2.jpg", f"{TRAIN}-views.jpg", f"{VAL}.jpg"),
            "rejected.jpg",
        ]
    )
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    page = (first / "index.html").read_text()
    assert len(re.findall(r'<img alt="[^"]+" src="data:image/', page)) == len(names) - 2
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert page.count('class="stats"') == 2, "a row of figures for each split"
    assert pristine.digest in page
    assert str(coco) not in page + (first / "card.json").read_text()
    assert json.loads((first / "card.json").read_text())["digest"] == pristine.digest


def test_views_that_are_never_rotated_have_a_figure(card: dict[str, Any], tmp_path: Path) -> None:
    still = json.loads(json.dumps(card))
    for view in still["splits"][TRAIN]["views"]:
        view["rotation_deg"] = {"5 %": 0, "median": 0, "95 %": 0, "edges": [], "counts": []}
    files = dict(write_figures(still, str(tmp_path)))
    assert list(files) == ["Keypoints", "People", "Augmented views"]
    assert all(Path(file).stat().st_size > 5000 for file in files.values())
    drawn = decode_image(Path(files["Augmented views"]).read_bytes(), apply_exif=False)
    assert drawn[80:220, 120:300].min() < 100, "words in place of bars"
    assert (drawn[:40, -3:] > 250).all(), "no title is cut off"


# ---------------------------------------------------------------------------------- MLflow


def test_a_search_for_the_digest_finds_the_card_and_the_training(
    pristine: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    storage = tmp_path / "runs"
    command = [
        "inspect",
        pristine.folder,
        "--out",
        str(tmp_path / "out"),
        "--log",
        "--run.storage",
        str(storage),
    ]
    assert main(command) == 0
    assert "none yet" in capsys.readouterr().out
    tracker = Tracker(TrackSettings(), storage)
    # As hrnet train logs its input (pipelines/train.py).
    (tmp_path / "out" / "other.jpg").write_bytes(b"of another dataset")
    dataset = {"source": pristine.folder, "digest": pristine.digest, "training": TRAIN, "validation": VAL}
    trained = tracker.open_run("w32", {}, {"dataset_digest": pristine.digest}, dataset)
    other = {**dataset, "digest": "0" * 64}
    tracker.open_run("another set", {}, {"dataset_digest": "0" * 64}, other)
    assert main(command) == 0
    assert "other runs on this dataset: w32\n" in capsys.readouterr().out

    experiment = tracker.client.get_experiment_by_name("hrnet").experiment_id
    query = f"dataset.digest = '{pristine.digest[:36]}'"
    found = {run.info.run_id: run for run in tracker.client.search_runs([experiment], query)}
    assert len(found) == 2  # asked twice, one run of the dataset
    assert trained in found
    run = next(run for run_id, run in found.items() if run_id != trained)
    assert (run.info.status, run.info.run_name) == ("FINISHED", f"dataset-{pristine.digest[:8]}")
    assert run.data.tags["dataset_digest"] == pristine.digest
    assert run.data.metrics[f"data/{TRAIN}/people"] == 9
    assert run.data.metrics[f"data/{TRAIN}/people_left_out"] == 4
    assert run.data.params["data.codec"] == "official"
    names = {i.dataset.name: (i.dataset.digest, i.tags[0].value) for i in run.inputs.dataset_inputs}
    assert names == dict.fromkeys((TRAIN, VAL), (pristine.digest[:36], "inspection"))
    logged = {item.path for item in tracker.client.list_artifacts(run.info.run_id, "dataset")}
    assert {"dataset/card.json", "dataset/index.html", f"dataset/{TRAIN}-v1.jpg"} <= logged
    assert "dataset/other.jpg" not in logged
