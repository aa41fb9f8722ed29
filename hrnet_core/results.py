"""What a predictor answers for one image: boxes, keypoints and their scores, in image px.

Shaped like ultralytics' Results so that code for one reads the other, with three differences: arrays are
NumPy, `boxes.xywh` is COCO's (left, top, width, height), and low scores are never zeroed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import DataError
from hrnet_core.geometry import Float32, UInt8
from hrnet_core.images import check_pixels, encode_jpeg, encode_png, read_image
from hrnet_core.oks import rescore
from hrnet_core.overlays import draw_poses
from hrnet_core.skeleton import COCO17, Skeleton

if TYPE_CHECKING:
    import pandas as pd
    import supervision as sv

# OpenPose's 18 COCO keypoints, as names of ours; its second one, the neck, is not among COCO's 17.
OPENPOSE18 = (
    "nose", "neck",
    "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
    "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
    "right_eye", "left_eye", "right_ear", "left_ear",
)  # fmt: skip


class _OnHost:
    """Code written for torch results calls these; NumPy arrays are there already."""

    def cpu(self) -> Any:
        return self

    def numpy(self) -> Any:
        return self


@dataclass(frozen=True)
class Keypoints(_OnHost):
    """P people of K keypoints."""

    data: Float32
    """(P, K, 3): x, y in image px, and the score (the peak of the heatmap)."""
    orig_shape: tuple[int, int] = (0, 0)
    """(height, width) of the image; Poses fills it in."""

    @property
    def xy(self) -> Float32:
        """(P, K, 2), image px."""
        return self.data[..., :2]

    @property
    def xyn(self) -> Float32:
        """(P, K, 2), as fractions of the image's width and height: x / width, y / height."""
        return self.xy / _size(self.orig_shape)

    @property
    def conf(self) -> Float32:
        """(P, K), as the network gave them: about 0 to 1, and possibly below 0."""
        return self.data[..., 2]

    @property
    def has_visible(self) -> bool:
        """True: every keypoint has a score."""
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        """(P, K, 3)"""
        return self.data.shape

    def visible(self, threshold: float = 0.3) -> NDArray[np.bool_]:
        """(P, K): whose score is above `threshold`."""
        return self.conf > threshold

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int | slice | NDArray[Any]) -> Keypoints:
        return Keypoints(self.data[_rows(len(self), index)], self.orig_shape)


@dataclass(frozen=True)
class Boxes(_OnHost):
    """P boxes, as they were given."""

    xywh: Float32
    """(P, 4): left, top, width, height in image px. (Ultralytics' xywh starts at the centre.)"""
    conf: Float32
    """(P,): the detector's scores, 1 where none were given."""
    orig_shape: tuple[int, int] = (0, 0)
    """(height, width) of the image; Poses fills it in."""

    @property
    def xyxy(self) -> Float32:
        """(P, 4): left, top, right, bottom in image px."""
        return np.concatenate([self.xywh[:, :2], self.xywh[:, :2] + self.xywh[:, 2:]], axis=1)

    @property
    def xyxyn(self) -> Float32:
        """(P, 4): left, top, right, bottom as fractions of the image's width and height."""
        return (self.xyxy.reshape(-1, 2, 2) / _size(self.orig_shape)).reshape(-1, 4)

    @property
    def cls(self) -> Float32:
        """(P,): 0, the index of the one class in Poses.names."""
        return np.zeros(len(self), np.float32)

    @property
    def id(self) -> None:
        """None: nothing is tracked."""
        return None

    def __len__(self) -> int:
        return len(self.xywh)

    def __getitem__(self, index: int | slice | NDArray[Any]) -> Boxes:
        rows = _rows(len(self), index)
        return Boxes(self.xywh[rows], self.conf[rows], self.orig_shape)


