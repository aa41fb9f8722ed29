"""The photographs of a split, looked at before any work is put into them: what their files say of themselves.

Every file's header is judged. Some, spread evenly, are also read to their end and decoded, as preprocess
will: of COCO's 66,000 pictures that is the difference between seconds and many minutes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from hrnet_core.errors import ImageError
from pipelines.sources.photos import check_photo, left_out, open_header
from pipelines.sources.records import Photo, Rejection, Split
from pipelines.storage.files import file_sizes, read_file


@dataclass(frozen=True)
class Look:
    """A photograph that can be used, as far as it was looked at."""

    photo: Photo
    people: slice
    """Its rows in the split's people."""
    orientation: int
    """EXIF's, 1 where nothing is turned."""
    mark: bytes
    """Of the file's size and first bytes: equal files have equal ones."""
    sha256: bytes | None
    """None where the file was not read to its end."""


def examine(
    split: Split, max_pixels: int, *, decode: bool, most: int, workers: int
) -> Iterator[Look | Rejection]:
    """The split's photographs with people, in order. At most `most` of them, spread evenly, are read to the
    end (0: all), and decoded with `decode`; of the others the header alone is judged."""
    photos = list(split.by_photo())
    whole = set(range(len(photos)))
    if 0 < most < len(photos):
        whole = set(np.linspace(0, len(photos) - 1, most).astype(int).tolist())
    sizes = file_sizes([photo.path for photo, _ in photos])

    def look(number: int) -> Look | Rejection:
        photo, people = photos[number]
        try:
            header, head = open_header(photo.path)
            mark = hashlib.sha256(sizes[number].to_bytes(8, signed=True) + head).digest()
            if number in whole:
                checked = check_photo(photo, max_pixels)
                if isinstance(checked, Rejection):
                    return checked
                if decode:
                    checked.decode()
                return Look(photo, people, checked.header.orientation, mark, checked.sha256)
        except ImageError as error:
            return left_out(photo, error.reason, str(error))
        if header.width * header.height > max_pixels or (header.width, header.height) != (
            photo.width,
            photo.height,
        ):
            checked = check_photo(photo, max_pixels)  # says it in its words
            if isinstance(checked, Rejection):
                return checked
        return Look(photo, people, header.orientation, mark, None)

    pool = ThreadPoolExecutor(workers)
    try:
        yield from pool.map(look, range(len(photos)))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for 100,000 pictures


def equal_files(looks: Sequence[Look], others: Sequence[Look]) -> Iterator[tuple[Look, Look]]:
    """Pairs of photographs, one of each, whose files are equal byte for byte; each of `looks` once."""
    by_mark: dict[bytes, list[Look]] = {}
    for other in others:
        by_mark.setdefault(other.mark, []).append(other)
    for look in looks:
        for other in by_mark.get(look.mark, ()):
            if other.photo.path != look.photo.path and _sha256(look) == _sha256(other):
                yield look, other
                break


def _sha256(look: Look) -> bytes:
    return look.sha256 or hashlib.sha256(read_file(look.photo.path)).digest()
