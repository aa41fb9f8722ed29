"""`hrnet estimate-sigmas`: OKS constants from people whom several annotators labelled.

    annotation files -> the same people -> distances to their mean, by size -> sigmas -> a skeleton file

COCO's definition (its keypoint evaluation page): sigma_k² = E[d_k² / s²], d_k the distance of an annotator's
keypoint from the true one in px, s² the person's area in px². The true place is unknown: with n annotators
the sum of the squared distances from their mean is (n - 1) E[d²] on average, so that sum over (n - 1) s² is
an unbiased estimate from one person, and people are averaged with the weight n - 1.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask

from hrnet_core.errors import DataError
from hrnet_core.locations import file_to_write
from hrnet_core.skeleton import Skeleton, load_skeleton, sides_by_name
from pipelines.sources.annotations import TO_CROP, read_annotations
from pipelines.sources.records import BOX_AREA, People
from pipelines.storage.files import writable, write_json

Float64 = NDArray[np.float64]
SAME_BOX = 0.5
"""IoU from which two files' boxes may be one person."""
HEAVY_TAIL = 1.5
"""Times the sigma of the median: from here on a few gross errors make most of it."""


@dataclass(frozen=True)
class Repeated:
    """People whom A annotators labelled."""

    keypoints: Float64
    """(A, P, K, 2) px"""
    labelled: NDArray[np.bool_]
    """(A, P, K): false where an annotator has no such keypoint, or not the person."""
    areas: Float64
    """(P,) px²: the mean of the annotators'."""
    how: str
    """ "id" or "box": by what the people were matched."""


@dataclass(frozen=True)
class Estimate:
    """The sigmas of K keypoints and how far they can be trusted."""

    skeleton: Skeleton
    """With the new sigmas, as written."""
    sigmas: Float64
    """(K,)"""
    errors: Float64
    """(K,) standard errors"""
    medians: Float64
    """(K,) what sigma would be if the median pair of a Gaussian decided: gross errors do not move it."""
    counts: NDArray[np.int64]
    """(K,) people with the keypoint labelled at least twice"""
    repeated: Repeated

    def __str__(self) -> str:
        annotators, people = self.repeated.labelled.shape[:2]
        names = np.array(self.skeleton.keypoints)
        rows = zip(names, self.sigmas, self.errors, self.medians, self.counts, strict=True)
        lines = [
            f"{people} people by {annotators} annotators, matched by {self.repeated.how}",
            f"{'keypoint':<20}{'sigma':>8}{'+-':>8}{'by median':>11}{'people':>8}",
            *("{:<20}{:8.4f}{:8.4f}{:11.4f}{:8d}".format(*row) for row in rows),
        ]
        heavy = self.sigmas > HEAVY_TAIL * np.maximum(self.medians, 1e-12)
        if heavy.any():
            lines.append(
                f"few large differences make most of the sigma of {', '.join(names[heavy])}: look for left "
                f"and right exchanged, or two people taken for one."
            )
        if not self.skeleton.flip_pairs:
            lines.append(
                "no mirror pairs: no two names differ by left and right. Where keypoints change places in a "
                "mirror, write flip_pairs into the file before you preprocess with it (docs/skeletons.md)."
            )
        return "\n".join(lines)


