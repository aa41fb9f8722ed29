"""The work on a request: pictures decoded and cut, people through the network, answers.

The method is PosePredictor's: its `prepare` here, its `predict_crops` on a batch over all requests, its
`finish` for the answer.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from hrnet_core.errors import ImageError
from hrnet_core.images import ImageHeader, check_image, decode_checked, displayed
from hrnet_core.results import Poses
from serve.body import Upload
from serve.model import ServedModel
from serve.schemas import ImageInfo, Person, Problem, Result
from serve.settings import Limits

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext

    from hrnet_core.detector import Found, View
    from hrnet_core.predictor import Prepared


@dataclass(frozen=True)
class Decoded:
    """A picture, its people cut out for the model."""

    people: Prepared
    exif_rotated: bool
    warnings: list[str]
    image: NDArray[np.uint8] | None
    """(H, W, 3), kept only where it will be drawn on."""
    clock: tuple[float, float, float, float]
    """By time.perf_counter: decoding begun and ended, cutting begun and ended."""


@dataclass(frozen=True)
class Opened:
    """A decoded picture, its people not known yet."""

    image: NDArray[np.uint8]
    """(H, W, 3)"""
    exif_rotated: bool
    warnings: list[str]
    view: View
    """What the detector is to see."""
    clock: tuple[float, float]
    """By time.perf_counter: decoding begun and ended."""


@dataclass(frozen=True)
class Portion:
    """People of one request on their way into a batch."""

    model: ServedModel
    crops: NDArray[np.uint8]
    """(P, h, w, 3)"""
    trace: SpanContext | None = None
    """Of its request, where that is traced."""


@dataclass(frozen=True)
class Inferred:
    """What came back for a portion, or for all portions of a request."""

    keypoints: NDArray[np.float32]
    """(P, K, 2) crop px"""
    scores: NDArray[np.float32]
    """(P, K)"""
    started: float
    ended: float
    batches: tuple[SpanContext, ...] = ()
    """That it was part of, where they are traced."""


def inspect(upload: Upload, limits: Limits) -> ImageHeader:
    """A picture's header, after everything that can be judged without decoding a pixel. Problem names the
    field that is wrong."""
    with _named(upload.field):
        header = check_image(upload.data, limits.max_pixels)
    if header.frames > 1 and not limits.first_frame:
        raise Problem.of_field(
            upload.field,
            "several-frames",
            f"the {header.format} file holds several frames or pages, and which one is meant is not said. "
            f"Send one picture.",
        )
    return header


def decode(
    model: ServedModel, upload: Upload, header: ImageHeader, keep: bool, looks: bool
) -> Decoded | Opened:
    """Decode a picture as displayed and cut its people out. Problem names the field that is wrong.

    keep: its pixels, too. looks: where it comes without boxes, the detector is to find its people.
    """
    begun = time.perf_counter()
    with _named(upload.field):
        image, warnings = pixels_of(upload.data, header)
    decoded = time.perf_counter()
    turned = header.orientation != 1
    if looks and model.detector and upload.boxes_xywh is None:
        view = model.detector.view(image)
        return Opened(image, turned, warnings, view, (begun, decoded))
    if upload.boxes_xywh is not None:
        _refuse_outside(upload.boxes_xywh, image, upload.field.replace("image", "boxes"))
    (people,) = model.predictor.prepare(image, upload.boxes_xywh)
    clock = (begun, decoded, decoded, time.perf_counter())
    return Decoded(people, turned, warnings, image if keep else None, clock)


def cut(model: ServedModel, opened: Opened, found: Found, warnings: list[str], keep: bool) -> Decoded:
    """Cut out the people that were found in a picture. keep: its pixels, too."""
    begun = time.perf_counter()
    (people,) = model.predictor.prepare(opened.image, *found)
    clock = (*opened.clock, begun, time.perf_counter())
    told = [*opened.warnings, *warnings]
    people = replace(people, boxes_source="detector")
    return Decoded(people, opened.exif_rotated, told, opened.image if keep else None, clock)


@contextlib.contextmanager
def _named(field: str) -> Iterator[None]:
    """An ImageError as the Problem of a field."""
    try:
        yield
    except ImageError as error:
        slugs = {"too_large": "too-many-pixels", "truncated": "truncated-picture"}
        slugs["unsupported_format"] = "media-type"
        slug = slugs.get(error.reason, "not-a-picture")
        raise Problem.of_field(field, slug, str(error), reason=error.reason) from None


def pixels_of(data: bytes, header: ImageHeader) -> tuple[NDArray[np.uint8], list[str]]:
    """A picture as displayed, and what libjpeg says of data that it could not follow and decoded all the
    same.

    OpenCV tells nobody, so that JPEGs are decoded strictly first: to the same pixels, which a test holds.
    About half of what falls on a file's data is noticed; the rest is data that JPEG allows.
    """
    warnings = []
    if header.format == "JPEG":
        try:
            stored = simplejpeg.decode_jpeg(data, "RGB")
            if stored.shape == (header.height, header.width, 3):
                return displayed(stored, header.orientation), []
        except ValueError as error:
            why = str(error).removeprefix("Corrupt JPEG data: ")
            what = f"The JPEG data are damaged ({why}): parts of the picture may be missing or displaced."
            warnings.append(what)
    return decode_checked(data, header, apply_exif=True), warnings


def _refuse_outside(boxes_xywh: NDArray[np.float32], image: NDArray[np.uint8], boxes_field: str) -> None:
    height, width = image.shape[:2]
    x, y, w, h = boxes_xywh.T
    outside = np.flatnonzero((x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0))
    if len(outside):
        what = f"lies outside of the picture, which is displayed as {width} x {height} px."
        raise Problem.of_field(f"{boxes_field}[{outside[0]}]", "invalid-boxes", what)


def count_people(portions: Sequence[Portion]) -> int:
    """Size of a batch, for @serve.batch."""
    return sum(len(portion.crops) for portion in portions)


def infer(portions: Sequence[Portion], batch_size: int) -> list[Inferred | Exception]:
    """A batch through the network: a result for each portion, in order.

    Portions of different models (while one takes the other's place) run one model after the other. Where a
    batch fails, its portions are tried one by one, so that each fails for its own sake only.
    """
    models = list({id(portion.model): portion.model for portion in portions}.values())
    if len(models) > 1:
        apart = {id(m): iter(infer([p for p in portions if p.model is m], batch_size)) for m in models}
        return [next(apart[id(portion.model)]) for portion in portions]
    (model,) = models
    started = time.perf_counter()
    try:
        crops = np.concatenate([portion.crops for portion in portions])
        keypoints, scores = model.predictor.predict_crops(crops, model.flip_test, batch_size)
        if not (np.isfinite(keypoints).all() and np.isfinite(scores).all()):
            raise RuntimeError("the network returned numbers that are not finite")
    except Exception as error:
        if len(portions) == 1:
            return [error]
        return [infer([portion], batch_size)[0] for portion in portions]
    ended = time.perf_counter()
    cuts = np.cumsum([len(portion.crops) for portion in portions])[:-1]
    shares = zip(np.split(keypoints, cuts), np.split(scores, cuts), strict=True)
    return [Inferred(*share, started, ended) for share in shares]


def result_of(decoded: Decoded, poses: Poses) -> Result:
    """The answer for one picture. Rounded to 1e-4: far below what is measured."""
    height, width = poses.orig_shape
    found = poses.boxes_source == "detector"
    rows = zip(
        poses.boxes.xywh.astype(np.float64).round(4).tolist() if found else poses.boxes.xywh.tolist(),
        poses.boxes.conf.astype(np.float64).round(4).tolist() if found else [None] * len(poses),
        poses.scores.round(4).tolist(),
        poses.keypoints.data.astype(np.float64).round(4).tolist(),
        strict=True,
    )
    return Result(
        image=ImageInfo(width=width, height=height, exif_rotated=decoded.exif_rotated),
        boxes_source="request" if poses.boxes_source == "given" else poses.boxes_source,
        persons=[
            Person(bbox=box, box_score=box_score, score=score, keypoints=keypoints)
            for box, box_score, score, keypoints in rows
        ],
        warnings=decoded.warnings,
    )
