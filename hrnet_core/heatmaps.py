"""Keypoints <-> heatmaps: encode and decode of one codec side by side, with the crop matrix it wants, and
the float16 in which shards hold what encode gives.

    official  Gaussian at the rounded cell, quarter-cell decode (arXiv:1902.09212; JointsDataset.py:233-289,
              inference.py:27-77). What the published HRNet weights were trained for.
    dark      Gaussian at the true place, Taylor step on the log of the blurred map (arXiv:1910.06278;
              mmpose msra_heatmap.py with unbiased=True)
    udp       unit lengths between pixel centres in crop, heatmap and flip alike (arXiv:1911.07524;
              mmpose udp_heatmap.py, heatmap_type "gaussian")

A model is decoded with the codec it was trained for; a checkpoint records which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from hrnet_core.choices import CODECS, CodecName, default_sigma
from hrnet_core.geometry import Float32, Float64, three_point_matrix, udp_matrix

# Below this a factor counts as 0: the product of two such factors would be a float32 denormal, which is
# slow to multiply and nothing beside a peak of 1.
SMALLEST_FACTOR = 2e-19
MAPS_PER_BLOCK = 2048
LONGEST_STEP = 3.0
Border = Literal["official", "mmpose"]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class HeatmapCodec:
    """One way of writing keypoints as heatmaps and reading them back."""

    name: CodecName
    input_size: tuple[int, int] = (192, 256)
    """(width, height) of the crop in px, multiples of 4."""
    sigma: float = None  # type: ignore[assignment]  # always a number once constructed
    """The Gaussian's, in heatmap cells; None: `default_sigma`."""

    def __post_init__(self) -> None:
        width, height = self.input_size  # a list when it comes from JSON
        sigma = default_sigma((width, height)) if self.sigma is None else float(self.sigma)
        if self.name not in CODECS:
            raise ValueError(f"codec must be one of {CODECS}, got {self.name!r}")
        if any(side <= 0 or side % 4 for side in (width, height)):
            raise ValueError(f"input_size must be two positive multiples of 4, got {self.input_size}")
        if not 0 < sigma < float("inf"):
            raise ValueError(f"sigma must be a positive number of heatmap cells, got {self.sigma}")
        object.__setattr__(self, "input_size", (int(width), int(height)))
        object.__setattr__(self, "sigma", sigma)

    @property
    def heatmap_size(self) -> tuple[int, int]:
        """(width, height) in cells: a quarter of input_size."""
        return self.input_size[0] // 4, self.input_size[1] // 4

    @property
    def cell_size(self) -> Float64:
        """Crop px per heatmap cell, (x, y): 4, but (W - 1) / (W_heatmap - 1) for udp."""
        crop, heatmap = np.array(self.input_size, np.float64), np.array(self.heatmap_size, np.float64)
        return (crop - 1) / (heatmap - 1) if self.name == "udp" else crop / heatmap

    @property
    def blur_kernel(self) -> int:
        """Taps of the blur before the Taylor step of dark and udp: 11, and 3 for sigma 1 (DarkPose's
        128x96), as published; mmpose and DarkPose keep 11 at 384x288 as well."""
        return 11 if self.sigma >= 1.5 else 3

    def as_dict(self) -> dict[str, Any]:
        """JSON types; `HeatmapCodec(**as_dict())` is the same codec."""
        return {"name": self.name, "input_size": list(self.input_size), "sigma": self.sigma}

    def image_to_crop_matrix(
        self, center: ArrayLike, scale: ArrayLike, rotation_deg: ArrayLike = 0.0
    ) -> Float64:
        """center, scale (..., 2) in image px, rotation in degrees, scalar or (...,) -> float64 (..., 2, 3).

        udp has factors of its own and turns the other way for the same angle (see geometry.py).
        """
        matrix = udp_matrix if self.name == "udp" else three_point_matrix
        return matrix(center, scale, self.input_size, rotation_deg)

    def encode(self, keypoints: ArrayLike, visible: ArrayLike) -> tuple[Float32, Float32]:
        """keypoints (..., K, 2) in crop px, visible (..., K) -> heatmaps float32 (..., K, H, W) and
        weights float32 (..., K), 0 or 1.

        visible 1 and 2 count the same. The peak is 1 (unnormalised). A keypoint outside whose Gaussian
        reaches the map keeps weight 1; one whose Gaussian ends just before it too, with an all-zero map,
        as published (`right >= 0`, JointsDataset.py:262-267). Coordinates where visible is 0 are not read.
        """
        rows, columns, weights = self.factors(keypoints, visible)
        # A Gaussian is the product of its two axes; einsum is the fastest way to write that product once.
        return np.einsum("...y,...x->...yx", rows, columns), weights

    def factors(self, keypoints: ArrayLike, visible: ArrayLike) -> tuple[Float32, Float32, Float32]:
        """What `encode` multiplies: rows float32 (..., K, H), columns float32 (..., K, W), and its weights.

        heatmaps[..., y, x] = rows[..., y] * columns[..., x]; the rows are zero where the weight is.
        """
        keypoints, visible = np.asarray(keypoints), np.asarray(visible)
        if keypoints.shape != (*visible.shape, 2):
            raise ValueError(f"encode wants (..., K, 2) and (..., K), got {keypoints.shape}, {visible.shape}")
        labelled = visible > 0
        center = np.where(labelled[..., None], keypoints, 0) / self.cell_size
        radius = 3 * self.sigma
        if self.name == "dark":
            window = center
        else:
            # Truncated towards zero, not floored: -2.1 px belongs to cell 0 (JointsDataset.py:256).
            window = np.trunc(center + 0.5)
            radius = float(int(radius))
        inside = (window - radius < self.heatmap_size) & (window + radius + 1 >= 0)
        weights = (labelled & inside.all(axis=-1)).astype(np.float32)

        columns = self._gaussian(center[..., 0], window[..., 0], self.heatmap_size[0])
        rows = self._gaussian(center[..., 1], window[..., 1], self.heatmap_size[1])
        rows *= weights[..., None]
        return rows, columns, weights

    def _gaussian(self, center: Float64, window: Float64, cells: int) -> Float32:
        """center, window (..., K) on one axis -> float32 (..., K, cells), that axis' factor of a heatmap."""
        cell = np.arange(cells)
        peak = window if self.name == "official" else center
        values = np.exp((cell - peak[..., None]) ** 2 * (-0.5 / self.sigma**2))
        if self.name == "dark":
            values[values < SMALLEST_FACTOR] = 0
        else:  # a square window of 6 sigma + 1 cells
            values *= np.abs(cell - window[..., None]) <= int(3 * self.sigma)
        return values.astype(np.float32)

    def decode(self, heatmaps: ArrayLike, border: Border = "official") -> tuple[Float32, Float32]:
        """heatmaps (..., K, H, W) -> keypoints float32 (..., K, 2) in crop px, scores float32 (..., K).

        The score is the maximum of the map. A map whose maximum is not positive (or not finite) has its
        keypoint at (0, 0), as the official code (mmpose says (-1, -1), or NaN for udp).
        `border` concerns official only: how near the border the quarter step is still taken. "official"
        takes none unless both axes are inside, "mmpose" judges each axis (refinement.py:31-44).
        """
        heatmaps = np.asarray(heatmaps)
        width, height = self.heatmap_size
        if heatmaps.ndim < 3 or heatmaps.shape[-2:] != (height, width):
            raise ValueError(f"decode wants heatmaps (..., K, {height}, {width}), got {heatmaps.shape}")
        if border not in ("official", "mmpose"):
            raise ValueError(f"border must be 'official' or 'mmpose', got {border!r}")
        maps = heatmaps.reshape(-1, height, width)
        keypoints = np.empty((len(maps), 2), np.float32)
        scores = np.empty(len(maps), np.float32)
        # In blocks of some 120 people: the maps are still in the cache when their maxima are refined.
        for start in range(0, len(maps), MAPS_PER_BLOCK):
            block = slice(start, start + MAPS_PER_BLOCK)
            cells, scores[block] = self._decode_block(maps[block], border)
            keypoints[block] = cells.T
        keypoints *= self.cell_size.astype(np.float32)
        leading = heatmaps.shape[:-2]
        return keypoints.reshape(*leading, 2), scores.reshape(leading)

    def _decode_block(self, maps: NDArray[Any], border: str) -> tuple[Float64, Float32]:
        """maps (M, H, W) -> x and y (2, M) in cells, scores (M,)."""
        maps = np.ascontiguousarray(maps, np.float32)
        best = maps.reshape(len(maps), -1).argmax(axis=1)
        y = best // maps.shape[2]
        x = best - y * maps.shape[2]
        at = best + np.arange(len(maps)) * maps[0].size  # the maximum's place in maps.ravel()
        scores: Float32 = maps.ravel().take(at)
        if self.name == "official":
            cells = self._quarter_step(maps, at, x, y, border)
        else:
            with np.errstate(all="ignore"):  # a map that is flat or not finite gets no step
                cells = self._taylor_step(maps, x, y, scores)
        cells += (x, y)
        cells *= (scores > 0) & (scores < np.inf)
        return cells, scores

    def _quarter_step(self, maps: Float32, at: Indices, x: Indices, y: Indices, border: str) -> Float64:
        """float64 (2, M): a quarter cell towards the higher neighbour on each axis, 0 near the border."""
        width, height = self.heatmap_size
        inside_x, inside_y = (x > 1) & (x < width - 1), (y > 1) & (y < height - 1)
        if border == "official":
            inside_x = inside_y = inside_x & inside_y
        else:
            inside_x, inside_y = inside_x & (y > 0), inside_y & (x > 0)
        values = maps.ravel()
        step = np.empty((2, len(maps)))
        for axis, reach in enumerate([inside_x * 1, inside_y * width]):
            # No reach, no difference: nothing outside the map is read.
            after, before = values.take(at + reach), values.take(at - reach)
            step[axis] = 0.25 * (after > before) - 0.25 * (after < before)
        return step

    def _taylor_step(self, maps: Float32, x: Indices, y: Indices, peaks: Float32) -> Float64:
        """float64 (2, M) cells from the maximum to the top of the parabola through log(blurred map).

        dark: differences over two cells, no step within two cells of the border, values at least 1e-10
        (DarkPose inference.py:51-111). udp: differences over one cell, the border repeated, values between
        1e-3 and 50, float32's epsilon on the Hessian's diagonal (mmpose refinement.py:91-151).
        Ours alone: a step of more than three cells on an axis, beyond all that it was computed from, is not
        taken. The published decoders throw a keypoint of pure noise up to 80,000 cells away.
        """
        low, high = (1e-3, 50.0) if self.name == "udp" else (1e-10, np.inf)
        at, c = self._log_blurred(maps, x, y, peaks, low, high), 2  # at[c + dy, c + dx] is (M,)
        dx, dy = 0.5 * (at[c, c + 1] - at[c, c - 1]), 0.5 * (at[c + 1, c] - at[c - 1, c])
        if self.name == "udp":
            epsilon = float(np.finfo(np.float32).eps)
            dxx = at[c, c + 1] - 2 * at[c, c] + at[c, c - 1] + epsilon
            dyy = at[c + 1, c] - 2 * at[c, c] + at[c - 1, c] + epsilon
            sides = at[c, c + 1] + at[c + 1, c] + at[c, c - 1] + at[c - 1, c]
            dxy = 0.5 * (at[c + 1, c + 1] + at[c - 1, c - 1] + 2 * at[c, c] - sides)
            usable = np.ones(len(maps), bool)
        else:
            dxx = 0.25 * (at[c, c + 2] - 2 * at[c, c] + at[c, c - 2])
            dyy = 0.25 * (at[c + 2, c] - 2 * at[c, c] + at[c - 2, c])
            dxy = 0.25 * (at[c + 1, c + 1] - at[c - 1, c + 1] - at[c + 1, c - 1] + at[c - 1, c - 1])
            width, height = self.heatmap_size
            usable = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2)
        determinant = dxx * dyy - dxy * dxy
        step = np.stack([dxy * dy - dyy * dx, dxy * dx - dxx * dy]) / determinant
        usable = usable & (np.abs(step) <= LONGEST_STEP).all(axis=0)
        return np.where(usable, step, 0)

    def _log_blurred(
        self, maps: Float32, x: Indices, y: Indices, peaks: Float32, low: float, high: float
    ) -> Float64:
        """float64 (5, 5, M): log of the blurred maps around (x, y), clipped to [low, high].

        The published decoders blur whole maps (zeros outside) and rescale each to its old maximum. In the
        logarithm that scale is a constant which no difference sees, except where a value is clipped: only
        those maps are blurred as a whole. Blurred values never exceed the peak, so the scale is >= 1.
        """
        width, height = self.heatmap_size
        blur_rows = blur_matrix(height, self.blur_kernel)
        blur_columns = blur_matrix(width, self.blur_kernel)
        around = np.arange(-2, 3)
        rows = blur_rows[np.clip(y[:, None] + around, 0, height - 1)]
        columns = blur_columns[np.clip(x[:, None] + around, 0, width - 1)]
        patch = (rows @ maps @ columns.transpose(0, 2, 1)).transpose(1, 2, 0).astype(np.float64)
        clipped = (patch.min(axis=(0, 1)) < low) | (peaks > high)
        clipped &= peaks > 0
        if clipped.any():
            top = (blur_rows @ maps[clipped] @ blur_columns).max(axis=(1, 2))
            patch[..., clipped] *= peaks[clipped] / (top + 1e-12)
        logs: Float64 = np.log(np.clip(patch, low, high))
        return logs

    def flip_back(self, heatmaps: NDArray[np.float32], flip_order: ArrayLike) -> NDArray[np.float32]:
        """Heatmaps (N, K, H, W) of mirrored crops -> the same shape, comparable to the plain crops' ones.

        Columns are reversed, keypoint pairs swapped (`Skeleton.flip_order`), and for official and dark the
        columns 1.. take the place of 0.., the first staying (official transforms.py:15-29,
        function.py:141-143): with 4 px cells the mirrored peak lies 0.75 cells too far left.
        """
        mirrored = heatmaps[..., np.asarray(flip_order), :, ::-1]
        if self.name == "udp":
            return np.ascontiguousarray(mirrored)
        shifted = np.empty(heatmaps.shape, heatmaps.dtype)
        shifted[..., 1:] = mirrored[..., :-1]
        shifted[..., 0] = mirrored[..., 0]
        return shifted


