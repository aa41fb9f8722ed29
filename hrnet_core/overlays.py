"""Poses and heatmaps drawn into pictures, and contact sheets of them. RGB in, an RGB copy out."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import cast

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from hrnet_core.geometry import FARTHEST, Float64, UInt8
from hrnet_core.images import check_pixels
from hrnet_core.skeleton import LEFT, RIGHT, Skeleton

Color = tuple[int, int, int]
SUBPIXEL = 4  # fractional bits of OpenCV's drawing coordinates
SHADE: Color = (20, 20, 20)
BOX: Color = (255, 255, 255)
PAPER, INK = (250, 250, 250), (30, 30, 30)


def draw_poses(
    image: UInt8,
    keypoints: ArrayLike,
    scores: ArrayLike | None,
    skeleton: Skeleton,
    threshold: float = 0.3,
    boxes_xywh: ArrayLike | None = None,
) -> UInt8:
    """A copy of image uint8 (H, W, 3) with limbs and keypoints, as thick as their person is large.

    keypoints (P, K, 2) in image px; scores (P, K), None draws all. Keypoints that score `threshold` or less,
    or are not finite, are left out, and so are their limbs. boxes_xywh (P, 4), one a person, are drawn too.

    DataError: no such image. ValueError: keypoints of another skeleton, or not as many boxes as people.
    """
    canvas = check_pixels(image, "image").copy()
    given = np.asarray(keypoints, np.float64)
    if given.size and given.shape[-2:] != (skeleton.num_keypoints, 2):
        named = f"(P, {skeleton.num_keypoints}, 2), x and y of {skeleton.name!r}"
        raise ValueError(f"keypoints must be {named}, got {given.shape}")
    points = given.reshape(-1, skeleton.num_keypoints, 2)
    shown = np.asarray((np.abs(points) < FARTHEST).all(axis=-1))  # False for NaN
    if scores is not None:
        shown &= np.asarray(scores).reshape(shown.shape) > threshold
    # The longer side of the box of what is seen, px.
    seen = (person[some] for person, some in zip(points, shown, strict=True))
    sizes = np.array([np.ptp(places, axis=0).max() if len(places) else 0.0 for places in seen])
    if boxes_xywh is not None:
        boxes = np.asarray(boxes_xywh, np.float64).reshape(-1, 4)
        if len(boxes) != len(points):
            raise ValueError(f"boxes_xywh must be one a person: {len(boxes)} boxes, {len(points)} people")
        _draw_boxes(canvas, boxes)
        # Tells more than the few keypoints that may be seen.
        sizes = np.where(_usable(boxes), boxes[:, 2:].max(axis=1), sizes)
    side = max(canvas.shape[:2])
    # To be seen where all of the picture is; but small people of a large one would be blots.
    least = np.where(sizes > 0, np.minimum(0.0025 * side, 0.03 * sizes), 0.0025 * side)
    widths = np.clip(0.014 * sizes, least, 0.02 * side)
    # The largest last: it is mostly the nearest, and its thick lines would hide a small one's anyway.
    for i in np.argsort(sizes, kind="stable"):
        _draw_person(canvas, points[i], shown[i], skeleton, float(widths[i]))
    return canvas


def color_line(skeleton: Skeleton) -> str:
    """What the colours of draw_poses say, as a sentence; nothing where they do not tell sides (a hand, a
    skeleton with colours of its own)."""
    sided = {LEFT, RIGHT} <= set(skeleton.palette) and not skeleton.colors
    return "The person's left is green, the right orange." if sided else ""


def draw_heatmaps(crop: UInt8, heatmaps: ArrayLike) -> UInt8:
    """A copy of crop uint8 (h, w, 3) under the strongest of heatmaps (K, H, W) at each place.

    A value of 1, the peak of a target, is dark red and nearly opaque; 0 leaves the crop as it is. DataError:
    no such crop. ValueError: heatmaps of several people, or one alone.
    """
    crop = check_pixels(crop, "crop")
    if np.ndim(heatmaps) != 3:
        raise ValueError(f"heatmaps must be (K, H, W) of one person, got {np.shape(heatmaps)}")
    height, width = crop.shape[:2]
    strongest = np.clip(np.asarray(heatmaps, np.float32).max(axis=0), 0, 1)
    # Cell (0, 0) lies on pixel (0, 0): cv2.resize would move everything by 1.5 px.
    factors = np.diag([width / strongest.shape[1], height / strongest.shape[0], 1.0])[:2]
    strongest = cv2.warpAffine(strongest, factors, (width, height), borderMode=cv2.BORDER_REPLICATE)
    colors = cv2.applyColorMap((strongest * 255).astype(np.uint8), cv2.COLORMAP_TURBO)[..., ::-1]
    opacity = 0.85 * np.sqrt(strongest)[..., None]
    blended: UInt8 = (crop * (1 - opacity) + colors * opacity + 0.5).astype(np.uint8)
    return blended


def side_by_side(left: UInt8, right: UInt8) -> UInt8:
    """Two images uint8 (h, w, 3) of one height in one, with 4 px of white between them."""
    return np.concatenate([left, np.full((len(left), 4, 3), 255, np.uint8), right], axis=1)


def tile(images: Sequence[UInt8], columns: int, labels: Sequence[str] = (), heading: str = "") -> UInt8:
    """A contact sheet: images uint8 (h, w, 3) of any sizes in rows of `columns`, each over its label.

    Columns are as wide as the widest image, rows as high as their highest; others stand in the middle. A
    label too long for its cell ends in "...". The heading stands above all, in as many lines as it takes.
    ValueError without images, or with labels for some only.
    """
    if not images or (labels and len(labels) != len(images)):
        raise ValueError(f"tile wants at least one image, a label for each: {len(images)}, {len(labels)}")
    columns = min(columns, len(images))
    width = max(image.shape[1] for image in images)
    heights = [max(i.shape[0] for i in images[n : n + columns]) for n in range(0, len(images), columns)]
    gap = max(4, width // 40)
    font = cast(ImageFont.FreeTypeFont, ImageFont.load_default(min(22, max(11, width // 18))))
    line = int(1.6 * font.size) if labels else 0
    across = columns * (width + gap) + gap
    letter = font.getlength(heading) / max(1, len(heading))
    said = textwrap.wrap(heading, max(1, int((across - 2 * gap) / max(1, letter))))
    above = int(1.6 * font.size) * len(said)
    size = (across, above + sum(heights) + len(heights) * (line + gap) + gap)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, text in enumerate(said):
        pen.text((gap, gap + i * int(1.6 * font.size)), text, fill=INK, font=font)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        left, top = gap + column * (width + gap), above + gap + sum(heights[:row]) + row * (line + gap)
        x, y = (width - image.shape[1]) // 2, (heights[row] - image.shape[0]) // 2
        sheet.paste(Image.fromarray(image), (left + x, top + y))
        if labels:
            text = _shorten(labels[i], width, font)
            pen.text((left, top + heights[row] + line // 5), text, fill=INK, font=font)
    return np.array(sheet)


def _draw_person(
    canvas: UInt8, points: Float64, shown: NDArray[np.bool_], skeleton: Skeleton, width: float
) -> None:
    limbs = [(a, b) for a, b in skeleton.limbs if shown[a] and shown[b]]
    palette = skeleton.palette
    # A dark rim keeps every colour readable on every ground.
    rim = max(1.0, 0.25 * width)
    for a, b in limbs:
        _line(canvas, points[a], points[b], SHADE, width + 2 * rim)
    for a, b in limbs:
        middle = (points[a] + points[b]) / 2
        _line(canvas, points[a], middle, palette[a], width)
        _line(canvas, middle, points[b], palette[b], width)
    for point, color in ((points[k], palette[k]) for k in np.flatnonzero(shown)):
        _dot(canvas, point, SHADE, 0.95 * width + rim)
        _dot(canvas, point, _lighter(color), 0.95 * width)


def _draw_boxes(canvas: UInt8, boxes_xywh: Float64) -> None:
    # Thinner than the thinnest limb, and not smoothed, which takes more pixels: in a crowd boxes would be all
    # that is seen.
    side = max(canvas.shape[:2])
    for x, y, w, h in boxes_xywh[_usable(boxes_xywh)]:
        width = max(1, round(min(0.0015 * side, 0.015 * max(w, h))))
        for color, thickness in ((SHADE, width + 2), (BOX, width)):
            start, end = _fixed((x, y)), _fixed((x + w, y + h))
            cv2.rectangle(canvas, start, end, color, thickness, cv2.LINE_8, SUBPIXEL)


def _usable(boxes_xywh: Float64) -> NDArray[np.bool_]:
    """(P,): False where a number is not finite or too far away."""
    return np.asarray((np.abs(boxes_xywh) < FARTHEST).all(axis=1))


def _line(canvas: UInt8, start: ArrayLike, end: ArrayLike, color: Color, width: float) -> None:
    cv2.line(canvas, _fixed(start), _fixed(end), color, max(1, round(width)), cv2.LINE_AA, SUBPIXEL)


def _dot(canvas: UInt8, center: ArrayLike, color: Color, radius: float) -> None:
    cv2.circle(canvas, _fixed(center), round(radius * 2**SUBPIXEL), color, -1, cv2.LINE_AA, SUBPIXEL)


def _fixed(point: ArrayLike) -> tuple[int, int]:
    x, y = np.rint(np.asarray(point, np.float64) * 2**SUBPIXEL).astype(int).tolist()
    return x, y


def _lighter(color: Color) -> Color:
    r, g, b = ((2 * channel + 255) // 3 for channel in color)
    return r, g, b


def _shorten(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
