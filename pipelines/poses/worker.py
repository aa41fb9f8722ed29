"""The work of an actor of predict: pictures and frames of a unit -> rows."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hrnet_core.detector import PersonDetector
from hrnet_core.errors import DataError, ImageError
from hrnet_core.images import encode_jpeg
from pipelines.config import PredictSettings
from pipelines.poses.formats import ROW, Row, poses_of, rejected_row
from pipelines.poses.plan import Asked, Still, Stretch
from pipelines.poses.units import Outcome
from pipelines.sources.media import Video
from pipelines.sources.photos import open_picture

if TYPE_CHECKING:
    from hrnet_core.predictor import PosePredictor


GROUP_PIXELS = 2**26
"""Decoded pixels that an actor holds at once (200 MB), or one picture that has more."""


@dataclass
class Worker:
    """A unit -> rows (pipelines.poses.formats.ROW) as Parquet bytes. Keeps a video open from unit to unit."""

    settings: PredictSettings
    detector: PersonDetector | None = None
    _video: Video | None = None

    def __call__(self, unit: Sequence[Asked], predictor: PosePredictor) -> Outcome:
        rows: list[Row] = []
        group: list[_Seen] = []
        boxes = pixels = 0
        for seen in self._read(unit):
            rows.append(seen.row)
            if seen.image is None:
                continue
            group.append(seen)
            boxes += 1 if seen.boxes is None else len(seen.boxes)
            pixels += seen.image.shape[0] * seen.image.shape[1]
            # Groups follow from the unit alone, and so do the batches in them.
            if boxes >= 2 * self.settings.batch_size or pixels >= GROUP_PIXELS:
                self._predict(group, predictor)
                group, boxes, pixels = [], 0, 0
        self._predict(group, predictor)
        content = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, ROW), content, compression="zstd", write_page_checksum=True)
        people = sum(len(row["box_scores"]) for row in rows if "reason" not in row)
        return Outcome(content.getvalue(), people)

    def _predict(self, group: list[_Seen], predictor: PosePredictor) -> None:
        """Fill the rows of a group. A pose that is not finite rejects its picture: the weights are bad."""
        found = predictor(
            [seen.image for seen in group],
            [seen.boxes for seen in group],
            [seen.scores for seen in group],
            self.settings.flip_test,
            batch_size=self.settings.batch_size,
        )
        for seen, poses in zip(group, found, strict=True):
            if not np.isfinite(poses.keypoints.data).all():
                detail = "the network gave NaN: its weights are damaged"
                seen.row |= {"reason": "not_finite", "detail": detail}
                continue
            seen.row |= {
                "boxes_xywh": poses.boxes.xywh.ravel(),
                "box_scores": poses.boxes.conf,
                "keypoints": poses.keypoints.data.ravel(),
            }
            if "overlays" in self.settings.formats and "frame" not in seen.row:
                known = poses_of(seen.row, predictor.spec.skeleton)  # knows where its boxes came from
                seen.row["overlay"] = encode_jpeg(known.plot(seen.image, self.settings.draw_threshold), 90)

    def _read(self, unit: Sequence[Asked]) -> Iterator[_Seen]:
        """Pictures and frames one after the other, decoded; those that cannot be used without an image."""
        for asked in unit:
            yield from self._read_frames(asked) if isinstance(asked, Stretch) else [self._read_picture(asked)]

    def _read_picture(self, asked: Still) -> _Seen:
        media, settings = asked.media, self.settings
        try:
            picture = open_picture(media.uri, settings.max_pixels, apply_exif=settings.exif, size=asked.size)
            image = picture.decode()
        except ImageError as error:
            return _Seen(rejected_row(media, error.reason, str(error)))
        except DataError as error:  # a bucket that does not answer costs this picture, not the run
            why, _, way_out = str(error).rpartition(". ")  # to run again is no way out here
            return _Seen(rejected_row(media, "unreadable", f"{why}." if why else way_out))
        row: Row = {"name": media.name, "uri": media.uri, "image_id": asked.image_id}
        return self._seen(row | {"exif_rotated": picture.turned}, image, asked.boxes)

    def _read_frames(self, asked: Stretch) -> Iterator[_Seen]:
        """Frames of a stretch. A video that ends too early says so once."""
        media, start, stop, expected = asked.media, asked.start, asked.stop, asked.expected
        video = self._video
        if video is None or video.uri != media.uri or video.position > start:  # else it goes on there
            self._video = video = None  # the next may not open
            try:
                self._video = video = Video(media.uri, self.settings.max_pixels)
            except ImageError as error:
                yield _Seen(rejected_row(media, error.reason, str(error)))
                return
        if not video.skip_to(start):
            return  # it ended in an earlier stretch, which told
        row: Row = {"name": media.name, "uri": media.uri, "exif_rotated": False}
        for number, image in video.frames(start, stop, self.settings.video_stride):
            yield self._seen(row | {"frame": number}, image, asked.boxes_in(number))
        wanted = expected if stop is None else min(stop, expected)
        # The header's count is an estimate: off by a few frames it means nothing.
        tolerated = max(self.settings.video_stride, expected // 50, 2)
        if video.position == 0 or video.position < wanted - tolerated:
            detail = f"no frame can be read after {video.position}, its header promises {expected}"
            yield _Seen(rejected_row(media, "video_cut_off", detail, video.position))

    def _seen(self, row: Row, image: NDArray[np.uint8], boxes: NDArray[np.float32] | None) -> _Seen:
        """A decoded picture with its boxes: given, found, or none."""
        source = "detector" if self.detector else "whole_image" if boxes is None else "given"
        row |= {"height": image.shape[0], "width": image.shape[1], "boxes_source": source}
        if self.detector is not None:
            return _Seen(row, image, *self.detector(image, self.settings.score_threshold))
        return _Seen(row, image) if boxes is None else _Seen(row, image, boxes[:, :4], boxes[:, 4])


@dataclass
class _Seen:
    """A picture or frame in an actor's hands."""

    row: Row
    image: NDArray[np.uint8] | None = None
    """None where it was rejected."""
    boxes: NDArray[np.float32] | None = None
    scores: NDArray[np.float32] | None = None
