"""Where the parts of a COCO root lie, on this machine or in a bucket."""

from __future__ import annotations

from pathlib import Path

from pipelines.storage import absolute, join


def annotations_of(root: str | Path, split: str) -> str:
    """ROOT/annotations/person_keypoints_SPLIT.json: path or URI, as `root` is."""
    return join(absolute(str(root)), f"annotations/person_keypoints_{split}.json")
