"""OKS and its suppression against the published code's numbers and pycocotools."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hrnet_core.oks import oks, oks_nms, rescore, soft_oks_nms
from hrnet_core.skeleton import COCO17

SIGMAS = COCO17.oks_sigmas
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def poses(reference: dict[str, Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The five poses (5, 17, 2) and areas (5,) that reference_vectors.json describes."""
    case = reference["official_oks_iou"]
    k = np.arange(17)
    first = np.stack([100 + 3 * k, 200 + 5 * k], axis=-1)
    return np.array([first + offset for offset in case["offsets"]], np.float32), np.array(case["a_d"])


def test_values_of_the_published_code(
    reference: dict[str, Any], poses: tuple[NDArray[Any], NDArray[Any]]
) -> None:
    keypoints, areas = poses
    values = oks(keypoints[0], keypoints, (10_000 + areas) / 2, SIGMAS)
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, reference["official_oks_iou"]["oks"], atol=1e-7)
    to_the_second = oks(keypoints[1], keypoints, (areas[1] + areas) / 2, SIGMAS)
    np.testing.assert_allclose(to_the_second, reference["official_oks_nms"]["pairwise_to_idx1"], atol=1e-7)


def test_values_of_pycocotools() -> None:
    """Truth against results, with hidden and unlabelled keypoints: COCOeval.computeOks, 4 x 5 pairs."""
    truth = RNG.uniform(50, 400, (4, 17, 2))
    visible = RNG.integers(0, 3, (4, 17))
    found = truth[[0, 1, 2, 3, 0]] + RNG.normal(0, 12, (5, 17, 2))
    areas = RNG.uniform(900, 40_000, 4)

    def flat(points: NDArray[Any], third: NDArray[Any]) -> list[float]:
        return np.concatenate([points, third[:, None]], axis=1).ravel().tolist()

    coco = COCO()
    box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 400, 400], "iscrowd": 0}
    annotations = [
        {**box, "id": i + 1, "area": areas[i], "num_keypoints": 1, "keypoints": flat(truth[i], visible[i])}
        for i in range(4)
    ]
    coco.dataset = {"info": {}, "images": [{"id": 1}], "categories": [{"id": 1}], "annotations": annotations}
    coco.createIndex()
    results = [
        {"image_id": 1, "category_id": 1, "score": 1 - i / 10, "keypoints": flat(found[i], np.ones(17))}
        for i in range(5)
    ]
    evaluation = COCOeval(coco, coco.loadRes(results), "keypoints")
    evaluation._prepare()
    expected = evaluation.computeOks(1, 1)  # (results by score, truths)

    ours = oks(truth, found[:, None], areas, SIGMAS, visible)
    assert ours.shape == (5, 4)
    np.testing.assert_allclose(ours, expected, rtol=1e-9)


def test_oks_of_nothing_is_zero_and_visible_one_counts_as_two() -> None:
    a, b = RNG.uniform(0, 100, (2, 3, 17, 2))
    areas = np.array([100.0, 200.0, 300.0])
    np.testing.assert_array_equal(oks(a, b, areas, SIGMAS, np.zeros((3, 17))), 0)
    visible = RNG.integers(0, 2, (3, 17))
    np.testing.assert_array_equal(oks(a, b, areas, SIGMAS, visible), oks(a, b, areas, SIGMAS, 2 * visible))
    np.testing.assert_array_equal(oks(a, a, areas, SIGMAS), 1)
    np.testing.assert_array_equal(oks(a, a, 0.0, SIGMAS), 1)


def test_suppression_is_the_published_one(
    reference: dict[str, Any], poses: tuple[NDArray[Any], NDArray[Any]]
) -> None:
    keypoints, areas = poses
    published = reference["official_oks_nms"]
    scores = np.array(published["scores"])
    before = keypoints.copy(), scores.copy(), areas.copy()
    for threshold in (0.9, 0.5):
        kept = oks_nms(keypoints, scores, areas, SIGMAS, threshold)
        assert kept.dtype == np.int64
        np.testing.assert_array_equal(kept, published[f"keep_thr{threshold}"])
    soft = soft_oks_nms(keypoints, scores, areas, SIGMAS, 0.9)
    assert soft.dtype == np.int64
    np.testing.assert_array_equal(soft, published["soft_keep_thr0.9"])
    for after, original in zip((keypoints, scores, areas), before, strict=True):
        np.testing.assert_array_equal(after, original)


