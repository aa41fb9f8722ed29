"""What is done to the pixels of a training crop, so that a network does not rely on them alone.

    photometric           brightness, contrast, saturation, hue and order of the channels, each by its own
                          chance: mmpose's PhotometricDistortion with its defaults
    coarse dropout        1 to 8 black rectangles anywhere: Albumentations' CoarseDropout as mmpose trained
                          HRNet with it
    information dropping  an ellipse of the mean colour over a keypoint or on the body (AID, arXiv
                          2008.07139): what it covers stays a target, to be told from the rest of the body

Keypoints, weights and heatmaps stay as they are. `NUMBERS` numbers of a person and an epoch decide
(`draw_noise`), always drawn and always in the same order: switching one kind on changes no other.
`place_noise` makes of them what `add_noise` does to a batch of crops on any device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from hrnet_core.choices import Noise
from hrnet_core.geometry import Float32, Float64, apply_affine

BRIGHTNESS = 32.0
"""Added, at most, of 255 levels."""
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
HUE_DEG = 36.0
"""Turned by at most: hue_delta 18 of OpenCV's 180 steps."""
HOLES = 8
"""Rectangles, at most."""
HOLE_SIDE = (10 / 192, 40 / 192)
"""Of a rectangle: mmpose's 10 to 40 px at 256x192, as shares of the crop's width."""
RADIUS = (0.1, 0.2)
"""Of an ellipse, in each direction: the published shares of the crop's width."""
SHIFT = 0.7
"""An ellipse lies off its keypoint by at most this share of its radii, in each direction: the keypoint stays
covered, and the middle of the ellipse does not tell where it is."""
MEAN_COLOR = (124, 116, 104)
"""Of ImageNet: about 0 after normalisation, as published."""
NUMBERS = 11 + 2 + 4 * HOLES + 7
ORDERS = np.array([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]], np.float32)
PLAIN = (0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 2.0)
"""Columns of `colors` that change nothing."""


class PlacedNoise(NamedTuple):
    """What becomes of P crops; None: nothing of that kind in any of them."""

    colors: Float32 | None
    """(P, 8): brightness added; factors of contrast before and of saturation; hue turned, degrees; factor of
    contrast after; three channels in their order."""
    rectangles: Float32 | None
    """(P, 8, 4) x0, y0, x1, y1 in crop px, the ends not included; empty ones are all 0."""
    ellipses: Float32 | None
    """(P, 4) center x, y and radius x, y in crop px; radius 0: none."""


def draw_noise(seed: int, epoch: int, ann_ids: Iterable[int]) -> Float64:
    """The numbers of each person in an epoch, float64 (P, NUMBERS) in [0, 1): from SeedSequence([seed, epoch,
    ann_id], spawn_key=(1,)) alone, other ones than those of the view."""
    sequences = (np.random.SeedSequence([seed, epoch, i % 2**64], spawn_key=(1,)) for i in ann_ids)
    return np.array([np.random.default_rng(s).random(NUMBERS) for s in sequences]).reshape(-1, NUMBERS)


def place_noise(
    numbers: Float64,
    noise: Noise,
    image_to_crop: ArrayLike,
    keypoints: ArrayLike,
    bbox_xywh: ArrayLike,
    input_size: tuple[int, int],
) -> PlacedNoise:
    """From the numbers (P, NUMBERS) of people to what is done to their crops.

    image_to_crop (P, 2, 3) of their views; keypoints (P, K, 3) with v and bbox_xywh (P, 4) in photo px;
    input_size (width, height) of the crops.
    """
    of_colors, of_holes, of_ellipse = np.split(numbers, [11, 13 + 4 * HOLES], axis=1)
    return PlacedNoise(
        _colors(of_colors, noise.photometric) if noise.photometric else None,
        _rectangles(of_holes, noise.coarse_dropout, input_size) if noise.coarse_dropout else None,
        _ellipses(of_ellipse, noise.information_dropping, image_to_crop, keypoints, bbox_xywh, input_size)
        if noise.information_dropping
        else None,
    )


def _between(share: Float64, ends: tuple[float, float]) -> Float64:
    return ends[0] + (ends[1] - ends[0]) * share


def _colors(numbers: Float64, probability: float) -> Float32:
    """(P, 8), as PlacedNoise says. Each change has its own gate; contrast comes first or last, evenly."""
    early, number = numbers[:, 10] < 0.5, numbers[:, 5:10].T
    contrast = _between(number[1], CONTRAST)
    colors = np.tile(np.array(PLAIN, np.float32), (len(numbers), 1))
    drawn = (
        _between(number[0], (-BRIGHTNESS, BRIGHTNESS)),
        np.where(early, contrast, 1),
        _between(number[2], SATURATION),
        _between(number[3], (-HUE_DEG, HUE_DEG)),
        np.where(early, 1, contrast),
        *ORDERS[(number[4] * len(ORDERS)).astype(int)].T,
    )
    gates = numbers[:, :5] < probability
    for column, (values, gate) in enumerate(zip(drawn, (0, 1, 2, 3, 1, 4, 4, 4), strict=True)):
        colors[gates[:, gate], column] = values[gates[:, gate]]
    return colors


