"""The files of a prediction: rows of pictures in, COCO results, tables, OpenPose files and videos out.

Written while the rows go by, so that memory does not grow with them. A file has its name once it is whole.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hrnet_core.errors import DataError, ImageError
from hrnet_core.results import Boxes, Keypoints, Poses
from hrnet_core.skeleton import Skeleton
from pipelines.settings.config import PredictSettings
from pipelines.sources.media import Media, Video
from pipelines.storage.files import join, read_file, remove_leftovers, writing, writing_many

Row = dict[str, Any]
"""Some columns of ROW; one that is not there is null."""
ROW = pa.schema(
    [
        ("name", pa.string()),  # Media.name
        ("uri", pa.string()),
        ("frame", pa.int32()),  # of a video, from 0; null for a picture
        ("image_id", pa.int64()),  # null: numbered when it is written
        ("width", pa.int32()),  # as displayed
        ("height", pa.int32()),
        ("exif_rotated", pa.bool_()),
        ("first_of_several", pa.bool_()),  # an animation's or a file's of several pages; null: of one
        ("boxes_source", pa.string()),
        ("boxes_xywh", pa.list_(pa.float32())),  # P * 4
        ("box_scores", pa.list_(pa.float32())),  # P
        ("keypoints", pa.list_(pa.float32())),  # P * K * 3: x, y, score
        ("overlay", pa.binary()),  # JPEG
        ("reason", pa.string()),  # why it was rejected; null: it was not
        ("detail", pa.string()),
    ]
)
"""A picture or frame, answered or rejected."""
TABLE_ROWS = 4096
"""People of a row group of poses.parquet."""
Write = Callable[[int, Row, Poses], None]
"""Takes the image_id, the row and its people."""
Put = Callable[[str, bytes], None]
"""Takes a file (path or URI) and its content."""


def rejected_row(media: Media, reason: str, detail: str, frame: int | None = None) -> Row:
    return {"name": media.name, "frame": frame, "reason": reason, "detail": detail}


def poses_of(row: Row, skeleton: Skeleton) -> Poses:
    """The people of an answered row."""
    keypoints = np.array(row["keypoints"], np.float32).reshape(-1, skeleton.num_keypoints, 3)
    boxes = np.array(row["boxes_xywh"], np.float32).reshape(-1, 4)
    return Poses(
        Keypoints(keypoints),
        Boxes(boxes, np.array(row["box_scores"], np.float32)),
        (row["height"], row["width"]),
        skeleton,
        row["boxes_source"],
        path=row["uri"],
    )


def check_formats(formats: Sequence[str], skeleton: Skeleton) -> None:
    """DataError where a format is not for these keypoints."""
    if "openpose" in formats:
        nobody = Keypoints(np.zeros((0, skeleton.num_keypoints, 3), np.float32))
        boxes = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
        Poses(nobody, boxes, (1, 1), skeleton).to_openpose()


def write_all(
    rows: Iterable[Row], media: Sequence[Media], out: str, settings: PredictSettings, skeleton: Skeleton
) -> tuple[Counter[str], Counter[str]]:
    """Every format of the settings, and images.json and rejected.json, in a folder (path or URI).

    Returns how many pictures, frames and people were answered (and how many pictures were the first of
    several in their file), and how many rejected, by reason. DataError, once all is written, where no picture
    was usable; OSError where a file cannot be written.
    """
    counts, left_out, writers = Counter[str](), Counter[str](), list[Write]()
    remove_leftovers(out)
    with contextlib.ExitStack() as files:
        put = files.enter_context(writing_many(sync=False))  # thousands, all written again where it fails
        images = files.enter_context(json_list(join(out, "images.json")))
        rejected = files.enter_context(json_list(join(out, "rejected.json")))
        if "coco" in settings.formats:
            category = settings.category_id
            results = files.enter_context(json_list(join(out, "poses.json")))
            writers.append(lambda image_id, row, poses: results(*poses.to_coco(image_id, category)))
        if "parquet" in settings.formats:
            writers.append(files.enter_context(_table(join(out, "poses.parquet"), skeleton)))
        if "openpose" in settings.formats:
            writers.append(_openpose(join(out, "openpose"), media, put))
        if "overlays" in settings.formats:
            writers.append(functools.partial(_overlay, join(out, "overlays"), put))
        if "videos" in settings.formats:
            writers.append(files.enter_context(_videos(join(out, "videos"), settings)))
        for row in rows:
            if row["reason"] is not None:
                left_out[row["reason"]] += 1
                rejected({key: row[key] for key in ("name", "frame", "reason", "detail")})
                continue
            counts["pictures" if row["frame"] is None else "frames"] += 1
            poses = poses_of(row, skeleton)
            counts["people"] += len(poses)
            image_id = row["image_id"]
            if image_id is None:
                image_id = counts["pictures"] + counts["frames"]
            counts["first_of_several"] += bool(row.get("first_of_several"))
            shown = ("width", "height", "frame", "exif_rotated", "first_of_several", "boxes_source")
            known = {key: row[key] for key in shown if row.get(key) is not None}
            images({"id": image_id, "file_name": row["name"], **known})
            for write in writers:
                write(image_id, row, poses)
    if not counts["pictures"] + counts["frames"]:
        file = join(out, "rejected.json")
        first = json.loads(read_file(file))[0]
        raise DataError(
            f"none of {len(media)} pictures and videos could be used. The first, {first['name']}: "
            f"{first['detail'].rstrip('.')}. All of them: {file}."
        )
    return counts, left_out


@contextlib.contextmanager
def json_list(file: str) -> Iterator[Callable[..., None]]:
    """A JSON list, one entry a line; takes entries."""
    with writing(file) as part, part.open("w", encoding="utf-8") as stream:
        between = itertools.chain(["[\n"], itertools.repeat(",\n"))

        def take(*entries: Any) -> None:
            for entry in entries:
                stream.write(next(between) + json.dumps(entry, allow_nan=False, ensure_ascii=False))

        yield take
        stream.write("\n]\n" if next(between) == ",\n" else "[]\n")


@contextlib.contextmanager
def _table(file: str, skeleton: Skeleton) -> Iterator[Write]:
    """poses.parquet: a row a person. The names of the keypoints stand in the schema's metadata."""
    schema = pa.schema(
        [
            ("image_id", pa.int64()),
            ("name", pa.string()),
            ("frame", pa.int32()),
            ("person", pa.int32()),
            ("bbox_xywh", pa.list_(pa.float32())),
            ("box_score", pa.float32()),
            ("score", pa.float64()),
            ("keypoints", pa.list_(pa.float32())),
        ],
        metadata={"hrnet": json.dumps({"skeleton": skeleton.as_dict()})},
    )
    people: list[Row] = []
    options = {"compression": "zstd", "write_page_checksum": True}
    with writing(file) as part, pq.ParquetWriter(part, schema, **options) as writer:

        def take(image_id: int, row: Row, poses: Poses) -> None:
            boxes, points = poses.boxes, poses.keypoints.data
            for person, of_one in enumerate(
                zip(boxes.xywh, boxes.conf, poses.scores, map(np.ravel, points), strict=True)
            ):
                values = (image_id, row["name"], row["frame"], person, *of_one)
                people.append(dict(zip(schema.names, values, strict=True)))
            if len(people) >= TABLE_ROWS:
                flush()

        def flush() -> None:
            if people:
                writer.write_table(pa.Table.from_pylist(people, schema))
                people.clear()

        yield take
        flush()


