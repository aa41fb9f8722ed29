"""PCK by hand."""

from __future__ import annotations

import numpy as np
import pytest
from mlflow.utils.validation import _validate_metric
from test_feed import dotted_shards
from test_train import perfect

from hrnet_core.pck import pck
from pipelines.shards.manifest import Manifest
from pipelines.training.epoch_ap import ValSplit, metric_names


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return dotted_shards(tmp_path_factory.mktemp("shards"), {"train2017": 37, "val2017": 12})


def test_the_share_of_people_whose_keypoint_is_near_enough() -> None:
    """Boxes of 100 x 40 and 20 x 200: 5 and 10 px are near; on the line is near."""
    truth = np.zeros((2, 4, 2))
    predicted = np.array(
        [
            [[5, 0], [5.01, 0], [0, 99], [99, 0]],
            [[6, 8], [0, 10], [3, 4], [0, 99]],
        ],
        np.float32,
    )
    visible = [[2, 1, 0, 0], [2, 2, 1, 0]]
    shares = pck(truth, predicted, visible, [[0, 0, 100, 40], [7, 7, 20, 200]])
    np.testing.assert_array_equal(shares, [1.0, 0.5, 1.0, np.nan])
    np.testing.assert_array_equal(pck(truth, predicted, visible, [[0, 0, 100, 40]] * 2), [0.5, 0, 1, np.nan])
    assert pck(truth, predicted, visible, [[0, 0, 100, 40]] * 2, threshold=1)[1] == 1


def test_names_of_metrics_are_as_mlflow_takes_them() -> None:
    """By its own rule, and none lost: names that differ in what it does not take are told apart."""
    names = [
        "nose",
        "toe/1",
        "toe:1",
        "..",
        "鼻",
        "left big toe",
        "a" * 300,
        "a" * 301,
        "nez.gauche",
        "x/../y",
    ]
    metrics = metric_names(names)
    assert len(set(metrics)) == len(names)
    for name in metrics:
        _validate_metric(f"val_pck/{name}", 0.5, 0, 0)
    assert metrics[:6] == ["nose", "toe_1 1", "toe_1 2", "_", "鼻", "left big toe"]


def test_an_epoch_has_a_figure_for_each_joint(manifest: Manifest) -> None:
    val = ValSplit(manifest, "val2017")
    names = manifest.recipe.skeleton.keypoints
    assert val.pck(perfect(val)) == dict.fromkeys(names, 1.0)
    found = perfect(val)
    side = val.truth.people.bbox_xywh[0, 2:].max()
    found.keypoints[:6, 7, 0] += 0.06 * side  # of 12 people
    expected = dict.fromkeys(names, 1.0) | {"left_elbow": 0.5}
    assert val.pck(found) == pytest.approx(expected)
