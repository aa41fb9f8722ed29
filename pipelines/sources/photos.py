"""A picture file, opened: the one verdict on it that every stage shares, with one set of limits.

`open_picture` raises an ImageError with its reason; `open_photo` is the same for a photograph of
annotations, whose verdict becomes a row of rejected.parquet.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import ImageError
from hrnet_core.images import ImageHeader, check_image, decode_checked, read_header
from pipelines.sources.records import Photo, Rejection
from pipelines.storage.files import read_file

HEAD = 1 << 12
"""Bytes that hold most headers."""
MAX_BYTES = 2**30
"""A larger file is not read: no picture below the limit of pixels has so many bytes."""


@dataclass(frozen=True)
class Picture:
    """A picture file after its header and end were judged; no pixel is decoded yet."""

    content: bytes
    header: ImageHeader
    apply_exif: bool

    @property
    def turned(self) -> bool:
        """Whether EXIF turns or mirrors what is stored, and is obeyed."""
        return self.apply_exif and self.header.orientation != 1

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the decoded picture, px."""
        sides = self.header.width, self.header.height
        return sides[::-1] if self.apply_exif and self.header.orientation >= 5 else sides

    @property
    def sha256(self) -> bytes:
        """Of the file."""
        return hashlib.sha256(self.content).digest()

    def decode(self) -> NDArray[np.uint8]:
        """uint8 (H, W, 3) RGB. ImageError `decode_failed`."""
        return decode_checked(self.content, self.header, apply_exif=self.apply_exif)


def open_picture(
    path: str, max_pixels: int, *, apply_exif: bool, size: tuple[int, int] | None = None
) -> Picture:
    """A picture at a path or URI. COCO's annotations are of the stored pixels (apply_exif False), what
    people look at is turned as its EXIF says.

    size: (width, height) px that boxes or annotations are of. ImageError: those of check_image,
    missing_image, unreadable, size_differs. DataError where a bucket does not answer.
    """
    try:
        content = read_file(path, MAX_BYTES + 1)
    except FileNotFoundError:
        raise ImageError("missing_image", "no such file") from None
    except OSError as error:
        raise ImageError("unreadable", str(error.strerror or error)) from None
    if len(content) > MAX_BYTES:
        raise ImageError("too_large", f"the file has more than {MAX_BYTES:,} bytes.")
    picture = Picture(content, check_image(content, max_pixels), apply_exif)
    if size is None or picture.size == tuple(size):
        return picture
    width, height = picture.size
    turned = " once turned as its EXIF says (--predict.no-exif: as stored)" if picture.turned else ""
    why = ""
    if (height, width) == tuple(size):
        why = ": width and height exchanged?"
        if not apply_exif and picture.header.orientation >= 5:  # a phone's photograph, as viewers show it
            why = ", as its EXIF turns it: turn the pixels, and drop the tag"
    raise ImageError(
        "size_differs", f"{width} x {height} px{turned}, the annotations are for {size[0]} x {size[1]}{why}"
    )


def open_header(path: str) -> tuple[ImageHeader, bytes]:
    """What the first bytes of a picture say, from as few as are needed; and the first 4 KiB. ImageError:
    those of read_header, missing_image, unreadable."""
    for size in (HEAD, 16 * HEAD, None):
        try:
            content = read_file(path, size)
            return read_header(content), content[:HEAD]
        except ImageError as error:
            if error.reason != "truncated" or size is None:
                raise
        except FileNotFoundError:
            raise ImageError("missing_image", "no such file") from None
        except OSError as error:
            raise ImageError("unreadable", str(error.strerror or error)) from None
    raise AssertionError("the whole file is read last")


def check_photo(photo: Photo, max_pixels: int) -> Picture | Rejection:
    """A photograph of annotations after all that is judged without decoding a pixel, or why it is out."""
    try:
        return open_picture(photo.path, max_pixels, apply_exif=False, size=(photo.width, photo.height))
    except ImageError as error:
        return left_out(photo, error.reason, str(error))


def open_photo(photo: Photo, max_pixels: int) -> tuple[NDArray[np.uint8], bytes] | Rejection:
    """The stored pixels uint8 (H, W, 3) RGB and the file's sha256, or why it is out."""
    checked = check_photo(photo, max_pixels)
    if isinstance(checked, Rejection):
        return checked
    pixels = decode_photo(photo, checked)
    return pixels if isinstance(pixels, Rejection) else (pixels, checked.sha256)


def decode_photo(photo: Photo, checked: Picture) -> NDArray[np.uint8] | Rejection:
    """The stored pixels uint8 (H, W, 3) RGB of what check_photo gave, or why it is out."""
    try:
        return checked.decode()
    except ImageError as error:
        return left_out(photo, error.reason, str(error))


def left_out(photo: Photo, reason: str, detail: str, people: int = 0) -> Rejection:
    """The rejection of a picture; who knows how many people it has says so."""
    return Rejection(reason, photo.file_name, photo.image_id, None, detail, people)
