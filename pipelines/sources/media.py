"""Pictures and videos that a user names: paths, folders, globs, URIs of buckets; listed, then read.

A folder is searched with its subfolders; what is neither a picture nor a video by its name is passed over,
and so are hidden files. A file that is named itself is always taken.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import itertools
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray
from pyarrow import fs

from hrnet_core.errors import DataError, ImageError
from hrnet_core.locations import is_uri, open_folder, refuse_no_bucket
from pipelines.storage.files import absolute, answering, list_tree

PICTURES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic",
    ".heif",
)  # fmt: skip
UNREAD = (".jp2",)
"""Pictures that we do not decode: taken, so that they are rejected by name instead of passed over."""
VIDEOS = (
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".mts", ".m2ts",
    ".3gp", ".ogv",
)  # fmt: skip
ATTEMPTS = 100
"""OpenCV gives no frame for a damaged packet, as at the end of a video, but goes on when it is asked
again."""


@dataclass(frozen=True)
class Media:
    """One file."""

    name: str
    """Unique among its fellows, with /: relative to the folder that was named, else the file's name."""
    uri: str
    """Absolute path, or URI."""
    kind: Literal["picture", "video"]
    size: int
    """Bytes."""
    modified_ns: int

    @property
    def first_name(self) -> str:
        """Its name before it was made unique."""
        file = self.uri.partition("?")[0] if is_uri(self.uri) else self.uri
        base = posixpath.basename(file)
        return posixpath.join(posixpath.dirname(self.name), unquote(base) if is_uri(self.uri) else base)


def list_media(
    sources: Sequence[str | Path], exclude: str | Path | None = None
) -> tuple[tuple[Media, ...], int]:
    """What the sources name, in their order, each folder and glob by name and every file once; and how many
    files of folders are neither pictures nor videos by name. DataError for a source that names nothing.

    sources: paths and URIs; one alone, in no list, is a TypeError.
    exclude: a folder whose files do not count: the one that is written into.
    """
    if isinstance(sources, str | os.PathLike):  # its letters would be sources: / is one of them
        raise TypeError(f"sources are a list of paths and URIs, got {str(sources)!r} alone")
    if not sources:
        raise DataError("no source is named: give pictures, videos, folders, globs or URIs.")
    found: dict[str, Media] = {}
    passed_over = 0
    outside = None if exclude is None else f"{absolute(str(exclude)).partition('?')[0]}/"
    for source in map(str, sources):
        some, passed = _of_uri(source) if is_uri(source) else _of_path(os.path.expanduser(source))
        there = len(some)
        some = [m for m in some if outside is None or not m.uri.startswith(outside)]
        if there and not some:
            raise DataError(
                f"{source}: all {there:,} pictures and videos there lie in {str(exclude).partition('?')[0]}, "
                f"which is written into: what lies in it is no source. Name another --out."
            )
        if not some:
            nothing = "no picture or video there" if passed else "nothing there"
            refuse_no_bucket(source)
            raise DataError(
                f"{source}: {nothing}. A source is a picture, a video, a folder, a glob such as "
                f"'photos/*.jpg' or a URI such as s3://bucket/photos; in folders, pictures are "
                f"{' '.join(sorted(PICTURES))} and videos {' '.join(sorted(VIDEOS))}."
            )
        passed_over += passed
        for media in some:
            found.setdefault(media.uri, media)
    return _with_unique_names(found.values()), passed_over


def _of_path(source: str) -> tuple[list[Media], int]:
    local, folder = fs.LocalFileSystem(), os.path.abspath(source)
    if os.path.isdir(source):
        return _of_folder(local, folder, folder)
    matches = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
    paths = [p for p in matches if os.path.isfile(p)]  # a pipe would be waited for
    infos = local.get_file_info([os.path.abspath(p) for p in paths])
    return [_media(info, info.base_name, info.path) for info in infos], 0


def _of_uri(source: str) -> tuple[list[Media], int]:
    """A URI's file, folder or glob. Its query (a bucket's endpoint, say) stays with every file."""
    # A ? is a wildcard in a glob, and starts the query of a URI: the latter where an = follows.
    address, query = re.fullmatch(r"(.*?)(\?[^/?]*=.*)?", source).groups("")  # type: ignore[union-attr]
    folder = address
    while any(c in folder for c in "*[?"):
        folder = posixpath.dirname(folder)
    files, path = open_folder(folder + query)
    with answering(source):
        info = files.get_file_info(path)
        if info.type == fs.FileType.File:
            return [_media(info, info.base_name, source)], 0
        some, passed = _of_folder(files, path, folder.rstrip("/"), query)
    if folder == address:
        return some, passed
    pattern = address[len(folder.rstrip("/")) + 1 :]
    deep, wanted = "**" in pattern, pattern.replace("**/", "*")
    some = [m for m in some if fnmatch.fnmatchcase(m.name, wanted)]
    return [m for m in some if deep or m.name.count("/") == pattern.count("/")], 0


def _of_folder(files: fs.FileSystem, path: str, address: str, query: str = "") -> tuple[list[Media], int]:
    if isinstance(files, fs.LocalFileSystem):  # a link to a folder above would be followed 40 times
        found = files.get_file_info([posixpath.join(path, name) for name in list_tree(path)])
    else:
        found = files.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    media, passed = [], 0
    for info in sorted(found, key=lambda info: info.path):
        name = info.path[len(path.rstrip("/")) + 1 :]
        if info.type != fs.FileType.File or any(part.startswith(".") for part in name.split("/")):
            continue
        if os.path.splitext(name)[1].lower() in PICTURES + UNREAD + VIDEOS:
            child = quote(name) if is_uri(address) else name
            media.append(_media(info, name, f"{address}/{child}{query}"))
        else:
            passed += 1
    return media, passed


