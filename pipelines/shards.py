"""The preprocessed dataset: columns, schema metadata, manifest; write, read, verify.

    SHARDS/manifest.json                      written last: no manifest, no dataset
    SHARDS/data/<split>[-v<variant>]-00000-of-000NN.parquet
    SHARDS/rejected.parquet                   what was left out, and why
    SHARDS/README.md, croissant.json          for readers without our code

A row is one view of one person. The files of a split's variants hold the same people in the same order:
row i of row group g of shard s is one person in every variant.

Keypoints are kept in photo px in the skeleton's order, whatever the view. In the crop they lie at
`image_to_crop` of that; a flipped row's matrix mirrors, and its heatmaps and weights have the pairs
swapped: crop keypoints of a flipped row are `apply_affine(image_to_crop, keypoints)[flip_order]`.

The stored picture is the view's own crop (`data.context` 1.0), or a cut of the photo that lies at
`image_to_picture` (2.0). `decode_rows` gives the view's crop either way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from hrnet_core.errors import DataError
from hrnet_core.skeleton import Skeleton, skeleton_from_dict
from pipelines.cards import croissant, readme
from pipelines.files import answering, one_line, open_folder, publish, put_file, sha256_of, temporary_name
from pipelines.paths import absolute, is_uri, join, list_files, read_file

if TYPE_CHECKING:
    from hrnet_core.augment import Augmentation
    from hrnet_core.heatmaps import HeatmapCodec

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
OWN_FILES = {MANIFEST, "README.md", "croissant.json", "rejected.parquet", "data"}

COLUMNS: dict[str, pa.DataType] = {
    "image": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    "image_to_picture": pa.list_(pa.float64()),
    "image_to_crop": pa.list_(pa.float64()),
    "keypoints": pa.list_(pa.float32()),
    "heatmaps": pa.binary(),
    "weights": pa.list_(pa.float32()),
    "image_id": pa.int64(),
    "ann_id": pa.int64(),
    "variant": pa.int16(),
    "bbox_xywh": pa.list_(pa.float32()),
    "center": pa.list_(pa.float32()),
    "scale": pa.list_(pa.float32()),
    "rotation_deg": pa.float32(),
    "flipped": pa.bool_(),
    "area": pa.float32(),
    "width": pa.int32(),
    "height": pa.int32(),
    "image_sha256": pa.binary(),
}
CROP_COLUMNS = ("image", "image_to_picture", "image_to_crop")
"""What `decode_rows` needs for a view's crop."""
REJECTED = pa.schema(
    [
        ("split", pa.string()),
        ("reason", pa.string()),
        ("file", pa.string()),
        ("image_id", pa.int64()),
        ("ann_id", pa.int64()),
        ("people", pa.int64()),
        ("detail", pa.string()),
    ]
)


# ---------------------------------------------------------------------------------- write


def shard_name(split: str, variant: int, index: int, count: int) -> str:
    """`data/train2017-v1-00000-of-00012.parquet`; the plain variant has no -v."""
    tag = f"-v{variant}" if variant else ""
    return f"data/{split}{tag}-{index:05d}-of-{count:05d}.parquet"


def shard_schema(config: Mapping[str, Any], plan: str, split: str) -> pa.Schema:
    """Columns with two metadata entries: `huggingface` features, and `hrnet` (what the bytes mean).

    `config` is DataSettings.semantic(); `plan` the hash that tells whose shard this is.
    """
    codec = codec_of(config)
    own = {
        "schema_version": SCHEMA_VERSION,
        "plan": plan,
        "split": split,
        "codec": codec.as_dict(),
        "heatmaps": {
            "dtype": "float16",
            "shape": [len(config["skeleton"]["keypoints"]), *codec.heatmap_size[::-1]],
        },
        "padding": config["padding"],
        "context": config["context"],
        "skeleton": config["skeleton"],
    }
    features = {name: _huggingface_feature(kind) for name, kind in COLUMNS.items()}
    # Not sorted: its readers take the columns in the order of the features.
    metadata = {"huggingface": json.dumps({"info": {"features": features}}), "hrnet": canonical_json(own)}
    return pa.schema(list(COLUMNS.items()), metadata=metadata)


def _huggingface_feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_struct(kind):
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return {"_type": "List", "feature": _huggingface_feature(kind.value_type)}
    names = {"float": "float32", "double": "float64"}
    return {"_type": "Value", "dtype": names.get(str(kind), str(kind))}


