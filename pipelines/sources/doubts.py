"""What looks wrong in a split though it parses: each doubt with the people who have it and its evidence.

Decided on the table of people alone. A doubt that most people of a split have is no doubt any more: whoever
reads the split is refused (`refuse_misread`), with the proof; validate lists the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import DataError
from hrnet_core.skeleton import Skeleton
from pipelines.sources.records import BOX_AREA, LARGEST, People, Split

FEW = 10
"""Fewer people than this are no evidence of how a whole file was written."""
NEAR = 0.02
"""Of the root of the box's area: keypoints nearer than this in the mean are two answers about one person."""
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Doubt:
    """One thing that looks wrong."""

    kind: str
    who: Mask
    """(N,) of the split's people"""
    evidence: str
    """What is seen, with figures, and what it does to training and AP."""
    proves: bool = True
    """Whether it is certain where most people have it."""

    @property
    def proven(self) -> bool:
        """Whether it is: whoever reads the split is refused."""
        return self.proves and bool(self.who.mean() > 0.5)


@dataclass(frozen=True, eq=False)
class Seen:
    """What doubts are decided on."""

    people: People
    """(N)"""
    sizes: NDArray[np.float64]
    """(N, 2) width and height of each person's picture; NaN where it is not known."""
    has_areas: bool
    """Whether the areas are the annotations' own."""

    @property
    def box_area(self) -> NDArray[np.float64]:
        """(N,) px²"""
        return self.people.stated_xywh[:, 2] * self.people.stated_xywh[:, 3]


def doubts_of(seen: Seen, skeleton: Skeleton, coordinates_checked: bool = False) -> list[Doubt]:
    """All doubts that somebody gives, the gravest first. coordinates_checked: the user says that people do
    stand in a part of the pictures; it is told then, and proves nothing."""
    if not len(seen.people):
        return []
    twice = _same_person_twice(seen)
    found = [
        _box_is_corners(seen),
        _coordinates_scaled(seen, coordinates_checked),
        _outside_picture(seen),
        _visible_at_origin(seen),
        twice,
        _left_right_exchanged(seen, skeleton),
        _outside_box(seen),
        _same_box(seen, twice.who),
        _area_impossible(seen),
        _area_is_box(seen),
    ]
    return [doubt for doubt in found if doubt.who.any()]


def seen_of(split: Split, people: People | None = None) -> Seen:
    """A split's usable people, or others on its photographs."""
    people = split.people if people is None else people
    return Seen(people, split.sizes_of(people), split.truth.has_areas)


def refuse_misread(file: str, doubts: Sequence[Doubt]) -> None:
    """DataError where most people prove that the file says something else than COCO's fields do."""
    for doubt in doubts:
        if doubt.proven:
            raise DataError(f"{file}: {doubt.evidence} (hrnet validate shows who.)")


def _box_is_corners(seen: Seen) -> Doubt:
    """x, y, w, h leaves the picture and x, y, x2, y2 holds the person. Where many do, those count too whose
    x, y, w, h stays inside: they stand up and left in their picture."""
    people = seen.people
    start, rest = people.stated_xywh[:, :2], people.stated_xywh[:, 2:]
    sizes = seen.sizes
    points, labelled = people.keypoints[..., :2], people.keypoints[..., 2] > 0
    near = (points >= start[:, None] - 1) & (points <= rest[:, None] + 1)
    held = (near.all(axis=2) | ~labelled).mean(axis=1) > 0.8
    corners = (rest > start).all(1) & (rest <= sizes + 1).all(1) & held
    who = corners & (start + rest > sizes + 1).any(1)
    beyond = int(who.sum())
    if who.mean() > 0.25:
        who = corners
    return Doubt(
        "box_is_corners",
        who,
        f"{who.sum():,} of {len(who):,} boxes hold their person as x, y, x2, y2, and {beyond:,} of them end "
        f"beyond the picture as x, y, width, height. Read as they stand, crops show too much and every AP "
        f"is too low: write width and height.",
    )


def _outside_picture(seen: Seen) -> Doubt:
    points, labelled = seen.people.keypoints[..., :2], seen.people.keypoints[..., 2] > 0
    sizes = seen.sizes[:, None]
    far = ((points < -0.02 * sizes) | (points > 1.02 * sizes)).any(axis=2) & labelled
    who = np.asarray(far.any(axis=1))
    return Doubt(
        "keypoints_outside_picture",
        who,
        f"{who.sum():,} of {len(who):,} people have labelled keypoints beyond their picture, "
        f"{far.sum():,} in all. No heatmap is drawn there and AP counts them as missed; where many do, the "
        f"coordinates are of a larger picture: multiply them to px of the stored one.",
    )