@dataclass(frozen=True)
class Poses(_OnHost):
    """The people of one image, in the order of the boxes."""

    keypoints: Keypoints
    boxes: Boxes
    orig_shape: tuple[int, int]
    """(height, width) of the image."""
    skeleton: Skeleton = COCO17
    boxes_source: Literal["given", "whole_image", "detector"] = "given"
    """"whole_image": no boxes were given, so the image was taken for one person."""
    speed: dict[str, float] = field(default_factory=dict)
    """Milliseconds of preprocess, inference and postprocess: this image's share of its call."""
    path: str | None = None
    """The file of the image, where it came from one."""

    def __post_init__(self) -> None:
        for name in ("keypoints", "boxes"):
            object.__setattr__(self, name, replace(getattr(self, name), orig_shape=self.orig_shape))

    @property
    def names(self) -> dict[int, str]:
        """Class names, as ultralytics has them: there is one class."""
        return {0: "person"}

    @property
    def scores(self) -> NDArray[np.float64]:
        """(P,): COCO's score of a pose: box score x mean of the keypoint scores above 0.2."""
        return rescore(self.keypoints.conf, self.boxes.conf)

    def __len__(self) -> int:
        return len(self.keypoints)

    def __getitem__(self, index: int | slice | NDArray[Any]) -> Poses:
        """Some of the people: an index, a slice, indices or a mask."""
        return replace(self, keypoints=self.keypoints[index], boxes=self.boxes[index])

    def __iter__(self) -> Iterator[Poses]:
        """One person after the other, each as a Poses of one."""
        return (self[person] for person in range(len(self)))

    def to_dict(self) -> dict[str, Any]:
        """JSON types, one `results` entry of the HTTP answer: image, boxes_source, persons."""
        height, width = self.orig_shape
        rows = zip(self.boxes.xywh, self.scores, self.keypoints.data, strict=True)
        return {
            "image": {"width": width, "height": height},
            "boxes_source": self.boxes_source,
            "persons": [
                {"bbox": box.tolist(), "score": float(score), "keypoints": person.tolist()}
                for box, score, person in rows
            ],
        }

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def to_coco(self, image_id: int, category_id: int = 1) -> list[dict[str, Any]]:
        """COCO keypoint results, ready for pycocotools' loadRes; a keypoint's third value is its score."""
        return [
            {
                "image_id": int(image_id),
                "category_id": int(category_id),
                "keypoints": person.astype(np.float64).reshape(-1).tolist(),
                "score": float(score),
                "bbox": box.astype(np.float64).tolist(),
            }
            for box, score, person in zip(self.boxes.xywh, self.scores, self.keypoints.data, strict=True)
        ]

    def to_openpose(self) -> dict[str, Any]:
        """OpenPose's JSON of one frame, in its 18-keypoint COCO order, marked as converted.

        Its neck is not predicted: it is the middle of the shoulders, with the lower of their scores.
        DataError for a skeleton that has not COCO's 17 names.
        """
        names = self.skeleton.keypoints
        if absent := sorted(set(OPENPOSE18) - {"neck"} - set(names)):
            raise DataError(
                f"skeleton {self.skeleton.name!r} has no {', '.join(absent)}: OpenPose's layout is for the "
                f"17 keypoints of COCO. Take another format."
            )
        columns = dict(zip(names, self.keypoints.data.swapaxes(0, 1), strict=True))  # (P, 3) each
        left, right = columns["left_shoulder"], columns["right_shoulder"]
        columns["neck"] = np.c_[(left + right)[:, :2] / 2, np.minimum(left, right)[:, 2:]]
        people = np.stack([columns[name] for name in OPENPOSE18], axis=1).reshape(-1, 3 * len(OPENPOSE18))
        others = ("face_keypoints_2d", "hand_left_keypoints_2d", "hand_right_keypoints_2d")
        return {
            "version": 1.3,
            "converted": {"from": self.skeleton.name, "layout": "COCO_18", "synthetic": ["neck"]},
            "people": [
                {"person_id": [-1], "pose_keypoints_2d": person, **{name: [] for name in others}}
                for person in people.tolist()
            ],
        }

    def to_df(self) -> pd.DataFrame:
        """A row a person: path, person, score, box_x, box_y, box_w, box_h, box_score, then of each keypoint
        NAME_x, NAME_y, NAME_score; image px. Needs pandas."""
        import pandas as pd

        names = [f"{name}_{part}" for name in self.skeleton.keypoints for part in ("x", "y", "score")]
        keypoints = pd.DataFrame(self.keypoints.data.reshape(-1, len(names)), columns=names)
        people = pd.DataFrame(self.boxes.xywh, columns=["box_x", "box_y", "box_w", "box_h"])
        people.insert(0, "path", self.path)
        people.insert(1, "person", np.arange(len(self)))
        people.insert(2, "score", self.scores)
        people["box_score"] = self.boxes.conf
        return pd.concat([people, keypoints], axis=1)

    def to_supervision(self) -> sv.KeyPoints:
        """supervision's KeyPoints (0.29 or newer), for its annotators and trackers. Needs supervision.

        detection_confidence is the box's score, keypoint_confidence the keypoints', untouched.
        """
        import supervision as sv

        return sv.KeyPoints(
            xy=self.keypoints.xy.copy(),
            class_id=np.zeros(len(self), int),
            keypoint_confidence=self.keypoints.conf.copy(),
            detection_confidence=self.boxes.conf.copy(),
            data={"class_name": np.array(["person"] * len(self))},
        )

    def plot(self, image: UInt8 | None = None, threshold: float = 0.3, boxes: bool = True) -> UInt8:
        """A copy of `image`, uint8 (H, W, 3) RGB, with the poses drawn in.

        None: the file of `path`, read again with its EXIF orientation applied. DataError where there is
        none, or the image is another; ImageError where it is no picture any more.
        """
        if image is None:
            if self.path is None:
                raise DataError("plot: these poses know no file: give the image that was predicted.")
            image = read_image(self.path)
        image = check_pixels(image, "plot: the image")
        if image.shape[:2] != self.orig_shape:
            raise DataError(
                f"plot: the image is (height, width) {image.shape[:2]}, but these poses are of one of "
                f"{self.orig_shape}. Give the image that was predicted."
            )
        boxes_xywh = self.boxes.xywh if boxes and self.boxes_source != "whole_image" else None
        return draw_poses(image, self.keypoints.xy, self.keypoints.conf, self.skeleton, threshold, boxes_xywh)

    def save(self, file: str | Path, image: UInt8 | None = None, threshold: float = 0.3) -> Path:
        """plot() into a file: a .png, which keeps every pixel, or a .jpg. DataError for another suffix."""
        file = Path(file)
        if file.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise DataError(f"{file}: poses are drawn into a .png or a .jpg. Name one.")
        drawn = self.plot(image, threshold)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(drawn) if file.suffix.lower() == ".png" else encode_jpeg(drawn))
        return file


def _size(orig_shape: tuple[int, int]) -> Float32:
    """(width, height)"""
    return np.array(orig_shape[::-1], np.float32)


def _rows(count: int, index: int | slice | NDArray[Any]) -> NDArray[np.int64]:
    return np.atleast_1d(np.arange(count)[index])
