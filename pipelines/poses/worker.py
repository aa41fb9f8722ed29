"""The work of an actor of predict: pictures and frames of a unit -> rows."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hrnet_core.detector import PersonDetector
from hrnet_core.errors import ImageError
from hrnet_core.images import check_image, decode_checked, encode_jpeg
from pipelines.config import PredictSettings
from pipelines.poses.formats import ROW, Row, poses_of
from pipelines.poses.units import Answer, Unit
from pipelines.sources.media import Video, read_picture

if TYPE_CHECKING:
    from hrnet_core.predictor import PosePredictor


GROUP_PIXELS = 2**26
"""Decoded pixels that an actor holds at once (200 MB), or one picture that has more."""


@dataclass
class Worker:
    """A unit -> rows (pipelines.poses.formats.ROW) as Parquet bytes. Keeps a video open from unit to unit."""

    settings: PredictSettings
    detector: PersonDetector | None = None
    draw: bool = False
    _video: Video | None = field(default=None, repr=False)

    def __call__(self, unit: Unit, predictor: PosePredictor) -> Answer:
        rows: list[Row] = []
        group: list[_Seen] = []
        people = pixels = 0
        for seen in self._read(unit):
            rows.append(seen.row)
            if seen.image is None:
                continue
            group.append(seen)
            people += 1 if seen.boxes is None else len(seen.boxes)
            pixels += seen.image.shape[0] * seen.image.shape[1]
            # Groups follow from the unit alone, and so do the batches in them.
            if people >= 2 * self.settings.batch_size or pixels >= GROUP_PIXELS:
                self._predict(group, predictor)
                group, people, pixels = [], 0, 0
        self._predict(group, predictor)
        content = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, ROW), content, compression="zstd", write_page_checksum=True)
        return Answer(
            content.getvalue(), sum(len(row["box_scores"]) for row in rows if row["reason"] is None)
        )

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
                seen.row |= {
                    "reason": "not_finite",
                    "detail": "the network gave NaN: its weights are damaged",
                }
                continue
            seen.row |= {
                "boxes_xywh": poses.boxes.xywh.ravel(),
                "box_scores": poses.boxes.conf,
                "keypoints": poses.keypoints.data.ravel(),
            }
            if self.draw and seen.row["frame"] is None:
                known = poses_of(seen.row, predictor.spec.skeleton)  # knows where its boxes came from
                seen.row["overlay"] = encode_jpeg(known.plot(seen.image, self.settings.draw_threshold), 90)

    def _read(self, unit: Unit) -> Iterator[_Seen]:
        """Pictures and frames one after the other, decoded; those that cannot be used without an image."""
        for item in unit:
            if item["kind"] == "video":
                yield from self._read_frames(item)
                continue
            row = {**dict.fromkeys(ROW.names), "name": item["name"], "uri": item["uri"]}
            row["image_id"] = item["image_id"]
            try:
                data = read_picture(item["uri"])
                header = check_image(data, self.settings.max_pixels)
                rotated = self.settings.exif and header.orientation != 1
                image = decode_checked(data, header, apply_exif=self.settings.exif)
                _check_size(item, image, rotated)
            except ImageError as error:
                yield _Seen(row | {"reason": error.reason, "detail": str(error)})
                continue
            yield self._seen(row | {"exif_rotated": rotated}, image, item["boxes"])

    def _read_frames(self, item: dict[str, Any]) -> Iterator[_Seen]:
        """Frames of a stretch. A video that ends too early says so once."""
        start, stop, expected = item["start"], item["stop"], item["expected"]
        base = {**dict.fromkeys(ROW.names), "name": item["name"], "uri": item["uri"], "exif_rotated": False}
        try:
            video = self._open(item["uri"], start)
        except ImageError as error:
            yield _Seen(base | {"reason": error.reason, "detail": str(error)})
            return
        if not video.skip_to(start):
            return  # it ended in an earlier stretch, which told
        for number, image in video.frames(start, stop, self.settings.video_stride):
            boxes = item["boxes"]
            if "frames" in item:
                boxes = item["frames"].get(str(number), [])
            yield self._seen(base | {"frame": number}, image, boxes)
        wanted = expected if stop is None else min(stop, expected)
        # The header's count is an estimate: off by a few frames it means nothing.
        if video.position == 0 or video.position < wanted - max(
            self.settings.video_stride, expected // 50, 2
        ):
            yield _Seen(
                base
                | {
                    "frame": video.position,
                    "reason": "video_cut_off",
                    "detail": f"no frame can be read after {video.position}, its header promises {expected}",
                }
            )

    def _open(self, uri: str, start: int) -> Video:
        """The video at or before a frame; the one that is open, if it goes on there."""
        if self._video is None or self._video.uri != uri or self._video.position > start:
            if self._video is not None:
                self._video.close()
            self._video = Video(uri, self.settings.max_pixels)
        return self._video

    def _seen(self, row: Row, image: NDArray[np.uint8], rows: list[list[float]] | None) -> _Seen:
        """A decoded picture with its boxes: given, found, or none."""
        row |= {"height": image.shape[0], "width": image.shape[1], "boxes_source": "given"}
        if self.detector is not None:
            row["boxes_source"] = "detector"
            return _Seen(row, image, *self.detector(image, self.settings.score_threshold))
        if rows is None:
            row["boxes_source"] = "whole_image"
            return _Seen(row, image)
        table = np.array(rows, np.float32).reshape(-1, 5)
        return _Seen(row, image, table[:, :4], table[:, 4])


@dataclass
class _Seen:
    """A picture or frame in an actor's hands."""

    row: Row
    image: NDArray[np.uint8] | None = None
    """None where it was rejected."""
    boxes: NDArray[np.float32] | None = None
    scores: NDArray[np.float32] | None = None


def _check_size(item: dict[str, Any], image: NDArray[np.uint8], rotated: bool) -> None:
    """ImageError where the boxes were made for a picture of another size."""
    size = (image.shape[1], image.shape[0])
    if item["size"] is None or tuple(item["size"]) == size:
        return
    turned = " once turned as its EXIF says (--predict.no-exif leaves it as stored)" if rotated else ""
    raise ImageError(
        "size_differs",
        f"the picture is {size[0]}x{size[1]} px{turned}, its boxes are of one of "
        f"{item['size'][0]}x{item['size'][1]}.",
    )
