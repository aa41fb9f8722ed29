"""The preprocessed dataset as a whole (docs/contracts.md; its columns: docs/shards.md): write, read, verify.

A row is one view of one person. The files of a split's variants hold the same people in the same order:
row i of row group g of shard s is one person in every variant.

Keypoints are kept in photo px in the skeleton's order, whatever the view. In the crop they lie at
`image_to_crop` of that; a flipped row's matrix mirrors, and its heatmaps and weights have the pairs
swapped: crop keypoints of a flipped row are `apply_affine(image_to_crop, keypoints)[flip_order]`.

The stored picture is the view's own crop (`data.context` 1.0), or a cut of the photo that lies at
`image_to_picture` (2.0). `decode_rows` gives the view's crop either way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hrnet_core.errors import DataError
from hrnet_core.locations import is_uri, refuse_no_bucket
from pipelines.process.in_order import ahead
from pipelines.shards.cards import croissant, readme
from pipelines.shards.recipe import Recipe
from pipelines.shards.schema import MANIFEST, SCHEMA_VERSION, Shard, canonical_json
from pipelines.storage.files import (
    absolute,
    is_file,
    is_folder,
    join,
    list_files,
    read_file,
    sha256_of,
    write_json,
    write_whole,
)

AT_ONCE, AT_ONCE_FAR = 4, 16
"""Shards that are hashed at a time: on a disk, and in a bucket, whose streams are slow each."""


def write_manifest(folder: str, fields: Mapping[str, Any]) -> Manifest:
    """README.md and croissant.json, then manifest.json, with the digest filled in."""
    fields = {"schema_version": SCHEMA_VERSION, "digest": dataset_digest(fields), **fields}
    write_whole(join(folder, "README.md"), readme(fields))
    write_whole(join(folder, "croissant.json"), croissant(fields))
    write_json(join(folder, MANIFEST), fields)
    return Manifest.load(folder)


def _what_instead(folder: str) -> str:
    """What a place (path or URI) without manifest.json is instead of a dataset, and the way out."""
    if is_file(folder):
        return f"is a file: name the folder that holds {MANIFEST} (--data.shards)."
    if not is_folder(folder):
        return (
            f"no {MANIFEST}, for there is no such folder: correct --data.shards, or run `hrnet preprocess` "
            f"with it to make the dataset."
        )
    if not any(name.endswith(".parquet") for name in list_files(join(folder, "data"))):
        return (
            f"no {MANIFEST}, and the folder holds no shards (data/*.parquet): correct --data.shards, or run "
            f"`hrnet preprocess` with a folder for the dataset alone."
        )
    return (
        f"no {MANIFEST}, so not a finished dataset (it is written last). Run `hrnet preprocess` with "
        f"--data.shards {folder}: what is there already is used."
    )


def dataset_digest(fields: Mapping[str, Any]) -> str:
    """sha256 over schema version, semantic configuration, annotation sha256 and the sorted shard sha256."""
    splits = fields["splits"]
    annotations = {name: split["annotation_sha256"] for name, split in splits.items()}
    shards = sorted(shard["sha256"] for split in splits.values() for shard in split["shards"])
    text = canonical_json([SCHEMA_VERSION, fields["config"], annotations, shards])
    return hashlib.sha256(text.encode()).hexdigest()


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
            if (version := fields["schema_version"]) != SCHEMA_VERSION:
                raise DataError(
                    f"{where}: schema_version {version}, this code reads {SCHEMA_VERSION}. Use the hrnet "
                    f"that wrote it ({fields.get('code', {}).get('hrnet')}), or preprocess again."
                )
            manifest = cls(folder, fields)
            _ = manifest.recipe
            known = {s.path: s for split in manifest.splits for s in manifest.all_shards(split)}
        except (FileNotFoundError, NotADirectoryError):
            refuse_no_bucket(folder, "data.shards")
            raise DataError(f"{folder}: {_what_instead(folder)}") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{where}: not a manifest ({error!r}). Preprocess into a new folder.") from None
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

    @cached_property
    def recipe(self) -> Recipe:
        """The settings that it was made with, skeleton and codec."""
        return Recipe.from_dict(self.fields["config"], f"{self.folder}/{MANIFEST}")

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.fields["splits"])

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

    def all_shards(self, split: str) -> list[Shard]:
        return [shard for v in range(self.variants(split)) for shard in self.shards(split, v)]

    def row_groups(self, split: str) -> dict[tuple[int, int], int]:
        """(shard, row group) -> rows, in order; every variant has the same."""
        return {
            (index, group): rows
            for index, shard in enumerate(self.shards(split))
            for group, rows in enumerate(shard.row_groups)
        }

    def verify(
        self, splits: Iterable[str] | None = None, progress: Callable[[Shard], None] | None = None
    ) -> None:
        """Hash every shard of `splits` (all by default) against the manifest: once a run, before reading.

        `progress` is called in this thread for each shard in order. DataError names each that differs.
        """
        shards = [s for name in (self.splits if splits is None else splits) for s in self.all_shards(name)]

        def differs(shard: Shard) -> bool:
            try:
                return sha256_of(join(self.folder, shard.path)) != shard.sha256
            except FileNotFoundError:
                return True

        bad = []
        at_once = AT_ONCE_FAR if is_uri(self.folder) else AT_ONCE
        for shard, wrong in zip(shards, ahead(differs, shards, at_once), strict=True):
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
