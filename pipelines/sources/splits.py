"""A split of whatever kind of source the settings name."""

from __future__ import annotations

from pathlib import Path

from hrnet_core.skeleton import load_skeleton
from pipelines.settings.config import DataSettings
from pipelines.sources.annotations import TO_CROP
from pipelines.sources.coco import read_coco
from pipelines.sources.records import Split
from pipelines.sources.yolo import read_yolo


def split_names(data: DataSettings) -> list[str]:
    """The splits of a dataset, once each."""
    return list(dict.fromkeys((data.train_split, data.val_split)))


def read_split(root: str | Path, name: str, data: DataSettings) -> Split:
    """One split of `root`, in the format and of the skeleton of the settings. DataError as in its reader."""
    skeleton = load_skeleton(data.skeleton)
    if data.format == "yolo_pose":
        return read_yolo(root, name, skeleton, data.category)
    return read_coco(root, name, skeleton, TO_CROP._replace(category=data.category))
