"""What a shard is made of: columns, metadata, names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.shards.recipe import Recipe

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


@dataclass(frozen=True)
class Shard:
    """One Parquet file as the manifest lists it. `path` is relative to the dataset's folder."""

    path: str
    variant: int
    rows: int
    people: int
    bytes: int
    sha256: str
    row_groups: tuple[int, ...]
    """Rows of each row group."""


def shard_name(split: str, variant: int, index: int, count: int) -> str:
    """`data/train2017-v1-00000-of-00012.parquet`; the plain variant has no -v."""
    tag = f"-v{variant}" if variant else ""
    return f"data/{split}{tag}-{index:05d}-of-{count:05d}.parquet"


def shard_schema(recipe: Recipe, plan: str, split: str) -> pa.Schema:
    """Columns with two metadata entries: `huggingface` features, and `hrnet` (what the bytes mean).

    `plan` is the hash that tells whose shard this is.
    """
    own = {
        "schema_version": SCHEMA_VERSION,
        "plan": plan,
        "split": split,
        "codec": recipe.codec.as_dict(),
        "heatmaps": {
            "dtype": "float16",
            "shape": [recipe.skeleton.num_keypoints, *recipe.codec.heatmap_size[::-1]],
        },
        "padding": recipe.settings.padding,
        "context": recipe.settings.context,
        "skeleton": recipe.skeleton.as_dict(),
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


def canonical_json(value: Any) -> str:
    """The one text of a JSON value, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
