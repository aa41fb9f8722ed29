"""One shard from its photographs: what a task of preprocess does."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hrnet_core.augment import (
    View,
    draw_stored,
    keypoints_in_view,
    plain_view,
    random_view,
    view_to_crop,
)
from hrnet_core.errors import DataError
from hrnet_core.geometry import PhotoCuts, box_to_center_scale, crop_people, cut_around, cut_photo
from hrnet_core.heatmaps import float16_heatmaps
from hrnet_core.images import encode_jpeg, encode_png
from hrnet_core.locations import open_folder
from hrnet_core.skeleton import skeleton_from_dict
from pipelines.shards.plan import (
    ShardWork,
    cannot_write,
    check_not_taken,
)
from pipelines.shards.schema import augmentation_of, codec_of, shard_schema
from pipelines.shards.writer import ShardWriter, shard_entry
from pipelines.sources.photos import open_photo
from pipelines.sources.records import Rejection

LARGEST_CUT = 4
"""A side of a stored cut (data.context 2.0) is at most this many times the network's longer input side; a
larger cut is made smaller. The plain view then has two pixels of the cut to one of the crop, and a view of
half its size (a half body, a zoom) still one to one: nothing that a crop could show is lost. COCO's photos
have 640 px at most: at 256x192 their cuts are never touched. Another number makes another schema version."""
Figures = dict[str, Any]
"""Of one shard: `shards`, its manifest entries by variant, and `rejected`, as dicts; of this run also
`start`, `end` (s since the epoch), `worker` and `peak_bytes`."""


def build_shard(work: ShardWork) -> Figures:
    """Write one shard, a file for each variant, and say what is in it. Needs no Ray.

    Each photo is decoded once for all its people and views. One that cannot be used becomes a rejection.
    DataError where the target cannot be written; then no file of this shard is left half.
    """
    common = _person_columns(work)
    views = [_view_columns(work, common, variant) for variant in range(work.variants)]
    schema = shard_schema(work.config, work.plan, work.split)
    rejected: list[Rejection] = []
    files, root = open_folder(work.folder)
    try:
        with contextlib.ExitStack() as stack:
            writers = []
            for name in work.names:
                writers.append(ShardWriter(files, f"{root}/{name}", schema))
                stack.callback(writers[-1].discard)
            # One row group after the other: no more pictures are kept than it has.
            rows = _rows(work, common, views, rejected)
            while group := list(itertools.islice(rows, work.config["row_group_people"])):
                _write_group(work, group, common, views, writers)
            told = [asdict(rejection) for rejection in rejected]
            check_not_taken(files, root, work)
            written = [writer.finish({"rejected": told}) for writer in writers]
    except OSError as error:
        raise DataError(cannot_write(work.folder, error)) from None
    shards = [
        shard_entry(name, variant, *written[variant], writers[variant].row_groups)
        for variant, name in enumerate(work.names)
    ]
    return {"rejected": told, "shards": shards}


class Row(NamedTuple):
    """A person of the shard whose photo could be used."""

    index: int
    """Among all people of the shard."""
    pictures: list[bytes]
    """To store, encoded, one for each variant."""
    sha256: bytes
    """Of the photo's file."""


def _rows(
    work: ShardWork,
    common: Mapping[str, Any],
    views: Sequence[Mapping[str, NDArray[Any]]],
    rejected: list[Rejection],
) -> Iterator[Row]:
    """The shard's people in order; photos that cannot be used are added to `rejected` instead."""
    matrices = np.stack([view["image_to_crop"] for view in views], axis=1)
    first = 0
    for photo, people in work.photos:
        indices, first = range(first, first + people), first + people
        opened = open_photo(photo, work.config["max_pixels"])
        if isinstance(opened, Rejection):
            rejected.append(replace(opened, people=people))
            continue
        image, sha256 = opened
        for index in indices:
            pictures = _pictures(image, index, matrices[index], common["cuts"], work.config)
            yield Row(index, pictures, sha256)


