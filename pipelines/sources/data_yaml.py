"""data.yaml of YOLO-pose labels: which class is read, of how many numbers a keypoint is, where all lies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from hrnet_core.errors import DataError
from hrnet_core.skeleton import Skeleton
from pipelines.settings.yaml_file import parse_yaml
from pipelines.sources.annotations import ALL
from pipelines.sources.rows import listed, name_difference
from pipelines.storage.files import is_file, is_folder, join, list_files, read_file

DESCRIPTION = "data.yaml"
FLAT = "all"
"""The split of the pictures that lie in images/ itself."""


@dataclass(frozen=True)
class Description:
    """What data.yaml says of a split; where there is none, what ultralytics takes for granted."""

    raw: bytes
    classes: frozenset[int]
    """The numbers that are read."""
    dimensions: int
    """3: x, y, v; 2: x, y."""
    pictures: str
    labels: str
    """Folders"""
    repaired: dict[str, int]


def read_description(root: str, split: str, skeleton: Skeleton, category: str | None) -> Description:
    """category: the name of the class that is read, or ALL; None: the one called person, or the only one.
    DataError where it contradicts the skeleton, or leads nowhere."""
    file = join(root, DESCRIPTION)
    if not is_file(file):  # another name, where only one can be meant
        named = [name for name in list_files(root) if name.endswith((".yaml", ".yml"))]
        file = join(root, named[0]) if len(named) == 1 else file
    fields, raw = _parsed(file)
    repaired: dict[str, int] = {}
    dimensions = _dimensions(file, fields.get("kpt_shape", [skeleton.num_keypoints, 3]), skeleton)
    if dimensions == 2:
        repaired["two_dimensions"] = 1
    _check_names(file, fields.get("kpt_names"), skeleton)
    if _check_mirror(file, fields.get("flip_idx"), skeleton):
        repaired["identity_flip_idx"] = 1
    classes = _classes(file, fields.get("names", ["person"]), category)
    entry = fields.get(split, "images" if split == FLAT else f"images/{split}")
    named = [name for name in ("train", "val", "test") if fields.get(name) and split not in fields]
    pictures, labels = _folders(root, file, split, entry, named)
    if isinstance(entry, str) and entry.replace("\\", "/") != entry:
        repaired["file_names"] = 1
    return Description(raw, classes, dimensions, pictures, labels, repaired)


def _parsed(file: str) -> tuple[dict[str, Any], bytes]:
    """Fields and bytes; nothing where there is no file."""
    try:
        raw = read_file(file)
        fields = parse_yaml(raw.decode("utf-8-sig")) or {}
    except (FileNotFoundError, NotADirectoryError):
        return {}, b""
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{file}: not a readable YAML file ({' '.join(str(error).split())}).") from None
    if not isinstance(fields, dict):
        raise DataError(f"{file}: a description is a mapping with train, val, names and kpt_shape.")
    return fields, raw


def _dimensions(file: str, shape: Any, skeleton: Skeleton) -> int:
    for dimensions in (3, 2):
        if shape == [skeleton.num_keypoints, dimensions]:
            return dimensions
    raise DataError(
        f"{file}: kpt_shape is {shape}, skeleton {skeleton.name!r} needs [{skeleton.num_keypoints}, 3] (or "
        f"2). Name the skeleton of these labels with --data.skeleton."
    )


def _check_names(file: str, names: Any, skeleton: Skeleton) -> None:
    for theirs in names.values() if isinstance(names, dict) else [names]:
        if theirs is not None and theirs != list(skeleton.keypoints):
            given = list(map(str, theirs)) if isinstance(theirs, list) else [str(theirs)]
            difference = name_difference(given, skeleton.keypoints)
            raise DataError(
                f"{file}: kpt_names is not skeleton {skeleton.name!r}: {difference}. Every number would go "
                f"to the wrong joint: give the skeleton of these labels with --data.skeleton FILE.json."
            )


def _check_mirror(file: str, theirs: Any, skeleton: Skeleton) -> bool:
    """flip_idx is all that most label sets say about the order of their keypoints. True where it exchanges
    nothing, as Roboflow writes it for every set: then it says nothing."""
    ours = skeleton.flip_order.tolist()
    if theirs in (None, [], ours):
        return False
    if theirs == list(range(len(ours))):
        return True
    names = dict(enumerate(skeleton.keypoints))
    same_length = isinstance(theirs, list) and len(theirs) == len(ours)
    differing = [
        f"{names[i]} ({i}) becomes {names.get(a, a) if isinstance(a, int) else a} ({a}) instead of "
        f"{names[b]} ({b})"
        for i, (a, b) in enumerate(zip(theirs if same_length else ours, ours, strict=True))
        if a != b
    ]
    raise DataError(
        f"{file}: flip_idx is not the mirror image of skeleton {skeleton.name!r}: "
        f"{', '.join(differing) or f'not {len(ours)} indices'}. The labels have another order of keypoints: "
        f"give their skeleton with --data.skeleton FILE.json."
    )


def _classes(file: str, names: Any, category: str | None) -> frozenset[int]:
    """The classes that are read."""
    named: Mapping[Any, Any] = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(named, dict) or not named or not all(type(number) is int for number in named):
        raise DataError(f"{file}: names is {names!r}, not the names of the classes by their numbers from 0.")
    if category == ALL:
        return frozenset(named)
    people = [number for number, name in named.items() if str(name).lower() == (category or "person").lower()]
    people = people or (list(named) if category is None else [])
    if len(people) != 1:
        raise DataError(
            f"{file}: names has the classes {listed(list(named.values()))}, none or several of them "
            f"{category or 'person'!r}. Choose the one whose keypoints are to be read with --data.category "
            f"NAME, or all with --data.category {ALL}."
        )
    return frozenset(people)


def _folders(root: str, file: str, split: str, entry: Any, named: Sequence[str]) -> tuple[str, str]:
    """Folder of the pictures and of the labels: as data.yaml says, else images/SPLIT and labels/SPLIT.
    named: the splits that it has, where this is none of them."""
    if not isinstance(entry, str) or entry.endswith(".txt"):
        raise DataError(
            f"{file}: {split} is {entry!r}; a folder of pictures is read, no list. Take {split} out of it "
            f"and put the pictures in images/{split}/ and the labels in labels/{split}/."
        )
    plain = entry.replace("\\", "/")
    parts = [part for part in plain.split("/") if part not in ("", ".")]
    parts = parts[1:] if parts[:1] == [".."] else parts  # as ultralytics reads ../train/images
    if plain.startswith("/") or re.match("[A-Za-z]:", plain):  # of the machine that wrote it
        inside = (parts[start:] for start in range(1, len(parts)))
        parts = next((p for p in inside if "images" in p and is_folder(join(root, "/".join(p)))), [".."])
    if ".." in parts or "images" not in parts:
        raise DataError(
            f"{file}: {split} is {entry!r}; it must lead from the folder of {DESCRIPTION} to pictures inside "
            f"it, through a folder 'images' that has a 'labels' beside it."
        )
    place = len(parts) - 1 - parts[::-1].index("images")
    pictures = join(root, "/".join(parts))
    labels = join(root, "/".join([*parts[:place], "labels", *parts[place + 1 :]]))
    for folder in (root, pictures, labels):
        if not is_folder(folder):
            if named and is_folder(root):
                raise DataError(
                    f"{folder}: no such folder. {file} names the splits {listed(named)}: give one of them "
                    f"with --data.train-split and --data.val-split, whatever its folder is called."
                )
            raise DataError(
                f"{folder}: no such folder. A YOLO-pose root has images/{split}/ and labels/{split}/, or "
                f"names them in {DESCRIPTION}. Where the pictures lie in images/ itself, give "
                f"--data.train-split {FLAT} and --data.val-split {FLAT}."
            )
    return pictures, labels
