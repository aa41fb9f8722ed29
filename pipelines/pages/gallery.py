"""A dataset to look at: sheets of its crops with keypoints and heatmaps, what was left out, distributions,
and one self-contained HTML page that holds them all. The same pictures whenever the digest is the same.
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hrnet_core.augment import keypoints_in_view
from hrnet_core.errors import ImageError
from hrnet_core.geometry import FARTHEST, box_to_center_scale
from hrnet_core.images import encode_jpeg
from hrnet_core.locations import is_uri, open_folder
from hrnet_core.overlays import INK, draw_heatmaps, draw_poses, side_by_side, tile
from hrnet_core.skeleton import Skeleton
from pipelines.pages.dataset import write_dataset_page, write_figures
from pipelines.shards.manifest import Manifest
from pipelines.shards.rows import decode_rows, read_row_group
from pipelines.sources.annotations import ALL, TO_CROP, read_annotations
from pipelines.sources.layout import locate
from pipelines.sources.photos import open_picture
from pipelines.sources.records import LEFT_OUT_AS_PUBLISHED
from pipelines.storage.files import is_file, join, write_whole

Picture = NDArray[np.uint8]
Address = tuple[int, int, int]
"""Shard, row group and row of a person: the same in every view."""
PEOPLE = 16
"""People of a contact sheet, spread evenly over the split."""
VIEWED_PEOPLE = 6
"""People of the sheet that has their views side by side."""
VIEWS = 8
"""Views that get a sheet; the figures count all."""
REJECTED = 4
"""Pictures of each reason, those that cost the most people first."""
HEIGHT = 256
"""Crops smaller than this are enlarged by a whole factor to about this many px."""
RED = (255, 80, 60)


def write_gallery(
    manifest: Manifest, card: Mapping[str, Any], folder: str, coco: str | None
) -> tuple[str, list[str]]:
    """Pictures and index.html in `folder`; returns the page and the pictures. OSError where they cannot be
    written.

    card: of inspect_shards.make_card. coco: the root with the photos of what was left out, if at hand.
    Paths or URIs.
    """
    views, left_out = [], []
    for split in manifest.splits:
        addresses, variants = spread_rows(manifest, split, PEOPLE), manifest.variants(split)
        for variant in range(min(variants, VIEWS)):
            name = f"{split}-v{variant}" if variant else split
            title = f"{split}, view {variant}" if variant else f"{split}, plain view"
            views.append(_write(folder, name, title, view_sheet(manifest, split, variant, addresses)))
        if variants > 1:
            title = f"{split}, the views of {min(len(addresses), VIEWED_PEOPLE)} people"
            views.append(_write(folder, f"{split}-views", title, views_sheet(manifest, split, addresses)))
    rejected = heaviest_rejections(manifest)
    if rejected and coco is not None:
        recipe = manifest.recipe
        sheet = rejected_sheet(rejected, coco, recipe.settings.max_pixels, recipe.skeleton)
        left_out.append(_write(folder, "rejected", "left out", sheet))
    pictures = {"figures": write_figures(card, folder), "views": views, "rejected": left_out}
    page = join(folder, "index.html")
    write_dataset_page(page, card, pictures, rejected)
    return page, [file for _, file in chain(*pictures.values())]


def _write(folder: str, name: str, title: str, picture: Picture) -> tuple[str, str]:
    file = join(folder, f"{name}.jpg")
    write_whole(file, encode_jpeg(picture, 90))
    return title, file


# ---------------------------------------------------------------------------------- people


def spread_rows(manifest: Manifest, split: str, count: int) -> list[Address]:
    """Of up to `count` people, evenly spread over the split."""
    groups = manifest.row_groups(split)
    starts = np.cumsum([0, *groups.values()])
    count = min(count, int(starts[-1]))
    rows = ((np.arange(count) + 0.5) * starts[-1] / count).astype(int)
    of = np.searchsorted(starts, rows, side="right") - 1
    names = list(groups)
    return [(*names[g], row) for g, row in zip(of.tolist(), (rows - starts[of]).tolist(), strict=True)]


def read_rows(
    manifest: Manifest, split: str, variant: int, addresses: Sequence[Address]
) -> dict[str, NDArray[Any]]:
    """Rows at `addresses` as decode_rows gives them, `images` being the views' own crops. One row group is
    in memory at a time."""
    wanted = defaultdict(list)
    for shard, group, row in addresses:
        wanted[shard, group].append(row)
    tables = [
        read_row_group(manifest, split, shard, group, variant=variant).take(pa.array(rows))
        for (shard, group), rows in wanted.items()
    ]
    return decode_rows(pa.concat_tables(tables), manifest)


def view_sheet(manifest: Manifest, split: str, variant: int, addresses: Sequence[Address]) -> Picture:
    """Of each person the crop with its keypoints beside the crop under its heatmaps."""
    rows = read_rows(manifest, split, variant, addresses)
    skeleton = manifest.recipe.skeleton
    pairs = []
    for index, pose in enumerate(annotated(rows, skeleton)):
        heat = draw_heatmaps(enlarged(rows["images"][index])[0], rows["heatmaps"][index])
        pairs.append(side_by_side(pose, heat))
    turns = _turns(rows, manifest)
    return tile(pairs, 4, [_label(rows, index, turn) for index, turn in enumerate(turns)])


def views_sheet(manifest: Manifest, split: str, addresses: Sequence[Address]) -> Picture:
    """The views of each person side by side, with the keypoints as the view has them."""
    chosen = addresses[:: max(1, len(addresses) // VIEWED_PEOPLE)][:VIEWED_PEOPLE]
    views = range(min(manifest.variants(split), VIEWS))
    columns, labels = [], []
    for variant in views:
        rows = read_rows(manifest, split, variant, chosen)
        columns.append(annotated(rows, manifest.recipe.skeleton))
        labels.append([turn or "plain" for turn in _turns(rows, manifest)])
    across = len(views) * max(1, VIEWS // len(views))  # whole people in a row
    pictures, told = (list(chain(*zip(*of_views, strict=True))) for of_views in (columns, labels))
    return tile(pictures, across, told)


def annotated(rows: Mapping[str, NDArray[Any]], skeleton: Skeleton) -> list[Picture]:
    """The enlarged crop of each row with the labelled keypoints as its view has them."""
    xy, visible = rows["keypoints"][..., :2], rows["keypoints"][..., 2]
    points, shown = keypoints_in_view(rows["image_to_crop"], rows["flipped"], xy, visible, skeleton)
    drawn = []
    for crop, person, labels in zip(rows["images"], points, shown, strict=True):
        large, factor = enlarged(crop)
        drawn.append(draw_poses(large, factor * person[None], (labels > 0)[None], skeleton))
    return drawn


def enlarged(crop: Picture) -> tuple[Picture, int]:
    """The crop at about HEIGHT px, and the factor; pixel (0, 0) stays on (0, 0)."""
    factor = max(1, round(HEIGHT / crop.shape[0]))
    size = (factor * crop.shape[1], factor * crop.shape[0])
    matrix = np.diag([factor, factor, 1.0])[:2]
    large = cv2.warpAffine(crop, matrix, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(large, np.uint8), factor


def _label(rows: Mapping[str, NDArray[Any]], index: int, turn: str) -> str:
    visible = rows["keypoints"][index, :, 2]
    seen = f"{(visible == 2).sum()} seen, {(visible == 1).sum()} hidden"
    return f"{turn or seen}, image {rows['image_id'][index]}"


def _turns(rows: Mapping[str, NDArray[Any]], manifest: Manifest) -> list[str]:
    """How each view differs from the plain one: "+12°, x0.80, mirrored"; "" for the plain one."""
    settings = manifest.recipe.settings
    plain = box_to_center_scale(rows["bbox_xywh"], settings.input_size, settings.padding)[1]
    zooms = rows["scale"][:, 1] / plain[:, 1]
    turns, views = [], zip(rows["variant"], rows["rotation_deg"], zooms, rows["flipped"], strict=True)
    for variant, angle, zoom, flipped in views:
        turn = f"{angle:+.0f}°, " if angle else ""
        turns.append(f"{turn}x{zoom:.2f}{', mirrored' if flipped else ''}" if variant else "")
    return turns


# ---------------------------------------------------------------------------------- what was left out


def heaviest_rejections(manifest: Manifest) -> list[dict[str, Any]]:
    """Rows of rejected.parquet: of each split and reason up to REJECTED that cost the most people, of
    different photos. Defects come before what the protocol leaves out."""
    files, root = open_folder(manifest.folder)
    table = pq.read_table(f"{root}/rejected.parquet", filesystem=files)
    order = [("people", "descending"), ("image_id", "ascending"), ("ann_id", "ascending")]
    chosen = []
    for split in manifest.splits:
        counts = manifest.split(split)["rejected"]
        for reason in sorted(counts, key=lambda r: (r in LEFT_OUT_AS_PUBLISHED, -counts[r]["people"], r)):
            own = (pc.field("split") == split) & (pc.field("reason") == reason)
            rows = table.filter(own).sort_by(order).slice(0, 16 * REJECTED)
            by_file: dict[str, dict[str, Any]] = {}  # one of each photo, as long as there are others
            for row in rows.to_pylist():
                by_file.setdefault(row["file"], row)
            chosen += list(by_file.values())[:REJECTED]
    return chosen


def rejected_sheet(
    rejected: Sequence[Mapping[str, Any]], coco: str, max_pixels: int, skeleton: Skeleton
) -> Picture:
    """The photos of what was left out, with the annotated box of a person; the reason where there is no
    picture to see."""
    boxes = _annotated_boxes(rejected, coco, skeleton)
    pictures, labels = [], []
    for row in rejected:
        box = boxes.get((row["split"], row["ann_id"]))
        pictures.append(_rejected_picture(row, coco, max_pixels, box))
        labels.append(f"{row['reason']}: {row['file']}")
    return tile(pictures, 4, labels)


def _rejected_picture(
    row: Mapping[str, Any], coco: str, max_pixels: int, box: Sequence[float] | None
) -> Picture:
    _, folder = locate(coco, row["split"])
    try:
        file = join(folder, row["file"])
        if not is_uri(file) and not Path(file).resolve().is_relative_to(Path(folder).resolve()):
            return _words(row["detail"])
        photo = open_picture(file, max_pixels, apply_exif=False).decode()
    except (ImageError, ValueError):  # ValueError: a name with a zero byte
        return _words(row["detail"])
    left, top = 0, 0
    if box is not None:
        photo, left, top = _surroundings(photo, box)
    factor = min(360 / photo.shape[1], HEIGHT / photo.shape[0])
    size = [max(1, round(factor * side)) for side in photo.shape[1::-1]]
    small = np.asarray(cv2.resize(photo, size, interpolation=cv2.INTER_AREA), np.uint8)
    if box is not None:
        corners = np.reshape(box, (2, 2)).cumsum(axis=0) - (left, top)
        start, end = (16 * factor * corners).round().astype(int).tolist()
        for color, width in ((INK, 4), (RED, 2)):
            cv2.rectangle(small, start, end, color, width, cv2.LINE_AA, 4)
    return small


def _surroundings(photo: Picture, box: Sequence[float]) -> tuple[Picture, int, int]:
    """The part of the photo around a box, five times its size and at least a fifth of the photo; its left
    and top in the photo. People that were left out are often too small to be seen in all of it."""
    x, y, w, h = box
    height, width = photo.shape[:2]
    side = max(5 * w, 5 * h, 0.2 * width, 0.2 * height) / 2
    left, right = (int(np.clip(x + w / 2 + d, 0, width)) for d in (-side, side))
    top, bottom = (int(np.clip(y + h / 2 + d, 0, height)) for d in (-side, side))
    if left == right or top == bottom:  # the box lies outside
        return photo, 0, 0
    return photo[top:bottom, left:right], left, top


def _words(text: str) -> Picture:
    """A grey card with a sentence on it, in place of a picture that nobody can see."""
    from PIL import Image, ImageDraw, ImageFont

    card = Image.new("RGB", (360, HEIGHT), (225, 227, 231))
    text, font = "\n".join(textwrap.wrap(text, 38)[:9]), ImageFont.load_default(18)
    pen = ImageDraw.Draw(card)
    pen.multiline_text((180, HEIGHT // 2), text, fill=INK, font=font, anchor="mm", align="center")
    return np.array(card)


def _annotated_boxes(
    rejected: Sequence[Mapping[str, Any]], coco: str, skeleton: Skeleton
) -> dict[tuple[str, int], list[float]]:
    """(split, ann_id) -> bbox of the rejected people who have one; none where annotations are gone."""
    boxes: dict[tuple[str, int], list[float]] = {}
    for split in {row["split"] for row in rejected if row["ann_id"] is not None}:
        wanted = [row["ann_id"] for row in rejected if row["split"] == split and row["ann_id"] is not None]
        file = locate(coco, split)[0]
        if is_file(file):
            everyone = read_annotations(file, skeleton, TO_CROP._replace(category=ALL))
            people = everyone.judged.people
            size = np.abs(people.stated_xywh).max(axis=1)
            people = people[np.isin(people.ann_id, wanted) & (size > 0) & (size < FARTHEST)]
            pairs = zip(people.ann_id.tolist(), people.stated_xywh.tolist(), strict=True)
            boxes |= {(split, ann_id): box for ann_id, box in pairs}
    return boxes