class ShardWriter:
    """One shard under a temporary name; `finish` puts it under its own, `discard` removes what there is."""

    def __init__(self, files: fs.FileSystem, path: str, schema: pa.Schema) -> None:
        self._files, self._path, self._schema = files, path, schema
        self._temporary = temporary_name(files, path)
        scalars = [
            n for n, kind in COLUMNS.items() if not pa.types.is_nested(kind) and not pa.types.is_binary(kind)
        ]
        # Opened here: a ParquetWriter that fails, at its first bytes or its last, leaves its file open.
        self._stream = pa.OSFile(self._temporary, "wb")
        try:
            self._writer = pq.ParquetWriter(
                self._stream,
                schema,
                compression="zstd",
                use_dictionary=False,
                write_statistics=scalars,
                write_page_checksum=True,
            )
        except BaseException:
            self._remove()
            raise
        self.row_groups: list[int] = []

    def write(self, columns: Mapping[str, Any]) -> None:
        """One row group. Numeric columns are arrays with the rows first; image and image_sha256 lists of
        bytes (images with `image_path`, a list of names); heatmaps float16 (N, K, H, W)."""
        arrays = [_arrow_column(name, kind, columns) for name, kind in COLUMNS.items()]
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self.row_groups.append(table.num_rows)

    def finish(self, figures: Mapping[str, Any]) -> tuple[int, str]:
        """Close with `figures` (JSON) in the footer and publish. Returns (bytes, sha256)."""
        self._writer.add_key_value_metadata({"hrnet_figures": canonical_json(figures)})
        self._writer.close()
        self._stream.close()
        size = os.path.getsize(self._temporary)
        digest = sha256_of(fs.LocalFileSystem(), self._temporary)
        publish(self._files, self._temporary, self._path)
        self.discard()
        return size, digest

    def discard(self) -> None:
        """Remove the temporary file if it is still there."""
        with contextlib.suppress(OSError):  # a full disk is so again on closing; the first error is told
            self._writer.close()
        self._remove()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.close()
        Path(self._temporary).unlink(missing_ok=True)


def float16_heatmaps(rows: NDArray[np.float32], columns: NDArray[np.float32]) -> NDArray[np.float16]:
    """The heatmaps (N, K, H, W) of `HeatmapCodec.factors`, rows (N, K, H) and columns (N, K, W): bit for
    bit `HeatmapCodec.encode` cast to float16, at a third of the cost.

    Only a window of each map is computed: no factor exceeds 1, so where one of the two is at most 2**-25
    the product is zero in float16.
    """
    (*maps, height), width = rows.shape, columns.shape[-1]
    rows, columns = rows.reshape(-1, height), columns.reshape(-1, width)
    result = np.zeros(len(rows) * height * width, np.uint16)
    filled = np.flatnonzero(rows.any(axis=1))  # keypoints with a weight
    rows, columns = rows[filled], columns[filled]
    top, left = _window(rows), _window(columns)
    number = np.arange(len(filled))[:, None]
    values = rows[number, top][:, :, None] * columns[number, left][:, None, :]
    starts = ((filled[:, None] * height + top) * width)[:, :, None]
    result[starts + left[:, None, :]] = to_float16(values).view(np.uint16)
    return result.view(np.float16).reshape(*maps, height, width)


def _window(factors: NDArray[np.float32]) -> NDArray[np.int64]:
    """(M, S) cells of each of M axes (M, cells): as many as the longest needs, around those that count."""
    cells = factors.shape[1]
    counts = factors > 2**-25
    first, last = counts.argmax(axis=1), cells - 1 - counts[:, ::-1].argmax(axis=1)
    length = int(np.where(counts.any(axis=1), last + 1 - first, 0).max(initial=0))
    window: NDArray[np.int64] = np.minimum(first, cells - length)[:, None] + np.arange(length)
    return window


def to_float16(heatmaps: NDArray[np.float32]) -> NDArray[np.float16]:
    """`heatmaps.astype(np.float16)` bit for bit, for values from 0 up, several times faster.

    NumPy's cast is slow, and slower on what float16 holds as subnormal. Many values are zero, and
    subnormals are multiples of 2**-24: their bits are that multiple.
    """
    flat = heatmaps.reshape(-1)
    some = np.flatnonzero(flat > 2**-25)  # the others round to zero
    values, smallest_normal = flat[some], np.float32(2**-14)
    bits = np.rint(np.minimum(values, smallest_normal) * np.float32(2**24)).astype(np.uint16)
    normal = values >= smallest_normal
    bits[normal] = values[normal].astype(np.float16).view(np.uint16)
    result = np.zeros(heatmaps.shape, np.uint16)
    result.reshape(-1)[some] = bits
    return result.view(np.float16)


