"""Where the parts of a COCO root lie, here or in a bucket: as COCO has it, or as tools unpack it."""

from __future__ import annotations

from pathlib import Path

from pipelines.storage.files import absolute, is_file, is_folder, join, list_files

COCO = "annotations/person_keypoints_{}.json"
LAYOUTS = (
    (COCO, "{}"),
    (COCO, "images/{}"),  # CVAT
    (COCO, "images"),
    ("{}/_annotations.coco.json", "{}"),  # Roboflow
    ("annotations/{}.json", "{}"),
    ("annotations/{}.json", "images/{}"),
    ("annotations/{}.json", "images"),
    ("{}.json", "images"),  # Label Studio: the split is called result
    ("{}.json", "{}"),
)
"""Annotations and pictures of a split, the first that are both there count."""


def annotations_of(root: str | Path, split: str) -> str:
    """ROOT/annotations/person_keypoints_SPLIT.json: path or URI, as `root` is."""
    return join(absolute(str(root)), COCO.format(split))


def locate(root: str | Path, split: str) -> tuple[str, str]:
    """The annotation file of a split and the folder of its pictures; COCO's own where neither is there."""
    root = absolute(str(root))
    for patterns in LAYOUTS:
        file, folder = (join(root, pattern.format(split)) for pattern in patterns)
        if is_file(file) and is_folder(folder):
            return file, folder
    return annotations_of(root, split), join(root, split)


def splits_there(root: str) -> list[str]:
    """Names of the splits whose annotations lie in a root, as far as LAYOUTS know them."""
    root, found = absolute(root), []
    before, after = COCO.removeprefix("annotations/").split("{}")
    for name in sorted(list_files(join(root, "annotations"))):
        if name.endswith(".json"):
            found.append(name.removeprefix(before).removesuffix(after))
    found += [name.removesuffix(".json") for name in sorted(list_files(root)) if name.endswith(".json")]
    usual = ("train", "valid", "val", "test")
    return found + [name for name in usual if is_file(join(root, f"{name}/_annotations.coco.json"))]
