"""The training feed: order by arithmetic, each row once, the same global batches for every world size."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
from small_coco import write_coco
from test_shards import make, whole_table

from hrnet_core.augment import (
    draw,
    draw_fresh,
    keypoints_in_view,
    place_views,
    plain_view,
    random_view,
    view_to_crop,
)
from hrnet_core.choices import Noise
from hrnet_core.errors import DataError
from hrnet_core.geometry import box_to_center_scale, compose_affine, crop_people, invert_affine
from hrnet_core.heatmaps import HeatmapCodec, float16_heatmaps
from hrnet_core.images import decode_image
from hrnet_core.noise import add_noise, draw_noise, place_noise
from hrnet_core.skeleton import COCO17
from pipelines.settings.config import DataSettings
from pipelines.settings.train import TrainSettings
from pipelines.shards import build as build_module
from pipelines.shards.manifest import Manifest, write_manifest
from pipelines.shards.recipe import Recipe
from pipelines.shards.rows import decode_rows
from pipelines.shards.schema import shard_name, shard_schema
from pipelines.shards.writer import writing_shard
from pipelines.sources.coco import read_coco
from pipelines.training import feed as feed_module
from pipelines.training.batch import FreshBatch
from pipelines.training.feed import Feed
from pipelines.training.order import EpochOrder

AREA = 30_000.0
"""Of every person: so large that even a hardly trained network has an AP between 0 and 1."""


def dotted_shards(
    folder: Path,
    people: dict[str, int],
    variants: int = 1,
    group: int = 8,
    size: tuple[int, int] = (64, 64),
    context: float = 1.0,
    per_image: int = 1,
) -> Manifest:
    """A dataset of pictures with 17 coloured dots, one person a photo that is its own crop (and its own
    cut); two shards a split. Row i of a split has ann_id 1000 + i; the first pixel of variant v holds v.
    per_image: so many neighbours say that they are of one photo."""
    recipe = Recipe.of(
        DataSettings(input_size=size, variants=variants, row_group_people=group, context=context)
    )
    splits = {}
    for split, count in people.items():
        listed, views = [], variants if split == "train2017" else 1
        halves = [range(count // 2), range(count // 2, count)]
        for variant in range(views):
            for index, half in enumerate(halves):
                name = shard_name(split, variant, index, len(halves))
                with writing_shard(f"{folder}/{name}", shard_schema(recipe, "plan", split)) as writer:
                    for start in range(0, len(half), group):
                        people_of = half[start : start + group]
                        writer.write(_rows(people_of, split, variant, size, recipe.codec, per_image))
                    listed.append(asdict(writer.finish(name, variant, [])))
        splits[split] = {
            "people": count,
            "photos": count,
            "variants": views,
            "annotation_sha256": "0" * 64,
            "rejected": {},
            "shards": listed,
        }
    return write_manifest(str(folder), {"config": recipe.as_dict(), "splits": splits})


def _rows(
    indices: range, split: str, variant: int, size: tuple[int, int], codec: HeatmapCodec, per_image: int
) -> dict[str, object]:
    colors = np.random.default_rng(0).integers(60, 255, (17, 3))
    images, all_points = [], []
    for index in indices:
        rng = np.random.default_rng([index, len(split)])
        points = rng.uniform(4, np.array(size) - 5, (17, 2)).astype(np.float32)
        image = np.zeros((size[1], size[0], 3), np.uint8)
        for (x, y), color in zip(points, colors.tolist(), strict=True):
            cv2.circle(image, (round(float(x)), round(float(y))), 3, color, -1)
        image[0, 0] = variant
        images.append(cv2.imencode(".png", image[:, :, ::-1])[1].tobytes())
        all_points.append(points)
    n = len(indices)
    points = np.stack(all_points)
    visible = np.full((n, 17), 2, np.float32)
    heatmaps, weights = codec.encode(points, visible)
    identity = np.tile(np.array([[1.0, 0, 0], [0, 1, 0]]), (n, 1, 1))
    ids = 1000 + np.array(indices)
    return {
        "image": images,
        "image_path": [f"{i}.png" for i in indices],
        "image_to_picture": identity,
        "image_to_crop": identity,
        "keypoints": np.concatenate([points, visible[..., None]], axis=-1),
        "heatmaps": heatmaps.astype(np.float16),
        "weights": weights,
        "image_id": 1000 + np.array(indices) // per_image,
        "ann_id": ids,
        "variant": np.full(n, variant, np.int16),
        "bbox_xywh": np.tile(np.array([0, 0, *size], np.float32), (n, 1)),
        "center": np.tile(np.array(size, np.float32) / 2, (n, 1)),
        "scale": np.tile(np.array(size, np.float32), (n, 1)),
        "rotation_deg": np.zeros(n, np.float32),
        "flipped": np.zeros(n, bool),
        "area": np.full(n, AREA, np.float32),
        "width": np.full(n, size[0], np.int32),
        "height": np.full(n, size[1], np.int32),
        "image_sha256": [b"0" * 32] * n,
    }


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """77 people in row groups of 8: a last batch of 77 - 4 x 16 = 13 rows."""
    return dotted_shards(tmp_path_factory.mktemp("shards"), {"train2017": 77, "val2017": 5}, variants=3)


SETTINGS = TrainSettings(batch_size=16, lanes=8, shuffle_row_groups=2, seed=5)


def global_batches(manifest: Manifest, world: int, epoch: int = 0, start: int = 0) -> list[list[int]]:
    """ann_ids of each global batch, sorted, from all workers of a world."""
    workers = [
        Feed(manifest, "train2017", SETTINGS, rank, world).batches(epoch, start) for rank in range(world)
    ]
    batches = []
    for parts in zip(*workers, strict=True):
        assert sum(p.rows for p in parts) == parts[0].total
        batches.append(sorted(np.concatenate([p.ann_ids[: p.rows] for p in parts]).tolist()))
    return batches


def rows_of(order: EpochOrder, lane: int) -> np.ndarray:
    """(M, 2) of (row group, row within it): the whole lane, in reading order."""
    windows = range(-(-order.lane_length(lane) // order.window_rows))
    return np.concatenate([order.window(lane, number) for number in windows])


def test_every_person_once_an_epoch_in_the_same_batches_for_every_world(manifest: Manifest) -> None:
    alone = global_batches(manifest, 1)
    assert [len(b) for b in alone] == [16, 16, 16, 16, 13]
    assert sorted(ann_id for batch in alone for ann_id in batch) == list(range(1000, 1077))
    for world in (2, 4, 8):
        assert global_batches(manifest, world) == alone
    assert global_batches(manifest, 2, epoch=1) != alone


def test_worker_r_reads_lanes_r_and_every_world_th_after(manifest: Manifest) -> None:
    feed = Feed(manifest, "train2017", SETTINGS, 1, 2)
    starts = np.cumsum([0, *feed.group_rows])
    rows = np.concatenate([rows_of(feed.order(3), lane)[2:4] for lane in (1, 3, 5, 7)])
    second = list(feed.batches(3))[1]
    assert second.ann_ids.tolist() == (1000 + starts[rows[:, 0]] + rows[:, 1]).tolist()


def test_going_on_inside_an_epoch_gives_the_rest_and_reads_nothing_before(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = global_batches(manifest, 2)
    assert global_batches(manifest, 2, start=3) == whole[3:]
    read: set[tuple[int, int]] = set()
    original = feed_module.read_row_group

    def noted(manifest: Manifest, split: str, shard: int, group: int, *args: object) -> pa.Table:
        read.add((shard, group))
        return original(manifest, split, shard, group, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(feed_module, "read_row_group", noted)
    # Windows of one row group, 8 rows: batch 4 starts with the second window of each lane.
    feed = Feed(manifest, "train2017", SETTINGS.model_copy(update={"shuffle_row_groups": 1}))
    (batch,) = feed.batches(0, start=4)
    order = feed.order(0)
    rest = np.concatenate([rows_of(order, lane)[8:] for lane in range(8)])
    assert batch.rows == len(rest) == 13
    assert read == {feed.groups[group] for group in rest[:, 0]}
    assert len(read) < len(feed.groups)


def test_order_is_a_function_of_seed_epoch_digest_lanes_and_batch_only() -> None:
    def order(**change: object) -> list[list[int]]:
        fields = {
            "group_rows": (128, 128, 40, 128),
            "seed": 3,
            "epoch": 1,
            "digest": "ab12",
            "lanes": 8,
            "batch_size": 64,
            "window_groups": 2,
        }
        epoch = EpochOrder(**{**fields, **change})  # type: ignore[arg-type]
        return [rows_of(epoch, lane).tolist() for lane in range(8)]

    first = order()
    assert first == order()
    every = sorted(tuple(row) for lane in first for row in lane)
    assert every == [(g, r) for g, rows in enumerate((128, 128, 40, 128)) for r in range(rows)]
    assert {len(lane) for lane in first} == {53}
    for change in ({"seed": 4}, {"epoch": 2}, {"digest": "ab13"}):
        assert order(**change) != first
    # The lane's rows are shuffled, and its windows keep to their row groups.
    assert first[0] != sorted(first[0])


def test_epoch_e_reads_variant_e_plus_ann_id(manifest: Manifest) -> None:
    for epoch in (0, 1, 2, 3):
        for batch in Feed(manifest, "train2017", SETTINGS, 1, 2).batches(epoch):
            variant = batch.images[:, 0, 0, 0]
            assert variant.tolist() == ((epoch + batch.ann_ids) % 3).tolist()


def test_batches_hold_the_rows_of_their_people(manifest: Manifest) -> None:
    """Against the shard's own columns, read without the feed."""
    columns = decode_rows(whole_table(manifest, "train2017"), manifest)
    row_of = {ann_id: row for row, ann_id in enumerate(columns["ann_id"].tolist())}
    batch = next(Feed(manifest, "train2017", SETTINGS, 0, 2).batches(7))
    rows = [row_of[ann_id] for ann_id in batch.ann_ids.tolist()]
    np.testing.assert_array_equal(batch.heatmaps, columns["heatmaps"][rows])
    np.testing.assert_array_equal(batch.weights, columns["weights"][rows])
    np.testing.assert_array_equal(batch.images[:, 1:], columns["images"][rows][:, 1:])
    assert batch.images.shape == (8, 64, 64, 3)
    assert batch.heatmaps.dtype == np.float16


