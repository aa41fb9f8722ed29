"""HeatmapCodec.decode and flip_back as batched tensor operations, for where the heatmaps already are.

On a GPU only keypoints and scores have to come back then; in an ONNX file decoding is part of the network.
heatmaps.py is what is meant, and says where each rule comes from; the tests hold the two together. Nothing
here depends on the data in its shape or flow, so that it can be recorded into a CUDA graph.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from hrnet_core.heatmaps import LONGEST_STEP, Border, HeatmapCodec, blur_matrix


class Decoder(nn.Module):
    """heatmaps float32 (N, K, H, W) -> float32 (N, K, 3): x, y in crop px, score.

    Equal to `codec.decode(heatmaps, border)`: for official to the last bit, for dark and udp within 1e-3 px.
    """

    cell_size: Tensor
    blur_rows: Tensor
    blur_columns: Tensor
    around: Tensor

    def __init__(self, codec: HeatmapCodec, border: Border = "official") -> None:
        super().__init__()
        self.codec, self.border = codec, border
        width, height = codec.heatmap_size
        self.register_buffer("cell_size", torch.from_numpy(codec.cell_size.astype(np.float32)), False)
        self.register_buffer("blur_rows", torch.from_numpy(blur_matrix(height, codec.blur_kernel)), False)
        self.register_buffer("blur_columns", torch.from_numpy(blur_matrix(width, codec.blur_kernel)), False)
        self.register_buffer("around", torch.arange(-2, 3), False)

    def forward(self, heatmaps: Tensor) -> Tensor:
        people, joints, height, width = heatmaps.shape
        maps = heatmaps.reshape(people * joints, height, width)
        scores, best = maps.flatten(1).max(dim=1)  # of equal cells the first, as numpy
        y = best // width
        x = best - y * width
        if self.codec.name == "official":
            steps = self._quarter_step(maps, best, x, y)
        else:
            steps = self._taylor_step(maps, x, y, scores)
        cells = torch.stack([x, y], dim=1) + steps
        usable = (scores > 0) & (scores < torch.inf)
        # Not a product with `usable`: NaN times 0 is NaN.
        cells = torch.where(usable[:, None], cells, torch.zeros_like(cells)).float()
        found = torch.cat([cells * self.cell_size, scores[:, None]], dim=1)
        return found.reshape(people, joints, 3)

    def _quarter_step(self, maps: Tensor, best: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """float32 (M, 2): a quarter cell towards the higher neighbour on each axis, 0 near the border."""
        height, width = maps.shape[1:]
        inside_x, inside_y = (x > 1) & (x < width - 1), (y > 1) & (y < height - 1)
        if self.border == "official":
            inside_x = inside_y = inside_x & inside_y
        else:
            inside_x, inside_y = inside_x & (y > 0), inside_y & (x > 0)
        reach = torch.stack([inside_x.long(), inside_y.long() * width], dim=1)
        values = maps.flatten(1)
        after = values.gather(1, best[:, None] + reach)
        before = values.gather(1, best[:, None] - reach)
        return 0.25 * (after > before).float() - 0.25 * (after < before).float()

    def _taylor_step(self, maps: Tensor, x: Tensor, y: Tensor, peaks: Tensor) -> Tensor:
        """float64 (M, 2) cells, as HeatmapCodec._taylor_step."""
        height, width = maps.shape[1:]
        at, c = self._log_blurred(maps, x, y, peaks), 2  # at[:, c + dy, c + dx] is (M,)
        right, left, below, above = at[:, c, c + 1], at[:, c, c - 1], at[:, c + 1, c], at[:, c - 1, c]
        dx, dy, middle = 0.5 * (right - left), 0.5 * (below - above), at[:, c, c]
        if self.codec.name == "udp":
            epsilon = float(np.finfo(np.float32).eps)
            dxx = right - 2 * middle + left + epsilon
            dyy = below - 2 * middle + above + epsilon
            sides = right + below + left + above
            dxy = 0.5 * (at[:, c + 1, c + 1] + at[:, c - 1, c - 1] + 2 * middle - sides)
            usable = torch.ones_like(x, dtype=torch.bool)
        else:
            dxx = 0.25 * (at[:, c, c + 2] - 2 * middle + at[:, c, c - 2])
            dyy = 0.25 * (at[:, c + 2, c] - 2 * middle + at[:, c - 2, c])
            falling = at[:, c - 1, c + 1] + at[:, c + 1, c - 1]
            dxy = 0.25 * (at[:, c + 1, c + 1] + at[:, c - 1, c - 1] - falling)
            usable = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2)
        determinant = dxx * dyy - dxy * dxy
        step = torch.stack([dxy * dy - dyy * dx, dxy * dx - dxx * dy], dim=1) / determinant[:, None]
        usable = usable & (step.abs() <= LONGEST_STEP).all(dim=1)  # NaN and infinity are not
        return torch.where(usable[:, None], step, torch.zeros_like(step))

    def _log_blurred(self, maps: Tensor, x: Tensor, y: Tensor, peaks: Tensor) -> Tensor:
        """float64 (M, 5, 5): log of the blurred maps around (x, y), clipped. All maps are blurred as a whole,
        also where nothing is clipped: to choose some would make the device wait for the host."""
        low, high = (1e-3, 50.0) if self.codec.name == "udp" else (1e-10, torch.inf)
        height, width = maps.shape[1:]
        rows = self.blur_rows[(y[:, None] + self.around).clamp(0, height - 1)]
        columns = self.blur_columns[(x[:, None] + self.around).clamp(0, width - 1)]
        blurred = self.blur_rows @ maps
        patch = (rows @ maps @ columns.transpose(1, 2)).double()
        top = (blurred @ self.blur_columns).amax(dim=(1, 2))
        clipped = (patch.amin(dim=(1, 2)) < low) | (peaks > high)
        factor = torch.where(clipped & (peaks > 0), peaks.double() / (top.double() + 1e-12), 1.0)
        return (patch * factor[:, None, None]).clamp(low, high).log()


class FlipBack(nn.Module):
    """HeatmapCodec.flip_back on tensors: heatmaps (N, K, H, W) of mirrored crops -> the same shape."""

    flip_order: Tensor

    def __init__(self, codec: HeatmapCodec, flip_order: ArrayLike) -> None:
        super().__init__()
        self.shift = codec.name != "udp"
        self.register_buffer("flip_order", torch.as_tensor(np.asarray(flip_order, np.int64)), False)

    def forward(self, heatmaps: Tensor) -> Tensor:
        mirrored = heatmaps.index_select(1, self.flip_order).flip(3)
        return torch.cat([mirrored[..., :1], mirrored[..., :-1]], dim=3) if self.shift else mirrored