def _openpose(folder: str, media: Sequence[Media], put: Put) -> Write:
    """STEM_keypoints.json, of frames STEM_000000000012_keypoints.json, as OpenPose names them.

    Where two pictures differ in their suffix only, it stays part of the stem.
    """
    twins = Counter(posixpath.splitext(m.name)[0] for m in media)

    def take(image_id: int, row: Row, poses: Poses) -> None:
        stem = posixpath.splitext(row["name"])[0]
        stem = stem if twins[stem] == 1 else row["name"]
        frame = "" if row["frame"] is None else f"_{row['frame']:012d}"
        content = json.dumps(poses.to_openpose(), allow_nan=False)
        put(join(folder, f"{stem}{frame}_keypoints.json"), content.encode())

    return take


def _with_suffix(name: str, *suffixes: str) -> str:
    """A name that ends in one of these, be it by the first at its end: a.png.jpg is made of a.png."""
    return name if name.lower().endswith(suffixes) else name + suffixes[0]


def _overlay(folder: str, put: Put, image_id: int, row: Row, poses: Poses) -> None:
    """A picture with its poses: a.jpg stays a.jpg, a.png becomes a.png.jpg."""
    if row["overlay"] is not None:
        put(join(folder, _with_suffix(row["name"], ".jpg", ".jpeg")), row["overlay"])


@contextlib.contextmanager
def _videos(folder: str, settings: PredictSettings) -> Iterator[Write]:
    """Videos with their poses drawn in: clip.avi becomes clip.avi.mp4, clip.mp4 stays clip.mp4.

    Frames come in order, video after video; each video is decoded once more.
    """
    name: str | None = None
    draw: Callable[[int, Poses], None] | None = None
    with contextlib.ExitStack() as last:

        def take(image_id: int, row: Row, poses: Poses) -> None:
            nonlocal name, draw
            if row["frame"] is None:
                return
            if draw is None or row["name"] != name:
                last.close()
                file = join(folder, _with_suffix(row["name"], ".mp4"))
                name, draw = row["name"], last.enter_context(_video(file, row, settings))
            draw(row["frame"], poses)

        yield take


@contextlib.contextmanager
def _video(file: str, first: Row, settings: PredictSettings) -> Iterator[Callable[[int, Poses], None]]:
    """MPEG-4 in MP4, of the video's own size and pace; the sound is not kept. Takes frame and people."""
    try:
        video = Video(first["uri"], settings.max_pixels)
    except ImageError as error:
        raise DataError(f"{first['uri']}: changed while it was predicted: {error}") from None
    size = first["width"], first["height"]
    with writing(file) as part:
        pace = video.frames_per_s / settings.video_stride
        link = part.with_suffix(".mp4")  # OpenCV takes the kind of video from the name
        link.symlink_to(part.name)
        writer = cv2.VideoWriter(str(link), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), pace, size)
        link.unlink()
        if not writer.isOpened():
            raise DataError(
                f"{file}: OpenCV cannot write a video of {size[0]}x{size[1]} at {pace:g} frames/s here. "
                f"Leave videos out of --predict.formats."
            )

        def take(number: int, poses: Poses) -> None:
            for _, frame in video.frames(number, number + 1):
                drawn = poses.plot(frame, settings.draw_threshold)
                writer.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))

        try:
            yield take
        finally:
            writer.release()
