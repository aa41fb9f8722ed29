"""The shards in the hands of others: what `datasets`, DuckDB, Polars and pandas read, with none of our code,
is what the annotations and photographs say; and mlcroissant finds croissant.json valid. All of them are
development dependencies: where one is absent, its test fails.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_coco import annotation_file, write_coco
from test_shards import make

from hrnet_core.geometry import box_to_center_scale, sanitize_boxes
from hrnet_core.heatmaps import HeatmapCodec

TRAIN, VAL = "train2017", "val2017"
SIZE = (64, 96)
PLAIN = f"data/{TRAIN}-0*.parquet"


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco") / "root", {TRAIN: [2, 3, 1], VAL: [2]})


@pytest.fixture(scope="module")
def shards(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six people with two views each in two shards, lossless; two people in one."""
    folder = tmp_path_factory.mktemp("shards") / "set"
    make(coco, folder, input_size=SIZE, people_per_shard=4, row_group_people=2, variants=2)
    return folder


@pytest.fixture(scope="module")
def truth(coco: Path) -> dict[int, dict[str, Any]]:
    """ann_id -> pixels, keypoints and heatmaps of the plain view, from the photographs and annotations."""
    annotations = json.loads(annotation_file(coco, TRAIN).read_text())
    files = {image["id"]: image["file_name"] for image in annotations["images"]}
    codec = HeatmapCodec("official", SIZE, sigma=0.75)
    people = {}
    for person in annotations["annotations"]:
        photo = cv2.imread(str(coco / TRAIN / files[person["image_id"]]), cv2.IMREAD_COLOR_RGB)
        box, _ = sanitize_boxes(person["bbox"], 160, 120)
        matrix = codec.image_to_crop_matrix(*box_to_center_scale(box, SIZE, 1.25))
        keypoints = np.array(person["keypoints"], np.float32).reshape(17, 3)
        crop = keypoints[:, :2] @ matrix[:, :2].T + matrix[:, 2]
        heatmaps, _ = codec.encode(crop.astype(np.float32)[None], keypoints[None, :, 2])
        people[person["id"]] = {
            "pixels": cv2.warpAffine(photo, matrix, SIZE, flags=cv2.INTER_LINEAR),
            "keypoints": keypoints,
            "heatmaps": heatmaps[0].astype(np.float16),
            "image_id": person["image_id"],
        }
    return people


def check(row: Mapping[str, Any], pixels: Image.Image, own: Mapping[str, Any], truth: dict[int, Any]) -> int:
    """A row in plain types against the truth; `own` is the schema's metadata `hrnet`. Returns the ann_id."""
    expected = truth[row["ann_id"]]
    np.testing.assert_array_equal(np.asarray(pixels), expected["pixels"])
    keypoints = np.array(row["keypoints"], np.float32).reshape(len(own["skeleton"]["keypoints"]), 3)
    np.testing.assert_array_equal(keypoints, expected["keypoints"])
    heatmaps = np.frombuffer(row["heatmaps"], own["heatmaps"]["dtype"]).reshape(own["heatmaps"]["shape"])
    np.testing.assert_array_equal(heatmaps, expected["heatmaps"])
    assert heatmaps.max() == 1
    assert row["image_id"] == expected["image_id"]
    assert not row["flipped"]
    return int(row["ann_id"])


