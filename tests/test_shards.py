"""The shard contract: what is written, that others can read it, and that damage never passes for data."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from small_coco import write_coco

from hrnet_core.augment import keypoints_in_view
from hrnet_core.errors import DataError
from hrnet_core.locations import open_folder
from hrnet_core.skeleton import COCO17
from pipelines.preprocess import finish
from pipelines.settings.config import DataSettings
from pipelines.shards.build import build_shard
from pipelines.shards.manifest import Manifest
from pipelines.shards.plan import finished_shards, plan_shards
from pipelines.shards.rows import decode_rows, read_row_group
from pipelines.shards.schema import COLUMNS
from pipelines.sources.coco import read_coco
from pipelines.storage import files as files_module
from pipelines.storage.files import remove_leftovers, temporary_name, write_whole

TRAIN, VAL = "train2017", "val2017"


def make(coco: Path, folder: Path, **settings: Any) -> Manifest:
    """The dataset of a COCO folder, without Ray."""
    data = DataSettings(
        root=str(coco),
        shards=str(folder),
        **{"input_size": (64, 96), "people_per_shard": 6, "row_group_people": 4, "image_format": "png"}
        | settings,
    )
    splits = [read_coco(data.root, name, COCO17) for name in (TRAIN, VAL)]
    works = [work for split in splits for work in plan_shards(split, data)]
    finished_shards(works, data.shards)
    return finish(splits, works, {work.key: build_shard(work) for work in works}, data)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco") / "root", {TRAIN: [2, 3, 1, 2, 3], VAL: [2, 1]})


@pytest.fixture(scope="module")
def pristine(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """11 people in two shards, two views of each; 3 people in one."""
    return make(coco, tmp_path_factory.mktemp("shards") / "set", variants=2)


@pytest.fixture
def copy(pristine: Manifest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine.folder, tmp_path / "copy"))


def rows(manifest: Manifest, split: str = TRAIN, variant: int = 0) -> dict[str, Any]:
    """All rows of a split as arrays."""
    return decode_rows(whole_table(manifest, split, variant), manifest)


def whole_table(manifest: Manifest, split: str, variant: int = 0) -> pa.Table:
    groups = manifest.row_groups(split)
    return pa.concat_tables([read_row_group(manifest, split, *group, variant=variant) for group in groups])


# ---------------------------------------------------------------------------------- what is written


def test_files_and_figures(pristine: Manifest) -> None:
    names = [
        "train2017-00000-of-00002.parquet",
        "train2017-00001-of-00002.parquet",
        "train2017-v1-00000-of-00002.parquet",
        "train2017-v1-00001-of-00002.parquet",
        "val2017-00000-of-00001.parquet",
    ]
    assert sorted(os.listdir(f"{pristine.folder}/data")) == names
    assert (pristine.people(TRAIN), pristine.people(VAL)) == (11, 3)
    assert (pristine.variants(TRAIN), pristine.variants(VAL)) == (2, 1)
    # 2 + 3 + 1 people of the first three photos, 2 + 3 of the others; groups of at most four.
    assert [shard.row_groups for shard in pristine.shards(TRAIN)] == [(4, 2), (4, 1)]
    for split in pristine.splits:
        for variant in range(pristine.variants(split)):
            for shard in pristine.shards(split, variant):
                content = Path(pristine.folder, shard.path).read_bytes()
                assert shard.sha256 == hashlib.sha256(content).hexdigest()
                assert shard.bytes == len(content)
                assert shard.rows == shard.people == sum(shard.row_groups)


def test_columns_are_the_contracts(pristine: Manifest) -> None:
    schema = pq.read_schema(f"{pristine.folder}/{pristine.shards(TRAIN)[0].path}")
    kinds = {
        "struct<bytes: binary, path: string>": "image",
        "list<element: double>": "image_to_picture image_to_crop",
        "list<element: float>": "keypoints weights bbox_xywh center scale",
        "binary": "heatmaps image_sha256",
        "int64": "image_id ann_id",
        "int32": "width height",
        "int16": "variant",
        "float": "rotation_deg area",
        "bool": "flipped",
    }
    expected = {name: kind for kind, names in kinds.items() for name in names.split()}
    assert {field.name: str(field.type) for field in schema} == expected


def test_schema_metadata_explains_the_bytes(pristine: Manifest) -> None:
    schema = pq.read_schema(f"{pristine.folder}/{pristine.shards(TRAIN)[0].path}")
    own = json.loads(schema.metadata[b"hrnet"])
    assert own["codec"] == {"name": "official", "input_size": [64, 96], "sigma": 0.75}
    assert own["heatmaps"] == {"dtype": "float16", "shape": [17, 24, 16]}
    assert own["skeleton"]["keypoints"] == list(COCO17.keypoints)
    assert own["plan"] == pristine.split(TRAIN)["plan"]
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["keypoints"] == {"_type": "List", "feature": {"_type": "Value", "dtype": "float32"}}
    assert features["image_to_crop"]["feature"]["dtype"] == "float64"
    assert features["flipped"] == {"_type": "Value", "dtype": "bool"}
    assert list(features) == list(COLUMNS)


def test_parquet_settings(pristine: Manifest) -> None:
    with pq.ParquetFile(f"{pristine.folder}/{pristine.shards(TRAIN)[0].path}") as parquet:
        group = parquet.metadata.row_group(0)
        columns = [group.column(i) for i in range(group.num_columns)]
    with_statistics = {c.path_in_schema for c in columns if c.is_stats_set}
    assert with_statistics == {
        "image_id", "ann_id", "variant", "rotation_deg", "flipped", "area", "width", "height",
    }  # fmt: skip
    assert {c.compression for c in columns} == {"ZSTD"}
    assert not any(c.has_dictionary_page for c in columns)


def test_rows_say_what_they_hold(pristine: Manifest, coco: Path) -> None:
    """Picture, heatmaps, weights and matrix of a row belong together, in both variants."""
    codec, skeleton = pristine.recipe.codec, pristine.recipe.skeleton
    assert skeleton == COCO17
    split = read_coco(coco, TRAIN, COCO17)
    people = split.people
    for variant in range(2):
        found = rows(pristine, TRAIN, variant)
        assert found["ann_id"].tolist() == people.ann_id.tolist() == list(range(1, 12))
        np.testing.assert_array_equal(found["keypoints"], people.keypoints.astype(np.float32))
        np.testing.assert_array_equal(found["bbox_xywh"], people.bbox_xywh)
        assert (found["variant"] == variant).all()
        places, visible = found["keypoints"][..., :2], found["keypoints"][..., 2]
        crop = keypoints_in_view(found["image_to_crop"], found["flipped"], places, visible, skeleton)
        heatmaps, weights = codec.encode(*crop)
        np.testing.assert_array_equal(found["heatmaps"], heatmaps.astype(np.float16).astype(np.float32))
        np.testing.assert_array_equal(found["weights"], weights)
        assert (found["images"].shape, found["images"].dtype) == ((11, 96, 64, 3), np.uint8)
        assert (found["heatmaps"].shape, found["heatmaps"].dtype) == ((11, 17, 24, 16), np.float32)
    assert found["flipped"].any()
    assert not rows(pristine, TRAIN, 0)["flipped"].any()


def test_pictures_are_rgb_and_of_the_photo(pristine: Manifest, coco: Path) -> None:
    """The plain crop is the published warp of the photo that cv2 reads, channels turned to RGB."""
    found = rows(pristine)
    photo = cv2.imread(str(coco / TRAIN / f"{TRAIN}-0.jpg"))
    expected = cv2.warpAffine(photo, found["image_to_crop"][0], (64, 96), flags=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(found["images"][0], expected[..., ::-1])
    content = (coco / TRAIN / f"{TRAIN}-0.jpg").read_bytes()
    assert found["image_sha256"][0].tobytes() == hashlib.sha256(content).digest()


def test_rows_of_slices_and_takes(pristine: Manifest) -> None:
    """The training feed shuffles rows as tables before it decodes them."""
    tables = [read_row_group(pristine, TRAIN, 0, 0, variant=v) for v in range(2)]
    whole = [decode_rows(table, pristine) for table in tables]
    mixed = pa.concat_tables(tables).take(pa.array([5, 0, 3])).slice(1, 2)
    for part, expected in ((tables[0].slice(1, 2), (whole[0], [1, 2])), (mixed, (whole[0], [0, 3]))):
        found = decode_rows(part, pristine)
        for name, values in found.items():
            np.testing.assert_array_equal(values, expected[0][name][expected[1]], err_msg=name)


def test_float16_heatmaps_are_not_copied(pristine: Manifest) -> None:
    table = read_row_group(pristine, TRAIN, 0, 0, ["heatmaps"])
    found = decode_rows(table, pristine, np.float16)
    assert list(found) == ["heatmaps"]
    buffer = np.frombuffer(table["heatmaps"].chunk(0).buffers()[2], np.uint8)
    assert np.shares_memory(found["heatmaps"], buffer)
    whole = decode_rows(table, pristine)["heatmaps"]
    assert not np.shares_memory(whole, buffer)
    np.testing.assert_array_equal(whole, found["heatmaps"].astype(np.float32))


def test_digest_is_the_contracts(pristine: Manifest, coco: Path, tmp_path: Path) -> None:
    """Schema version, semantic configuration, annotation sha256, sorted shard sha256; nothing else."""
    written = Path(pristine.folder, "data").iterdir()
    shards = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in written)
    annotations = {
        name: hashlib.sha256((coco / f"annotations/person_keypoints_{name}.json").read_bytes()).hexdigest()
        for name in (TRAIN, VAL)
    }
    parts = [1, pristine.fields["config"], annotations, shards]
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    assert pristine.digest == hashlib.sha256(text.encode()).hexdigest()
    elsewhere = Path(shutil.copytree(coco, tmp_path / "moved"))
    assert make(elsewhere, tmp_path / "b", variants=2).digest == pristine.digest
    assert make(coco, tmp_path / "c", variants=2, seed=1).digest != pristine.digest


def test_manifest_travels_to_workers(pristine: Manifest) -> None:
    assert pickle.loads(pickle.dumps(pristine)) == pristine
    with pytest.raises(DataError, match=r"no split 'test'.*train2017, val2017"):
        pristine.shards("test")


def test_readme_and_croissant_list_the_files(pristine: Manifest) -> None:
    folder = Path(pristine.folder)
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    patterns = {f["split"]: f["path"] for f in yaml.safe_load(head)["configs"][0]["data_files"]}
    assert {name: len(list(folder.glob(path))) for name, path in patterns.items()} == {TRAIN: 4, VAL: 1}
    assert all(f"| {name} |" in body for name in COLUMNS)
    croissant = json.loads((folder / "croissant.json").read_text())
    assert croissant["conformsTo"] == "http://mlcommons.org/croissant/1.1"
    objects = [entry for entry in croissant["distribution"] if entry["@type"] == "cr:FileObject"]
    shards = [shard for split in (TRAIN, VAL) for shard in pristine.split(split)["shards"]]
    assert {o["contentUrl"]: o["sha256"] for o in objects} == {s["path"]: s["sha256"] for s in shards}
    fields = [field["name"] for field in croissant["recordSet"][0]["field"]]
    assert fields == list(COLUMNS)


# ---------------------------------------------------------------------------------- damage


def test_every_flipped_byte_is_noticed(pristine: Manifest, copy: Path) -> None:
    """60 single-byte flips over a shard: `verify` sees each; reading sees each that lies in a page."""
    manifest = Manifest.load(copy)
    file = copy / manifest.shards(TRAIN)[0].path
    content = file.read_bytes()
    with pq.ParquetFile(file) as parquet:
        groups = [parquet.metadata.row_group(g) for g in range(2)]
    chunks = [group.column(c) for group in groups for c in range(group.num_columns)]
    # dictionary pages are off, so a chunk is data pages: a short header each, then checked bytes.
    pages = [range(c.data_page_offset + 60, c.data_page_offset + c.total_compressed_size) for c in chunks]
    data = [place for page in pages for place in page]
    places = [data[i * len(data) // 50] for i in range(50)] + [i * len(content) // 10 for i in range(10)]
    for number, place in enumerate(places):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=file.name):
            manifest.verify([TRAIN])
        if number < 50:
            with pytest.raises(DataError, match=file.name):
                rows(manifest)
    file.write_bytes(content)
    manifest.verify()
    manifest.verify([VAL])


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        Manifest.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert [w for w in (str(folder), *words) if w not in message] == [], message


def test_a_folder_without_manifest_is_no_dataset(copy: Path, tmp_path: Path) -> None:
    os.remove(copy / "manifest.json")
    refused(copy, "manifest.json", "hrnet preprocess")
    refused(copy, "no manifest.json", "what is there already is used")


def test_what_is_no_dataset_at_all_is_not_to_be_gone_on_with(pristine: Manifest, tmp_path: Path) -> None:
    """Preprocessing into a place that was named by mistake is not the way out."""
    (tmp_path / "coco" / "data").mkdir(parents=True)
    (tmp_path / "coco" / "data" / "notes.txt").write_text("x")
    for place, words in (
        (tmp_path / "nowhere", ["no manifest.json", "no such folder: correct --data.shards"]),
        (Path(pristine.folder) / "manifest.json", ["is a file: name the folder", "--data.shards"]),
        (tmp_path / "coco", ["no manifest.json", "holds no shards", "correct --data.shards"]),
    ):
        refused(place, *words)
        with pytest.raises(DataError) as caught:
            Manifest.load(place)
        assert "already" not in str(caught.value)


def test_shards_must_be_the_manifests(copy: Path) -> None:
    victim = copy / "data" / "train2017-v1-00001-of-00002.parquet"
    content = victim.read_bytes()
    victim.write_bytes(content[:-1])
    refused(copy, victim.name, f"{len(content) - 1} bytes instead of {len(content)}")
    os.remove(victim)
    refused(copy, victim.name, "missing")
    victim.write_bytes(content)
    shutil.copy(victim, copy / "data" / "train2017-00002-of-00003.parquet")
    refused(copy, "train2017-00002-of-00003.parquet is not in the manifest")


def test_manifests_that_cannot_be_read(copy: Path) -> None:
    file = copy / "manifest.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "schema_version": 2, "code": {"hrnet": "9.9"}}))
    refused(copy, "schema_version 2", "9.9")
    for content in (file.read_text()[:300], "[]", '{"schema_version": 1}'):
        file.write_text(content)
        refused(copy, "not a manifest")


# ---------------------------------------------------------------------------------- files


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a.txt", b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_whole(tmp_path / "a.txt", b"new")
    assert (tmp_path / "a.txt").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]
    with open(tmp_path / "a.txt", "rb") as reader:  # whoever reads at that moment reads the old file whole
        write_whole(tmp_path / "a.txt", b"new")
        assert reader.read() == b"old"
    assert (tmp_path / "a.txt").read_bytes() == b"new"


def test_leftovers_of_dead_writers_go_those_of_live_ones_stay(tmp_path: Path) -> None:
    files, root = open_folder(str(tmp_path))
    alive = temporary_name(files, f"{root}/x.parquet")
    dead = alive.replace(f".{os.getpid()}@", ".999999999@")
    elsewhere = alive.replace("@", "@another-")
    old = elsewhere.replace("@", "@old-")
    for name in (alive, dead, elsewhere, old, f"{root}/.hidden"):
        Path(name).touch()
    os.utime(old, (0, 0))
    remove_leftovers(tmp_path)
    left = {Path(alive).name, Path(elsewhere).name, ".hidden"}
    assert set(os.listdir(tmp_path)) == left


def test_folders_that_cannot_be_opened() -> None:
    with pytest.raises(DataError, match="nosuch://bucket"):
        open_folder("nosuch://bucket/x")
