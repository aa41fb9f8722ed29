"""The work on a request: pictures decoded and cut, people through the network, answers."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import ImageError
from serve.body import Picture
from serve.model import Model
from serve.schemas import ImageInfo, Limits, Person, Problem, Result


@dataclass(frozen=True)
class Crops:
    """People on their way into a batch."""

    model: Model
    crops: NDArray[np.uint8]
    """(P, h, w, 3)"""


@dataclass(frozen=True)
class Found:
    """What came back for them."""

    keypoints: NDArray[np.float32]
    """(P, K, 2) crop px"""
    scores: NDArray[np.float32]
    """(P, K)"""
    started: float
    ended: float


@dataclass(frozen=True)
class Prepared:
    """A decoded picture, cut up for its model."""

    model: Model
    info: ImageInfo
    source: str
    boxes_xywh: NDArray[np.float32]
    crops: NDArray[np.uint8]
    image_to_crop: NDArray[np.float64]
    image: NDArray[np.uint8] | None
    """Kept only where it will be drawn on."""


def count_people(items: list[Crops]) -> int:
    """Size of a batch, for @serve.batch."""
    return sum(len(item.crops) for item in items)


def prepare(model: Model, picture: Picture, limits: Limits, keep: bool) -> Prepared:
    """Decode a picture as displayed and cut its people out. Problem names the field that is wrong."""
    from hrnet_core.geometry import crop_people
    from hrnet_core.images import check_image, decode_checked

    try:
        header = check_image(picture.data, limits.max_pixels)
        if header.frames > 1 and not limits.first_frame:
            raise Problem(
                "several-frames",
                f"{picture.field}: the {header.format} file holds several frames or pages, and which one is "
                f"meant is not said. Send one picture.",
                field=picture.field,
            )
        image = decode_checked(picture.data, header, apply_exif=True)
    except ImageError as error:
        slug = {"too_large": "too-many-pixels", "truncated": "truncated-picture"}.get(
            error.reason, "not-a-picture"
        )
        raise Problem(slug, f"{picture.field}: {error}", field=picture.field, reason=error.reason) from None
    height, width = image.shape[:2]
    boxes = picture.boxes_xywh
    if boxes is None:
        boxes = np.array([[0, 0, width, height]], np.float32)
    _refuse_outside(boxes, width, height, picture.field)
    image_to_crop = model.predictor.image_to_crop(boxes)
    return Prepared(
        model,
        ImageInfo(width=width, height=height, exif_rotated=header.orientation != 1),
        "whole_image" if picture.boxes_xywh is None else "request",
        boxes,
        crop_people(image, image_to_crop, model.predictor.spec.input_size),
        image_to_crop,
        image if keep else None,
    )


def _refuse_outside(boxes_xywh: NDArray[np.float32], width: int, height: int, image_field: str) -> None:
    x, y, w, h = boxes_xywh.T
    outside = np.flatnonzero((x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0))
    if len(outside):
        field = f"{image_field.replace('image', 'boxes')}[{outside[0]}]"
        raise Problem(
            "invalid-boxes",
            f"{field}: lies outside of the picture, which is displayed as {width} x {height} px.",
            field=field,
        )


def infer(items: list[Crops], batch_size: int) -> list[Found | Exception]:
    """A batch through the network: a result for each item, in order.

    Items of different models (while one takes the other's place) run one model after the other. Where a
    batch fails, its items are tried one by one, so that an item fails for its own sake only.
    """
    models = list({id(item.model): item.model for item in items}.values())
    if len(models) > 1:
        apart = {id(m): iter(infer([i for i in items if i.model is m], batch_size)) for m in models}
        return [next(apart[id(item.model)]) for item in items]
    started = time.perf_counter()
    try:
        keypoints, scores = models[0].predictor.predict_crops(
            np.concatenate([item.crops for item in items]),
            flip_test=models[0].flip_test,
            batch_size=batch_size,
        )
        if not (np.isfinite(keypoints).all() and np.isfinite(scores).all()):
            raise RuntimeError("the network returned numbers that are not finite")
    except Exception as error:
        if len(items) == 1:
            return [error]
        return [infer([item], batch_size)[0] for item in items]
    ended = time.perf_counter()
    cuts = np.cumsum([len(item.crops) for item in items])[:-1]
    return [
        Found(k, s, started, ended)
        for k, s in zip(np.split(keypoints, cuts), np.split(scores, cuts), strict=True)
    ]


def place(pictures: list[Prepared], found: Found) -> list[Result]:
    """Keypoints from crops into their pictures, as answers. Rounded to 1e-4: far below what is measured."""
    from hrnet_core.geometry import place_in_image
    from hrnet_core.oks import rescore

    cuts = np.cumsum([len(p.crops) for p in pictures])[:-1]
    results = []
    for picture, keypoints, scores in zip(
        pictures, np.split(found.keypoints, cuts), np.split(found.scores, cuts), strict=True
    ):
        points = np.dstack([place_in_image(keypoints, picture.image_to_crop), scores]).astype(np.float64)
        person_scores = rescore(scores, np.ones(len(scores)))
        persons = [
            Person(bbox=box, score=score, keypoints=person)
            for box, score, person in zip(
                picture.boxes_xywh.tolist(),
                person_scores.round(4).tolist(),
                points.round(4).tolist(),
                strict=True,
            )
        ]
        results.append(Result(image=picture.info, boxes_source=picture.source, persons=persons))
    return results
