"""The shard plan: which people make which shard, and which shards of it are there already."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from pyarrow import fs

from hrnet_core.errors import DataError
from hrnet_core.locations import is_uri, one_line, open_folder, refuse_no_bucket
from pipelines.settings.config import DataSettings
from pipelines.shards.recipe import Recipe
from pipelines.shards.schema import MANIFEST, OWN_FILES, SCHEMA_VERSION, Shard, canonical_json, shard_name
from pipelines.shards.writer import inspect_shard
from pipelines.sources.records import People, Photo, Rejection, Split
from pipelines.storage.files import (
    absolute,
    answering,
    file_sizes,
    join,
    list_files,
    read_file,
    remove_leftovers,
)


@dataclass(frozen=True)
class ShardWork:
    """What a task needs to write one shard: one file for each variant of the same people."""

    folder: str
    split: str
    index: int
    count: int
    variants: int
    photos: tuple[Photo, ...]
    """Each has people."""
    people: People
    """All of these photos, in their order."""
    recipe: Recipe
    plan: str

    @property
    def key(self) -> tuple[str, int]:
        return self.split, self.index

    @property
    def names(self) -> list[str]:
        """The files, by variant."""
        return [shard_name(self.split, v, self.index, self.count) for v in range(self.variants)]


@dataclass(frozen=True)
class BuiltShard:
    """What became of a ShardWork."""

    shards: tuple[Shard, ...]
    """The files, by variant."""
    rejected: tuple[Rejection, ...]
    """Photos that could not be used."""


def plan_shards(split: Split, data: DataSettings) -> list[ShardWork]:
    """The split's photos with people, in order of image id, in shards of about people_per_shard.

    The plan's hash stands for everything that decides the bytes: annotations, settings, which photos and
    people are in, and the size of each photo's file (a replaced picture makes another plan).
    """
    photos = list(split.by_photo())
    if not photos:
        counts = Counter(r.reason for r in split.rejected)
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
        raise DataError(
            f"{split.annotation_file}: no person of split {split.name!r} can be used "
            f"({reasons or 'it has none'}). Give annotations with labelled keypoints and their pictures: "
            f"hrnet validate says what is wrong with each, and the way out."
        )
    recipe = Recipe.of(data)
    sizes = file_sizes([photo.path for photo, _ in photos])
    members = [
        (photo.image_id, size, split.people.ann_id[rows].tolist())
        for (photo, rows), size in zip(photos, sizes, strict=True)
    ]
    text = canonical_json([SCHEMA_VERSION, recipe.as_dict(), split.name, split.annotation_sha256, members])
    ends = [rows.stop for _, rows in photos]
    count = -(-ends[-1] // data.people_per_shard)
    borders = np.searchsorted(ends, np.arange(1, count) * ends[-1] / count) + 1
    cuts = sorted({0, *borders.tolist(), len(photos)})
    return [
        ShardWork(
            folder=absolute(data.shards),
            split=split.name,
            index=index,
            count=len(cuts) - 1,
            variants=data.variants if split.name == data.train_split else 1,
            photos=tuple(photo for photo, _ in photos[a:b]),
            people=split.people[photos[a][1].start : ends[b - 1]],
            recipe=recipe,
            plan=hashlib.sha256(text.encode()).hexdigest(),
        )
        for index, (a, b) in enumerate(pairwise(cuts))
    ]


def finished_shards(works: Sequence[ShardWork], folder: str) -> dict[tuple[str, int], BuiltShard]:
    """Those that are there whole, by ShardWork.key; makes the folder where there is none.

    DataError where the folder holds something that this plan would not write: nothing of it is touched.
    """
    try:
        with answering(folder):
            check_target(folder, works)
        if not is_uri(folder):  # a bucket has no folders, only names
            os.makedirs(f"{absolute(folder)}/data", exist_ok=True)
        remove_leftovers(folder)
    except OSError as error:
        raise DataError(cannot_write(folder, error)) from None
    there = {f"data/{name}" for name in list_files(join(folder, "data"))}
    begun = [work for work in works if not there.isdisjoint(work.names)]
    with ThreadPoolExecutor(4) as pool:
        found = zip(begun, pool.map(find_built, begun), strict=True)
        return {work.key: built for work, built in found if built is not None}


def find_built(work: ShardWork) -> BuiltShard | None:
    """A shard that is there already; None where a file of it is missing or damaged. DataError where one is
    of another plan and whole: before a run, or since it began."""
    found = [inspect_shard(work.folder, name, v) for v, name in enumerate(work.names)]
    for name, one in zip(work.names, found, strict=True):
        if one is not None and one[0] != work.plan:
            raise DataError(_another_plan(work.folder, name))
    whole = [one for one in found if one is not None]
    return BuiltShard(tuple(one[2] for one in whole), whole[0][1]) if len(whole) == len(found) else None


def check_target(folder: str, works: Sequence[ShardWork]) -> None:
    """DataError where the folder holds files that these works would not write, or a manifest of another
    plan. Asked at the start, and again at the end: another run may have taken the folder meanwhile."""
    files, root = open_folder(folder)
    info = files.get_file_info(root)
    if info.type == fs.FileType.File:
        raise DataError(f"data.shards: {folder} is a file. Give a folder, new or of this dataset.")
    if info.type == fs.FileType.NotFound:
        refuse_no_bucket(folder, "data.shards")
        return
    if files.get_file_info(f"{root}/{MANIFEST}").type == fs.FileType.File:
        _check_same_plan(folder, works)
    inside = {i.base_name for i in files.get_file_info(fs.FileSelector(root))}
    shards = files.get_file_info(fs.FileSelector(f"{root}/data", allow_not_found=True))
    inside |= {f"data/{i.base_name}" for i in shards}
    ours = OWN_FILES.union(*(work.names for work in works))
    foreign = sorted(name for name in inside - ours if not name.removeprefix("data/").startswith("."))
    if foreign:
        raise DataError(
            f"data.shards: {folder} holds {len(foreign)} files that this dataset does not have: "
            f"{', '.join(foreign[:5])}. Nothing was touched: give a new folder, or move them elsewhere."
        )


def _check_same_plan(folder: str, works: Sequence[ShardWork]) -> None:
    path = join(folder, MANIFEST)
    try:
        theirs = json.loads(read_file(path))
        plans = {name: split["plan"] for name, split in theirs["splits"].items()}
        config = theirs["config"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: not a manifest of ours. Give --data.shards a new folder.") from None
    if plans != {work.split: work.plan for work in works}:
        ours = works[0].recipe.as_dict()
        differing = sorted(k for k in ours if ours[k] != config.get(k))
        what = f"settings {', '.join(differing)}" if differing else "annotations or pictures"
        raise DataError(_another_plan(folder, f"its {MANIFEST}", what))


def _another_plan(folder: str, where: str, what: str = "settings, annotations or pictures") -> str:
    return (
        f"data.shards: {folder} holds another dataset ({where}): other {what}. Nothing was touched: give "
        f"--data.shards a new folder, or remove the old one yourself."
    )


def cannot_write(folder: str, error: OSError) -> str:
    why = error.strerror or one_line(error)
    return (
        f"data.shards: {folder} cannot be written ({why}). Free space, or give a folder that you may write "
        f"to; then run the same command again: finished shards are kept."
    )
