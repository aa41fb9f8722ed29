"""The plan of a prediction: pictures and stretches of videos with their boxes, in work units.

Everything that decides an answer is in it, and its digest names it: a second call goes on with the same plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hrnet_core.detector import PersonDetector
from hrnet_core.errors import ImageError
from pipelines.poses.formats import Row, rejected_row
from pipelines.poses.units import cut, digest_of
from pipelines.settings.config import PredictSettings
from pipelines.sources.boxes import BoxesFile, Entry, number_in
from pipelines.sources.media import Media, Video

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec


@dataclass(frozen=True, eq=False)
class Still:
    """A picture that is asked about."""

    media: Media
    boxes: NDArray[np.float32] | None
    """(P, 5) x, y, w, h, score, px as displayed; None: none were given."""
    image_id: int | None = None
    size: tuple[int, int] | None = None
    """(width, height) px of the picture that the boxes are of."""


@dataclass(frozen=True, eq=False)
class Stretch:
    """Frames of a video that are asked about."""

    media: Media
    boxes: NDArray[np.float32] | None
    """(P, 5) of every frame, as of a Still; where `frames` is there, that counts."""
    start: int
    stop: int | None
    """None: to the end, wherever that is."""
    expected: int
    """Frames of the whole video by its header."""
    frames: Mapping[int, NDArray[np.float32]] | None = None
    """Boxes by frame; the others have none."""

    def boxes_in(self, frame: int) -> NDArray[np.float32] | None:
        if self.frames is None:
            return self.boxes
        return self.frames.get(frame, np.zeros((0, 5), np.float32))


Asked = Still | Stretch


@dataclass(frozen=True, eq=False)
class Plan:
    """What is asked, and what is known to be out before any picture was opened."""

    units: list[list[Asked]]
    rejected: list[Row]
    digest: str
    boxes: dict[str, Any]
    """Where boxes come from: source, and the file with its sha256."""
    unmatched: int
    """Entries of the boxes file that fit no picture."""
    image_ids: str
    """Where they come from."""


def make_plan(
    media: Sequence[Media],
    given: BoxesFile | None,
    detector: PersonDetector | None,
    settings: PredictSettings,
    spec: CheckpointSpec,
) -> Plan:
    """Pictures and stretches of videos with their boxes, in work units."""
    entries, unmatched = given.match(media) if given else ({}, [])
    ids, id_source = _image_ids(media, entries)
    rejected: list[Row] = []
    asked: list[Asked] = []
    for one in media:
        entry = entries.get(one.name)
        if given is not None and entry is None:
            if given.complete:
                rejected.append(rejected_row(one, "not_in_boxes_file", f"{given.path} does not list it"))
                continue
            entry = Entry()  # a detector that found nobody leaves no trace
        if entry is not None:
            rejected += [rejected_row(one, "bbox_invalid", why) for why in entry.invalid]
        boxes, size = (entry.boxes, entry.size) if entry else (None, None)
        if one.kind == "picture":
            if entry is not None and entry.frames is not None:
                why = "boxes by frame number belong to a video: give a picture's as a list"
                rejected.append(rejected_row(one, "bbox_invalid", why))
            asked.append(Still(one, boxes, ids.get(one.name), size))
            continue
        try:
            asked += _stretches(one, entry, settings)
        except ImageError as error:
            rejected.append(rejected_row(one, error.reason, str(error)))
    source = _boxes_source(given, detector)
    made_by = settings.model_dump(exclude={"num_workers", "cpus_per_worker"})
    digest = digest_of(spec.as_dict(), asked, media, source, made_by, settings.threads)
    most = 2 * settings.batch_size

    def people_of(one: Asked) -> int:
        """As far as is known, at least one; a stretch of video is a unit of its own."""
        if isinstance(one, Stretch):
            return most
        return 1 if one.boxes is None else max(1, len(one.boxes))

    return Plan(cut(asked, people_of, most), rejected, digest, source, len(unmatched), id_source)


def _boxes_source(given: BoxesFile | None, detector: PersonDetector | None) -> dict[str, Any]:
    if given is not None:
        return {"source": given.path, "sha256": given.sha256}
    if detector is not None:
        sha256 = hashlib.sha256(detector.model).hexdigest()
        return {"source": detector.name, "sha256": sha256, "declaration": vars(detector.declaration)}
    return {"source": "whole picture"}


def _image_ids(media: Sequence[Media], entries: Mapping[str, Entry]) -> tuple[dict[str, int], str]:
    """Ids by name, and where they are from: the boxes file, the numbers that the names are (COCO's), or none.

    They are all of one origin, so that no two can be equal.
    """
    pictures = [m for m in media if m.kind == "picture"]
    if len(pictures) < len(media):
        return {}, "numbered"
    given = {m.name: entries[m.name].image_id for m in pictures if m.name in entries}
    named = {m.name: int(number_in(m.name) or -1) for m in pictures}
    for ids, origin in ((given, "boxes file"), (named, "file names")):
        distinct = {i for i in ids.values() if i is not None and i >= 0}
        if len(distinct) == len(pictures):
            return ids, origin  # type: ignore[return-value]
    return {}, "numbered"


def _stretches(media: Media, entry: Entry | None, settings: PredictSettings) -> Iterator[Stretch]:
    """A video cut into stretches of frames; the last one goes to the end, wherever that is."""
    expected = Video(media.uri, settings.max_pixels).expected
    boxes, frames = (entry.boxes, entry.frames) if entry else (None, None)
    length = 2 * settings.batch_size * settings.video_stride
    starts = list(range(0, max(1, expected), length))
    for start in starts:
        stop = start + length if start != starts[-1] else None
        here = frames
        if frames is not None:
            here = {n: found for n, found in frames.items() if start <= n and (stop is None or n < stop)}
        yield Stretch(media, boxes, start, stop, expected, here)