def _arrow_column(name: str, kind: pa.DataType, columns: Mapping[str, Any]) -> pa.Array:
    values = columns[name]
    if name == "image":
        parts = [pa.array(values, pa.binary()), pa.array(columns["image_path"], pa.string())]
        return pa.StructArray.from_arrays(parts, fields=list(kind))
    if name == "heatmaps":  # one copy-free buffer; pa.array would make a Python bytes of each row
        data = np.ascontiguousarray(values, np.float16)
        offsets = np.arange(len(data) + 1, dtype=np.int32) * np.int32(data[0].nbytes)
        return pa.Array.from_buffers(kind, len(data), [None, pa.py_buffer(offsets), pa.py_buffer(data)])
    if pa.types.is_list(kind):
        data = np.asarray(values, kind.value_type.to_pandas_dtype()).reshape(len(values), -1)
        offsets = np.arange(len(data) + 1, dtype=np.int32) * np.int32(data.shape[1])
        return pa.ListArray.from_arrays(offsets, data.reshape(-1), type=kind)
    return pa.array(values, kind)


def shard_entry(path: str, variant: int, size: int, sha256: str, row_groups: Sequence[int]) -> dict[str, Any]:
    """A shard as the manifest lists it."""
    rows = sum(row_groups)
    return {
        "path": path,
        "variant": variant,
        "rows": rows,
        "people": rows,
        "bytes": size,
        "sha256": sha256,
        "row_groups": list(row_groups),
    }


def inspect_shard(path: str) -> tuple[str, dict[str, Any], tuple[int, str, list[int]]] | None:
    """What lies there: its plan's hash ("" for a Parquet file that is none of ours), its footer's figures,
    and (bytes, sha256, row_groups). None where the file or one of its pages is damaged.

    DataError for a bucket that does not answer: that says nothing about the shard.
    """
    try:
        content = read_file(path)  # once, for the pages and for the hash
        with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as shard:
            metadata = shard.metadata.metadata or {}
            own, figures = (json.loads(metadata.get(key, b"{}")) for key in (b"hrnet", b"hrnet_figures"))
            row_groups = [shard.metadata.row_group(i).num_rows for i in range(shard.num_row_groups)]
            for index in range(shard.num_row_groups):
                shard.read_row_group(index)
        return own.get("plan", ""), figures, (len(content), hashlib.sha256(content).hexdigest(), row_groups)
    except (OSError, pa.ArrowException, ValueError):
        return None


def plan_of_shard(files: fs.FileSystem, path: str) -> str | None:
    """The hash of the plan in a shard's footer, "" in a Parquet file that is none of ours; None where no
    footer can be read."""
    try:
        metadata = pq.read_schema(path, filesystem=files).metadata or {}
        return str(json.loads(metadata.get(b"hrnet", b"{}")).get("plan", ""))
    except (OSError, pa.ArrowException, ValueError):
        return None


def write_rejected(files: fs.FileSystem, path: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """rejected.parquet from rows with the fields of REJECTED. Returns its sha256."""
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=REJECTED), buffer, compression="zstd")
    content = buffer.getvalue().to_pybytes()
    put_file(files, path, content)
    return hashlib.sha256(content).hexdigest()


def write_manifest(folder: str, fields: Mapping[str, Any]) -> Manifest:
    """README.md and croissant.json, then manifest.json, with the digest filled in."""
    files, root = open_folder(folder)
    fields = {"schema_version": SCHEMA_VERSION, "digest": dataset_digest(fields), **fields}
    columns = {name: str(kind) for name, kind in COLUMNS.items()}
    put_file(files, f"{root}/README.md", readme(fields, columns).encode())
    put_file(files, f"{root}/croissant.json", croissant(fields, columns).encode())
    put_file(files, f"{root}/{MANIFEST}", (json.dumps(fields, indent=1) + "\n").encode())
    return Manifest.load(folder)


