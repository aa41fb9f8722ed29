"""Rows of a shard as arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import DTypeLike, NDArray

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
    table: pa.Table,
    manifest: Manifest,
    heatmap_dtype: type[np.floating[Any]] = np.float32,
    empty: Callable[[tuple[int, ...], DTypeLike], NDArray[Any]] | None = None,
) -> dict[str, NDArray[Any]]:
    """A table of shard rows as arrays; only the columns that it has.

    images uint8 (N, h, w, 3) RGB, the views' crops: where the dataset has cuts, by one warp of them, for
    which the table needs CROP_COLUMNS; heatmaps (N, K, H, W) in `heatmap_dtype` (float16 of a table of one
    chunk shares its memory, read-only); weights float32 (N, K); keypoints float32 (N, K, 3) in photo px;
    image_to_crop and image_to_picture float64 (N, 2, 3); bbox_xywh float32 (N, 4); center, scale float32
    (N, 2); the scalar columns (N,). empty: makes the arrays of images and heatmaps, in place of np.empty.
    """
    num_keypoints, codec = manifest.recipe.skeleton.num_keypoints, manifest.recipe.codec
    rows = {}
    shape: tuple[int, ...]
    for name in table.column_names:
        chunks = table.column(name)
        if name == "image":
            continue
        if name == "heatmaps":
            heatmaps = _joined(chunks, np.dtype(np.float16), empty)
            shape = len(chunks), num_keypoints, *codec.heatmap_size[::-1]
            rows[name] = heatmaps.reshape(shape).astype(heatmap_dtype, copy=False)
            continue
        column = chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()  # which copies
        if name == "image_sha256":
            rows[name] = _binary_rows(column)
        elif pa.types.is_list(column.type):
            shape = (-1, 2, 3) if name.startswith("image_to") else (len(column), -1)
            if name == "keypoints":
                shape = -1, num_keypoints, 3
            rows[name] = column.flatten().to_numpy().reshape(shape)
        else:
            rows[name] = column.to_numpy(zero_copy_only=False)
    if "image" in table.column_names:
        width, height = manifest.recipe.settings.input_size
        rows["images"] = (empty or np.empty)((len(table), height, width, 3), np.uint8)
        _fill_crops(rows["images"], decode_pictures(table["image"]), rows, manifest)
    return rows


def decode_pictures(column: pa.ChunkedArray) -> Iterator[NDArray[np.uint8]]:
    """The stored pictures as they are, each uint8 (H, W, 3) RGB. DataError for one that does not decode.

    One after the other: who keeps none of them decodes into the same memory again, a fifth faster.
    """
    for chunk in column.chunks:  # not combined: that would copy all of them
        for index, item in enumerate(chunk.field("bytes")):
            picture = cv2.imdecode(np.frombuffer(item.as_buffer(), np.uint8), cv2.IMREAD_COLOR_RGB)
            if picture is None or picture.dtype != np.uint8 or picture.shape[2:] != (3,):
                raise DataError(f"{chunk.field('path')[index]}: not a picture that decodes. {REPAIR}")
            yield np.asarray(picture, np.uint8)


def _fill_crops(
    crops: NDArray[np.uint8],
    pictures: Iterator[NDArray[np.uint8]],
    rows: Mapping[str, NDArray[Any]],
    manifest: Manifest,
) -> None:
    """Into uint8 (N, h, w, 3): the stored pictures, or what the matrices in `rows` make of cuts."""
    if manifest.recipe.settings.context == 1.0:
        for crop, picture in zip(crops, pictures, strict=True):
            if picture.shape != crop.shape:
                raise DataError(
                    f"{manifest.folder}: a picture of {picture.shape} in place of a crop. {REPAIR}"
                )
            crop[:] = picture
        return
    picture_to_crop = compose_affine(rows["image_to_crop"], invert_affine(rows["image_to_picture"]))
    for crop, picture, matrix in zip(crops, pictures, picture_to_crop, strict=True):
        crop[:] = crop_people(picture, matrix[None], crop.shape[1::-1])[0]


def _joined(
    column: pa.ChunkedArray,
    dtype: np.dtype[Any],
    empty: Callable[[tuple[int, ...], DTypeLike], NDArray[Any]] | None,
) -> NDArray[Any]:
    """Rows of equal length as (N, values); one chunk without a copy unless `empty` makes the array."""
    chunks = [_binary_rows(chunk).view(dtype) for chunk in column.chunks]
    if len(chunks) == 1 and empty is None:
        return chunks[0]
    joined = (empty or np.empty)((len(column), chunks[0].shape[1]), dtype)
    return np.concatenate(chunks, out=joined)


def _binary_rows(column: pa.BinaryArray) -> NDArray[np.uint8]:
    """Rows of equal length as uint8 (N, bytes), without a copy."""
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    return np.frombuffer(data, np.uint8)[ends[0] : ends[-1]].reshape(len(column), -1)
