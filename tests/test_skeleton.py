"""COCO17 against COCO's own lists, and skeletons that users write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.cocoeval import Params

from hrnet_core.errors import DataError
from hrnet_core.skeleton import COCO17, LEFT, RIGHT, load_skeleton, skeleton_from_dict

HAND = {
    "name": "hand3",
    "keypoints": ["wrist", "left_tip", "right_tip"],
    "flip_pairs": [[1, 2]],
    "oks_sigmas": [0.05, 0.03, 0.03],
}

# The order of COCO's annotation files (cocodataset.org, person_keypoints, categories[0].keypoints).
COCO_ORDER = [
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder",
    "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee",
    "right_knee", "left_ankle", "right_ankle",
]  # fmt: skip


def test_coco17_is_cocos() -> None:
    assert list(COCO17.keypoints) == COCO_ORDER
    np.testing.assert_allclose(COCO17.oks_sigmas, Params("keypoints").kpt_oks_sigmas, rtol=1e-15)
    assert COCO17.num_keypoints == 17
    # Official lib/dataset/coco.py:83-103.
    assert COCO17.upper_body == tuple(range(11))
    assert COCO17.joint_weights == (1,) * 7 + (1.2, 1.2, 1.5, 1.5, 1, 1, 1.2, 1.2, 1.5, 1.5)
    assert len(COCO17.limbs) == 19


def test_real_annotations_name_the_same_keypoints_and_limbs(real_data: Path) -> None:
    category = json.loads((real_data / "coco/annotations/person_keypoints_val2017.json").read_text())[
        "categories"
    ][0]
    assert list(COCO17.keypoints) == category["keypoints"]
    assert [[a + 1, b + 1] for a, b in COCO17.limbs] == category["skeleton"]


def test_mirroring_exchanges_left_and_right_and_nothing_else() -> None:
    mirrored = [COCO17.keypoints[i] for i in COCO17.flip_order]
    swap = {"left": "right", "right": "left"}
    for name, other in zip(COCO17.keypoints, mirrored, strict=True):
        side, _, part = name.partition("_")
        assert other == (f"{swap[side]}_{part}" if side in swap else name)
    np.testing.assert_array_equal(COCO17.flip_order[COCO17.flip_order], np.arange(17))


def test_flip_order_is_the_published_reordering(reference: dict[str, Any]) -> None:
    case = reference["official_fliplr_joints"]
    visible = np.array(case["vis_in"])[:, 0]
    np.testing.assert_array_equal(visible[COCO17.flip_order], np.array(case["vis_out"])[:, 0])
    joints = np.array(case["joints_in"])[COCO17.flip_order]
    joints[:, 0] = case["width"] - 1 - joints[:, 0]
    # The published code also zeroes what is not visible (trap 9).
    np.testing.assert_array_equal(joints * np.array(case["vis_out"]), case["joints_out"])


def test_json_round_trip(tmp_path: Path) -> None:
    assert skeleton_from_dict(json.loads(json.dumps(COCO17.as_dict()))) == COCO17
    file = tmp_path / "hand.json"
    file.write_text(json.dumps(HAND))
    hand = load_skeleton(file)
    assert hand.num_keypoints == 3
    assert hash(hand) == hash(skeleton_from_dict(HAND))
    np.testing.assert_array_equal(hand.flip_order, [0, 2, 1])
    assert hand.palette[1:] == (LEFT, RIGHT)
    assert load_skeleton("coco17") is COCO17


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"keypoints": []}, ["keypoints", "at least one"]),
        ({"keypoints": ["a", "b", "a"]}, ["unique"]),
        ({"oks_sigmas": [0.1]}, ["oks_sigmas", "3"]),
        ({"oks_sigmas": [0.1, 0, 0.1]}, ["oks_sigmas", "positive"]),
        ({"flip_pairs": [[1, 3]]}, ["flip_pairs", "0 to 2"]),
        ({"flip_pairs": [[1, 2], [2, 0]]}, ["flip_pairs", "at most once"]),
        ({"limbs": [[-1, 0]]}, ["limbs", "0 to 2"]),
        ({"joint_weights": [1]}, ["joint_weights", "3"]),
        ({"sigmas": [1, 1, 1]}, ["unknown fields ['sigmas']", "docs/skeletons.md"]),
        ({"flip_pairs": None}, ["missing fields ['flip_pairs']"]),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, change: dict[str, Any], names: list[str]) -> None:
    fields = {key: value for key, value in (HAND | change).items() if value is not None}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(fields))
    with pytest.raises(DataError) as caught:
        load_skeleton(file)
    for name in names:
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "{", "[1, 2]"])
def test_a_file_that_is_no_skeleton_is_named(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=r"mine\.json"):
        load_skeleton(file)
