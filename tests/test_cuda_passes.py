"""Recorded passes on a GPU against the CPU; skipped where there is none."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from test_predictor import hrnet_predictor, noise

from hrnet_core import cuda_passes
from hrnet_core.cuda_passes import CudaPasses
from hrnet_core.predictor import PosePredictor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
# Heatmaps of a GPU's float32 kernels against a CPU's, of their range; 16 bits through some ten layers.
TOLERANCES = {"float32": 1e-5, "channels_last": 1e-5, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}


def on_gpu(mode: str = "float32", codec: str = "official") -> tuple[PosePredictor, PosePredictor]:
    """The same weights on the CPU in float32, and on the GPU."""
    model, exact = hrnet_predictor(codec=codec)
    return exact, PosePredictor(model, exact.spec, "cuda", mode)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("mode", TOLERANCES)
def test_heatmaps_are_the_cpus(mode: str, flip: bool) -> None:
    exact, there = on_gpu(mode)
    crops = noise(11)
    expected = exact.heatmaps(crops, flip)
    difference = np.abs(there.heatmaps(crops, flip) - expected).max() / np.ptp(expected)
    assert difference < TOLERANCES[mode]


@pytest.mark.parametrize("codec", ["official", "dark", "udp"])
def test_keypoints_are_those_of_its_own_heatmaps(codec: Any) -> None:
    _, there = on_gpu(codec=codec)
    crops = noise(70)
    keypoints, scores = there.predict_crops(crops, True, batch_size=64)
    expected, expected_scores = there.spec.codec.decode(there.heatmaps(crops, True, batch_size=64))
    np.testing.assert_allclose(keypoints, expected, atol=1e-3)
    np.testing.assert_array_equal(scores, expected_scores)


def test_filling_up_changes_nothing_of_a_person() -> None:
    _, there = on_gpu()
    crops = noise(8)
    whole = there.heatmaps(crops, False, batch_size=8)
    np.testing.assert_array_equal(there.heatmaps(crops[:5], False, batch_size=8), whole[:5])
    assert len(there.predict_crops(noise(300), False, batch_size=300)[0]) == 300


def test_threads_do_not_disturb_each_other() -> None:
    _, there = on_gpu()
    several = [noise(n, seed=n) for n in (1, 3, 9, 17, 33, 2)] * 4
    alone = [there.predict_crops(crops, True, 16) for crops in several]
    with ThreadPoolExecutor(6) as pool:
        beside = list(pool.map(lambda crops: there.predict_crops(crops, True, 16), several))
    for one, other in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_what_cannot_be_recorded_is_launched_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, recorded = on_gpu()
    expected = recorded.heatmaps(noise(3), False)

    def fails(*_: Any) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(CudaPasses, "_capture", fails)
    _, launched = on_gpu()
    with caplog.at_level(logging.WARNING, cuda_passes.__name__):
        found = launched.heatmaps(noise(3), False)
    np.testing.assert_array_equal(found, expected)
    assert "batches of 4 are launched kernel by kernel, more slowly" in caplog.text
    assert "not permitted when stream is capturing" in caplog.text


def test_a_recording_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    capture = CudaPasses._capture

    def spoiled(self: CudaPasses, launch: Any, crops: torch.Tensor) -> Any:
        def other(given: torch.Tensor) -> Any:
            keypoints, heatmaps = launch(given)
            return keypoints, heatmaps + 0.1 * heatmaps.amax()

        return capture(self, other, crops)

    expected = on_gpu()[1].heatmaps(noise(2), False)
    monkeypatch.setattr(CudaPasses, "_capture", spoiled)
    with caplog.at_level(logging.WARNING, cuda_passes.__name__):
        found = on_gpu()[1].heatmaps(noise(2), False)
    np.testing.assert_array_equal(found, expected)
    assert "the recording differs by" in caplog.text


@pytest.mark.parametrize("mode", ["float32", "channels_last"])
def test_other_weights_reach_what_is_recorded(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, exact = hrnet_predictor()
    there = PosePredictor(model, exact.spec, "cuda", mode)
    before = there.heatmaps(noise(5), True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    expected = PosePredictor(model, exact.spec, "cpu").heatmaps(noise(5), True)
    monkeypatch.setattr(CudaPasses, "_record", lambda *_: pytest.fail("recorded again"))
    there.take_weights(model)
    found = there.heatmaps(noise(5), True)
    assert np.abs(found - expected).max() < TOLERANCES[mode] * np.ptp(expected)
    assert np.abs(found - before).max() > 0.1 * np.ptp(expected)


def test_warm_up_records_every_size_that_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    _, there = on_gpu()
    there.warm_up(people=20, flip_test=True)
    recorded = there._passes._work  # type: ignore[union-attr]
    assert [size for size, *_ in recorded] == [1, 2, 4, 8, 16, 32]
    monkeypatch.setattr(CudaPasses, "_record", lambda *_: pytest.fail("recorded during a request"))
    there.predict_crops(noise(20), True)