def dataset_digest(fields: Mapping[str, Any]) -> str:
    """sha256 over schema version, semantic configuration, annotation sha256 and the sorted shard sha256."""
    splits = fields["splits"]
    annotations = {name: split["annotation_sha256"] for name, split in splits.items()}
    shards = sorted(shard["sha256"] for split in splits.values() for shard in split["shards"])
    text = canonical_json([SCHEMA_VERSION, fields["config"], annotations, shards])
    return hashlib.sha256(text.encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """The one text of a JSON value, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


# ---------------------------------------------------------------------------------- read


@dataclass(frozen=True)
class Shard:
    """One Parquet file of the manifest. `path` is relative to the dataset's folder."""

    path: str
    variant: int
    rows: int
    people: int
    bytes: int
    sha256: str
    row_groups: tuple[int, ...]
    """Rows of each row group."""


@dataclass(frozen=True)
class Manifest:
    """A finished dataset. Plain data: it travels to workers, who open the files themselves."""

    folder: str
    fields: dict[str, Any]
    """manifest.json as it is."""

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """The dataset in `folder` (path or URI). DataError where it is none, is of a newer schema, or has
        files that are missing, of another size or unknown. Contents are checked by `verify`."""
        folder = absolute(str(folder))
        where = join(folder, MANIFEST)
        try:
            fields = json.loads(read_file(where))
            version = fields["schema_version"]
            manifest = cls(folder, fields)
            known = {
                s.path: s
                for split in manifest.splits
                for v in range(manifest.variants(split))
                for s in manifest.shards(split, v)
            }
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{folder}: no {MANIFEST}, so not a finished dataset (it is written last). Run `hrnet "
                f"preprocess` with --data.shards {folder}: what is there already is used."
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where}: not a manifest ({error!r}). Preprocess into a new folder.") from None
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{where}: schema_version {version}, this code reads {SCHEMA_VERSION}. Use the hrnet that "
                f"wrote it ({fields.get('code', {}).get('hrnet')}), or preprocess again."
            )
        manifest._check_listing(known)
        return manifest

    def _check_listing(self, known: Mapping[str, Shard]) -> None:
        listing = list_files(join(self.folder, "data"))
        there = {f"data/{name}": size for name, size in listing.items() if name.endswith(".parquet")}
        problems = [f"{path} is missing" for path in sorted(set(known) - set(there))]
        problems += [f"{path} is not in the manifest" for path in sorted(set(there) - set(known))]
        problems += [
            f"{path} has {there[path]} bytes instead of {known[path].bytes}"
            for path in sorted(set(known) & set(there))
            if there[path] != known[path].bytes
        ]
        if problems:
            raise DataError(f"{self.folder}: {'; '.join(problems[:5])} ({len(problems)} in all). {REPAIR}")

    @property
    def digest(self) -> str:
        """Hex sha256 that two datasets share exactly when their content does."""
        return str(self.fields["digest"])

    @property
    def config(self) -> dict[str, Any]:
        """DataSettings.semantic() of the run that wrote it."""
        return dict(self.fields["config"])

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.fields["splits"])

    @property
    def input_size(self) -> tuple[int, int]:
        """(width, height) of a crop in px."""
        width, height = self.config["input_size"]
        return width, height

    def split(self, name: str) -> dict[str, Any]:
        """A split's own part of the manifest; DataError names what there is instead."""
        if name not in self.fields["splits"]:
            raise DataError(f"{self.folder}: no split {name!r}; it has {', '.join(self.splits)}.")
        return dict(self.fields["splits"][name])

    def people(self, split: str) -> int:
        return int(self.split(split)["people"])

    def variants(self, split: str) -> int:
        """Stored views of each person: files of variant 0 ... variants - 1."""
        return int(self.split(split)["variants"])

    def shards(self, split: str, variant: int = 0) -> list[Shard]:
        """The shards of one variant in order."""
        rows = [Shard(**{**s, "row_groups": tuple(s["row_groups"])}) for s in self.split(split)["shards"]]
        return [shard for shard in rows if shard.variant == variant]

    def codec(self) -> HeatmapCodec:
        """The codec that made the heatmaps."""
        return codec_of(self.config)

    def skeleton(self) -> Skeleton:
        return skeleton_from_dict(self.config["skeleton"], f"{self.folder}/{MANIFEST}")

    def verify(
        self, splits: Iterable[str] | None = None, progress: Callable[[Shard], None] | None = None
    ) -> None:
        """Hash every shard of `splits` (all by default) against the manifest: once a run, before reading.

        `progress` is called in this thread for each shard in order. DataError names each that differs.
        """
        files, root = open_folder(self.folder)
        names = self.splits if splits is None else tuple(splits)
        shards = [s for name in names for v in range(self.variants(name)) for s in self.shards(name, v)]

        def differs(shard: Shard) -> bool:
            try:
                with answering(join(self.folder, shard.path)):
                    return sha256_of(files, f"{root}/{shard.path}") != shard.sha256
            except FileNotFoundError:
                return True

        bad = []
        with ThreadPoolExecutor(4) as pool:
            for shard, wrong in zip(shards, pool.map(differs, shards), strict=True):
                if wrong:
                    bad.append(shard.path)
                if progress is not None:
                    progress(shard)
        if bad:
            raise DataError(
                f"{self.folder}: {', '.join(bad[:5])} ({len(bad)} in all) not as written: sha256 differs "
                f"from {MANIFEST}. {REPAIR}"
            )