def float16_heatmaps(rows: Float32, columns: Float32) -> NDArray[np.float16]:
    """What `HeatmapCodec.encode` gives, cast to float16 bit for bit, at a third of the cost: heatmaps
    (..., K, H, W) of `HeatmapCodec.factors`, rows (..., K, H) and columns (..., K, W).

    Only a window of each map is computed: no factor exceeds 1, so where one of the two is at most 2**-25
    the product is zero in float16.
    """
    (*maps, height), width = rows.shape, columns.shape[-1]
    rows, columns = rows.reshape(-1, height), columns.reshape(-1, width)
    result = np.zeros(len(rows) * height * width, np.uint16)
    filled = np.flatnonzero(rows.any(axis=1))  # keypoints with a weight
    rows, columns = rows[filled], columns[filled]
    top, left = _window(rows), _window(columns)
    number = np.arange(len(filled))[:, None]
    values = rows[number, top][:, :, None] * columns[number, left][:, None, :]
    starts = ((filled[:, None] * height + top) * width)[:, :, None]
    result[starts + left[:, None, :]] = to_float16(values).view(np.uint16)
    return result.view(np.float16).reshape(*maps, height, width)


def _window(factors: Float32) -> Indices:
    """(M, S) cells of each of M axes (M, cells): as many as the longest needs, around those that count."""
    cells = factors.shape[1]
    counts = factors > 2**-25
    first, last = counts.argmax(axis=1), cells - 1 - counts[:, ::-1].argmax(axis=1)
    length = int(np.where(counts.any(axis=1), last + 1 - first, 0).max(initial=0))
    window: Indices = np.minimum(first, cells - length)[:, None] + np.arange(length)
    return window


