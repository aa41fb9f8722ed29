"""One shard from its photographs: what a task of preprocess does.

photo -> its people -> views, crops or one cut     several photos at a time where the task has several CPUs
heatmaps -> a row group of each variant            one after the other, beside them
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hrnet_core.augment import View, draw_stored, place_views, view_targets
from hrnet_core.errors import DataError
from hrnet_core.geometry import Float64, PhotoCuts, box_to_center_scale, crop_people, cut_around, cut_photo
from hrnet_core.heatmaps import float16_heatmaps
from hrnet_core.images import encode_jpeg, encode_png
from hrnet_core.locations import is_uri
from pipelines.process.in_order import ahead
from pipelines.settings.config import DataSettings
from pipelines.shards.plan import BuiltShard, ShardWork, cannot_write, find_built
from pipelines.shards.schema import shard_schema
from pipelines.shards.writer import ShardWriter, writing_shard
from pipelines.sources.photos import check_photo, decode_photo
from pipelines.sources.records import Photo, Rejection
from pipelines.storage.files import join

READ_AHEAD = 8
"""Photographs for each thread of a task that are read, or ready, before their turn: a bucket is waited for so
many at a time, and no thread waits for the one before it. A file's bytes or its pictures each."""
MOST_THREADS = 6
"""That one shard can use: what is written one after the other is 15 % of the work."""
LARGEST_CUT = 4
"""A side of a stored cut (data.context 2.0) is at most this many times the network's longer input side; a
larger cut is made smaller. The plain view then has two pixels of the cut to one of the crop, and a view of
half its size (a half body, a zoom) still one to one: nothing that a crop could show is lost. COCO's photos
have 640 px at most: at 256x192 their cuts are never touched. Another number makes another schema version."""


def build_shard(work: ShardWork, threads: int = 1) -> BuiltShard:
    """Write one shard, a file for each variant. Needs no Ray.

    Each photo is decoded once for all its people and views. One that cannot be used becomes a rejection.
    threads: how many photos are worked on at a time; with more than one, beside the writing. They change no
    byte: photos come in their order.
    DataError where the target cannot be written; then no file of this shard is left half.
    """
    shard = _placed(work)
    schema = shard_schema(work.recipe, work.plan, work.split)
    rejected: list[Rejection] = []
    try:
        with contextlib.ExitStack() as stack:
            files = [writing_shard(join(work.folder, name), schema) for name in work.names]
            writers = [stack.enter_context(file) for file in files]
            rows = stack.enter_context(contextlib.closing(_rows(shard, rejected, threads)))
            # One row group after the other: no more pictures are kept than it has. While a thread writes one,
            # the next is filled: then twice as many, and those of the photos that are worked on.
            groups = iter(lambda: list(itertools.islice(rows, work.recipe.settings.row_group_people)), [])
            write = functools.partial(_write, shard, writers)
            for _ in ahead(write, groups, 1 if threads > 1 else 0):
                pass
            finished = [writers[v].finish(name, v, rejected) for v, name in enumerate(work.names)]
            find_built(work)  # refuses where a run with other settings has written here meanwhile
    except OSError as error:
        raise DataError(cannot_write(work.folder, error)) from None
    return BuiltShard(tuple(finished), tuple(rejected))


@dataclass(frozen=True, eq=False)
class _Shard:
    """A shard's people (P) with the place of everything that is cut out for them."""

    work: ShardWork
    sizes: NDArray[np.int32]
    """(P, 2) width and height of each person's photo."""
    cuts: PhotoCuts
    views: list[tuple[View, Float64]]
    """By variant: the views, and their image_to_crop (P, 2, 3)."""


def _placed(work: ShardWork) -> _Shard:
    people, recipe = work.people, work.recipe
    settings, input_size = recipe.settings, recipe.settings.input_size
    sizes = np.array([(photo.width, photo.height) for photo in work.photos], np.int32)
    sizes = sizes[np.unique(people.image_id, return_inverse=True)[1]]
    center, scale = box_to_center_scale(people.bbox_xywh, input_size, settings.padding)
    # A view turns about the box, so what it may show is round: a square as wide as the longer side.
    cuts = cut_around(center, settings.context * scale.max(axis=-1), sizes, LARGEST_CUT * max(input_size))
    ids, keypoints = people.ann_id.tolist(), people.keypoints.astype(np.float32)
    how = center, scale, keypoints, sizes[:, 0], recipe.codec, recipe.skeleton, recipe.augmentation
    draws = [draw_stored(settings.seed, ids, v) if v else None for v in range(work.variants)]
    return _Shard(work, sizes, cuts, [place_views(numbers, *how) for numbers in draws])