REPAIR = (
    "Run `hrnet preprocess` with the same settings and folder: damaged or missing shards are made again; "
    "move files that are not its own elsewhere first."
)


def augmentation_of(config: Mapping[str, Any]) -> Augmentation:
    """How far the views of a dataset may differ from the plain one, by DataSettings.semantic()."""
    from hrnet_core.augment import Augmentation

    return Augmentation(**{name: config[name] for name in Augmentation.__dataclass_fields__})


def codec_of(config: Mapping[str, Any]) -> HeatmapCodec:
    """The codec that DataSettings.semantic() describes."""
    from hrnet_core.heatmaps import HeatmapCodec

    return HeatmapCodec(config["codec"], input_size=tuple(config["input_size"]), sigma=config["sigma"])


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
    num_keypoints = len(manifest.config["skeleton"]["keypoints"])
    codec = manifest.codec()
    rows = {}
    for name in table.column_names:
        chunks = table.column(name)
        column = chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()  # which copies
        if name == "image":
            rows["images"] = _crops(decode_pictures(column), table, manifest)
        elif name == "heatmaps":
            shape = (len(column), num_keypoints, *codec.heatmap_size[::-1])
            rows[name] = (
                _binary_rows(column).view(np.float16).reshape(shape).astype(heatmap_dtype, copy=False)
            )
        elif name == "image_sha256":
            rows[name] = _binary_rows(column)
        elif pa.types.is_list(column.type):
            shape = {"keypoints": (-1, num_keypoints, 3)}.get(
                name, (-1, 2, 3) if name.startswith("image_to") else (len(column), -1)
            )
            rows[name] = column.flatten().to_numpy().reshape(shape)
        else:
            rows[name] = column.to_numpy(zero_copy_only=False)
    return rows


def decode_pictures(column: pa.StructArray) -> list[NDArray[np.uint8]]:
    """The stored pictures as they are, each uint8 (H, W, 3) RGB. DataError for one that does not decode."""
    import cv2

    pictures = []
    for index, item in enumerate(column.field("bytes")):
        picture = cv2.imdecode(np.frombuffer(item.as_buffer(), np.uint8), cv2.IMREAD_COLOR_RGB)
        if picture is None or picture.dtype != np.uint8 or picture.shape[2:] != (3,):
            raise DataError(f"{column.field('path')[index]}: not a picture that decodes. {REPAIR}")
        pictures.append(picture)
    return pictures


def picture_to_crop(table: pa.Table) -> NDArray[np.float64]:
    """float64 (N, 2, 3): stored picture px -> crop px of each row's view."""
    from hrnet_core.geometry import compose_affine, invert_affine

    def matrices(name: str) -> NDArray[np.float64]:
        return table[name].combine_chunks().flatten().to_numpy().reshape(-1, 2, 3)

    return compose_affine(matrices("image_to_crop"), invert_affine(matrices("image_to_picture")))


def _crops(pictures: Sequence[NDArray[np.uint8]], table: pa.Table, manifest: Manifest) -> NDArray[np.uint8]:
    """uint8 (N, h, w, 3): the stored pictures themselves, or warped from cuts."""
    from hrnet_core.geometry import crop_people

    width, height = manifest.input_size
    crops = np.empty((len(pictures), height, width, 3), np.uint8)
    if manifest.config["context"] == 1.0:
        for crop, picture in zip(crops, pictures, strict=True):
            if picture.shape != crop.shape:
                raise DataError(
                    f"{manifest.folder}: a picture of {picture.shape} in place of a crop. {REPAIR}"
                )
            crop[:] = picture
        return crops
    for i, matrix in enumerate(picture_to_crop(table)):
        crops[i] = crop_people(pictures[i], matrix[None], (width, height))[0]
    return crops


def _binary_rows(column: pa.BinaryArray) -> NDArray[np.uint8]:
    """Rows of equal length as uint8 (N, bytes), without a copy."""
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    return np.frombuffer(data, np.uint8)[ends[0] : ends[-1]].reshape(len(column), -1)