def to_float16(heatmaps: Float32) -> NDArray[np.float16]:
    """`heatmaps.astype(np.float16)` bit for bit, for values from 0 up, several times faster.

    NumPy's cast is slow, and slower on what float16 holds as subnormal. Many values are zero, and
    subnormals are multiples of 2**-24: their bits are that multiple.
    """
    flat = heatmaps.reshape(-1)
    some = np.flatnonzero(flat > 2**-25)  # the others round to zero
    values, smallest_normal = flat[some], np.float32(2**-14)
    bits = np.rint(np.minimum(values, smallest_normal) * np.float32(2**24)).astype(np.uint16)
    normal = values >= smallest_normal
    bits[normal] = values[normal].astype(np.float16).view(np.uint16)
    result = np.zeros(heatmaps.shape, np.uint16)
    result.reshape(-1)[some] = bits
    return result.view(np.float16)


def blur_matrix(cells: int, taps: int) -> Float32:
    """float32 (cells, cells), symmetric: multiplying by it blurs one axis with zeros outside.

    The published code asks OpenCV for a kernel of that size and sigma 0.
    """
    kernel = cv2.getGaussianKernel(taps, 0)[taps // 2 :, 0]
    distance = np.abs(np.arange(cells)[:, None] - np.arange(cells))
    half = np.append(kernel, 0).astype(np.float32)
    blur: Float32 = half[np.minimum(distance, len(half) - 1)]
    return blur