def _pictures(
    image: NDArray[np.uint8],
    index: int,
    matrices: NDArray[np.float64],
    cuts: PhotoCuts,
    config: Mapping[str, Any],
) -> list[bytes]:
    """What to store of a person, encoded: the crop of each view (matrices (V, 2, 3)), or one cut of the
    photo for all."""
    if config["context"] != 1.0:
        return [_encode(cut_photo(image, cuts.box[index], cuts.size[index]), config)] * len(matrices)
    return [_encode(crop, config) for crop in crop_people(image, matrices, config["input_size"])]


def _person_columns(work: ShardWork) -> dict[str, Any]:
    """What all views of the shard's people share: arrays with the people first."""
    told = work.annotated
    input_size, context = work.config["input_size"], work.config["context"]
    center, scale = box_to_center_scale(told["bbox_xywh"], tuple(input_size), work.config["padding"])
    sizes = np.stack([told["width"], told["height"]], axis=-1)
    return {
        **told,
        "plain": plain_view(center, scale),
        # A view turns about the box, so what it may show is round: a square as wide as the longer side.
        "cuts": cut_around(center, context * scale.max(axis=-1), sizes, LARGEST_CUT * max(input_size)),
    }


def _view_columns(work: ShardWork, common: Mapping[str, Any], variant: int) -> dict[str, NDArray[Any]]:
    """The columns of one variant that its view decides, without picture and heatmaps."""
    view: View = common["plain"]
    if variant:
        draws = draw_stored(work.config["seed"], common["ann_id"].tolist(), variant)
        places, visible = common["keypoints"][..., :2], common["keypoints"][..., 2]
        skeleton, size = skeleton_from_dict(work.config["skeleton"]), work.config["input_size"]
        how = augmentation_of(work.config)
        view = random_view(draws, view.center, view.scale, places, visible, skeleton, size, how)
    matrices = view_to_crop(view, codec_of(work.config), common["width"])
    return {
        **view._asdict(),
        "image_to_crop": matrices,
        "image_to_picture": matrices if work.config["context"] == 1.0 else common["cuts"].image_to_picture,
        "variant": np.full(len(matrices), variant, np.int16),
    }


def _write_group(
    work: ShardWork,
    group: Sequence[Row],
    common: Mapping[str, Any],
    views: Sequence[Mapping[str, NDArray[Any]]],
    writers: Sequence[ShardWriter],
) -> None:
    """One row group of every variant."""
    codec, skeleton = codec_of(work.config), skeleton_from_dict(work.config["skeleton"])
    suffix = "jpg" if work.config["image_format"] == "jpeg" else "png"
    indices = [row.index for row in group]
    shared = {name: values[indices] for name, values in common.items() if name not in ("plain", "cuts")}
    places, visible = shared["keypoints"][..., :2], shared["keypoints"][..., 2]
    ids = list(zip(shared["image_id"].tolist(), shared["ann_id"].tolist(), strict=True))
    for variant, (view, writer) in enumerate(zip(views, writers, strict=True)):
        own = {name: values[indices] for name, values in view.items()}
        crop = keypoints_in_view(own["image_to_crop"], own["flipped"], places, visible, skeleton)
        heatmap_rows, heatmap_columns, weights = codec.factors(*crop)
        writer.write(
            {
                **shared,
                **own,
                "image": [row.pictures[variant] for row in group],
                "image_path": [f"{image_id}-{ann_id}-v{variant}.{suffix}" for image_id, ann_id in ids],
                "image_sha256": [row.sha256 for row in group],
                "heatmaps": float16_heatmaps(heatmap_rows, heatmap_columns),
                "weights": weights,
            }
        )


def _encode(crop: NDArray[np.uint8], config: Mapping[str, Any]) -> bytes:
    return encode_png(crop) if config["image_format"] == "png" else encode_jpeg(crop, config["jpeg_quality"])
