"""One picture of a COCO folder: its stored pixels, or why it is left out. The one verdict on a file that
preprocess and validate share.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import ImageError
from hrnet_core.images import ImageHeader, check_image, decode_checked
from pipelines.sources.records import Photo, Rejection
from pipelines.storage import read_file


def open_photo(photo: Photo, max_pixels: int) -> tuple[NDArray[np.uint8], bytes] | Rejection:
    """The stored pixels (EXIF ignored, as the annotations want) and the file's sha256, or why not."""
    read = read_photo(photo, max_pixels)
    if isinstance(read, Rejection):
        return read
    content, header = read
    try:
        image = decode_checked(content, header, apply_exif=False)
    except ImageError as error:
        return left_out(photo, error.reason, str(error))
    return image, hashlib.sha256(content).digest()


def read_photo(photo: Photo, max_pixels: int) -> tuple[bytes, ImageHeader] | Rejection:
    """The file's bytes and header after all that is judged without decoding a pixel, or why it is out."""
    try:
        content = read_file(photo.path)
        header = check_image(content, max_pixels)
    except FileNotFoundError:
        return left_out(photo, "missing_image", "no such file")
    except OSError as error:
        return left_out(photo, "unreadable", str(error.strerror))
    except ImageError as error:
        return left_out(photo, error.reason, str(error))
    if (header.width, header.height) == (photo.width, photo.height):
        return content, header
    told = f"{header.width} x {header.height} px, the annotations are for {photo.width} x {photo.height}"
    return left_out(photo, "size_differs", told)


def left_out(photo: Photo, reason: str, detail: str) -> Rejection:
    """The rejection of a picture with all its people."""
    return Rejection(reason, photo.file_name, photo.image_id, None, detail, len(photo.people))
