"""Rows of a shard as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hrnet_core.errors import DataError
from hrnet_core.geometry import compose_affine, crop_people, invert_affine
from hrnet_core.locations import is_uri, one_line, open_folder
from pipelines.shards.manifest import REPAIR, Manifest


def read_row_group(
    manifest: Manifest,
    split: str,
    shard_index: int,
    row_group_index: int,
    columns: Sequence[str] | None = None,
    variant: int = 0,
) -> pa.Table:
    """One row group, every page checked against its CRC. DataError names the shard that is damaged."""
    shard = manifest.shards(split, variant)[shard_index]
    files, root = open_folder(manifest.folder)
    far = is_uri(manifest.folder)  # there, few large requests beat many small ones
    try:
        with pq.ParquetFile(
            f"{root}/{shard.path}", filesystem=files, page_checksum_verification=True, pre_buffer=far
        ) as parquet:
            return parquet.read_row_group(row_group_index, columns=columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        way_out = f"If the bucket did not answer, run the command again. {REPAIR}" if far else REPAIR
        raise DataError(
            f"{manifest.folder}: {shard.path}, row group {row_group_index}: {one_line(error)}. {way_out}"
        ) from None


def decode_rows(
    table: pa.Table, manifest: Manifest, heatmap_dtype: type[np.floating[Any]] = np.float32
) -> dict[str, NDArray[Any]]:
    """A table of shard rows as arrays; only the columns that it has.

    images uint8 (N, h, w, 3) RGB, the views' crops: where the dataset has cuts, by one warp of them, for
    which the table needs CROP_COLUMNS; heatmaps (N, K, H, W) in `heatmap_dtype` (float16 shares the
    table's memory); weights float32 (N, K); keypoints float32 (N, K, 3) in photo px; image_to_crop and
    image_to_picture float64 (N, 2, 3); bbox_xywh float32 (N, 4); center, scale float32 (N, 2); the scalar
    columns (N,).
    """
    num_keypoints, codec = manifest.recipe.skeleton.num_keypoints, manifest.recipe.codec
    rows = {}
    for name in table.column_names:
        chunks = table.column(name)
        column = chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()  # which copies
        if name == "image":
            pictures = decode_pictures(column)
        elif name == "heatmaps":
            stored = _binary_rows(column).view(np.float16)
            heatmaps = stored.reshape(len(column), num_keypoints, *codec.heatmap_size[::-1])
            rows[name] = heatmaps.astype(heatmap_dtype, copy=False)
        elif name == "image_sha256":
            rows[name] = _binary_rows(column)
        elif pa.types.is_list(column.type):
            shape = {"keypoints": (-1, num_keypoints, 3)}.get(
                name, (-1, 2, 3) if name.startswith("image_to") else (len(column), -1)
            )
            rows[name] = column.flatten().to_numpy().reshape(shape)
        else:
            rows[name] = column.to_numpy(zero_copy_only=False)
    if "image" in table.column_names:
        rows["images"] = _crops(pictures, rows, manifest)
    return rows


def decode_pictures(column: pa.StructArray) -> list[NDArray[np.uint8]]:
    """The stored pictures as they are, each uint8 (H, W, 3) RGB. DataError for one that does not decode."""
    pictures = []
    for index, item in enumerate(column.field("bytes")):
        picture = cv2.imdecode(np.frombuffer(item.as_buffer(), np.uint8), cv2.IMREAD_COLOR_RGB)
        if picture is None or picture.dtype != np.uint8 or picture.shape[2:] != (3,):
            raise DataError(f"{column.field('path')[index]}: not a picture that decodes. {REPAIR}")
        pictures.append(picture)
    return pictures


def _crops(
    pictures: Sequence[NDArray[np.uint8]], rows: Mapping[str, NDArray[Any]], manifest: Manifest
) -> NDArray[np.uint8]:
    """uint8 (N, h, w, 3): the stored pictures themselves, or warped from cuts by the matrices in `rows`."""
    width, height = manifest.recipe.settings.input_size
    crops = np.empty((len(pictures), height, width, 3), np.uint8)
    if manifest.recipe.settings.context == 1.0:
        for crop, picture in zip(crops, pictures, strict=True):
            if picture.shape != crop.shape:
                raise DataError(
                    f"{manifest.folder}: a picture of {picture.shape} in place of a crop. {REPAIR}"
                )
            crop[:] = picture
        return crops
    picture_to_crop = compose_affine(rows["image_to_crop"], invert_affine(rows["image_to_picture"]))
    for i, matrix in enumerate(picture_to_crop):
        crops[i] = crop_people(pictures[i], matrix[None], (width, height))[0]
    return crops


def _binary_rows(column: pa.BinaryArray) -> NDArray[np.uint8]:
    """Rows of equal length as uint8 (N, bytes), without a copy."""
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    return np.frombuffer(data, np.uint8)[ends[0] : ends[-1]].reshape(len(column), -1)
