"""Crops and targets of random views on the device, batched, equal to the numpy side.

Where a view lies is decided once, by hrnet_core/augment.py and the codec on the CPU (some 50 us a person);
here is what costs: the warp of crop_people, and the product of HeatmapCodec.factors.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hrnet_core.geometry import Float32, Float64, UInt8

Indices = NDArray[np.int64]


def invert_views(picture_to_crop: Float64) -> Float32:
    """crop_to_picture float32 (N, 2, 3) of picture_to_crop (N, 2, 3), as `warp_pictures` takes it."""
    matrices = torch.from_numpy(picture_to_crop).double()
    linear = torch.linalg.inv(matrices[..., :2])
    inverse: Float32 = torch.cat([linear, -linear @ matrices[..., 2:]], dim=-1).float().numpy()
    return inverse


def view_reaches(crop_to_picture: Float32, input_size: tuple[int, int]) -> Indices:
    """x0, y0, x1, y1 int64 (N, 4): where each view looks in its picture and beyond it; whole pixels, the ends
    not included."""
    width, height = input_size
    corners = [[0, 0, 1], [width - 1, 0, 1], [0, height - 1, 1], [width - 1, height - 1, 1]]
    places = np.asarray(crop_to_picture, np.float64) @ np.array(corners, np.float64).T
    # The right and lower neighbours are looked at too, and float32 moves a place by less than a pixel.
    ends = np.floor(places.min(axis=-1)) - 1, np.floor(places.max(axis=-1)) + 3
    return np.concatenate(ends, axis=-1).astype(np.int64)


def pack_reaches(
    pictures: Iterable[UInt8], reaches: Indices, pixels: UInt8
) -> tuple[UInt8, Indices, Indices]:
    """What the views of N pictures, uint8 (H, W, 3) each, take of them, as `warp_pictures` wants it: pixels,
    sizes, reaches.

    reaches (N, 4) of `view_reaches`, which come back as far as the picture goes, at least a pixel. pixels
    uint8 (M, 3) has room for all of them and is filled from its beginning; a part of it comes back.
    """
    end, sizes, cut = 0, [], []
    for picture, (x0, y0, x1, y1) in zip(pictures, reaches.tolist(), strict=True):
        height, width = picture.shape[:2]
        x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
        x1, y1 = min(max(x1, x0 + 1), width), min(max(y1, y0 + 1), height)
        begin, end = end, end + (x1 - x0) * (y1 - y0)
        pixels[begin:end].reshape(y1 - y0, x1 - x0, 3)[:] = picture[y0:y1, x0:x1]
        sizes.append((width, height))
        cut.append((x0, y0, x1, y1))
    return pixels[:end], np.array(sizes, np.int64), np.array(cut, np.int64)


def warp_pictures(
    pixels: Tensor, sizes: Tensor, reaches: Tensor, crop_to_picture: Tensor, input_size: tuple[int, int]
) -> Tensor:
    """Crops uint8 (N, h, w, 3) of N pictures of different sizes, on the device of the tensors.

    pixels uint8 (M, 3): the reaches of the pictures (`pack_reaches`) one after the other, row by row; sizes
    int64 (N, 2) widths and heights of the whole pictures; reaches int64 (N, 4) x0, y0, x1, y1;
    crop_to_picture float32 (N, 2, 3); input_size (w, h). Bilinear, black outside the picture, as
    `geometry.crop_people`: the four neighbours are gathered from the packed pixels, because grid_sample would
    want all pictures padded to the largest and as floats (8 times the memory on cuts of COCO).
    """
    device, (width, height) = pixels.device, input_size
    inverse = crop_to_picture[..., None, None]
    columns = torch.arange(width, device=device, dtype=torch.float32)
    rows = torch.arange(height, device=device, dtype=torch.float32)[:, None]
    x = inverse[:, 0, 0] * columns + inverse[:, 0, 1] * rows + inverse[:, 0, 2]
    y = inverse[:, 1, 0] * columns + inverse[:, 1, 1] * rows + inverse[:, 1, 2]
    left, top = x.floor(), y.floor()
    right_share, bottom_share = x - left, y - top
    last_x, last_y = (sizes - 1).T[..., None, None]
    x0, y0, x1, y1 = reaches.T[..., None, None]
    areas = (x1 - x0) * (y1 - y0)
    starts = areas.cumsum(0) - areas
    crops = torch.zeros(*x.shape, 3, device=device)
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        at_x, at_y = left.long() + dx, top.long() + dy
        share = (right_share if dx else 1 - right_share) * (bottom_share if dy else 1 - bottom_share)
        share = share * ((at_x >= 0) & (at_x <= last_x) & (at_y >= 0) & (at_y <= last_y))
        at = starts + (at_y.clamp(y0, y1 - 1) - y0) * (x1 - x0) + at_x.clamp(x0, x1 - 1) - x0
        crops += share[..., None] * pixels[at]
    return crops.round_().to(torch.uint8)


def multiply_factors(heatmap_rows: Tensor, heatmap_columns: Tensor) -> Tensor:
    """rows (N, K, H), columns (N, K, W) of `HeatmapCodec.factors` -> heatmaps (N, K, H, W), the same bits
    as `HeatmapCodec.encode`."""
    return heatmap_rows[..., :, None] * heatmap_columns[..., None, :]
