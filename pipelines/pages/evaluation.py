"""An evaluation to look at: contact sheets of truth beside prediction, and the page that holds them."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrnet_core.geometry import apply_affine, box_to_center_scale, crop_people, three_point_matrix
from hrnet_core.images import encode_jpeg
from hrnet_core.overlays import draw_poses, tile
from hrnet_core.skeleton import Skeleton
from pipelines.pages.frame import definitions, embedded, section, tiles, write_page
from pipelines.poses.protocol import Evaluation, Matched, protocol_line, work_line
from pipelines.sources.photos import open_picture
from pipelines.storage import join, write_whole

PAIRS = 12
"""People of a contact sheet."""
TILE = (192, 256)
"""(width, height) px of one picture of a pair."""
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


def contact_sheets(
    matched: Matched, paths: Mapping[int, str], skeleton: Skeleton, folder: str, max_pixels: int
) -> dict[str, str]:
    """Write best.jpg, median.jpg and worst.jpg into a folder (path or URI): of each person truth (left)
    beside prediction (right).

    paths: of the photographs by image_id.
    """
    ranked = np.lexsort((matched.people.ann_id, matched.people.image_id, -matched.oks))
    middle = max(0, (len(ranked) - PAIRS) // 2)
    chosen = {"best": ranked[:PAIRS], "median": ranked[middle:][:PAIRS], "worst": ranked[::-1][:PAIRS]}
    files = {}
    for name, rows in chosen.items():
        pairs, labels = [], []
        for row, image_id in zip(rows, matched.people.image_id[rows].tolist(), strict=True):
            picture = open_picture(paths[image_id], max_pixels, apply_exif=False).decode()
            pairs.append(_pair(picture, matched, row, skeleton))
            labels.append(f"OKS {matched.oks[row]:.2f}  image {image_id}")
        if pairs:
            files[name] = join(folder, f"{name}.jpg")
            write_whole(files[name], encode_jpeg(tile(pairs, 4, labels), 90))
    return files


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
    right = draw_poses(crop, predicted[None], matched.scores[row][None], skeleton, 0.2, boxes_xywh=boxes)
    gap = np.full((TILE[1], 4, 3), 255, np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def write_report(
    file: str,
    evaluation: Evaluation,
    matched: Matched,
    sheets: Mapping[str, str],
    skeleton: Skeleton,
    made_by: Mapping[str, Any],
) -> None:
    """The page of an evaluation: figures, protocol, distributions, the contact sheets."""
    stats, protocol = evaluation.stats, evaluation.protocol
    title = f"AP {stats['AP']:.3f}, {protocol['split']}"
    pictures = [
        f"<h3>{name}</h3>{embedded(path, f'{name} people: truth left, prediction right')}"
        for name, path in sheets.items()
    ]
    write_page(
        file,
        title,
        protocol_line(protocol),
        work_line(evaluation.figures),
        tiles((f"{stats[name]:.3f}", name, meaning) for name, meaning in MEANINGS.items() if name in stats),
        section(
            "People by OKS",
            "How well each labelled person was found: 1 is exact, below .5 counts as missed at the loosest "
            "threshold. A person without any prediction counts as 0.",
            _oks_bars(matched.oks),
        ),
        section(
            "Keypoints",
            "Mean similarity (the term of OKS) where labelled.",
            _similarities(matched, skeleton),
        ),
        section(
            "Pictures",
            "Of each person the truth on the left, the prediction on the right, and the annotated box; left "
            "limbs green, right limbs orange. Keypoints scoring .2 or less are not drawn.",
            *pictures,
        ),
        section("Protocol", "", definitions(protocol)),
        section("Made by", "", definitions(made_by)),
    )


def _oks_bars(values: NDArray[np.float64]) -> str:
    """Ten bars as inline SVG."""
    counts, _ = np.histogram(values, bins=10, range=(0, 1))
    tallest = max(int(counts.max(initial=0)), 1)
    bars = []
    for i, count in enumerate(counts):
        height = 120 * count / tallest
        bars.append(
            f'<rect x="{i * 60 + 4}" y="{140 - height:.1f}" width="52" height="{height:.1f}"/>'
            f'<text x="{i * 60 + 30}" y="{134 - height:.1f}">{count}</text>'
            f'<text x="{i * 60 + 30}" y="156">.{i}</text>'
        )
    return f'<svg viewBox="0 0 600 162" role="img" aria-label="people by OKS">{"".join(bars)}</svg>'


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