def test_soft_suppression_keeps_twenty_and_reorders() -> None:
    keypoints = np.tile(RNG.uniform(0, 200, (1, 17, 2)), (30, 1, 1))
    keypoints[-1] += 1000  # the one person elsewhere is not held back by the others
    areas = np.full(30, 5000.0)
    scores = np.linspace(0.9, 0.5, 30)
    kept = soft_oks_nms(keypoints, scores, areas, SIGMAS)
    assert len(kept) == 20
    # After the best one all its doubles have exp(-1 / 0.9) = 0.33 of their score; the other has its 0.5.
    np.testing.assert_array_equal(kept[:3], [0, 29, 1])
    assert len(soft_oks_nms(keypoints, scores, areas, SIGMAS, max_keep=5)) == 5


def test_half_similar_poses_by_hand() -> None:
    """Sigmas of 0.1 and areas of 800 and 1200: OKS = exp(-d² / 80), one half at d² = 80 ln 2."""
    sigmas = np.full(17, 0.1)
    keypoints = np.zeros((3, 17, 2))
    keypoints[1, :, 0] = np.sqrt(80 * np.log(2))
    keypoints[2] = 5000
    scores, areas = np.array([0.9, 0.8, 0.5]), np.array([800.0, 1200.0, 1000.0])
    np.testing.assert_array_equal(oks_nms(keypoints, scores, areas, sigmas, threshold=0.51), [0, 1, 2])
    np.testing.assert_array_equal(oks_nms(keypoints, scores, areas, sigmas, threshold=0.49), [0, 2])
    # Softly the second keeps exp(-0.25 / 0.9) of its 0.8: 0.606, still before the third's 0.5 ...
    np.testing.assert_array_equal(soft_oks_nms(keypoints, scores, areas, sigmas), [0, 1, 2])
    # ... and of 0.65: 0.492, after it.
    scores[1] = 0.65
    np.testing.assert_array_equal(soft_oks_nms(keypoints, scores, areas, sigmas), [0, 2, 1])


def test_equal_scores_keep_their_order_and_the_threshold_itself_stays() -> None:
    keypoints = np.arange(40)[:, None, None] * 500 + RNG.uniform(0, 100, (1, 17, 2))
    scores = np.where(np.arange(40) % 2, 0.5, 0.7)
    areas = np.full(40, 1000.0)
    order = [*range(0, 40, 2), *range(1, 40, 2)]
    np.testing.assert_array_equal(oks_nms(keypoints, scores, areas, SIGMAS), order)
    np.testing.assert_array_equal(soft_oks_nms(keypoints, scores, areas, SIGMAS, max_keep=40), order)
    doubles = np.repeat(keypoints[:1], 40, axis=0)
    np.testing.assert_array_equal(oks_nms(doubles, scores, areas, SIGMAS), [0])
    np.testing.assert_array_equal(oks_nms(doubles, scores, areas, SIGMAS, threshold=1), order)


def test_nobody() -> None:
    nobody = np.empty((0, 17, 2)), np.empty(0), np.empty(0)
    assert oks_nms(*nobody, SIGMAS).shape == (0,)
    assert soft_oks_nms(*nobody, SIGMAS).shape == (0,)
    assert rescore(np.empty((0, 17)), np.empty(0)).shape == (0,)


def test_rescoring_by_hand() -> None:
    scores = [[0.1, 0.3, 0.5], [0.2, 0.1, 0.0], [0.9, 0.9, 0.9]]
    values = rescore(scores, [0.5, 0.9, 1.0])
    np.testing.assert_allclose(values, [0.4 * 0.5, 0.0, 0.9], rtol=1e-15)  # 0.2 itself does not count
    np.testing.assert_allclose(rescore(scores, [1, 1, 1], threshold=0.0), [0.3, 0.15, 0.9], rtol=1e-15)


def test_rescoring_sums_in_float64() -> None:
    """float32 scores of a network: the mean is that of the exact numbers, not float32's."""
    scores = RNG.random((500, 17)).astype(np.float32)
    exact = [sum(map(float, row)) / 17 for row in scores]
    np.testing.assert_allclose(rescore(scores, np.ones(500), threshold=0), exact, rtol=1e-14)
    assert np.abs(scores.mean(axis=1) / exact - 1).max() > 1e-8, "float32 would differ"