def test_a_worker_without_rows_in_the_last_batch_runs_one_that_does_not_count(tmp_path: Path) -> None:
    few = dotted_shards(tmp_path / "few", {"train2017": 17, "val2017": 4})
    last = [list(Feed(few, "train2017", SETTINGS, rank, 8).batches(0))[-1] for rank in range(8)]
    assert [b.total for b in last] == [1] * 8
    assert sorted(b.rows for b in last) == [0] * 7 + [1]
    assert all(len(b.images) == 1 for b in last)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("half a minute was not enough")


@pytest.mark.parametrize("views", ["stored", "device"])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads_gives_the_same_bytes(tmp_path: Path, views: Any, threads: int) -> None:
    """Against one batch after the other, each made here from whole tables: two epochs, gone into in the
    middle of the first, by two workers; the second epoch reads other variants, or draws other views."""
    few = dotted_shards(tmp_path / "few", {"train2017": 77, "val2017": 5}, variants=2, context=2.0)
    settings = SETTINGS.model_copy(update={"views": views, "cpus_per_worker": threads})
    tables = [whole_table(few, "train2017", variant) for variant in range(2)]
    for rank in range(2):
        feed = Feed(few, "train2017", settings, rank, 2)
        starts = np.cumsum([0, *feed.group_rows])
        batches = feed.batches(4, 2, 6)
        for epoch, step in [(4, 2), (4, 3), (4, 4), (5, 0), (5, 1), (5, 2), (5, 3), (5, 4)]:
            order, batch = feed.order(epoch), next(batches)
            parts = [rows_of(order, lane)[2 * step : 2 * step + 2] for lane in range(rank, 8, 2)]
            rows = [int(starts[group]) + row for group, row in np.concatenate(parts).tolist()]
            variants = [0 if views == "device" else (epoch + 1000 + row) % 2 for row in rows]
            own = [tables[variant].slice(row, 1) for variant, row in zip(variants, rows, strict=True)]
            table, count = pa.concat_tables(own), len(rows)
            total = 16 if step < 4 else 13
            if views == "stored":
                columns = decode_rows(table, few, np.float16)
                expected = {name: columns[name] for name in ("images", "heatmaps", "weights")}
            else:
                made = feed._fresh(table.select(feed_module.FRESH), epoch, count, total)
                expected = {name: getattr(made, name) for name in (*made.SENT, "picture_to_crop")}
            assert (batch.rows, batch.total) == (count, total)
            assert batch.ann_ids.tolist() == [1000 + row for row in rows]
            for name, array in expected.items():
                np.testing.assert_array_equal(getattr(batch, name), array)
        assert next(batches, None) is None


