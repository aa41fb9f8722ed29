"""The page of `hrnet validate`: every kind of finding, with examples drawn into their pictures."""

from __future__ import annotations

import html
import itertools
from pathlib import Path

import cv2
import numpy as np

from hrnet_core.images import encode_jpeg
from hrnet_core.overlays import color_line, draw_poses
from hrnet_core.skeleton import Skeleton
from pipelines.pages.frame import picture, section, table, tiles, write_page
from pipelines.sources.findings import WAY_OUT, CheckedSplit, Finding, Validation
from pipelines.sources.photos import open_photo
from pipelines.sources.records import People, Photo, Rejection

DRAWN = 2
"""Pictures shown of each kind."""
LISTED = 20
"""Rows shown of each kind."""
LONGEST = 800
"""px that a shown picture has at most."""


def write_findings(page: str | Path, found: Validation, skeleton: Skeleton, max_pixels: int) -> None:
    """One HTML file."""
    verdict = "This set is not good as it is" if found.fatal else "This set is good"
    people = "; ".join(f"{c.split.name}: {c.people:,} people on {c.photos:,} pictures" for c in found.splits)
    files = "; ".join(c.split.annotation_file for c in found.splits)
    why = [f"<p>{html.escape(text)}</p>" for text in found.fatal or found.good]
    parts = [section("Why" if found.fatal else "What that means", "", *why)]
    for checked in found.splits:
        groups = checked.findings()
        parts.append(tiles((f"{len(g.rows):,}", g.kind, f"{checked.split.name}: {g.fate}") for g in groups))
        parts += [_finding(checked, group, skeleton, max_pixels) for group in groups if group.matters]
        if repaired := checked.split.repaired:
            rows = [(kind, f"{number:,}", WAY_OUT[kind]) for kind, number in sorted(repaired.items())]
            title = f"{checked.split.name}: repaired"
            parts.append(section(title, "Read as they are meant.", table(rows, ("kind", "times", "what"))))
    write_page(page, verdict, people, files, *parts)


def _finding(checked: CheckedSplit, group: Finding, skeleton: Skeleton, max_pixels: int) -> str:
    """A section: how many, what it does, the way out, examples drawn, rows."""
    photos = {photo.image_id: photo for photo in checked.split.photos}
    shown = (
        _drawn(photos[row.image_id], checked.split.people, row, skeleton, max_pixels)
        for row in group.rows[:LISTED]
        if row.image_id in photos
    )
    drawn = "".join(itertools.islice(filter(None, shown), DRAWN))
    if drawn:
        about = f"Labelled keypoints, and the boxes as they are read. {color_line(skeleton)}"
        drawn = f'<p class="quiet">{html.escape(about)}</p><div class="photos">{drawn}</div>'
    rows = [(r.file, r.ann_id, f"{r.people:,}", r.detail) for r in group.rows[:LISTED]]
    more = f"and {len(group.rows) - LISTED:,} more" if len(group.rows) > LISTED else ""
    return section(
        f"{checked.split.name}: {group.kind}",
        f"{len(group.rows):,} rows, {group.people:,} people; {group.fate}. Way out: {WAY_OUT[group.kind]}",
        f"<p>{html.escape(group.evidence)}</p>",
        drawn,
        table(rows, ("file", "annotation", "people", "detail")),
        html.escape(more),
    )


def _drawn(photo: Photo, people: People, row: Rejection, skeleton: Skeleton, max_pixels: int) -> str:
    """The picture of a row as HTML, with the person, or everyone where the row is of the picture; nothing
    where it cannot be opened."""
    opened = open_photo(photo, max_pixels)
    if isinstance(opened, Rejection):
        return ""
    image = opened[0]
    factor = min(1.0, LONGEST / max(image.shape[:2]))
    small = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    people = people[people.image_id == photo.image_id]
    if row.ann_id is not None:
        people = people[people.ann_id == row.ann_id]
    labelled = (people.keypoints[..., 2] > 0).astype(float)
    places, boxes = people.keypoints[..., :2] * factor, people.stated_xywh * factor
    # One after the other: a box that is wrong would say how thick limbs are, and small people be blots.
    boxed = draw_poses(
        np.asarray(small, np.uint8), places, np.zeros_like(labelled), skeleton, boxes_xywh=boxes
    )
    shown = draw_poses(boxed, places, labelled, skeleton)
    caption = row.file if row.ann_id is None else f"{row.file}, annotation {row.ann_id}"
    return f"<div><h3>{html.escape(caption)}</h3>{picture(encode_jpeg(shown, 85), 'jpeg', caption)}</div>"
