"""One drawn picture and its COCO annotations."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.drawn.body import pose_figure
from pipelines.drawn.chance import pick
from pipelines.drawn.flat import add_texture
from pipelines.drawn.looks import sample_body
from pipelines.drawn.person import Painted, View, look_at, paint_person
from pipelines.drawn.scenes import Scene, paint_scene
from pipelines.drawn.stances import FAMILIES, sample_pose
from pipelines.drawn.things import Things, paint_occluder, paint_seat
from pipelines.drawn.visibility import HIDDEN, VISIBLE, pixels_of

FIRST_ID = {"train2017": 1_000_000, "val2017": 9_000_000}
"""Of the pictures of a split; annotation ids are picture id * 100 + a number from 1."""
SPLITS = tuple(FIRST_ID)
SIZES = ((640, 480), (640, 427), (640, 480), (480, 640), (427, 640), (500, 375), (480, 360), (576, 432))
MIN_HEIGHT = 44.0
"""A smaller person (stature in px) gets no keypoints, as in COCO."""
BOX_REACH = 0.06
"""A hidden keypoint this far (share of the box's longer side) outside the seen box is v = 0."""
ID_STEP = 32
"""The buffer of ids holds number * ID_STEP + part of the person at each pixel; 0 is no person."""


@dataclass(frozen=True)
class DrawnPerson:
    """One annotation of a picture: a person, or a crowd."""

    keypoints: NDArray[np.float32]
    """float32 (17, 2) picture px, also where v is 0"""
    visible: NDArray[np.int64]
    """int64 (17,) COCO's 0/1/2"""
    number: int
    """ids // ID_STEP of this person's pixels"""
    window: tuple[slice, slice]
    """Rows and columns of `ids` outside of which no pixel is this person's"""
    painted: Painted | None
    """None: a crowd"""

    @property
    def crowd(self) -> bool:
        return self.painted is None


@dataclass(frozen=True)
class Drawing:
    """One finished picture and its truth."""

    picture: NDArray[np.uint8]
    """uint8 (h, w, 3) RGB"""
    ids: NDArray[np.uint16]
    """uint16 (h, w), see ID_STEP"""
    people: tuple[DrawnPerson, ...]


def draw_picture(seed: int, split: str, index: int) -> Drawing:
    """Picture `index` of a split. Depends on its arguments only."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, SPLITS.index(split), index]))
    width, height = SIZES[int(rng.integers(len(SIZES)))]
    scene = paint_scene(rng, width, height)
    ids = np.zeros((height, width), np.uint16)
    drawn: list[DrawnPerson] = []
    for kind, tall, x in _cast(rng, width, height, scene.indoor):
        number = len(drawn) + 1
        if kind == "thing":
            foot = min(_foot(scene, tall, 0.95), height * 1.1)
            paint_occluder(rng, Things(scene.picture, ids), x, foot, tall, scene.indoor)
        elif kind == "crowd":
            for _ in range(int(rng.integers(5, 11))):
                one, aside = tall * rng.uniform(0.85, 1.15), rng.normal(0, 2.2 * tall)
                _place_person(rng, scene, ids, number, one, x + aside)
            nobody = np.zeros((17, 2), np.float32), np.zeros(17, np.int64)
            drawn.append(DrawnPerson(*nobody, number, (slice(0, height), slice(0, width)), None))
        elif (painted := _place_person(rng, scene, ids, number, tall, x)) is not None:
            drawn.append(DrawnPerson(painted.keypoints, painted.seen, number, painted.window, painted))
    finished = tuple(_judge(person, ids) for person in drawn)
    return Drawing(_develop(rng, scene.picture), ids, finished)


def _cast(rng: np.random.Generator, width: int, height: int, indoor: bool) -> list[tuple[str, float, float]]:
    """Who and what is in the picture, far to near: (kind, stature in px, x of the foot)."""
    count = int(pick(rng, "0123456", (0.04, 0.34, 0.28, 0.18, 0.09, 0.04, 0.03)))
    largest = min(340.0, 0.82 * height) * (1.0 if count < 3 else 0.85 if count < 5 else 0.62)
    cast = []
    # One slot each across the picture, so that people overlap without covering each other.
    slots = (rng.permutation(count) + 0.5 + rng.uniform(-0.36, 0.36, count)) / max(count, 1)
    for slot in slots:
        tall = math.exp(rng.uniform(math.log(max(90.0, 0.4 * largest)), math.log(largest)))
        cast.append(("person", tall, float(np.clip(slot, 0.03, 0.97)) * width))
    if rng.random() < 0.09 and not indoor:
        cast.append(("crowd", rng.uniform(30, 46), rng.uniform(0.15, 0.85) * width))
    if rng.random() < 0.2 and not indoor:
        for _ in range(int(rng.integers(1, 4))):
            cast.append(("person", rng.uniform(22, MIN_HEIGHT), rng.uniform(0.05, 0.95) * width))
    if count and rng.random() < 0.22:
        # Beside or before someone, a step nearer than they are.
        _, tall, x = cast[int(rng.integers(count))]
        cast.append(("thing", tall * rng.uniform(1.02, 1.15), x + rng.normal(0, 0.3 * tall)))
    return sorted(cast, key=lambda item: item[1])


def _foot(scene: Scene, tall: float, eye: float) -> float:
    """Row of the ground below someone of `tall` px, seen by a camera at `eye` of that stature."""
    return max(scene.horizon + eye * tall, scene.ground + 0.04 * tall)


def _place_person(
    rng: np.random.Generator, scene: Scene, ids: NDArray[np.uint16], number: int, tall: float, x: float
) -> Painted | None:
    """Sample someone, paint them with their shadow and seat. None when nothing of them is inside."""
    height, width = ids.shape
    body = sample_body(rng)
    family = pick(rng, tuple(FAMILIES), [share for share, _ in FAMILIES.values()])
    figure = pose_figure(body, sample_pose(rng, family))
    yaw = _sample_yaw(rng)
    turn = look_at(yaw, rng.uniform(-2, 9), rng.normal(0, 2.0))
    foot = _foot(scene, tall, rng.uniform(0.86, 1.04))
    view = View(turn, tall, (x, foot), rng.uniform(3.5, 8.0))
    painted = paint_person(body, figure, view, (width, height), scene.light, scene.ambient)
    if painted is None:
        return None
    _paint_shadow(scene, painted, x, foot, tall)
    if family == "sit":
        hips = view.project(np.stack([figure.points["left_hip"], figure.points["right_hip"]]))
        seat = float(hips[:, 1].mean()) + 0.06 * tall
        things, turned = Things(scene.picture, ids), math.sin(math.radians(yaw))
        paint_seat(rng, things, float(hips[:, 0].mean()), seat, foot, tall, turned)
    area = scene.picture[painted.window]
    cv2.copyTo(painted.color, painted.part, area)
    np.copyto(ids[painted.window], painted.part + np.uint16(number * ID_STEP), where=painted.part > 0)
    return painted


YAWS = {
    "front": (0.46, 0, 25),
    "three-quarter": (0.29, 25, 65),
    "side": (0.13, 65, 105),
    "back": (0.12, 105, 180),
}
"""Share of people, and degrees from and to."""


def _sample_yaw(rng: np.random.Generator) -> float:
    """Degrees, `look_at`: mostly towards us."""
    _, low, high = YAWS[pick(rng, tuple(YAWS), [share for share, *_ in YAWS.values()])]
    return float(rng.uniform(low, high)) * (1 if rng.random() < 0.5 else -1)


def _paint_shadow(scene: Scene, painted: Painted, x: float, foot: float, tall: float) -> None:
    """A soft dark patch below the feet; in the sun also the shape of the person along the ground."""
    height, width = scene.picture.shape[:2]
    reach = 0.9 if scene.sunny else 0.3
    left, right = max(0, int(x - reach * tall)), min(width, int(x + reach * tall))
    top, bottom = max(0, int(foot - 0.3 * tall)), min(height, int(foot + 0.12 * tall))
    if right - left < 4 or bottom - top < 4:
        return
    dark = np.zeros((bottom - top, right - left), np.uint8)
    cv2.ellipse(
        dark, (int(x) - left, int(foot) - top), (int(0.17 * tall), int(0.035 * tall) + 1), 0, 0, 360, 110, -1
    )
    if scene.sunny:
        slant = -0.75 if scene.light[0] > 0 else 0.75
        flat = 0.22
        # Picture -> shadow: rows shrink towards the foot, columns slide with the height above it.
        warp = np.array([[1, -slant, slant * foot], [0, flat, foot * (1 - flat)]], np.float32)
        move_in = np.array([[1, 0, painted.left], [0, 1, painted.top], [0, 0, 1]], np.float32)
        move_out = np.array([[1, 0, -left], [0, 1, -top], [0, 0, 1]], np.float32)
        warp = (move_out @ np.vstack([warp, [0, 0, 1]]) @ move_in)[:2]
        mask = (painted.part > 0).astype(np.uint8) * np.uint8(120)
        dark = np.maximum(dark, cv2.warpAffine(mask, warp, (right - left, bottom - top)))
    size = max(3, int(0.03 * tall)) | 1
    dark = cv2.blur(dark, (size, size))
    area = scene.picture[top:bottom, left:right]
    area[:] = cv2.multiply(area, cv2.merge([255 - dark] * 3), scale=1 / 255)


def _develop(rng: np.random.Generator, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The camera: a little blur, exposure, tint and noise."""
    soft = cv2.GaussianBlur(picture, (3, 3), rng.uniform(0.55, 0.9))
    gain = rng.normal(1, 0.06) * (1 + rng.normal(0, 0.025, 3))
    tinted = cv2.transform(soft, np.column_stack([np.diag(gain), np.full(3, rng.normal(0, 5))]))
    picture = np.asarray(tinted, np.uint8)
    add_texture(rng, picture, "grain", rng.uniform(1.0, 4.5))
    return picture


def _judge(person: DrawnPerson, ids: NDArray[np.uint16]) -> DrawnPerson:
    """COCO's v from what the finished picture shows."""
    painted = person.painted
    if painted is None:
        return person
    inside, pixel = pixels_of(person.keypoints, ids.shape)
    here = ids[pixel] // ID_STEP == person.number
    visible = np.where(here | (person.visible != VISIBLE), person.visible, HIDDEN)
    mask, (x, y, wide, high) = _seen(person, ids)
    reach = BOX_REACH * max(wide, high)
    low, far = np.array([x, y]) - reach, np.array([x + wide, y + high]) + reach
    near = np.all((person.keypoints >= low) & (person.keypoints <= far), axis=1)
    visible = np.where(inside & near, visible, 0)
    shown = np.count_nonzero(mask) / np.count_nonzero(painted.part)
    if painted.view.scale < MIN_HEIGHT or shown < 0.15 or np.count_nonzero(visible == VISIBLE) < 2:
        visible = np.zeros(17, np.int64)
    return replace(person, visible=visible)


def _seen(
    person: DrawnPerson, ids: NDArray[np.uint16]
) -> tuple[NDArray[np.bool_], tuple[int, int, int, int]]:
    """What is seen of a person: mask inside its tight box, and the box (x, y, w, h); empty: all 0."""
    rows, columns = person.window
    mask = ids[person.window] // ID_STEP == person.number
    x, y, wide, high = cv2.boundingRect(mask.view(np.uint8))
    return mask[y : y + high, x : x + wide], (x + columns.start, y + rows.start, wide, high)


def annotate(drawing: Drawing, image_id: int) -> list[dict[str, Any]]:
    """COCO annotations of one picture; people of whom nothing is seen are left out."""
    annotations: list[dict[str, Any]] = []
    for person in drawing.people:
        mask, bbox = _seen(person, drawing.ids)
        if mask.size == 0:
            continue
        labelled = person.visible > 0
        keypoints = np.column_stack([np.round(person.keypoints.astype(np.float64), 2), person.visible])
        annotations.append(
            {
                "id": image_id * 100 + len(annotations) + 1,
                "image_id": image_id,
                "category_id": 1,
                "iscrowd": int(person.crowd),
                "segmentation": (
                    _run_lengths(mask, bbox, drawing.ids.shape) if person.crowd else _polygons(mask, bbox)
                ),
                "area": int(np.count_nonzero(mask)),
                "bbox": list(bbox),
                "num_keypoints": int(labelled.sum()),
                "keypoints": np.where(labelled[:, None], keypoints, 0).ravel().tolist(),
            }
        )
    return annotations


def _polygons(mask: NDArray[np.bool_], bbox: tuple[int, int, int, int]) -> list[list[float]]:
    """Outlines of the mask in picture px, along the edges of its pixels (corner of a pixel: integer)."""
    # Grown by one row and column, the outline through pixel centres is the outline along pixel edges.
    patch = np.pad(mask.view(np.uint8), 1)
    grown = cv2.dilate(patch, np.ones((2, 2), np.uint8), anchor=(1, 1))
    outlines, _ = cv2.findContours(grown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = []
    for outline in outlines:
        simple = cv2.approxPolyDP(outline, 0.6, True)
        corners = (simple if len(simple) > 2 else outline)[:, 0] + (bbox[0] - 1, bbox[1] - 1)
        polygons.append(corners.ravel().astype(float).tolist())
    return polygons


def _run_lengths(
    mask: NDArray[np.bool_], bbox: tuple[int, int, int, int], shape: tuple[int, int]
) -> dict[str, Any]:
    """COCO's uncompressed RLE: runs down the columns, the first run counts zeros."""
    x, y, width, height = bbox
    whole = np.zeros(shape, bool)
    whole[y : y + height, x : x + width] = mask
    flat = whole.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(ends, prepend=0, append=flat.size).tolist()
    return {"size": list(shape), "counts": [0, *counts] if flat[0] else counts}
