"""The keypoints of a body: names, mirror pairs, OKS constants, limbs and colours.

COCO17 is built in, CrowdPose's and MPII's are shipped as skeletons/NAME.json, any other comes from one JSON
file with the same fields (docs/skeletons.md). Everything that depends on the number or order of keypoints
asks a Skeleton.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import DataError
from hrnet_core.files import from_json, read_object

# Head blue, left green, right orange (RGB), as MMPose and rtmlib have it and the field knows it. Their green,
# (0, 255, 0), can hardly be told from the orange without green cones; this one can.
HEAD, LEFT, RIGHT = (51, 153, 255), (0, 255, 128), (255, 128, 0)
SHIPPED = Path(__file__).parent / "skeletons"
WAY_OUT = "docs/skeletons.md has an example."
OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}
SIDE = r"left|right|(?<![a-z0-9])[lr](?![a-z0-9])"


@dataclass(frozen=True)
class Skeleton:
    """One body layout with K keypoints. Index order is the order of every (..., K, ...) array."""

    name: str
    keypoints: tuple[str, ...]
    """K names, lower snake case."""
    flip_pairs: tuple[tuple[int, int], ...]
    """Index pairs that change places in a mirror image."""
    oks_sigmas: tuple[float, ...]
    """K per-keypoint constants of OKS (COCO's are sigma, not 2 sigma)."""
    limbs: tuple[tuple[int, int], ...] = ()
    """Index pairs to draw as lines."""
    upper_body: tuple[int, ...] = ()
    """Indices that half-body augmentation counts as the upper half; the others are the lower."""
    joint_weights: tuple[float, ...] = ()
    """K loss weights used only where `train.joint_weights` is on; empty means all 1."""
    colors: tuple[tuple[int, int, int], ...] = ()
    """K RGB colours; empty: left green, right orange, the rest blue, by name."""

    def __post_init__(self) -> None:
        if problems := self._malformed():
            raise DataError(f"skeleton {self.name!r}: {'; '.join(problems)}")
        count = len(self.keypoints)
        if count == 0 or len(set(self.keypoints)) != count:
            problems.append("keypoints must be unique names, at least one")
        if len(self.oks_sigmas) != count or any(s <= 0 for s in self.oks_sigmas):
            problems.append(f"oks_sigmas must be {count} positive numbers, got {len(self.oks_sigmas)}")
        for field in ("joint_weights", "colors"):
            if len(getattr(self, field)) not in (0, count):
                problems.append(f"{field} must be empty or {count} long, got {len(getattr(self, field))}")
        indices = [i for pair in (*self.flip_pairs, *self.limbs) for i in pair] + list(self.upper_body)
        if any(not 0 <= i < count for i in indices):
            problems.append(f"flip_pairs, limbs and upper_body must be indices from 0 to {count - 1}")
        paired = [i for pair in self.flip_pairs for i in pair]
        if len(set(paired)) != len(paired):
            problems.append("flip_pairs must name each keypoint at most once")
        if problems:
            raise DataError(f"skeleton {self.name!r}: {'; '.join(problems)}")

    def _malformed(self) -> list[str]:
        """What each field that is of another kind than its own must be."""

        def entries(field: str, fits: Callable[[Any], bool]) -> bool:
            values = getattr(self, field)
            return isinstance(values, tuple) and all(map(fits, values))

        def pair(value: Any) -> bool:
            return isinstance(value, tuple) and len(value) == 2 and all(map(_is_index, value))

        def color(value: Any) -> bool:
            return (
                isinstance(value, tuple)
                and len(value) == 3
                and all(_is_index(c) and 0 <= c < 256 for c in value)
            )

        wanted = {
            "keypoints": (_is_name, "names that can be printed"),
            "flip_pairs": (pair, "pairs of indices from 0, [[1, 2], ...]"),
            "oks_sigmas": (_is_amount, "finite numbers, none negative"),
            "limbs": (pair, "pairs of indices from 0, [[1, 2], ...]"),
            "upper_body": (_is_index, "indices from 0"),
            "joint_weights": (_is_amount, "finite numbers, none negative"),
            "colors": (color, "[r, g, b] each, whole numbers from 0 to 255"),
        }
        problems = [] if _is_name(self.name) else ["name must be text"]
        return problems + [
            f"{field} must be a list of {what}"
            for field, (fits, what) in wanted.items()
            if not entries(field, fits)
        ]

    @property
    def num_keypoints(self) -> int:
        return len(self.keypoints)

    @property
    def flip_order(self) -> NDArray[np.int64]:
        """int64 (K,): `keypoints[..., flip_order, :]` is the mirror image's order."""
        order = np.arange(self.num_keypoints)
        for a, b in self.flip_pairs:
            order[[a, b]] = b, a
        return order

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """K RGB colours for drawing."""
        if self.colors:
            return self.colors
        sides = {"left": LEFT, "l": LEFT, "right": RIGHT, "r": RIGHT}
        named = (re.search(SIDE, name.lower()) for name in self.keypoints)
        return tuple(sides[found[0]] if found else HEAD for found in named)

    def as_dict(self) -> dict[str, Any]:
        """JSON types; `skeleton_from_dict` gives the same skeleton back."""
        return dict(json.loads(json.dumps(asdict(self))))  # tuples become lists


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != "" and value.isprintable()


def _is_index(value: Any) -> bool:
    """-1 too: what is out of range is told with the range."""
    return type(value) is int


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def skeleton_from_dict(fields: dict[str, Any], source: str = "skeleton") -> Skeleton:
    """A Skeleton from JSON fields. DataError names `source` and the field."""
    return from_json(Skeleton, fields, source, DataError, WAY_OUT)


def sides_by_name(names: Sequence[str]) -> list[tuple[int, int]]:
    """Index pairs of names that differ by left and right ("left_eye", "EyeRight", "l_hip", "hip-R") and in
    nothing else."""
    places = {name.lower(): place for place, name in enumerate(names)}
    mirrored = (re.sub(SIDE, lambda found: OTHER_SIDE[found[0]], name) for name in places)
    partners = [places.get(name) for name in mirrored]
    return [(a, b) for a, b in zip(places.values(), partners, strict=True) if b is not None and a < b]


def load_skeleton(name_or_file: str | Path) -> Skeleton:
    """ "coco17", "crowdpose14", "mpii16", or the path of a skeleton JSON file.

    DataError also where left and right of a name are not exchanged by flip_pairs: nothing after it would
    notice, and mirrored people would teach the wrong side.
    """
    if str(name_or_file) == COCO17.name:
        return COCO17
    shipped = {file.stem: file for file in sorted(SHIPPED.glob("*.json"))}
    path = shipped.get(str(name_or_file), Path(name_or_file))
    named = f"Name a skeleton file, or one of {', '.join([COCO17.name, *shipped])}. {WAY_OUT}"
    skeleton = skeleton_from_dict(read_object(path, DataError, named), str(path))
    order = skeleton.flip_order
    if apart := [pair for pair in sides_by_name(skeleton.keypoints) if order[pair[0]] != pair[1]]:
        told = ", ".join(f"{skeleton.keypoints[a]} and {skeleton.keypoints[b]}" for a, b in apart[:3])
        more = f" and {len(apart) - 3} pairs more" if len(apart) > 3 else ""
        raise DataError(
            f"{path}: flip_pairs does not exchange {told}{more}: mirrored people would teach the wrong side. "
            f"The pairs that lack are {json.dumps(apart)}. {WAY_OUT}"
        )
    return skeleton


COCO17 = Skeleton(
    name="coco17",
    keypoints=(
        "nose", "left_eye", "right_eye", "left_ear", "right_ear",
        "left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist",
        "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle",
    ),
    flip_pairs=((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)),
    # pycocotools' Params.kpt_oks_sigmas.
    oks_sigmas=(
        0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072,
        0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089,
    ),
    # COCO's 19 edges, from 0.
    limbs=(
        (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8),
        (7, 9), (8, 10), (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
    ),
    upper_body=tuple(range(11)),
    # Official lib/dataset/coco.py:97-103; off in every published configuration.
    joint_weights=(1, 1, 1, 1, 1, 1, 1, 1.2, 1.2, 1.5, 1.5, 1, 1, 1.2, 1.2, 1.5, 1.5),
)  # fmt: skip