def estimate_sigmas(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    skeleton: str | Path | None = None,
    use_area: bool = True,
    category: str | None = None,
) -> Estimate:
    """Sigmas from two or more COCO keypoint files of the same people; writes a skeleton file to `out`;
    all of them paths or URIs.

    People are matched by annotation id where all files hold the same (image, id) pairs on boxes that overlap
    (IoU at least 0.5), else by their boxes alone, one to one, the best IoU first. A crowd is nobody.
    skeleton: the layout whose other fields are kept ("coco17" or a file); None: names and limbs of the
    annotations' category, mirror pairs by left and right in the names. use_area=False: 0.53 x box
    width x height for s², as in scoring data that has no areas. category: its name, or "all"; None: person,
    or the only one with keypoints.

    DataError: fewer than two files, other keypoints, no common people, a keypoint that nobody labelled twice,
    files that agree to the last digit (a copy is no second annotator).
    """
    if len(files) < 2:
        raise DataError(
            "sigmas come from differences: name two or more annotation files of the same people, one an "
            "annotator (hrnet estimate-sigmas A.json B.json --out skeleton.json)."
        )
    out = file_to_write(out, "--out")
    read = [_read(file, use_area, category) for file in files]
    for other in read[1:]:
        if other.names != read[0].names:
            raise DataError(
                f"{other.file}: its category has the keypoints {', '.join(other.names)}, but {read[0].file} "
                f"has {', '.join(read[0].names)}. Files of one skeleton in one order are needed."
            )
    body = _layout(read[0], skeleton)
    repeated = match_people(read)
    sigmas, errors, medians, counts = sigmas_of(repeated)
    names = np.array(body.keypoints)
    if not counts.all():
        raise DataError(
            f"{', '.join(names[counts == 0])}: nobody's was labelled by two annotators in {_named(read)}, so "
            f"there is nothing to estimate from. Label these keypoints again on some people."
        )
    if not (sigmas > 0).all():
        raise DataError(
            f"{_named(read)} agree to the last digit on {', '.join(names[sigmas == 0])}: a copy is no second "
            f"annotator. Name files that were labelled independently."
        )
    body = replace(body, oks_sigmas=tuple(float(f"{sigma:.4g}") for sigma in sigmas))
    with writable(out):
        write_json(out, body.as_dict())
    return Estimate(body, sigmas, errors, medians, counts, repeated)


def sigmas_of(repeated: Repeated) -> tuple[Float64, Float64, Float64, NDArray[np.int64]]:
    """(K,) each: sigmas, their standard errors, sigmas by the median, people counted. NaN where none is.

    By the median: d² of a pair, halved, is exponential for Gaussian errors, whose median is ln 2 of its mean.
    """
    labelled, keypoints = repeated.labelled, repeated.keypoints
    counted = labelled.sum(axis=0)  # (P, K)
    mean = (keypoints * labelled[..., None]).sum(axis=0) / np.maximum(counted, 1)[..., None]
    squared = (((keypoints - mean) ** 2).sum(axis=-1) * labelled).sum(axis=0)
    free = np.maximum(counted - 1, 0)
    variances = squared / np.maximum(free, 1) / repeated.areas[:, None]
    people = free.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        pooled = (free * variances).sum(axis=0) / people
        spread = np.sqrt((free**2 * (variances - pooled) ** 2).sum(axis=0)) / people
        sigmas = np.sqrt(pooled)
        errors = spread / (2 * sigmas)
    return sigmas, errors, _by_median(repeated), (free > 0).sum(axis=0)


def _by_median(repeated: Repeated) -> Float64:
    labelled, keypoints = repeated.labelled, repeated.keypoints
    halves = []
    for a, b in itertools.combinations(range(len(labelled)), 2):
        half = ((keypoints[a] - keypoints[b]) ** 2).sum(axis=-1) / 2 / repeated.areas[:, None]
        halves.append(np.ma.array(half, mask=~(labelled[a] & labelled[b])))
    middles = np.ma.median(np.ma.concatenate(halves), axis=0).filled(np.nan)
    return np.sqrt(middles / np.log(2))


# --- the same people ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Annotator:
    """One file: the people whom it labelled, without crowds."""

    file: str
    category: Mapping[str, Any]
    people: People

    @property
    def names(self) -> list[str]:
        return [str(name) for name in self.category["keypoints"]]


def _read(file: str | Path, use_area: bool, category: str | None) -> _Annotator:
    """DataError for people whose keypoints or area cannot be read: distances are measured by the area."""
    read = read_annotations(file, None, TO_CROP._replace(category=category, flag="--category"))
    truth = read.truth
    truth.refuse_unscorable()
    people = truth.people
    people = people[~people.crowd & (people.keypoints[..., 2] > 0).any(axis=1)]
    if not use_area:
        people = replace(people, area=BOX_AREA * people.stated_xywh[:, 2] * people.stated_xywh[:, 3])
    elif not truth.has_areas:
        raise DataError(f"{file}: no annotation has an area. Without areas: --no-use-area.")
    elif without := read.judged.repaired.get("area_from_box"):
        raise DataError(
            f"{file}: {without} people have no area above 0: distances are measured by it. Correct it, take "
            f"them out, or measure everyone's by the box with --no-use-area."
        )
    return _Annotator(str(file), read.category, people)


