"""What a predictor answers for one image: boxes, keypoints and their scores, in image px.

Shaped like ultralytics' Results so that code for one reads the other, with three differences: arrays are
NumPy, `boxes.xywh` is COCO's (left, top, width, height), and low scores are never zeroed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import DataError
from hrnet_core.oks import rescore
from hrnet_core.skeleton import COCO17, Skeleton

Float32 = NDArray[np.float32]

# OpenPose's 18 COCO keypoints, as names of ours; its second one, the neck, is not among COCO's 17.
OPENPOSE18 = (
    "nose", "neck",
    "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
    "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
    "right_eye", "left_eye", "right_ear", "left_ear",
)  # fmt: skip


@dataclass(frozen=True)
class Keypoints:
    """P people of K keypoints."""

    data: Float32
    """(P, K, 3): x, y in image px, and the score (the peak of the heatmap)."""

    @property
    def xy(self) -> Float32:
        """(P, K, 2), image px."""
        return self.data[..., :2]

    @property
    def conf(self) -> Float32:
        """(P, K), as the network gave them: about 0 to 1, and possibly below 0."""
        return self.data[..., 2]

    def visible(self, threshold: float = 0.3) -> NDArray[np.bool_]:
        """(P, K): whose score is above `threshold`."""
        return self.conf > threshold

    def __len__(self) -> int:
        return len(self.data)


@dataclass(frozen=True)
class Boxes:
    """P boxes, as they were given."""

    xywh: Float32
    """(P, 4): left, top, width, height in image px."""
    conf: Float32
    """(P,): the detector's scores, 1 where none were given."""

    @property
    def xyxy(self) -> Float32:
        """(P, 4): left, top, right, bottom in image px."""
        return np.concatenate([self.xywh[:, :2], self.xywh[:, :2] + self.xywh[:, 2:]], axis=1)

    def __len__(self) -> int:
        return len(self.xywh)


@dataclass(frozen=True)
class Poses:
    """The people of one image, in the order of the boxes."""

    keypoints: Keypoints
    boxes: Boxes
    orig_shape: tuple[int, int]
    """(height, width) of the image."""
    skeleton: Skeleton = COCO17
    boxes_source: Literal["given", "whole_image"] = "given"
    """"whole_image": no boxes were given, so the image was taken for one person."""
    speed: dict[str, float] = field(default_factory=dict)
    """Milliseconds of preprocess, inference and postprocess: this image's share of its call."""

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
        chosen = np.atleast_1d(np.arange(len(self))[index])
        boxes = Boxes(self.boxes.xywh[chosen], self.boxes.conf[chosen])
        return Poses(
            Keypoints(self.keypoints.data[chosen]),
            boxes,
            self.orig_shape,
            self.skeleton,
            self.boxes_source,
            self.speed,
        )

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
                "image_id": image_id,
                "category_id": category_id,
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
        absent = sorted(set(OPENPOSE18) - {"neck"} - set(names))
        if absent:
            raise DataError(
                f"skeleton {self.skeleton.name!r} has no {', '.join(absent)}: OpenPose's layout is for the "
                f"17 keypoints of COCO. Use to_coco or to_dict."
            )
        data = self.keypoints.data
        left, right = data[:, names.index("left_shoulder")], data[:, names.index("right_shoulder")]
        neck = np.concatenate([(left + right)[:, :2] / 2, np.minimum(left, right)[:, 2:]], axis=1)
        columns = [neck if name == "neck" else data[:, names.index(name)] for name in OPENPOSE18]
        people = np.stack(columns, axis=1).reshape(-1, 3 * len(OPENPOSE18)).astype(np.float64)
        return {
            "version": 1.3,
            "converted": {"from": self.skeleton.name, "layout": "COCO_18", "synthetic": ["neck"]},
            "people": [
                {
                    "person_id": [-1],
                    "pose_keypoints_2d": person.tolist(),
                    "face_keypoints_2d": [],
                    "hand_left_keypoints_2d": [],
                    "hand_right_keypoints_2d": [],
                }
                for person in people
            ],
        }

    def plot(self, image: NDArray[np.uint8], threshold: float = 0.3, boxes: bool = True) -> NDArray[np.uint8]:
        """A copy of `image`, uint8 (H, W, 3) RGB, with the poses drawn in."""
        from hrnet_core.drawing import draw_poses

        boxes_xywh = self.boxes.xywh if boxes and self.boxes_source != "whole_image" else None
        return draw_poses(
            image, self.keypoints.xy, self.keypoints.conf, self.skeleton, threshold, boxes_xywh=boxes_xywh
        )
