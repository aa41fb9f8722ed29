"""HEIC and AVIF: pictures in ISO's container. Pillow reads AVIF, pi-heif (the extra `heif`) reads HEIC.

How the container turns or mirrors a picture (irot, imir) is a part of decoding it, as for all who read them:
width, height and pixels are those of the turned picture. The EXIF orientation beside says the same once
more and is not looked at.
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, ImageOps

from hrnet_core.errors import ImageError

Image = NDArray[np.uint8]

AVIF = {b"avif", b"avis"}
HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
EXTRA = "pip install 'hrnet-ray[heif]'"
BOX_TYPE = re.compile(rb"[ -~]{4}")


def kind_of(data: bytes) -> str | None:
    """AVIF or HEIC, by the brands at the beginning of a file; None for anything else, such as a video."""
    if data[4:8] != b"ftyp":
        return None
    end = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
    if brands & AVIF:
        return "AVIF"
    return "HEIC" if brands & HEIC else None


def size_of(kind: str, data: bytes) -> tuple[int, int, int]:
    """(width, height, frames) as displayed, no pixel decoded; frames is 2 for more than one. Of a HEIC of
    several pictures its primary one counts. ImageError where there is no decoder; other errors where it is
    damaged."""
    if kind == "HEIC":
        width, height = _heic(data).size
        return width, height, 1
    picture = _avif(data)
    width, height = picture.size
    turned = picture.getexif().get(0x0112, 1) >= 5
    return *((height, width) if turned else (width, height)), 2 if picture.is_animated else 1


def decode(kind: str, data: bytes) -> Image:
    """uint8 (H, W, 3) RGB as displayed. Errors as of size_of."""
    picture = _heic(data).to_pillow() if kind == "HEIC" else ImageOps.exif_transpose(_avif(data))
    return np.array(picture.convert("RGB"))


def is_whole(data: bytes) -> bool:
    """Whether the container's boxes are there to their ends: what describes the picture, and its data."""
    at = 0
    seen: set[bytes] = set()
    while at + 8 <= len(data) and not {b"meta", b"mdat"} <= seen:
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size == 0:  # up to the end, wherever that is
            return True
        if size < 8 or not BOX_TYPE.fullmatch(kind):
            break  # no box any more
        at += size
        seen.add(kind)
    return at <= len(data) and bool(seen & {b"meta", b"moov"}) and b"mdat" in seen


def _avif(data: bytes) -> Any:
    if not AvifImagePlugin.SUPPORTED:
        what = "AVIF is not read by this Pillow: install the wheel of Pillow from PyPI"
        raise ImageError("unsupported_format", f"{what}, or convert the file to JPEG or PNG.")
    # Pillow says what irot and imir say as an EXIF orientation, in place of the one that stands there.
    return AvifImagePlugin.AvifImageFile(io.BytesIO(data))


def _heic(data: bytes) -> Any:
    try:
        import pi_heif
    except ImportError:
        what = f"HEIC is not read here: {EXTRA}, or convert the file to JPEG or PNG."
        raise ImageError("unsupported_format", what) from None
    return pi_heif.open_heif(data)