NOISY: dict[str, Any] = {"photometric": 0.5, "coarse_dropout": 0.5, "information_dropping": 0.5}


@pytest.mark.parametrize("views", ["stored", "device"])
@pytest.mark.parametrize("kind", [*NOISY, "all"])
def test_noise_is_a_persons_and_an_epochs_in_any_world_and_on_any_threads(
    tmp_path: Path, views: Any, kind: str
) -> None:
    """Crops on the device byte for byte: by one worker on one thread, by two on three each that begin in the
    middle of the first epoch; and against the same crops without noise, with each person's numbers drawn and
    placed here. Targets stay."""
    few = dotted_shards(tmp_path / "few", {"train2017": 37, "val2017": 4}, variants=2, context=2.0)
    how = NOISY if kind == "all" else {kind: 0.5}
    settings = SETTINGS.model_copy(update={"views": views, "epochs": 2})
    noisy = settings.model_copy(update=how)

    def made(settings: TrainSettings, world: int, start: int = 0) -> dict[tuple[int, int], tuple[Any, ...]]:
        found = {}
        for rank in range(world):
            feed = Feed(few, "train2017", settings, rank, world)
            for number, batch in enumerate(feed.batches(0, start, 2), start):
                sent = [tensor.numpy() for tensor in batch.on_device("cpu")]
                for row, ann_id in enumerate(batch.ann_ids.tolist()[: batch.rows]):
                    found[number // feed.steps, ann_id] = tuple(tensor[row] for tensor in sent)
        return found

    plain, alone = made(settings, 1), made(noisy, 1)
    assert plain.keys() == alone.keys()
    assert len(alone) == 2 * 37
    together = made(noisy.model_copy(update={"cpus_per_worker": 3}), 2, start=1)
    assert len(together) == 2 * 37 - 16
    for key, (image, heatmaps, weights) in together.items():
        for array, other in zip((image, heatmaps, weights), alone[key], strict=True):
            np.testing.assert_array_equal(array, other)
    rows = {
        1000 + i: row for i, row in enumerate(decode_rows(whole_table(few, "train2017"), few)["keypoints"])
    }
    changed = 0
    for (epoch, ann_id), (image, heatmaps, weights) in plain.items():
        box = np.array([[0, 0, 64, 64]], np.float32)
        matrix = np.array([[[1.0, 0, 0], [0, 1, 0]]])
        if views == "device":
            matrix = place_views(
                draw_fresh(settings.seed, epoch, [ann_id]),
                np.float32([[32, 32]]),
                np.float32([[64, 64]]),
                rows[ann_id][None],
                np.array([64]),
                few.recipe.codec,
                COCO17,
            )[1]
        placed = place_noise(
            draw_noise(settings.seed, epoch, [ann_id]),
            Noise(**how),
            matrix,
            rows[ann_id][None],
            box,
            (64, 64),
        )
        tensors = (None if array is None else torch.from_numpy(array) for array in placed)
        expected = add_noise(torch.from_numpy(image[None].copy()), *tensors)[0].numpy()
        np.testing.assert_array_equal(alone[epoch, ann_id][0], expected)
        np.testing.assert_array_equal(alone[epoch, ann_id][1], heatmaps)
        np.testing.assert_array_equal(alone[epoch, ann_id][2], weights)
        changed += int((expected != image).any())
    assert changed > 15


def test_information_dropping_begins_with_its_epoch(tmp_path: Path) -> None:
    few = dotted_shards(tmp_path / "few", {"train2017": 17, "val2017": 4})
    how = {"information_dropping": 1.0, "dropping_from": 0.5, "epochs": 5}
    for views in ("stored", "device"):
        feed = Feed(few, "train2017", SETTINGS.model_copy(update={**how, "views": views}))
        noise = [batch.noise for batch in feed.batches(0, 0, 5)]
        assert [one.ellipses is not None for one in noise] == [False] * 6 + [True] * 4
        assert all((one.ellipses[:, 2] > 0).all() for one in noise[6:])
        assert all(one.colors is None and one.rectangles is None for one in noise)
    assert TrainSettings().noise(209) == Noise()


@pytest.mark.parametrize("batch_size", [24, 40, 128])
def test_windows_need_not_fit_batches_nor_epochs(tmp_path: Path, batch_size: int) -> None:
    """3, 5 and 16 rows of a lane a batch, of windows of 8 and lanes of 8 rows: a batch of two windows, an
    epoch whose last batch goes beyond its window, and one of less than a batch."""
    few = dotted_shards(tmp_path / "few", {"train2017": 64, "val2017": 4})
    settings = SETTINGS.model_copy(update={"batch_size": batch_size, "shuffle_row_groups": 1})
    for groups in (1, 5):
        feed = Feed(few, "train2017", settings.model_copy(update={"shuffle_row_groups": groups}))
        starts, taken = np.cumsum([0, *feed.group_rows]), feed.order(0).lane_rows
        expected = []
        for epoch in range(7):
            lanes = [rows_of(feed.order(epoch), lane) for lane in range(8)]
            for step in range(feed.steps):
                rows = np.concatenate([lane[step * taken : (step + 1) * taken] for lane in lanes])
                expected.append((1000 + starts[rows[:, 0]] + rows[:, 1]).tolist())
        assert [batch.ann_ids.tolist() for batch in feed.batches(0, 0, 7)] == expected
        assert [b.ann_ids.tolist() for b in feed.batches(1, feed.steps - 1, 7)] == expected[
            2 * feed.steps - 1 :
        ]


def flipped_byte(shards: Manifest, index: int) -> Path:
    """A bit of the first row group of a shard is another one: its page checksum does not hold any more."""
    file = Path(shards.folder) / shards.shards("train2017")[index].path
    content = bytearray(file.read_bytes())
    content[200] ^= 0x10
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("threads", [1, 3])
def test_a_damaged_shard_stops_the_feed_by_name(tmp_path: Path, threads: int) -> None:
    """Read ahead or not: at the batch that needs it, whose rows are told by the order."""
    few = dotted_shards(tmp_path / "few", {"train2017": 80, "val2017": 4})
    settings = SETTINGS.model_copy(update={"cpus_per_worker": threads, "shuffle_row_groups": 1})
    file = flipped_byte(few, 1)
    feed = Feed(few, "train2017", settings)
    damaged = feed.groups.index((1, 0))
    lanes = [rows_of(feed.order(0), lane)[:, 0] == damaged for lane in range(8)]
    first = min(int(np.argmax(lane)) // 2 for lane in lanes if lane.any())
    before, batches = set(threading.enumerate()), feed.batches(0)
    for _ in range(first):
        next(batches)
    with pytest.raises(DataError, match=f"{file.name}, row group 0"):
        next(batches)
    assert set(threading.enumerate()) <= before


def test_an_exception_of_a_thread_is_raised_to_the_consumer(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> pa.Table:
        raise DataError("shard x: damaged")

    monkeypatch.setattr(feed_module, "read_row_group", broken)
    before = set(threading.enumerate())  # those of other tests may end meanwhile
    with pytest.raises(DataError, match="shard x: damaged"):
        next(Feed(manifest, "train2017", SETTINGS).batches(0))
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("threads", [1, 4])
def test_what_is_made_ahead_is_bounded_and_the_threads_end_with_the_consumer(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    made, read, decode, original = [], [], feed_module.decode_rows, feed_module.read_row_group

    def counted(table: pa.Table, *args: Any) -> Any:
        made.append(table.num_rows)
        return decode(table, *args)

    def noted(manifest: Manifest, split: str, shard: int, group: int, *args: Any) -> pa.Table:
        read.append((shard, group))
        return original(manifest, split, shard, group, *args)

    monkeypatch.setattr(feed_module, "decode_rows", counted)
    monkeypatch.setattr(feed_module, "read_row_group", noted)
    before = set(threading.enumerate())
    settings = SETTINGS.model_copy(update={"cpus_per_worker": threads, "shuffle_row_groups": 1})
    feed = Feed(manifest, "train2017", settings)
    assert feed.ahead == threads + 4
    stream = feed.batches(0, 0, 1000)
    for _ in range(2):
        next(stream)
    wait_for(lambda: len(made) >= 2 + feed.ahead)
    time.sleep(0.1)  # the threads could go on
    assert len(set(threading.enumerate()) - before) == threads
    assert len(made) == 2 + feed.ahead
    # 9 batches of two rows a lane are 18 rows of it: two epochs of windows of 8 rows, and no third.
    assert len(set(read)) == len(feed.groups)
    assert len(read) < 6 * len(feed.groups) * feed.variants
    stream.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) <= before


def test_batches_in_flight_are_bounded_by_bytes(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows of a crop of 64x64 and 17 float16 maps of 16x16: 335,872 bytes a batch."""
    monkeypatch.setattr(feed_module, "READY_BYTES", 3 * 335_872)
    feed = Feed(manifest, "train2017", SETTINGS)
    assert feed.ahead == 3
    batch = next(feed.batches(0))
    assert batch.images.nbytes + batch.heatmaps.nbytes == 335_872
    monkeypatch.setattr(feed_module, "READY_BYTES", 1)
    assert Feed(manifest, "train2017", SETTINGS).ahead == 1


def test_the_next_epoch_is_made_while_nobody_asks(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last batch of an epoch (validation runs) its first ones are ready without reading."""
    settings = SETTINGS.model_copy(update={"cpus_per_worker": 2})
    feed = Feed(manifest, "train2017", settings)
    made, make = [], feed._make
    monkeypatch.setattr(feed, "_make", lambda *args: made.append(make(*args)) or made[-1])
    stream = feed.batches(0, 0, 2)
    first = [next(stream) for _ in range(feed.steps)]
    wait_for(lambda: len(made) == 2 * feed.steps)

    def broken(*_: object) -> Any:
        raise DataError("not made by now")

    for name in ("read_row_group", "decode_rows"):
        monkeypatch.setattr(feed_module, name, broken)
    second = [next(stream) for _ in range(feed.steps)]
    monkeypatch.undo()
    for epoch, batches in enumerate((first, second)):
        alone = [batch.ann_ids.tolist() for batch in feed.batches(epoch)]
        assert [batch.ann_ids.tolist() for batch in batches] == alone


def test_a_world_that_does_not_divide_the_lanes_is_refused(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match="3 workers"):
        Feed(manifest, "train2017", SETTINGS, 0, 3)


# ---------------------------------------------------------------------------------- cuts and fresh views


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco") / "root", {"train2017": [2, 3, 1, 2], "val2017": [1]})


def cut_shards(coco: Path, folder: Path, **data: Any) -> Manifest:
    """Eight people stored as cuts of their photos, without loss, in two views."""
    return make(coco, folder, context=2.0, variants=2, people_per_shard=5, row_group_people=3, **data)


@pytest.fixture(scope="module")
def cuts(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return cut_shards(coco, tmp_path_factory.mktemp("cuts") / "set")


FRESH = TrainSettings(batch_size=4, lanes=4, shuffle_row_groups=2, seed=5, views="device")


def test_stored_views_are_cropped_from_cuts(cuts: Manifest) -> None:
    stored = TrainSettings(batch_size=4, lanes=4, seed=5)
    for variant in range(2):
        columns = decode_rows(whole_table(cuts, "train2017", variant), cuts)
        row_of = {ann_id: row for row, ann_id in enumerate(columns["ann_id"].tolist())}
        for batch in Feed(cuts, "train2017", stored).batches(epoch=variant):
            for i, ann_id in enumerate(batch.ann_ids.tolist()):
                if (variant + ann_id) % 2 == variant:
                    row = row_of[ann_id]
                    np.testing.assert_array_equal(batch.images[i], columns["images"][row])
                    np.testing.assert_array_equal(batch.heatmaps[i], columns["heatmaps"][row])


def test_fresh_views_are_the_numpy_sides_of_the_photo(cuts: Manifest, coco: Path) -> None:
    """From the photo and the annotations by random_view, crop_people and encode, with the numbers of
    SeedSequence([seed, epoch, ann_id]); the device's crop comes from the cut."""
    codec = cuts.recipe.codec
    split = read_coco(coco, "train2017", COCO17)
    rows = {ann_id: row for row, ann_id in enumerate(split.people.ann_id.tolist())}
    photos = {photo.image_id: photo for photo in split.photos}
    seen, black = [], 0
    for batch in Feed(cuts, "train2017", FRESH).batches(epoch=3):
        assert isinstance(batch, FreshBatch)
        images, heatmaps, _ = (made.numpy() for made in batch.on_device("cpu"))
        for i, ann_id in enumerate(batch.ann_ids.tolist()):
            photo = photos[int(split.people.image_id[rows[ann_id]])]
            box, keypoints = split.people.bbox_xywh[rows[ann_id]], split.people.keypoints[rows[ann_id]]
            places, visible = keypoints[:, :2].astype(np.float32), keypoints[:, 2]
            rng = np.random.default_rng(np.random.SeedSequence([FRESH.seed, 3, ann_id]))
            plain = plain_view(*box_to_center_scale(box, codec.input_size))
            view = random_view(rng, plain.center, plain.scale, places, visible, COCO17, codec.input_size)
            matrix = view_to_crop(view, codec, photo.width)
            in_view = keypoints_in_view(matrix, view.flipped, places, visible, COCO17)
            target, weights = codec.encode(*in_view)
            np.testing.assert_array_equal(batch.weights[i], weights)
            np.testing.assert_allclose(heatmaps[i], target, atol=1e-6)
            image = decode_image(Path(photo.path).read_bytes(), apply_exif=False)
            (crop,) = crop_people(image, matrix[None], codec.input_size)
            difference = np.abs(images[i].astype(int) - crop)
            assert np.quantile(difference, 0.99) <= 1
            black += int((difference > 1).any(axis=-1).sum())
            seen.append(ann_id)
    assert sorted(seen) == sorted(rows)
    assert black < 0.001 * len(seen) * 64 * 96


def test_fresh_views_change_with_the_epoch_and_not_with_the_worker(cuts: Manifest) -> None:
    def matrices(epoch: int, world: int) -> dict[int, list[float]]:
        found = {}
        for rank in range(world):
            for batch in Feed(cuts, "train2017", FRESH, rank, world).batches(epoch):
                rows = zip(batch.ann_ids.tolist(), batch.picture_to_crop.reshape(-1, 6).tolist(), strict=True)
                found |= dict(list(rows)[: batch.rows])
        return found

    assert matrices(3, 1) == matrices(3, 4)
    again = matrices(4, 1)
    assert all(again[ann_id] != matrix for ann_id, matrix in matrices(3, 1).items())


@pytest.mark.parametrize("codec", ["official", "udp"])
def test_the_same_draws_are_the_same_view_stored_and_fresh(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """preprocess and the feed are given the same six numbers for each person, of a wider augmentation than
    the default: matrix, heatmaps and weights are equal to the last bit."""
    draws = np.array([draw(np.random.default_rng(ann_id)) for ann_id in range(20)])
    draws[:, 0] = np.arange(20) % 2  # every second one a half body
    monkeypatch.setattr(build_module, "draw_stored", lambda seed, ann_ids, variant: draws[ann_ids])
    monkeypatch.setattr(feed_module, "draw_fresh", lambda seed, epoch, ann_ids: draws[ann_ids])
    how = {"scale_factor": 0.5, "rotation_factor": 30.0, "half_body_probability": 0.6}
    manifest = cut_shards(coco, tmp_path / "s", codec=codec, padding=1.4, **how)
    stored = decode_rows(whole_table(manifest, "train2017", 1), manifest, heatmap_dtype=np.float16)
    assert 0 < stored["flipped"].sum() < 8
    assert len(np.unique(stored["rotation_deg"])) > 4
    plain = box_to_center_scale(stored["bbox_xywh"], (64, 96), 1.4)[0]
    assert (stored["center"] != plain).any(axis=1).sum() == 4
    matrices = compose_affine(stored["image_to_crop"], invert_affine(stored["image_to_picture"]))
    row_of = {ann_id: row for row, ann_id in enumerate(stored["ann_id"].tolist())}
    for batch in Feed(manifest, "train2017", FRESH).batches(0):
        rows = [row_of.pop(ann_id) for ann_id in batch.ann_ids.tolist()]
        np.testing.assert_array_equal(batch.picture_to_crop, matrices[rows])
        np.testing.assert_array_equal(batch.weights, stored["weights"][rows])
        heatmaps = float16_heatmaps(batch.heatmap_rows, batch.heatmap_columns)
        np.testing.assert_array_equal(heatmaps, stored["heatmaps"][rows])
    assert row_of == {}
