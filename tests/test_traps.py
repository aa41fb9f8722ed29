"""Ten places where a plausible re-implementation of HRNet silently differs from the published one
(leoxiaobin/deep-high-resolution-net.pytorch at 6f69e46), and the test that stands at each.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrnet_core.geometry import box_to_center_scale, sanitize_boxes
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.oks import oks_nms, rescore
from hrnet_core.skeleton import COCO17

TESTS = Path(__file__).parent
TRAPS = {
    "1 weight decay is in the yaml and never reaches Adam": (
        "test_train.py::test_adam_gets_no_weight_decay_and_the_published_rate",
    ),
    "2 the rate falls with the first batch of epoch 170 and 200": (
        "test_train.py::test_the_rate_falls_with_the_first_batch_of_epoch_170_and_200",
    ),
    "3 the loss squares the joint weight and has a factor 0.5": (
        "test_loss.py::test_trap_3_official_squares_the_weight_and_halves",
        "test_loss.py::test_values_of_the_published_losses",
    ),
    "4 the joint weights are off in every published configuration": (
        "test_loss.py::test_trap_4_joint_weights_are_off_in_the_published_recipe",
        "test_config.py::test_published_recipes_are_the_published_numbers",
    ),
    "5 sigma is 2 at 256x192 and 3 at 384x288, not 1": (
        "test_traps.py::test_sigma_is_two_and_three",
        "test_config.py::test_published_recipes_are_the_published_numbers",
    ),
    "6 a ground-truth box loses one pixel, a detector's does not": (
        "test_traps.py::test_only_ground_truth_boxes_shrink",
        "test_geometry.py::test_ground_truth_boxes_are_the_published_ones",
        "test_coco.py::test_detections_of_the_published_fixture",
    ),
    "7 half body takes the upper half in 69 of 100": (
        "test_augment.py::test_half_body_is_taken_in_three_of_ten_and_the_upper_half_in_69_of_100",
    ),
    "8 AP during training uses ground-truth boxes, the published tables a detector's": (
        "test_tracking.py::test_only_equal_protocols_are_comparable",
        "test_tracking.py::test_an_evaluation_stands_at_version_and_run",
    ),
    "9 a mirrored keypoint that is not visible becomes (0, 0); ours is mirrored, and never read": (
        "test_traps.py::test_where_nothing_is_labelled_nothing_is_read",
        "test_augment.py::test_mirrored_keypoints_are_the_references",
        "test_skeleton.py::test_flip_order_is_the_published_reordering",
    ),
    "10 AP depends on the order of equal scores and on float32": (
        "test_traps.py::test_equal_scores_stay_equal_and_in_order",
        "test_oks_ap.py::test_mmpose_align1_ties_and_float64",
        "test_coco.py::test_results_are_sorted_float64_and_what_pycocotools_reads",
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_has_its_test(trap: str) -> None:
    for name in TRAPS[trap]:
        file, test = name.split("::")
        tree = ast.parse((TESTS / file).read_text())
        assert test in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, name


def test_sigma_is_two_and_three(reference: dict[str, Any]) -> None:
    """Without a sigma given, the targets have the published energy: 25.08 at sigma 2, 56.38 at sigma 3;
    sigma 1, the paper's "1 pixel", would give 6.28."""
    for size in ((192, 256), (288, 384)):
        energy = {
            row["sum"]
            for case in reference["official_generate_target"]["cases"]
            for row in case["rows"]
            if tuple(case["input_wh"]) == size and row["pt_input"] == [96, 128]
        }
        heatmaps, _ = HeatmapCodec("official", size).encode([[96, 128]], [2])
        assert [pytest.approx(heatmaps.sum(), abs=1e-3)] == list(energy)
    assert HeatmapCodec("dark", (96, 128)).sigma == 1, "DarkPose's 128x96"


def test_only_ground_truth_boxes_shrink(reference: dict[str, Any], mmpose_cases: dict[str, Any]) -> None:
    person = mmpose_cases["coco_fixture"]["annotations"][0]
    published = reference["official_gt_boxes_test_coco"]["records"][0]
    cleaned, _ = sanitize_boxes(person["bbox"], 640, 425)
    np.testing.assert_allclose(cleaned[2:], np.array(person["bbox"][2:]) - 1, atol=1e-4)
    center, scale = box_to_center_scale(cleaned, (192, 256))
    np.testing.assert_allclose(center, published["center"], atol=1e-3)
    np.testing.assert_allclose(scale / 200, published["scale"], atol=1e-5)
    # The same numbers as a detector's box: half a pixel and 1.25 px further.
    raw_center, raw_scale = box_to_center_scale(person["bbox"], (192, 256))
    np.testing.assert_allclose(raw_center - center, 0.5, atol=1e-3)
    assert raw_scale[1] - scale[1] == pytest.approx(1.25, abs=1e-3)


@pytest.mark.parametrize("name", ["official", "dark", "udp"])
def test_where_nothing_is_labelled_nothing_is_read(name: Any) -> None:
    """The published flip leaves (0, 0) there, ours the mirrored place: both give the same target."""
    codec = HeatmapCodec(name)
    keypoints = np.random.default_rng(0).uniform(0, 190, (17, 2)).astype(np.float32)
    visible = np.arange(17) % 3
    mirrored = keypoints[COCO17.flip_order] * [-1, 1] + [191, 0]
    seen = visible[COCO17.flip_order]
    for ours, theirs in zip(
        codec.encode(mirrored, seen), codec.encode(mirrored * (seen > 0)[:, None], seen), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_equal_scores_stay_equal_and_in_order() -> None:
    """17 equal keypoint scores of 0.8 and 17 that have the same sum in another order: float32 tells them
    apart, so that the rounding would decide who counts first."""
    scores = np.full((3, 17), 0.8, np.float32)
    scores[1, ::2] += np.float32(0.1)
    scores[2] = scores[1, ::-1]
    totals = rescore(scores, [1, 1, 1])
    assert totals.dtype == np.float64
    assert totals[1] == totals[2]
    assert totals[0] == np.float64(np.float32(0.8))
    far_apart = np.arange(3)[:, None, None] * 1e4 + np.zeros((1, 17, 2))
    kept = oks_nms(far_apart, totals, np.full(3, 1000.0), COCO17.oks_sigmas)
    np.testing.assert_array_equal(kept, [1, 2, 0])
