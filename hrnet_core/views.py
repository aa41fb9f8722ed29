"""Crops and targets of random views on the device, batched, equal to the numpy side.

Where a view lies is decided once, by hrnet_core/augment.py and the codec on the CPU (some 50 us a person);
here is what costs: the warp of crop_people, and the product of HeatmapCodec.factors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def warp_pictures(
    pixels: Tensor, sizes: Tensor, picture_to_crop: Tensor, input_size: tuple[int, int]
) -> Tensor:
    """Crops uint8 (N, h, w, 3) of N pictures of different sizes, on the device of `pixels`.

    pixels uint8 (M, 3): the pictures one after the other, row by row; sizes int64 (N, 2) their widths and
    heights; picture_to_crop float64 (N, 2, 3); input_size (w, h). Bilinear, black outside the picture, as
    `geometry.crop_people`: the four neighbours are gathered from the packed pixels, because grid_sample
    would want all pictures padded to the largest and as floats (8 times the memory on cuts of COCO).
    """
    device, (width, height) = pixels.device, input_size
    linear = torch.linalg.inv(picture_to_crop[..., :2].double())
    inverse = torch.cat([linear, -linear @ picture_to_crop[..., 2:].double()], dim=-1)
    inverse = inverse.to(device, torch.float32)[..., None, None]
    columns = torch.arange(width, device=device, dtype=torch.float32)
    rows = torch.arange(height, device=device, dtype=torch.float32)[:, None]
    x = inverse[:, 0, 0] * columns + inverse[:, 0, 1] * rows + inverse[:, 0, 2]
    y = inverse[:, 1, 0] * columns + inverse[:, 1, 1] * rows + inverse[:, 1, 2]
    left, top = x.floor(), y.floor()
    right_share, bottom_share = x - left, y - top
    sizes = sizes.to(device)
    last_x, last_y = (sizes - 1).T[..., None, None]
    starts = (sizes.prod(dim=1).cumsum(0) - sizes.prod(dim=1))[:, None, None]
    crops = torch.zeros(*x.shape, 3, device=device)
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        at_x, at_y = left.long() + dx, top.long() + dy
        share = (right_share if dx else 1 - right_share) * (bottom_share if dy else 1 - bottom_share)
        share = share * ((at_x >= 0) & (at_x <= last_x) & (at_y >= 0) & (at_y <= last_y))
        at = starts + torch.minimum(at_y.clamp(min=0), last_y) * (last_x + 1)
        at += torch.minimum(at_x.clamp(min=0), last_x)
        crops += share[..., None] * pixels[at]
    return crops.round_().to(torch.uint8)


def multiply_factors(heatmap_rows: Tensor, heatmap_columns: Tensor) -> Tensor:
    """rows (N, K, H), columns (N, K, W) of `HeatmapCodec.factors` -> heatmaps (N, K, H, W), the same bits
    as `HeatmapCodec.encode`."""
    return heatmap_rows[..., :, None] * heatmap_columns[..., None, :]