def match_people(read: Sequence[_Annotator]) -> Repeated:
    """The people of the first file with their partners in the others; those without any are left out."""
    first, *others = (annotator.people for annotator in read)
    by_id = all(_same_ids(first, other) for other in others)
    own = np.arange(len(first))
    partners = np.array([own, *(own if by_id else _by_box(first, other) for other in others)])
    matched = (partners[1:] >= 0).any(axis=0)
    if not matched.any():
        raise DataError(
            f"{_named(read)} have no person in common (same image id, boxes with IoU of at least "
            f"{SAME_BOX:g}). Name annotations of the same pictures under the same image ids."
        )
    partners = partners[:, matched]
    there = partners >= 0
    rows = list(zip(partners, [first, *others], strict=True))
    keypoints = np.array([people.keypoints[mine] for mine, people in rows])
    areas = np.where(there, np.array([people.area[mine] for mine, people in rows]), np.nan)
    labelled = (keypoints[..., 2] > 0) & there[..., None]
    how = "annotation id" if by_id else "box"
    return Repeated(
        np.where(labelled[..., None], keypoints[..., :2], 0), labelled, np.nanmean(areas, axis=0), how
    )


def _same_ids(first: People, other: People) -> bool:
    """Whether both hold the same (image, id) pairs and mean the same people: tools that number from 1 give
    equal ids to different ones, whose boxes lie elsewhere."""
    if not (np.array_equal(first.image_id, other.image_id) and np.array_equal(first.ann_id, other.ann_id)):
        return False
    pairs = zip(first.stated_xywh, other.stated_xywh, strict=True)
    return all(_iou(a[None], b[None])[0, 0] >= SAME_BOX for a, b in pairs)


def _by_box(first: People, other: People) -> NDArray[np.int64]:
    """(P,) row in `other` of each person in `first`, -1 for none: one to one in each image, the best IoU
    first."""
    found = np.full(len(first), -1)
    in_other = other.by_image()
    for image_id, ours in first.by_image().items():
        theirs = in_other.get(image_id, slice(0, 0))
        overlap = _iou(first.stated_xywh[ours], other.stated_xywh[theirs])
        for place in np.argsort(-overlap, axis=None, kind="stable"):
            i, j = divmod(int(place), overlap.shape[1])
            if overlap[i, j] < SAME_BOX:  # also -1: one of the two is taken
                continue
            found[ours.start + i] = theirs.start + j
            overlap[i, :] = overlap[:, j] = -1
    return found


def _iou(a: Float64, b: Float64) -> Float64:
    """Boxes (M, 4) and (N, 4), left, top, width, height -> intersection over union (M, N)."""
    return np.reshape(mask.iou(a, b, np.zeros(len(b))), (len(a), len(b)))


def _named(read: Sequence[_Annotator]) -> str:
    return " and ".join(annotator.file for annotator in read)


# --- the skeleton -------------------------------------------------------------------------------------


def _layout(annotator: _Annotator, skeleton: str | Path | None) -> Skeleton:
    """The skeleton to write, its sigmas still to be replaced."""
    names = tuple(annotator.names)
    if skeleton is not None:
        body = load_skeleton(skeleton)
        if body.keypoints != names:
            raise DataError(
                f"skeleton {body.name!r} has the keypoints {', '.join(body.keypoints)}, but the category of "
                f"{annotator.file} has {', '.join(names)}. Name the skeleton of these annotations, or none."
            )
        return body
    pairs = tuple(sides_by_name(names))
    edges = [tuple(int(i) - 1 for i in edge) for edge in annotator.category.get("skeleton") or ()]
    limbs = tuple((e[0], e[1]) for e in edges if len(e) == 2 and all(0 <= i < len(names) for i in e))
    label = re.sub(r"\W+", "_", str(annotator.category.get("name", "body"))).strip("_").lower()
    return Skeleton(f"{label}{len(names)}", names, pairs, (1.0,) * len(names), limbs)