def _coordinates_scaled(seen: Seen, checked: bool) -> Doubt:
    """Nobody of many reaches beyond a part of the pictures: fractions, percent, or another size. What is
    around the centre of all of them (a mark on aligned pictures) has its size. A fixed camera whose people
    all pass above and left looks the same, and only who made the set can tell."""
    people = seen.people
    labelled = people.keypoints[..., 2:] > 0
    largest = np.where(labelled, people.keypoints[..., :2], 0).max(axis=1)
    lowest = np.where(labelled, people.keypoints[..., :2], LARGEST).min(axis=1)
    ends = (lowest / seen.sizes).min(axis=0), (largest / seen.sizes).max(axis=0)
    reach, centred = float(ends[1].max()), bool((np.mean(ends, axis=0) > 0.35).all())
    few = len(people) < FEW or len(np.unique(people.image_id)) < 3
    who = np.full(len(people), reach < 0.6 and not centred and not few)
    most = float(largest.max())
    unit, fractions = "px of a smaller picture", most <= 1.5
    if most <= 100:
        unit = "fractions from 0 to 1" if fractions else "percent or px of a smaller picture"
    way_out = "multiply keypoints, boxes and areas to px of the stored picture"
    if not fractions:
        way_out += (
            ". If people do stand there (a fixed camera; hrnet validate --page draws some), say so with "
            "--data.coordinates-checked, evaluate: --evaluate.coordinates-checked"
        )
    return Doubt(
        "coordinates_scaled",
        who,
        f"none of {len(people):,} people reaches beyond {reach:.0%} of the width or height of the picture; "
        f"the largest coordinate is {most:g}, as if they were {unit}. Crops would show the wrong place: "
        f"{way_out}.",
        proves=fractions or not checked,
    )


def _visible_at_origin(seen: Seen) -> Doubt:
    keypoints = seen.people.keypoints
    who = ((keypoints[..., 2] > 0) & (keypoints[..., :2] == 0).all(axis=2)).any(axis=1)
    return Doubt(
        "visible_at_origin",
        who,
        f"{who.sum():,} of {len(who):,} people have keypoints at exactly (0, 0) that are marked as labelled. "
        f"A network learns to look for them in the corner, and AP counts them as missed: write v = 0 there.",
    )


def _same_person_twice(seen: Seen) -> Doubt:
    """Twins stand beside each other once people are sorted by picture and the mean of their keypoints."""
    people = seen.people
    points, labelled = people.keypoints[..., :2], people.keypoints[..., 2] > 0
    mean = (points * labelled[..., None]).sum(axis=1) / np.maximum(labelled.sum(axis=1), 1)[:, None]
    order = np.lexsort((mean[:, 0], people.image_id))
    reach = NEAR * np.sqrt(np.maximum(seen.box_area, 1))
    who, copies = np.zeros(len(people), bool), np.zeros(len(people), bool)
    for step in (1, 2, 3):
        one, other = order[:-step], order[step:]
        both = labelled[one] & labelled[other]
        number = both.sum(axis=1)
        apart = (np.linalg.norm(points[one] - points[other], axis=2) * both).sum(axis=1)
        near = (apart <= reach[one] * number) & (number > 2) | (apart == 0) & (number > 0)
        twins = (people.image_id[one] == people.image_id[other]) & near
        who[one[twins]] = who[other[twins]] = copies[other[twins]] = True
    return Doubt(
        "same_person_twice",
        who,
        f"{who.sum():,} of {len(who):,} people stand more than once, with the keypoints of another of their "
        f"picture to the digit or nearly: {copies.sum():,} copies. They weigh more in training, and AP "
        f"counts all but one as missed: remove the copies.",
    )


