"""What is done to the pixels of a crop: its odds, its places, its arithmetic against OpenCV and by hand.

With 20,000 draws a share's standard error is at most 0.0036; bounds are 4 of them.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hrnet_core.augment import draw_fresh
from hrnet_core.choices import Noise
from hrnet_core.geometry import apply_affine
from hrnet_core.noise import (
    HOLES,
    MEAN_COLOR,
    NUMBERS,
    PLAIN,
    PlacedNoise,
    add_noise,
    change_colors,
    draw_noise,
    place_noise,
)

SIZE = (192, 256)
MANY = 20_000
ALWAYS = Noise(photometric=1.0, coarse_dropout=1.0, information_dropping=1.0)
ELLIPSE = 11 + 2 + 4 * HOLES
"""The first number of the ellipse's: its gate, whether it is on a keypoint, and on which."""
TURNED = np.array([[0.6, -0.8, 90.0], [0.8, 0.6, -60.0]]) * 0.7
"""image_to_crop of a view that is turned by 53 degrees."""


@pytest.fixture(scope="module")
def numbers() -> NDArray[np.float64]:
    """As the feed draws them: whether neighbouring ids give independent numbers is part of the question."""
    return draw_noise(5, 2, range(MANY))


def people(count: int) -> dict[str, Any]:
    """Everyone with the same box, keypoints 0 to 9 labelled, of which 8 and 9 lie outside the crop."""
    xs = np.where(np.arange(17) < 8, np.arange(17) * 10 + 100, 10_000)
    keypoints = np.stack([xs, np.full(17, 150), np.where(np.arange(17) < 10, 2, 0)], axis=-1)
    return {
        "image_to_crop": np.broadcast_to(TURNED, (count, 2, 3)),
        "keypoints": np.broadcast_to(keypoints.astype(np.float32), (count, 17, 3)),
        "bbox_xywh": np.broadcast_to(np.float32([90, 100, 100, 120]), (count, 4)),
        "input_size": SIZE,
    }


def placed(numbers: NDArray[np.float64], noise: Noise) -> PlacedNoise:
    return place_noise(numbers, noise, **people(len(numbers)))


def near(share: Any, expected: float) -> bool:
    share = np.asarray(share)
    return abs(float(share.mean()) - expected) < 4 * np.sqrt(expected * (1 - expected) / len(share))


def crops(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 64, 48, 3), np.uint8))


# ---------------------------------------------------------------------------------- draws


def test_numbers_follow_from_seed_epoch_and_id_alone(numbers: NDArray[np.float64]) -> None:
    assert numbers.shape == (MANY, NUMBERS)
    np.testing.assert_array_equal(draw_noise(5, 2, [7, 3]), numbers[[7, 3]])
    for other in (draw_noise(6, 2, [7]), draw_noise(5, 3, [7]), draw_noise(5, 2, [-7])):
        assert (other[0] != numbers[7]).all()
    assert draw_noise(5, 2, []).shape == (0, NUMBERS)
    # Other numbers than those of the view of the same person and epoch.
    assert not np.isin(draw_fresh(5, 2, range(100)), numbers[:100]).any()
    correlation = np.corrcoef(numbers.T)
    assert np.abs(correlation - np.eye(NUMBERS)).max() < 5 / np.sqrt(MANY)


def test_nothing_is_drawn_where_nothing_is_wanted(numbers: NDArray[np.float64]) -> None:
    assert placed(numbers[:3], Noise()) == PlacedNoise(None, None, None)
    images = crops(3)
    assert add_noise(images, None, None, None) is images


@pytest.mark.parametrize("kind", range(3))
def test_switching_one_kind_on_changes_no_other(numbers: NDArray[np.float64], kind: int) -> None:
    alone = Noise(**{name: 0.5 for i, name in enumerate(Noise.__dataclass_fields__) if i == kind})
    together = placed(numbers[:500], Noise(0.5, 0.5, 0.5))
    found = placed(numbers[:500], alone)
    np.testing.assert_array_equal(found[kind], together[kind])
    assert [i for i in range(3) if found[i] is not None] == [kind]