def _media(info: fs.FileInfo, name: str, uri: str) -> Media:
    kind: Literal["picture", "video"] = "picture"
    if os.path.splitext(name)[1].lower() in VIDEOS:
        kind = "video"
    return Media(name, uri, kind, info.size or 0, info.mtime_ns or 0)


def _with_unique_names(media: Iterable[Media]) -> tuple[Media, ...]:
    """The second a.jpg becomes a-2.jpg: outputs are named after their pictures."""
    taken: set[str] = set()
    unique = []
    for one in media:
        stem, suffix = os.path.splitext(one.name)
        others = (f"{stem}-{number}{suffix}" for number in itertools.count(2))
        name = next(name for name in itertools.chain([one.name], others) if name not in taken)
        taken.add(name)
        unique.append(replace(one, name=name))
    return tuple(unique)


# --- reading -------------------------------------------------------------------------------------


class Video:
    """Frames of a video file in order, uint8 (H, W, 3) RGB, turned as its metadata says.

    There is no seeking: most codecs land on another frame than the one asked for. To skip, frames are
    decoded and dropped. Frames that are damaged are passed over, and the next one has their number, as with
    all programs that count what they decode. ImageError `not_a_video` or `too_large`.
    """

    def __init__(self, uri: str, max_pixels: int) -> None:
        import cv2

        self.uri, self.position = uri, 0
        self.damaged: list[int] = []
        """Numbers of frames before which something could not be read, as far as it was read."""
        # FFmpeg's own words about a damaged file go to stderr, past every logger; ours are in `rejected`.
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        with _on_this_machine(uri) as file:
            self._capture = cv2.VideoCapture(file, cv2.CAP_FFMPEG)
            size = os.path.getsize(file) if self._capture.isOpened() else 0
        width = int(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        height = int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        if not self._capture.isOpened() or width < 1 or height < 1:
            raise ImageError(
                "not_a_video",
                "the file holds no moving pictures, is damaged, cut off or of a kind that is not read: save "
                "it again as MP4 or AVI.",
            )
        if width * height > max_pixels:
            raise ImageError(
                "too_large",
                f"its frames have {width} x {height} = {width * height:,} pixels, above max_pixels = "
                f"{max_pixels:,}: make it smaller or raise max_pixels.",
            )
        rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        credible = 0.1 <= rate <= 1000
        self.frames_per_s = rate if credible else 25.0
        expected = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        # The picture on an audio file's cover has 90,000 frames/s; a frame has at least a byte.
        self.expected = expected if credible and 0 < expected <= size else 0
        """Frames by the header, or by its length and rate: an estimate, 0 where it says nothing."""
        self._seconds = 0.0

    @property
    def codec(self) -> str:
        """Its four letters, such as h264 or AV01."""
        import cv2

        letters = int(self._capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little", signed=True)
        return letters.decode("ascii", "replace").strip("\0 ") or "unknown"

    @property
    def at_end(self) -> bool:
        """Whether what was read reaches as far as `expected` frames of one pace would, though it be fewer."""
        return self.expected - self._seconds * self.frames_per_s <= _tolerance(self.expected) + 1

    def lacks_frames(self, stride: int) -> bool:
        """Of a video read to its end, every `stride`-th frame: whether there were fewer than `expected`. That
        is an estimate: off by a few frames it means nothing."""
        return self.expected - self.position > max(stride, _tolerance(self.expected))

    def skip_to(self, frame: int) -> bool:
        """Go on to a frame that is not behind; False where the video ends before."""
        while self.position < frame:
            if not self._next():
                return False
        return True

    def _next(self) -> bool:
        """Decode the frame at `position`; False where the video ends."""
        import cv2

        for attempt in range(ATTEMPTS):
            if self._capture.grab():
                if attempt:
                    self.damaged.append(self.position)
                self.position += 1
                self._seconds = max(self._seconds, self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
                return True
        return False

    def frames(
        self, start: int, stop: int | None, stride: int = 1
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(number, frame) of start, start + stride ... below `stop`, or to the end."""
        import cv2

        wanted = start
        while (stop is None or wanted < stop) and self.skip_to(wanted):
            if not self._next():
                return
            there, frame = self._capture.retrieve()
            if there:
                yield wanted, np.ascontiguousarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
            else:
                self.damaged.append(wanted)
            wanted += stride


def _tolerance(expected: int) -> int:
    """Frames that an estimate of so many may be off."""
    return max(expected // 50, 2)


@contextlib.contextmanager
def _on_this_machine(uri: str) -> Iterator[str]:
    """A file to open within the block: FFmpeg reads files, what lies in a bucket is copied first. The copy's
    name is gone after the block, and the copy when it is closed."""
    if not is_uri(uri):
        yield uri
        return
    with tempfile.NamedTemporaryFile(suffix=os.path.splitext(uri.partition("?")[0])[1]) as copy:
        try:
            files, path = open_folder(uri)
            with files.open_input_stream(path) as stream:
                shutil.copyfileobj(stream, copy, 1 << 20)
            copy.flush()
        except (OSError, DataError) as error:
            raise ImageError("unreadable", f"the file cannot be read ({error}).") from None
        yield copy.name