def test_datasets_reads_the_folder_with_images_as_images(
    shards: Path, truth: dict[int, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    found = datasets.load_dataset(str(shards), cache_dir=str(tmp_path))
    assert {name: len(split) for name, split in found.items()} == {TRAIN: 12, VAL: 2}
    assert isinstance(found[TRAIN].features["image"], datasets.Image)
    plain = found[TRAIN].filter(lambda variant: variant == 0, input_columns="variant")
    own = json.loads(pq.read_schema(next(shards.glob(PLAIN))).metadata[b"hrnet"])
    assert {check(row, row["image"], own, truth) for row in plain} == set(truth)


def test_duckdb_reads_them_in_sql(shards: Path, truth: dict[int, Any]) -> None:
    import duckdb

    with duckdb.connect() as database:
        key = f"SELECT value FROM parquet_kv_metadata('{shards}/{PLAIN}') WHERE key = 'hrnet' LIMIT 1"
        own = json.loads(database.sql(key).fetchall()[0][0])
        people = database.sql(f"SELECT * FROM '{shards}/data/{TRAIN}-*.parquet' WHERE variant = 0")
        rows = [dict(zip(people.columns, row, strict=True)) for row in people.fetchall()]
        counted = database.sql(
            f"SELECT count(*) FILTER (keypoints[3 * 5 + 3] = 1) FROM '{shards}/{PLAIN}'"
        ).fetchall()
    assert {check(r, Image.open(io.BytesIO(r["image"]["bytes"])), own, truth) for r in rows} == set(truth)
    assert counted == [(6,)]  # v of keypoint 5 is 1 for everyone


def test_polars_reads_them(shards: Path, truth: dict[int, Any]) -> None:
    import polars

    own = json.loads(polars.read_parquet_metadata(next(shards.glob(PLAIN)))["hrnet"])
    rows = polars.scan_parquet(shards / PLAIN).collect().to_dicts()
    assert {check(r, Image.open(io.BytesIO(r["image"]["bytes"])), own, truth) for r in rows} == set(truth)


def test_pandas_reads_them(shards: Path, truth: dict[int, Any]) -> None:
    import pandas

    files = sorted(shards.glob(PLAIN))
    own = json.loads(pq.read_schema(files[0]).metadata[b"hrnet"])
    rows = pandas.concat([pandas.read_parquet(file) for file in files]).to_dict("records")
    assert {check(r, Image.open(io.BytesIO(r["image"]["bytes"])), own, truth) for r in rows} == set(truth)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:rdflib.*")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:mlcroissant.*")
def test_croissant_is_valid_and_its_records_are_the_rows(
    shards: Path, truth: dict[int, Any], tmp_path: Path
) -> None:
    import mlcroissant

    dataset = mlcroissant.Dataset(jsonld=str(shards / "croissant.json"))
    assert not dataset.metadata.issues.errors
    # Recommended only, and not known here: whose pictures they are, and when somebody publishes them.
    told = {warning.split('"')[1].rsplit("/")[-1] for warning in dataset.metadata.issues.warnings}
    assert told == {"license", "citeAs", "datePublished"}
    own = json.loads(pq.read_schema(next(shards.glob(PLAIN))).metadata[b"hrnet"])
    rows = [
        {name.removeprefix(f"{TRAIN}/"): value for name, value in record.items()}
        for record in dataset.records(TRAIN)
    ]
    assert len(rows) == 12
    plain = [row for row in rows if row["variant"] == 0]
    assert {check(row, row["image"], own, truth) for row in plain} == set(truth)

    broken = json.loads((shards / "croissant.json").read_text())
    broken["recordSet"][0]["field"][0]["source"]["fileSet"]["@id"] = "nowhere"
    (tmp_path / "croissant.json").write_text(json.dumps(broken))
    with pytest.raises(mlcroissant.ValidationError, match="nowhere"):
        mlcroissant.Dataset(jsonld=str(tmp_path / "croissant.json"))


EXAMPLES = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs/shards.md").read_text(), re.DOTALL
)


READERS = ("datasets", "duckdb", "polars", "pandas", "ray")


@pytest.mark.parametrize(
    ("reader", "code"),
    [
        pytest.param(reader, code, id=reader, marks=[pytest.mark.ray] if reader == "ray" else [])
        for reader, code in zip(READERS, EXAMPLES, strict=True)
    ],
)
def test_the_examples_of_the_docs_run(
    reader: str,
    code: str,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    import datasets

    assert f"import {reader}" in code or f", {reader}" in code or f"from {reader}" in code
    if reader == "ray":
        request.getfixturevalue("ray_local")

    (tmp_path / "SHARDS").symlink_to(shards)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names: dict[str, Any] = {}
    exec(compile(code, "docs/shards.md", "exec"), names)
    if reader == "ray":
        assert {row["ann_id"] for row in names["people"].take_all()} == {1, 2, 3, 4, 5, 6}
    if "row" in names:
        assert len(names["row"]["heatmaps"]) == 2 * 17 * 24 * 16


def test_pictures_are_named_for_their_person(shards: Path) -> None:
    """The path beside the bytes: unique, and with the suffix that says what the bytes are."""
    import polars

    paths = polars.scan_parquet(shards / f"data/{TRAIN}-*.parquet").select("image").collect()["image"]
    names = paths.struct.field("path").to_list()
    assert len(set(names)) == len(names) == 12
    assert all(name.endswith(".png") for name in names)
