"""The work of an actor of predict: pictures and frames of a unit -> rows."""

from __future__ import annotations

import functools
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
from pipelines.poses.actor import Outcome, Threads
from pipelines.poses.formats import ROW, Row, poses_of, rejected_row
from pipelines.poses.plan import Asked, Still, Stretch
from pipelines.settings.config import PredictSettings
from pipelines.sources.media import Video
from pipelines.sources.photos import open_picture

if TYPE_CHECKING:
    from hrnet_core.predictor import Prepared


GROUP_PIXELS = 2**26
"""Pixels of the pictures of a group (200 MB where they are kept to be drawn on), or one that has more."""

BATCHES_AHEAD = 16
"""Of people in frames that are read before the network has the first of them."""


@dataclass
class Worker:
    """A unit -> rows (pipelines.poses.formats.ROW) as Parquet bytes. Keeps a video open from unit to unit."""

    settings: PredictSettings
    detector: PersonDetector | None = None
    _video: Video | None = None

    def __call__(self, unit: Sequence[Asked], threads: Threads) -> Outcome:
        rows: list[Row] = []
        group: list[_Seen] = []
        boxes = pixels = 0
        for seen in self._read(unit, threads):
            rows.append(seen.row)
            if seen.people is None:
                continue
            group.append(seen)
            boxes += len(seen.people.boxes)
            pixels += seen.row["height"] * seen.row["width"]
            # Groups follow from the unit alone, and so do the batches in them.
            if boxes >= 2 * self.settings.batch_size or pixels >= GROUP_PIXELS:
                self._predict(group, threads)
                group, boxes, pixels = [], 0, 0
        self._predict(group, threads)
        content = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, ROW), content, compression="zstd", write_page_checksum=True)
        people = sum(len(row["box_scores"]) for row in rows if "reason" not in row)
        return Outcome(content.getvalue(), people)

    def _predict(self, group: list[_Seen], threads: Threads) -> None:
        """Fill the rows of a group. A pose that is not finite rejects its picture: the weights are bad."""
        people = [seen.people for seen in group if seen.people is not None]
        found = threads.predict(people, self.settings.flip_test, self.settings.batch_size)
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
            if seen.image is not None:
                known = poses_of(seen.row, threads.predictor.spec.skeleton)  # knows where its boxes came from
                seen.row["overlay"] = encode_jpeg(known.plot(seen.image, self.settings.draw_threshold), 90)

    def _read(self, unit: Sequence[Asked], threads: Threads) -> Iterator[_Seen]:
        """Pictures and frames in their order, their people cut out; those that cannot be used without any."""
        stretches = [one for one in unit if isinstance(one, Stretch)]
        if not stretches:  # a stretch is a unit of its own
            yield from threads.read(functools.partial(self._read_picture, threads=threads), unit)
            return
        for stretch in stretches:
            # Read before the network has it, so that the next one is read meanwhile; a crowd in portions.
            read: list[_Seen] = []
            with threads.filming:
                for seen in self._read_frames(stretch, threads):
                    read.append(seen)
                    if sum(one.count for one in read) >= BATCHES_AHEAD * self.settings.batch_size:
                        yield from read
                        read = []
            yield from read

    def _read_picture(self, asked: Still, threads: Threads) -> _Seen:
        media, settings = asked.media, self.settings
        try:
            picture = open_picture(media.uri, settings.max_pixels, apply_exif=settings.exif, size=asked.size)
        except ImageError as error:
            return _Seen(rejected_row(media, error.reason, str(error)))
        except DataError as error:  # a bucket that does not answer costs this picture, not the run
            why, _, way_out = str(error).rpartition(". ")  # to run again is no way out here
            return _Seen(rejected_row(media, "unreadable", f"{why}." if why else way_out))
        row: Row = {"name": media.name, "uri": media.uri, "image_id": asked.image_id}
        with threads.decoding:
            try:
                image = picture.decode()
            except ImageError as error:
                return _Seen(rejected_row(media, error.reason, str(error)))
            row |= {"exif_rotated": picture.turned, "first_of_several": picture.header.frames > 1 or None}
            return self._seen(row, image, asked.boxes, threads)

    def _read_frames(self, asked: Stretch, threads: Threads) -> Iterator[_Seen]:
        """Frames of a stretch. A video that ends too early says so once; boxes after its end are
        told."""
        media, start, stop, expected = asked.media, asked.start, asked.stop, asked.expected
        video = self._video
        if video is None or video.uri != media.uri or video.position > start:  # else it goes on there
            self._video = video = None  # the next may not open
            try:
                self._video = video = Video(media.uri, self.settings.max_pixels)
            except ImageError as error:
                yield _Seen(rejected_row(media, error.reason, str(error)))
                return
        row: Row = {"name": media.name, "uri": media.uri, "exif_rotated": False}
        stride = self.settings.video_stride
        if video.skip_to(start):
            for number, image in video.frames(start, stop, stride):
                yield self._seen(row | {"frame": number}, image, asked.boxes_in(number), threads)
        # Each stretch tells what it was the first to meet, whoever works on the one before.
        damaged = [n for n in video.damaged if start - stride < n and (stop is None or n <= stop - stride)]
        if damaged:
            where = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
            detail = (
                f"before frame {where} something is damaged; the frames after it are answered, and numbered "
                f"as if nothing were between"
            )
            yield _Seen(rejected_row(media, "frames_missing", detail, damaged[0]))
        ended = stop is None or video.position <= stop - stride
        told = video.position <= start - stride  # by the stretch that lacked a frame first
        if ended and not told and (why := _too_few(video, expected, stride)) is not None:
            yield _Seen(rejected_row(media, *why, video.position or None))
        late = sorted(n for n in asked.frames or () if n >= video.position) if ended else []
        if late:
            which = f"frame {late[0]}" if len(late) == 1 else f"{len(late)} frames, {late[0]} to {late[-1]},"
            detail = f"the boxes of {which} fit no frame: {video.position} can be read, counted from 0"
            yield _Seen(rejected_row(media, "bbox_invalid", detail, video.position))

    def _seen(
        self, row: Row, image: NDArray[np.uint8], boxes: NDArray[np.float32] | None, threads: Threads
    ) -> _Seen:
        """A decoded picture with its people: in boxes that were given, found, or the whole of it."""
        source = "detector" if self.detector else "whole_image" if boxes is None else "given"
        row |= {"height": image.shape[0], "width": image.shape[1], "boxes_source": source}
        xywh, scores = (None, None) if boxes is None else (boxes[:, :4], boxes[:, 4])
        if self.detector is not None:
            xywh, scores = self.detector(image, self.settings.score_threshold)
        (people,) = threads.predictor.prepare(image, xywh, scores)
        drawn = "overlays" in self.settings.formats and "frame" not in row
        return _Seen(row, people, image if drawn else None)


def _too_few(video: Video, expected: int, stride: int) -> tuple[str, str] | None:
    """Of a video that was read to its end: reason and detail, where that came too early."""
    read = video.position
    if not read:
        return "not_a_video", (
            f"none of its frames can be read: the file is damaged, cut off, or its codec ({video.codec}) is "
            f"not read here: save it again as H.264, such as by ffmpeg -i CLIP -c:v libx264 NEW.mp4."
        )
    if not video.lacks_frames(stride):
        return None
    if video.at_end:
        return "frames_missing", (
            f"{read} frames can be read up to its end, where its length and rate promise {expected}: its "
            f"rate varies, or some in between are damaged"
        )
    return "video_cut_off", f"no frame can be read after {read}, its header promises {expected}"


@dataclass
class _Seen:
    """A picture or frame in an actor's hands."""

    row: Row
    people: Prepared | None = None
    """None where it was rejected."""
    image: NDArray[np.uint8] | None = None
    """Its pixels, where it will be drawn on."""

    @property
    def count(self) -> int:
        return 0 if self.people is None else len(self.people.boxes)
