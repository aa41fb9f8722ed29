"""An evaluation to look at: contact sheets of truth beside prediction, and the page that holds them."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrnet_core.geometry import apply_affine, box_to_center_scale, crop_people, three_point_matrix
from hrnet_core.images import encode_jpeg
from hrnet_core.oks import oks
from hrnet_core.overlays import color_line, draw_poses, side_by_side, tile
from hrnet_core.skeleton import Skeleton
from pipelines.pages.frame import definitions, embedded, section, table, tiles, write_page
from pipelines.poses.protocol import Evaluation, Matched, protocol_line, work_line
from pipelines.sources.photos import open_picture
from pipelines.storage.files import base_name, join, write_whole

PAIRS = 12
"""People of a contact sheet."""
TILE = (192, 256)
"""(width, height) px of one picture of a pair."""
DRAWN_ABOVE = 0.2
"""Predicted keypoints of a contact sheet score more."""
LISTED = 30
"""People of the table of the worst."""
EXCHANGED = 0.1
"""So much more OKS with left and right exchanged, and sides are said to be exchanged."""
MEANINGS = {
    "AP": "average precision, mean over OKS .50, .55 ... .95",
    "AP50": "at OKS .50 (loose)",
    "AP75": "at OKS .75 (strict)",
    "APm": "medium people, 32² to 96² px of segment",
    "APl": "large people, above 96² px",
    "AR": "average recall with at most 20 results an image",
    "AR50": "at OKS .50",
    "AR75": "at OKS .75",
    "ARm": "medium people",
    "ARl": "large people",
}


def truth_and_prediction(skeleton: Skeleton) -> str:
    """What a sheet of pairs shows, above it: it is looked at in MLflow and in folders, too."""
    drawn = f"Keypoints scoring {DRAWN_ABOVE} or less are not drawn."
    return f"Of each pair: annotated on the left, predicted on the right. {color_line(skeleton)} {drawn}"


def contact_sheets(
    matched: Matched, paths: Mapping[int, str], skeleton: Skeleton, folder: str, max_pixels: int
) -> dict[str, str]:
    """Write best.jpg, median.jpg and worst.jpg into a folder (path or URI): of each person truth (left)
    beside prediction (right), OKS and the number of labelled keypoints underneath.

    paths: of the photographs by image_id.
    """
    ranked, labelled = _best_first(matched), np.isfinite(matched.similarity).sum(axis=1)
    middle = max(0, (len(ranked) - PAIRS) // 2)
    chosen = {"best": ranked[:PAIRS], "median": ranked[middle:][:PAIRS], "worst": ranked[::-1][:PAIRS]}
    files = {}
    for name, rows in chosen.items():
        pairs, labels = [], []
        for row, image_id in zip(rows, matched.people.image_id[rows].tolist(), strict=True):
            picture = open_picture(paths[image_id], max_pixels, apply_exif=False).decode()
            pairs.append(_pair(picture, matched, row, skeleton))
            labels.append(f"OKS {matched.oks[row]:.2f} of {labelled[row]}, image {image_id}")
        if pairs:
            files[name] = join(folder, f"{name}.jpg")
            write_whole(files[name], encode_jpeg(tile(pairs, 4, labels, truth_and_prediction(skeleton)), 90))
    return files


def _best_first(matched: Matched) -> NDArray[np.int64]:
    """Rows by OKS; of equal ones by picture and annotation."""
    return np.lexsort((matched.people.ann_id, matched.people.image_id, -matched.oks))


def _pair(image: NDArray[np.uint8], matched: Matched, row: int, skeleton: Skeleton) -> NDArray[np.uint8]:
    """uint8 (h, 2w + gap, 3): the person cut out twice, with the truth and with the prediction drawn in."""
    box = matched.people.bbox_xywh[row]
    truth = matched.people.keypoints[row]
    center, scale = box_to_center_scale(box, TILE, padding=1.35)
    image_to_tile = three_point_matrix(center, scale, TILE)
    crop = crop_people(image, image_to_tile[None], TILE)[0]
    # The tile is not rotated: a box stays a box.
    start, end = apply_affine(image_to_tile, box.reshape(2, 2).cumsum(axis=0))
    boxes = [[*start, *(end - start)]]
    places = apply_affine(image_to_tile, truth[:, :2])
    left = draw_poses(crop, places[None], truth[None, :, 2] > 0, skeleton, boxes_xywh=boxes)
    # NaN points are not drawn: where nothing was predicted the box stands alone.
    predicted = apply_affine(image_to_tile, matched.predicted[row])
    scores = matched.scores[row][None]
    right = draw_poses(crop, predicted[None], scores, skeleton, DRAWN_ABOVE, boxes_xywh=boxes)
    return side_by_side(left, right)


def write_report(
    file: str,
    evaluation: Evaluation,
    matched: Matched,
    sheets: Mapping[str, str],
    paths: Mapping[int, str],
    skeleton: Skeleton,
    made_by: Mapping[str, Any],
) -> None:
    """The page of an evaluation: figures, protocol, distributions, the contact sheets, who is worst and how.

    paths: of the photographs by image_id.
    """
    stats, protocol = evaluation.stats, evaluation.protocol
    title = f"AP {stats['AP']:.3f}, {protocol['split']}"
    pictures = [
        f"<h3>{name}</h3>{embedded(path, f'{name} people: truth left, prediction right', wide=True)}"
        for name, path in sheets.items()
    ]
    write_page(
        file,
        title,
        protocol_line(protocol),
        work_line(evaluation.figures),
        tiles(_tile(stats[name], name, meaning) for name, meaning in MEANINGS.items() if name in stats),
        section(
            "People by OKS",
            f"How well each of {len(matched.oks):,} labelled people was found: 1 is exact, below .5 counts "
            f"as missed at the loosest threshold ({(matched.oks < 0.5).sum():,} people, hollow). A person "
            f"without any prediction counts as 0.",
            _oks_bars(matched.oks),
        ),
        section(
            "Keypoints",
            "Mean similarity (the term of OKS) where labelled: 1 is exact, 0 far off for a person so large.",
            _similarities(matched, skeleton),
        ),
        section(
            "Pictures",
            f"The box is the annotated one. {truth_and_prediction(skeleton)} Under a pair: OKS of how many "
            f"labelled keypoints.",
            *pictures,
        ),
        _worst(matched, paths, skeleton),
        section("Protocol", "", definitions(protocol)),
        section("Made by", "", definitions(made_by)),
    )


def _tile(value: float, name: str, meaning: str) -> tuple[str, str, str]:
    """pycocotools says -1 where the ground truth has no such person."""
    return (f"{value:.3f}", name, meaning) if value >= 0 else ("–", name, f"{meaning}: no one is labelled")


def _worst(matched: Matched, paths: Mapping[int, str], skeleton: Skeleton) -> str:
    """A table of who is worst, and how: what an engineer opens next."""
    people, labelled = matched.people, np.isfinite(matched.similarity)
    other_way = oks(
        people.keypoints[..., :2],
        np.nan_to_num(matched.predicted[:, skeleton.flip_order]),
        people.area,
        skeleton.oks_sigmas,
        labelled,
    )
    other_way = np.where(np.isnan(matched.predicted).any(axis=(1, 2)), 0, other_way)
    exchanged = other_way > matched.oks + EXCHANGED
    rows = []
    for row in _best_first(matched)[::-1][:LISTED]:
        told = _wrong(matched, row, skeleton)
        if exchanged[row]:
            told = [f"left and right exchanged (OKS {other_way[row]:.2f} the other way round)", *told]
        file, of = base_name(paths[int(people.image_id[row])]), f"{matched.oks[row]:.2f}"
        rows.append(
            (file, int(people.ann_id[row]), of, int(labelled[row].sum()), "; ".join(filter(None, told)))
        )
    return section(
        "The worst",
        f"{exchanged.sum():,} of {len(people):,} people fit better by {EXCHANGED} or more of OKS "
        f"with left and right exchanged. Distances are px of the photograph.",
        table(rows, ("file", "annotation", "OKS", "labelled", "what is wrong")),
    )


def _wrong(matched: Matched, row: int, skeleton: Skeleton) -> list[str]:
    """The keypoints of a person that fit least, and how far off they are."""
    if np.isnan(matched.predicted[row]).any():
        return ["nothing predicted in this photograph"]
    away = np.linalg.norm(matched.predicted[row] - matched.people.keypoints[row, :, :2], axis=-1)
    similarity = matched.similarity[row]
    least = [k for k in np.argsort(similarity, kind="stable") if similarity[k] < 0.5][:3]
    return [f"{skeleton.keypoints[k].replace('_', ' ')} {away[k]:.0f} px off" for k in least]


def _oks_bars(values: NDArray[np.float64]) -> str:
    """Ten bars as inline SVG, over an axis of OKS; those that are missed at .5 hollow."""
    counts, _ = np.histogram(values, bins=10, range=(0, 1))
    tallest = max(int(counts.max(initial=0)), 1)
    bars = []
    for i, count in enumerate(counts):
        height, kind = 120 * count / tallest, ' class="missed"' if i < 5 else ""
        bars.append(
            f'<rect{kind} x="{i * 60 + 14}" y="{140 - height:.1f}" width="52" height="{height:.1f}"/>'
            f'<text x="{i * 60 + 40}" y="{134 - height:.1f}">{count:,}</text>'
        )
    bars += [f'<text x="{i * 60 + 10}" y="156">{i / 10:g}</text>' for i in range(11)]
    bars.append('<text x="310" y="174">OKS; above each bar the number of people</text>')
    drawn = f'<svg viewBox="0 0 620 180" role="img" aria-label="people by OKS">{"".join(bars)}</svg>'
    return f'<div class="wide">{drawn}</div>'


def _similarities(matched: Matched, skeleton: Skeleton) -> str:
    """A row for each keypoint: name, labelled people, mean similarity as a bar."""
    similarity = matched.similarity
    labelled = np.isfinite(similarity)
    means = np.nansum(similarity, axis=0) / np.maximum(labelled.sum(axis=0), 1)
    rows = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{count}</td><td>{mean:.2f}</td>"
        f'<td class="bar"><i style="width:{100 * mean:.0f}%"></i></td></tr>'
        for name, count, mean in zip(skeleton.keypoints, labelled.sum(axis=0), means, strict=True)
    )
    return f"<table><tr><th>keypoint</th><th>labelled</th><th>similarity</th><th></th></tr>{rows}</table>"
