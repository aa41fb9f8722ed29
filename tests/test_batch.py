"""Batches on the device: sent ahead as sent at once. On a machine with CUDA this file checks the copies
beside the network; without one those tests are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hrnet_core.augment import draw_fresh, place_views, view_targets
from hrnet_core.choices import Noise
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.noise import add_noise, draw_noise, place_noise
from hrnet_core.skeleton import COCO17
from hrnet_core.views import invert_views, pack_reaches, view_reaches
from pipelines.training.batch import Batch, FreshBatch, StoredBatch, on_device_ahead

SIZE = (48, 64)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")),
]


def stored(number: int) -> StoredBatch:
    rng = np.random.default_rng(number)
    n = 32 - number % 3  # memory of one is not always right for the next
    return StoredBatch(
        weights=rng.integers(0, 2, (n, 17)).astype(np.float32),
        ann_ids=np.arange(n) + 100 * number,
        rows=n,
        total=n,
        images=rng.integers(0, 256, (n, SIZE[1], SIZE[0], 3), np.uint8),
        heatmaps=rng.random((n, 17, 16, 12)).astype(np.float16),
    )


def noisy(number: int) -> StoredBatch:
    """With holes in the crops and no colours: what is not there is not sent."""
    batch = stored(number)
    draws, people = draw_noise(number, 0, range(batch.rows)), np.full((batch.rows, 17, 3), 2)
    boxes, matrices = np.full((batch.rows, 4), 9), np.broadcast_to(np.eye(3)[:2], (batch.rows, 2, 3))
    holes = place_noise(draws, Noise(0.0, 0.5, 0.5), matrices, people, boxes, SIZE)
    return replace(batch, noise=holes)


def fresh(number: int) -> FreshBatch:
    rng, codec = np.random.default_rng(number), HeatmapCodec("official", SIZE)
    n = 8
    pictures = [rng.integers(0, 256, (*rng.integers(90, 130, 2), 3), np.uint8) for _ in range(n)]
    keypoints = np.concatenate([rng.uniform(20, 100, (n, 17, 2)), np.full((n, 17, 1), 2)], axis=-1)
    center, scale = np.full((n, 2), 60, np.float32), np.tile(np.float32([45, 60]), (n, 1))
    draws = draw_fresh(number, 0, range(n))
    view, matrices = place_views(draws, center, scale, keypoints, np.full(n, 120), codec, COCO17)
    rows, columns, weights = view_targets(matrices, view.flipped, keypoints, codec, COCO17)
    inverse = invert_views(matrices)
    reaches = view_reaches(inverse, SIZE)
    room = np.empty(((reaches[:, 2:] - reaches[:, :2]).prod(axis=1).sum(), 3), np.uint8)
    pixels, sizes, reaches = pack_reaches(pictures, reaches, room)
    return FreshBatch(
        weights=weights,
        ann_ids=np.arange(n),
        rows=n,
        total=n,
        pixels=pixels,
        sizes=sizes,
        reaches=reaches,
        picture_to_crop=matrices,
        crop_to_picture=inverse,
        heatmap_rows=rows,
        heatmap_columns=columns,
        input_size=SIZE,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [stored, noisy, fresh])
def test_batches_sent_ahead_are_those_sent_at_once(make: Any, device: str) -> None:
    """On CUDA from page-locked memory that goes back as soon as it may, to a device that is kept busy; only
    at the end is looked at what was there."""
    count, where = 40, torch.device(device)
    weight = torch.rand(2048, 2048, device=where)

    def batches() -> Iterator[Batch]:
        for number in range(count):
            yield make(number).pinned() if device == "cuda" else make(number)

    found = []
    for number, (batch, sent) in enumerate(on_device_ahead(batches(), where)):
        assert batch.ann_ids.tolist() == make(number).ann_ids.tolist()
        if device == "cuda":
            for _ in range(20):
                weight = (weight @ weight).softmax(dim=1)
        found.append([tensor.double().sum(dim=tuple(range(1, tensor.ndim))) for tensor in sent])
        assert all(tensor.device.type == device for tensor in sent)
    assert len(found) == count
    for number, sums in enumerate(found):
        crops, heatmaps, weights = make(number).on_device(where)
        assert (crops.dtype, heatmaps.dtype, weights.dtype) == (torch.uint8, torch.float32, torch.float32)
        for tensor, total in zip((crops, heatmaps, weights), sums, strict=True):
            assert torch.equal(tensor.double().sum(dim=tuple(range(1, tensor.ndim))), total)


def test_a_stored_batch_on_the_device_is_its_arrays() -> None:
    batch = stored(1)
    crops, heatmaps, weights = batch.on_device("cpu")
    np.testing.assert_array_equal(crops.numpy(), batch.images)
    np.testing.assert_array_equal(heatmaps.numpy(), batch.heatmaps.astype(np.float32))
    np.testing.assert_array_equal(weights.numpy(), batch.weights)


def test_a_batch_with_noise_is_its_arrays_and_what_is_done_to_them() -> None:
    batch = noisy(1)
    before = batch.images.copy()
    crops, heatmaps, _ = batch.on_device("cpu")
    assert len(batch.arrays()) == 3 + 2
    _, rectangles, ellipses = batch.noise
    holes = torch.from_numpy(rectangles), torch.from_numpy(ellipses)
    assert torch.equal(crops, add_noise(torch.from_numpy(before), None, *holes))
    np.testing.assert_array_equal(batch.images, before)
    np.testing.assert_array_equal(heatmaps.numpy(), batch.heatmaps.astype(np.float32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("make", [stored, noisy, fresh])
def test_pinned_arrays_are_the_same_in_locked_memory(make: Any) -> None:
    batch = make(3)
    locked = batch.pinned()
    for before, after in zip(batch.arrays(), locked.arrays(), strict=True):
        np.testing.assert_array_equal(before, after)
        assert torch.from_numpy(after).is_pinned()
    again = locked.pinned()  # what is locked is not copied
    assert [a.ctypes.data for a in again.arrays()] == [a.ctypes.data for a in locked.arrays()]