def _left_right_exchanged(seen: Seen, skeleton: Skeleton) -> Doubt:
    """Of people who face us the left shoulder is on the right of the picture. Who shows the nose and both
    shoulders and hips faces us, nearly always; of real COCO four in five do by this rule."""
    nobody = Doubt("left_right_exchanged", np.zeros(len(seen.people), bool), "")
    names = list(skeleton.keypoints)
    pair = [n for n in ("left_shoulder", "right_shoulder", "left_hip", "right_hip", "nose") if n in names]
    if len(pair) < 5:
        return nobody
    left, right, left_hip, right_hip, nose = (seen.people.keypoints[:, names.index(n)] for n in pair)
    facing = np.all([point[:, 2] == 2 for point in (left, right, left_hip, right_hip, nose)], axis=0)
    wrong = facing & (left[:, 0] < right[:, 0]) & (left_hip[:, 0] < right_hip[:, 0])
    if facing.sum() < 2 * FEW or wrong.sum() < 0.8 * facing.sum():
        return nobody
    return Doubt(
        "left_right_exchanged",
        wrong,
        f"{wrong.sum():,} of {facing.sum():,} people who show nose, shoulders and hips have their left ones "
        f"on the left of the picture, as nobody who faces us has: left and right seem exchanged. A flip then "
        f"teaches the wrong side. Exchange the pairs, or the order of the names.",
        proves=False,
    )


def outside_box(people: People) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(N,) labelled keypoints further than a tenth of the box outside of it; all labelled ones."""
    corner, size = people.bbox_xywh[:, None, :2], people.bbox_xywh[:, None, 2:]
    labelled = people.keypoints[..., 2] > 0
    outside = (np.abs(people.keypoints[..., :2] - corner - size / 2) > 0.6 * size).any(axis=2)
    return (outside & labelled).sum(axis=1), labelled.sum(axis=1)


def _outside_box(seen: Seen) -> Doubt:
    outside, labelled = outside_box(seen.people)
    who = outside > labelled / 2
    return Doubt(
        "keypoints_outside_box",
        who,
        f"most keypoints of {who.sum():,} of {len(who):,} people lie outside their boxes: crops show "
        f"something else. Keypoints and boxes are px of the stored picture, a box is x, y of its upper left "
        f"corner, width and height. Numbers from 0 to 1, or of the box, must be multiplied or moved first; "
        f"a center must become a corner.",
    )


def _same_box(seen: Seen, twice: Mask) -> Doubt:
    """twice: people who are copies, whose boxes are no news."""
    people = seen.people
    rows = np.column_stack([people.image_id, people.stated_xywh])
    _, group, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    who = (counts[group.ravel()] > 1) & ~twice
    return Doubt(
        "same_box",
        who,
        f"{who.sum():,} of {len(who):,} people have the box of another of their picture and other keypoints. "
        f"A box is all that says who is meant: write each person's own.",
    )


def _area_impossible(seen: Seen) -> Doubt:
    area, box = seen.people.area, seen.box_area
    who = (area > 1.1 * box + 4) | (area < 0.005 * box)
    return Doubt(
        "area_impossible",
        who,
        f"{who.sum():,} of {len(who):,} areas are larger than the box, or less than 0.5 % of it. OKS divides "
        f"by the area: too large an area forgives every error, too small a one forgives none. Write the "
        f"outline's in px, or take the areas out: {BOX_AREA} x width x height is used then.",
    )


def refuse_misread_boxes(file: str, seen: Seen, flag: str) -> None:
    """DataError where most of a detector's boxes are corners, or fractions of the picture."""
    corners = _box_is_corners(seen).who
    fractions = np.asarray((seen.people.stated_xywh <= 1.5).all(axis=1))
    for who, what in ((corners, "x, y, x2, y2"), (fractions, "fractions from 0 to 1")):
        if who.mean() > 0.5:
            raise DataError(
                f"{file}: {who.sum():,} of {len(who):,} boxes are {what}, as they lie in their pictures. "
                f"{flag} takes x, y, width, height in px of the stored picture."
            )


def _area_is_box(seen: Seen) -> Doubt:
    box = seen.box_area
    same = np.abs(seen.people.area - box) <= 0.01 * box
    who = same if same.mean() > 0.95 and seen.has_areas else np.zeros(len(same), bool)
    return Doubt(
        "area_is_box",
        who,
        f"{who.sum():,} of {len(who):,} areas are width x height of the box. OKS divides by the area, and "
        f"that of a person's outline is about half of it: AP comes out too high (.71 where .62 is true, on "
        f"drawn people). Take the areas out: {BOX_AREA} x width x height is used then, and is near.",
        proves=False,
    )
