"""Views on the device against the numpy side: OpenCV's warp and the codec's heatmaps."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import torch

from hrnet_core.geometry import crop_people
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.views import invert_views, multiply_factors, pack_reaches, view_reaches, warp_pictures

SIZE = (48, 64)


def pictures_and_views(count: int) -> tuple[list[Any], Any]:
    """Noise pictures of different sizes, smooth over some pixels as photos are, and random views that reach
    over their edges."""
    rng = np.random.default_rng(1)
    pictures, matrices = [], []
    codec = HeatmapCodec("official", SIZE)
    for _ in range(count):
        width, height = (int(side) for side in rng.integers(20, 200, 2))
        noise = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
        pictures.append(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC))
        center = rng.uniform(0, 1, 2) * [width, height]
        scale = np.array([0.75, 1]) * rng.uniform(30, 200)
        matrix = codec.image_to_crop_matrix(center, scale, rng.uniform(-90, 90))
        mirror = np.array([[-1, 0, width - 1], [0, 1, 0], [0, 0, 1]]) if rng.random() < 0.5 else np.eye(3)
        matrices.append(matrix @ mirror)
    return pictures, np.stack(matrices)


def warped(pictures: list[Any], matrices: Any, reaches: Any = None) -> Any:
    """reaches: what is taken of the pictures; all by default."""
    if reaches is None:
        reaches = np.array([(0, 0, *p.shape[1::-1]) for p in pictures])
    room = np.empty(((reaches[:, 2:] - reaches[:, :2]).prod(axis=1).sum(), 3), np.uint8)
    arrays = *pack_reaches(pictures, reaches, room), invert_views(matrices)
    return warp_pictures(*map(torch.from_numpy, arrays), SIZE).numpy()


def test_the_warp_is_opencvs() -> None:
    """OpenCV computes places in float32 and rounds to whole levels, as we do: one level apart at most, and
    hardly anywhere."""
    pictures, matrices = pictures_and_views(40)
    ours = warped(pictures, matrices)
    theirs = np.stack([crop_people(p, m[None], SIZE)[0] for p, m in zip(pictures, matrices, strict=True)])
    assert (theirs == 0).all(axis=-1).mean() > 0.1  # views over the edge are among them
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.002


def test_each_picture_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time and together give the same bytes: packed pictures do not bleed into each other."""
    pictures, matrices = pictures_and_views(7)
    together = warped(pictures, matrices)
    for i, picture in enumerate(pictures):
        np.testing.assert_array_equal(warped([picture], matrices[i : i + 1])[0], together[i])


def test_a_view_needs_no_more_of_a_picture_than_its_reach() -> None:
    """The same bits as of whole pictures, for views over the edge and wholly beside it; and little more than
    needed is taken: without two pixels of its border a reach that lies inside gives another crop."""
    pictures, matrices = pictures_and_views(600)
    matrices[::10, :, 2] += 300  # up to far outside
    reaches = view_reaches(invert_views(matrices), SIZE)
    whole = warped(pictures, matrices)
    np.testing.assert_array_equal(warped(pictures, matrices, reaches), whole)
    assert (~whole.any(axis=(1, 2, 3))).sum() > 20
    room = np.empty(((reaches[:, 2:] - reaches[:, :2]).prod(axis=1).sum(), 3), np.uint8)
    pixels, sizes, taken = pack_reaches(pictures, reaches, room)
    areas = (taken[:, 2:] - taken[:, :2]).prod(axis=1)
    assert areas.min() >= 1
    assert areas.sum() == len(pixels) < 0.9 * sizes.prod(axis=1).sum()
    inside = (taken == reaches).all(axis=1) & (areas > 400)
    assert inside.sum() > 10
    smaller = taken[inside] + np.array([2, 2, -2, -2])
    cropped = warped([pictures[i] for i in np.flatnonzero(inside)], matrices[inside], smaller)
    assert (cropped != whole[inside]).any(axis=(1, 2, 3)).mean() > 0.9


@pytest.mark.parametrize("name", ["official", "dark", "udp"])
def test_targets_are_the_codecs_bits(name: Any) -> None:
    codec = HeatmapCodec(name, SIZE)
    rng = np.random.default_rng(2)
    keypoints = rng.uniform(-20, 80, (30, 17, 2)).astype(np.float32)
    visible = rng.integers(0, 3, (30, 17))
    heatmaps, weights = codec.encode(keypoints, visible)
    rows, columns, same = codec.factors(keypoints, visible)
    np.testing.assert_array_equal(weights, same)
    ours = multiply_factors(torch.from_numpy(rows), torch.from_numpy(columns))
    np.testing.assert_array_equal(ours.numpy(), heatmaps)