def _rectangles(numbers: Float64, probability: float, input_size: tuple[int, int]) -> Float32:
    """(P, HOLES, 4) whole px. A hole lies inside the crop; its sides are drawn apart."""
    width, height = input_size
    gate, count = numbers[:, 0] < probability, 1 + np.floor(numbers[:, 1] * HOLES)
    places, sides = np.split(numbers[:, 2:].reshape(-1, HOLES, 4), 2, axis=-1)
    size = np.maximum(np.round(_between(sides, HOLE_SIDE) * width), 1)
    first = np.floor(places * (np.array([width, height]) - size + 1))
    rectangles = np.concatenate([first, first + size], axis=-1)
    shown = gate[:, None] & (np.arange(HOLES) < count[:, None])
    return np.where(shown[..., None], rectangles, 0).astype(np.float32)


def _ellipses(
    numbers: Float64,
    probability: float,
    image_to_crop: ArrayLike,
    keypoints: ArrayLike,
    bbox_xywh: ArrayLike,
    input_size: tuple[int, int],
) -> Float32:
    """(P, 4). On one of the labelled keypoints that the crop shows in half of the cases, else anywhere in the
    person's box; there, too, where no keypoint is shown."""
    gate, on_keypoint = numbers[:, 0] < probability, numbers[:, 1] < 0.5
    radii = _between(numbers[:, 3:5], RADIUS) * input_size[0]
    triples = np.asarray(keypoints, np.float64)
    places = apply_affine(image_to_crop, triples[..., :2])
    shown = (triples[..., 2] > 0) & (places >= 0).all(axis=-1) & (places < input_size).all(axis=-1)
    count = shown.sum(axis=1)
    # The n-th of those shown: where their running count first exceeds n.
    number = np.floor(numbers[:, 2] * count)
    chosen = (np.cumsum(shown, axis=1) > number[:, None]).argmax(axis=1)
    keypoint = places[np.arange(len(places)), chosen] + (2 * numbers[:, 5:7] - 1) * SHIFT * radii
    box = np.asarray(bbox_xywh, np.float64)
    inside = apply_affine(image_to_crop, (box[:, :2] + numbers[:, 5:7] * box[:, 2:])[:, None])[:, 0]
    center = np.where((on_keypoint & (count > 0))[:, None], keypoint, inside)
    return np.where(gate[:, None], np.concatenate([center, radii], axis=1), 0).astype(np.float32)


# --- on the device ------------------------------------------------------------------------------------


def add_noise(
    crops: Tensor, colors: Tensor | None, rectangles: Tensor | None, ellipses: Tensor | None
) -> Tensor:
    """Crops uint8 (N, h, w, 3) RGB as `PlacedNoise` of the same N wants them: colours, then holes."""
    if colors is not None:
        crops = change_colors(crops, colors)
    if rectangles is not None:
        crops = crops.masked_fill(_in_rectangles(rectangles, crops)[..., None], 0)
    if ellipses is not None:
        inside, crops = _in_ellipses(ellipses, crops), crops.clone()
        for channel, level in enumerate(MEAN_COLOR):  # numbers: a tensor would have to be sent first
            crops[..., channel].masked_fill_(inside, level)
    return crops


def change_colors(crops: Tensor, colors: Tensor) -> Tensor:
    """Crops uint8 (N, h, w, 3) RGB by colors (N, 8) of PlacedNoise; rounded once, at the end.

    Saturation and hue are those of HSV (value and hue kept by the one, value and saturation by the other).
    """
    brightness, before, saturation, hue, after, *order = colors.T[..., None, None]
    planes = crops.permute(3, 0, 1, 2).float().add_(brightness).clamp_(0, 255)
    planes = planes.mul_(before).clamp_(0, 255)
    value, low = planes.amax(dim=0), planes.amin(dim=0)
    chroma = value - low
    red, green, blue = planes
    # In sixths of a turn from red, and what divides by no chroma has no hue: 0.
    some = chroma.clamp(min=1e-6)
    sector = torch.where(
        value == red,
        (green - blue) / some,
        torch.where(value == green, (blue - red) / some + 2, (red - green) / some + 4),
    )
    sector = sector + hue / 60
    chroma = torch.minimum(chroma * saturation, value)
    for channel, place in enumerate((5, 3, 1)):
        way = (sector + place).remainder(6)
        planes[channel] = value - chroma * torch.minimum(way, 4 - way).clamp(0, 1)
    planes = planes.mul_(after).clamp_(0, 255).round_().to(torch.uint8)
    channels = torch.stack(order).long().expand(planes.shape)
    return planes.gather(0, channels).permute(1, 2, 3, 0).contiguous()


def _in_rectangles(rectangles: Tensor, crops: Tensor) -> Tensor:
    """bool (N, h, w): inside any of a crop's rectangles, as the product of their rows and columns."""
    height, width = crops.shape[1:3]
    x0, y0, x1, y1 = rectangles.unbind(-1)

    def along(first: Tensor, end: Tensor, length: int) -> Tensor:
        at = torch.arange(length, device=crops.device)
        return ((at >= first[..., None]) & (at < end[..., None])).float()

    return torch.bmm(along(y0, y1, height).mT, along(x0, x1, width)) > 0


def _in_ellipses(ellipses: Tensor, crops: Tensor) -> Tensor:
    """bool (N, h, w). Without a division: radius 0 holds nothing."""
    height, width = crops.shape[1:3]
    x, y, radius_x, radius_y = ellipses.T[..., None, None]
    across = (torch.arange(width, device=crops.device) - x) * radius_y
    down = (torch.arange(height, device=crops.device)[:, None] - y) * radius_x
    inside: Tensor = across**2 + down**2 < (radius_x * radius_y) ** 2
    return inside