class _Row(NamedTuple):
    """A person of the shard whose photo could be used."""

    number: int
    """Among all people of the shard."""
    pictures: list[bytes]
    """To store, encoded, one for each variant."""
    sha256: bytes
    """Of the photo's file."""


def _rows(shard: _Shard, rejected: list[Rejection], threads: int) -> Generator[_Row, None, None]:
    """The shard's people in order; photos that cannot be used are added to `rejected` instead."""
    work = shard.work
    matrices = np.stack([image_to_crop for _, image_to_crop in shard.views], axis=1)
    one = functools.partial(_of_photo, shard, matrices, threading.Semaphore(threads))
    far = any(is_uri(photo.path) for photo in work.photos)
    most = READ_AHEAD * threads if far or threads > 1 else 0
    # A bucket is waited for by as many threads; on a disk more than work would be in each other's way.
    asked = zip(work.photos, work.people.by_image().values(), strict=True)
    for found in ahead(one, asked, most, most if far else threads):
        if isinstance(found, Rejection):
            rejected.append(found)
        else:
            yield from found


def _of_photo(
    shard: _Shard, matrices: Float64, working: threading.Semaphore, asked: tuple[Photo, slice]
) -> list[_Row] | Rejection:
    """The people (rows of the shard's) of a photo. working: held while its pixels are there."""
    photo, people = asked
    settings = shard.work.recipe.settings
    checked = check_photo(photo, settings.max_pixels)
    if isinstance(checked, Rejection):
        return replace(checked, people=people.stop - people.start)
    with working:
        image = decode_photo(photo, checked)
        if isinstance(image, Rejection):
            return replace(image, people=people.stop - people.start)
        rows = []
        for index in range(people.start, people.stop):
            if settings.context == 1.0:
                crops = crop_people(image, matrices[index], settings.input_size)
                pictures = [_encode(crop, settings) for crop in crops]
            else:
                cut = cut_photo(image, shard.cuts.box[index], shard.cuts.size[index])
                pictures = [_encode(cut, settings)] * shard.work.variants
            rows.append(_Row(index, pictures, checked.sha256))
    return rows


def _encode(crop: NDArray[np.uint8], settings: DataSettings) -> bytes:
    return encode_png(crop) if settings.image_format == "png" else encode_jpeg(crop, settings.jpeg_quality)


def _write(shard: _Shard, writers: Sequence[ShardWriter], group: Sequence[_Row]) -> None:
    """A row group of each variant; the heatmaps of one variant are there at a time."""
    for variant, writer in enumerate(writers):
        writer.write(_columns(shard, group, variant))


def _columns(shard: _Shard, group: Sequence[_Row], variant: int) -> dict[str, Any]:
    """A row group of a variant, as ShardWriter.write wants it."""
    rows = np.array([row.number for row in group])
    people, settings = shard.work.people[rows], shard.work.recipe.settings
    view, image_to_crop = shard.views[variant]
    recipe, keypoints = shard.work.recipe, people.keypoints.astype(np.float32)
    heatmap_rows, heatmap_columns, weights = view_targets(
        image_to_crop[rows], view.flipped[rows], keypoints, recipe.codec, recipe.skeleton
    )
    image_to_picture = image_to_crop if settings.context == 1.0 else shard.cuts.image_to_picture
    suffix = "jpg" if settings.image_format == "jpeg" else "png"
    ids = zip(people.image_id.tolist(), people.ann_id.tolist(), strict=True)
    return {
        "image": [row.pictures[variant] for row in group],
        "image_path": [f"{image_id}-{ann_id}-v{variant}.{suffix}" for image_id, ann_id in ids],
        "image_to_picture": image_to_picture[rows],
        "image_to_crop": image_to_crop[rows],
        "keypoints": keypoints,
        "heatmaps": float16_heatmaps(heatmap_rows, heatmap_columns),
        "weights": weights,
        "image_id": people.image_id,
        "ann_id": people.ann_id,
        "variant": np.full(len(rows), variant, np.int16),
        "bbox_xywh": people.bbox_xywh,
        **{name: values[rows] for name, values in view._asdict().items()},
        "area": people.area.astype(np.float32),
        "width": shard.sizes[rows, 0],
        "height": shard.sizes[rows, 1],
        "image_sha256": [row.sha256 for row in group],
    }