# ---------------------------------------------------------------------------------- colours


def test_each_colour_changes_by_its_own_chance_and_range(numbers: NDArray[np.float64]) -> None:
    colors = placed(numbers, Noise(photometric=0.3)).colors
    assert colors is not None
    changed = colors != np.float32(PLAIN)
    brightness, before, saturation, hue, after = changed[:, :5].T
    contrast, order = before | after, changed[:, 5:].any(axis=1)
    for gate in (brightness, contrast, saturation, hue):
        assert near(gate, 0.3)
    assert near(order, 0.3 * 5 / 6)  # one of six orders is the plain one
    assert not (before & after).any()
    assert near(before[contrast], 0.5)
    gates = np.stack([brightness, contrast, saturation, hue, order])
    assert np.abs(np.corrcoef(gates) - np.eye(5)).max() < 0.03
    for column, gate, (low, high) in (
        (0, brightness, (-32, 32)),
        (1, before, (0.5, 1.5)),
        (2, saturation, (0.5, 1.5)),
        (3, hue, (-36, 36)),
        (4, after, (0.5, 1.5)),
    ):
        values = (colors[gate, column] - low) / (high - low)
        assert 0 <= values.min() < 0.01
        assert 0.99 < values.max() <= 1
        assert near(values < 0.25, 0.25)
    orders, counts = np.unique(colors[:, 5:], axis=0, return_counts=True)
    assert orders.tolist() == [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    assert abs(counts[1:] / MANY - 0.05).max() < 4 * np.sqrt(0.05 * 0.95 / MANY)


def test_plain_colours_change_no_byte() -> None:
    images = crops(8)
    images[0] = 128  # grey has no hue
    images[1, :, :, 1:] = 0
    assert torch.equal(change_colors(images, torch.tensor(PLAIN).repeat(8, 1)), images)


def test_colours_are_those_of_opencvs_hsv(numbers: NDArray[np.float64]) -> None:
    """mmpose's steps one by one, in floats, on OpenCV's own conversions: to the rounding."""
    colors = placed(numbers[:64], Noise(photometric=0.7)).colors
    images = crops(64)
    images[:4] = images[:4, :, :, :1]  # greys
    images[4:8, ..., 1] = 0
    found = change_colors(images, torch.from_numpy(colors)).numpy().astype(float)
    for image, how, made in zip(images.numpy(), colors.tolist(), found, strict=True):
        brightness, before, saturation, hue, after = how[:5]
        one = np.clip(image.astype(np.float32) + np.float32(brightness), 0, 255)
        one = np.clip(one * np.float32(before), 0, 255)
        hsv = cv2.cvtColor(one / 255, cv2.COLOR_RGB2HSV)  # hue in degrees
        hsv[..., 0] = (hsv[..., 0] + hue) % 360
        hsv[..., 1] = np.clip(hsv[..., 1] * saturation, 0, 1)
        one = np.clip(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255 * after, 0, 255)
        np.testing.assert_allclose(made, one[..., np.int64(how[5:])], atol=0.51)


# ---------------------------------------------------------------------------------- holes


def test_rectangles_are_one_to_eight_and_inside(numbers: NDArray[np.float64]) -> None:
    rectangles = placed(numbers, Noise(coarse_dropout=0.4)).rectangles
    assert rectangles is not None
    width, height = rectangles[..., 2] - rectangles[..., 0], rectangles[..., 3] - rectangles[..., 1]
    there = width > 0
    assert near(there.any(axis=1), 0.4)
    counts = there.sum(axis=1)[there.any(axis=1)]
    for count in range(1, HOLES + 1):
        assert near(counts == count, 1 / HOLES)
    assert (rectangles == np.round(rectangles)).all()
    for sides, length, axis in ((width, 192, 0), (height, 256, 1)):
        drawn = sides[there]
        assert (drawn.min(), drawn.max()) == (10, 40)  # mmpose's, at 256x192
        assert near(drawn < 24.5, 14.5 / 30)
        first, last = rectangles[..., axis][there], rectangles[..., axis + 2][there]
        assert (first.min(), last.max()) == (0, length)
    assert (rectangles[~there] == 0).all()


def test_ellipses_cover_a_keypoint_or_lie_on_the_box(numbers: NDArray[np.float64]) -> None:
    ellipses = placed(numbers, Noise(information_dropping=0.6)).ellipses
    assert ellipses is not None
    there = ellipses[:, 2] > 0
    assert near(there, 0.6)
    assert (ellipses[~there] == 0).all()
    center, radii = ellipses[there, :2].astype(float), ellipses[there, 2:].astype(float)
    assert radii.min() > 0.1 * 192 - 1e-4
    assert radii.max() < 0.2 * 192
    # The box, as the photo has it, and how far its places are from the first eight keypoints in radii.
    (a, b), (c, d) = np.linalg.inv(TURNED[:, :2])
    back = (center - TURNED[:, 2]) @ np.array([[a, c], [b, d]])
    in_box = ((back > [89.99, 99.99]) & (back < [190.01, 220.01])).all(axis=1)
    places = apply_affine(TURNED, people(1)["keypoints"][0, :8, :2].astype(float))
    near_one = (np.abs(center[:, None] - places) / radii[:, None] < 0.7001).all(axis=-1)
    assert (in_box | near_one.any(axis=1)).all()
    on_keypoint = numbers[there, ELLIPSE + 1] < 0.5
    assert near(on_keypoint, 0.5)
    assert near_one[on_keypoint].any(axis=1).all(), "and so the keypoint itself is covered"
    assert in_box[~on_keypoint].all()
    # Every keypoint that is shown comes as often, those outside the crop and unlabelled ones never.
    chosen = np.floor(numbers[there, ELLIPSE + 2][on_keypoint] * 8).astype(int)
    assert near_one[on_keypoint][np.arange(on_keypoint.sum()), chosen].all()


def test_an_ellipse_without_a_keypoint_to_cover_lies_on_the_box(numbers: NDArray[np.float64]) -> None:
    everyone = people(500)
    nobody = {**everyone, "keypoints": everyone["keypoints"] * np.float32([1, 1, 0])}
    center = place_noise(numbers[:500], ALWAYS, **nobody).ellipses[:, :2].astype(float)
    back = apply_affine(np.linalg.inv(np.vstack([TURNED, [0, 0, 1]]))[:2], center)
    assert ((back > [89.99, 99.99]) & (back < [190.01, 220.01])).all()


def test_holes_are_filled_pixel_by_pixel_and_the_crops_stay_as_they_were() -> None:
    images = crops(3)
    before = images.clone()
    rectangles = np.zeros((3, HOLES, 4), np.float32)
    rectangles[0, :2] = [[5, 0, 15, 7], [10, 3, 48, 64]]
    rectangles[1, 7] = [0, 60, 1, 64]
    ellipses = np.float32([[10.3, 20.5, 6, 9], [0, 0, 0, 0], [46, 62, 20, 5]])
    expected = images.numpy().copy()
    for n in range(3):
        for x0, y0, x1, y1 in rectangles[n].astype(int).tolist():
            expected[n, y0:y1, x0:x1] = 0
        cx, cy, rx, ry = ellipses[n].tolist()
        for y in range(64):
            for x in range(48):
                if rx and ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1:
                    expected[n, y, x] = MEAN_COLOR
    found = add_noise(images, None, torch.from_numpy(rectangles), torch.from_numpy(ellipses))
    np.testing.assert_array_equal(found.numpy(), expected)
    assert (expected != before.numpy()).any(axis=(1, 2, 3)).all()
    colors = torch.tensor(PLAIN).repeat(3, 1)
    colors[:, 0] = 200
    everything = add_noise(images, colors, torch.from_numpy(rectangles), torch.from_numpy(ellipses))
    assert (everything[0, 10, 12] == 0).all(), "holes lie over the colours"
    assert torch.equal(images, before)
