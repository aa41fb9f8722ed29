"""A split of whatever kind of source the settings name."""

from __future__ import annotations

from pathlib import Path

from hrnet_core.skeleton import load_skeleton
from pipelines.config import DataSettings
from pipelines.sources.coco import read_coco
from pipelines.sources.records import Split
from pipelines.sources.yolo import read_yolo


def split_names(data: DataSettings) -> list[str]:
    """The splits of a dataset, once each."""
    return list(dict.fromkeys((data.train_split, data.val_split)))


def read_split(root: str | Path, name: str, data: DataSettings) -> Split:
    """One split of `root`, in the format and of the skeleton of the settings. DataError as in its reader."""
    read = read_yolo if data.format == "yolo_pose" else read_coco
    return read(root, name, load_skeleton(data.skeleton))
