"""Picture bytes -> uint8 RGB, and back. The header is judged before anything is decoded.

Read: JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF, and with the extra `heif` HEIC. Everything becomes 8-bit RGB:
grey is repeated, CMYK converted, 16 bit keeps the upper 8, a palette is looked up, of several frames or pages
the first is taken. Alpha is dropped, the colours stay as stored, but for two: what is transparent turns black
in a TIFF, as libtiff reads it, and has the background's colour in a GIF.

One verdict for one file, whoever asks: bytes go through `decode_image`, never through cv2.imread, which
accepts a JPEG with 90 % of it missing.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Image import DecompressionBombError, Exif
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from hrnet_core import heif
from hrnet_core.choices import MAX_PIXELS
from hrnet_core.errors import DataError, ImageError, first_line
from hrnet_core.picture_parts import jpeg_ends, png_ends, readable_head

Image = NDArray[np.uint8]

# Pillow's header parsers by the file's first bytes. Not Image.open: it tries what we do not support, and
# judges the size by a global of its own.
PARSERS: tuple[tuple[str, re.Pattern[bytes], Any], ...] = (
    ("JPEG", re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    ("WEBP", re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImageFile),
    ("GIF", re.compile(rb"GIF8[79]a"), GifImageFile),
    ("BMP", re.compile(rb"BM....\0\0\0\0", re.DOTALL), BmpImageFile),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImageFile),
)
SUPPORTED = "JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or HEIC"
# Pictures that people do send, to be told what they are.
OTHER_FORMATS: tuple[tuple[str, re.Pattern[bytes]], ...] = (
    ("a video or another file in ISO's container", re.compile(rb"....ftyp", re.DOTALL)),
    ("PDF", re.compile(rb"%PDF")),
    ("Photoshop", re.compile(rb"8BPS")),
    ("JPEG 2000", re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51")),
    ("SVG", re.compile(rb"\s*(<\?xml[^>]*>\s*)?<svg")),
)
ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class ImageHeader:
    """What a picture says of itself before it is decoded."""

    format: str
    """JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF or HEIC; a JPEG with others behind it (MPO) is a JPEG."""
    width: int
    """As stored, before EXIF; of AVIF and HEIC as displayed, for which `orientation` is 1."""
    height: int
    orientation: int
    """EXIF orientation 1 to 8; 1 where there is none or it cannot be read."""
    frames: int
    """1, or 2 where there are more frames or pages; they are not counted, only the first is used."""


def read_header(data: bytes) -> ImageHeader:
    """Format, size and orientation of a picture, without decoding a pixel.

    Raises ImageError: `empty`, `not_an_image`, `unsupported_format` (also a HEIC where nothing reads it),
    `truncated` (the header itself is cut off or damaged), `too_large` (a WebP that Pillow refuses by its
    header), `decode_failed` (more scans, segments, chunks or blocks than any program writes).
    """
    if not data:
        raise ImageError("empty", "the file is empty (0 bytes): send the picture itself.")
    name, parser = _parser(data)
    orientation = 1
    try:
        if parser is None:
            width, height, frames = heif.size_of(name, data)
        else:
            picture = parser(io.BytesIO(readable_head(name, data)))
            width, height = picture.size
            frames = 2 if getattr(picture, "is_animated", False) else 1
            orientation = _orientation(picture)
    except ImageError:
        raise
    except DecompressionBombError as error:
        raise ImageError("too_large", f"the {name} header promises too much: {error}") from None
    except Exception as error:  # a parser of hostile bytes may raise anything
        if "unknown pixel mode" in str(error):  # Pillow of a TIFF of several float channels, which is whole
            why = f"pixels of this {name} are of a kind that is not read: save it as 8-bit JPEG or PNG."
            raise ImageError("unsupported_format", why) from None
        why = f"the {name} header is cut off or damaged ({error}): save or send the picture again."
        raise ImageError("truncated", why) from None
    if name == "TIFF" and orientation >= 5:  # Pillow gives a TIFF's size as displayed
        width, height = height, width
    if width < 1 or height < 1:
        raise ImageError("not_an_image", f"the {name} header gives a size of {width} x {height} pixels.")
    return ImageHeader(name, width, height, orientation, frames)


def check_image(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """The header of a picture after everything that can be judged without decoding a pixel.

    Raises ImageError: those of read_header, `too_large` when the header promises more than max_pixels,
    `truncated` when the end is missing (JPEG's EOI, PNG's IEND, WebP's and BMP's declared length, AVIF's and
    HEIC's boxes; bytes after the end are tolerated).
    """
    header = read_header(data)
    if header.width * header.height > max_pixels:
        raise ImageError(
            "too_large",
            f"the {header.format} header promises {header.width} x {header.height} = "
            f"{header.width * header.height:,} pixels, above max_pixels = {max_pixels:,}: "
            "send a smaller picture or raise max_pixels.",
        )
    if not _is_complete(header.format, data):
        raise ImageError(
            "truncated",
            f"the {header.format} file is cut off: its end is missing after {len(data):,} bytes. "
            "Copy, download or send it again.",
        )
    return header


def decode_image(data: bytes, *, apply_exif: bool, max_pixels: int = MAX_PIXELS) -> Image:
    """Picture bytes -> uint8 (H, W, 3) RGB.

    apply_exif=True turns the picture as its EXIF orientation says (serving, predict). False leaves the
    stored pixels, to which COCO's annotations belong.

    Raises ImageError: those of check_image, `decode_failed` for any other damage.
    """
    return decode_checked(data, check_image(data, max_pixels), apply_exif=apply_exif)


def decode_checked(data: bytes, header: ImageHeader, *, apply_exif: bool) -> Image:
    """decode_image for bytes that check_image has passed, with the header that it gave."""
    turn = header.orientation if apply_exif else 1
    if header.format == "TIFF":  # OpenCV's reader turns it by itself, whatever its flags say
        turn = 1 if apply_exif else {6: 8, 8: 6}.get(header.orientation, header.orientation)
    return displayed(_decode(header, data), turn)


def displayed(image: Image, orientation: int) -> Image:
    """The stored picture (H, W, 3) as EXIF orientation 1 to 8 wants it displayed."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def read_image(file: str | Path) -> Image:
    """The picture in a file, its EXIF orientation applied. DataError: it cannot be read; ImageError as of
    decode_image, with the file's name."""
    try:
        return decode_image(Path(file).read_bytes(), apply_exif=True)
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}). Check its name and its rights, or give the picture "
            f"as an array."
        ) from None
    except ImageError as error:
        raise ImageError(error.reason, f"{file}: {error}") from None


def check_pixels(given: Any, name: str) -> Image:
    """A picture that a caller gave as an array: uint8 (H, W, 3) in C order. DataError, which calls it `name`
    and tells how to make one of what it is."""
    usable = isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.shape[2:] == (3,)
    if not usable or not given.size:
        got = f"{given.dtype} {given.shape}" if isinstance(given, np.ndarray) else type(given).__name__
        raise DataError(f"{name} must be a uint8 array (H, W, 3), RGB, got {got}. {_to_pixels(given)}")
    return np.ascontiguousarray(given)


def _to_pixels(given: Any) -> str:
    """How a picture is made of something that is none."""
    if given is None:
        return "cv2.imread gives None where it cannot read a file: give the path itself."
    if isinstance(given, str | Path):
        return "hrnet_core.images.read_image makes one of a file."
    if isinstance(given, bytes | bytearray | memoryview):
        return "hrnet_core.images.decode_image makes one of a file's bytes."
    module = type(given).__module__
    if module.startswith("PIL."):
        return "np.array(ImageOps.exif_transpose(image).convert('RGB')) makes one of Pillow's."
    if module.startswith("torch"):
        return "image.permute(1, 2, 0).cpu().numpy() makes one of a uint8 tensor (3, H, W)."
    if not isinstance(given, np.ndarray):
        return "np.array makes one of nested lists, hrnet_core.images.read_image of a file."
    if not given.size:
        return "It has no pixels."
    if given.dtype.kind == "f":
        return "np.rint(255 * image).astype(np.uint8) makes one of floats from 0 to 1."
    if given.dtype == np.uint16:
        return "(image >> 8).astype(np.uint8) makes one of 16 bits."
    if given.dtype != np.uint8:
        return "image.astype(np.uint8) makes one of whole numbers from 0 to 255."
    if given.ndim == 2 or given.shape[2:] == (1,):
        return "cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) makes one of a grey picture."
    if given.ndim == 3 and given.shape[0] == 3:
        return "image.transpose(1, 2, 0) makes one of (3, H, W)."
    return (
        "image[..., :3] leaves alpha out." if given.shape[2:] == (4,) else "H and W are its first two sides."
    )


def encode_jpeg(image: Image, quality: int = 95) -> bytes:
    """uint8 (H, W, 3) RGB -> JPEG with full colour resolution (4:4:4)."""
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return _encode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality, *sampling])


def encode_png(image: Image) -> bytes:
    """uint8 (H, W, 3) RGB -> PNG."""
    return _encode(".png", image, [])


def _parser(data: bytes) -> tuple[str, Any]:
    """Format of a picture, and what reads its header; None: `heif`."""
    if kind := heif.kind_of(data):
        return kind, None
    for name, start, parser in PARSERS:
        if start.match(data):
            return name, parser
    for name, start in OTHER_FORMATS:
        if start.match(data):
            raise ImageError("unsupported_format", f"{name} is not read: convert the file to {SUPPORTED}.")
    raise ImageError("not_an_image", f"the file begins with {data[:12]!r}, unknown to us: send {SUPPORTED}.")


def _orientation(picture: Any) -> int:
    """EXIF's orientation, XMP's ignored as browsers do."""
    try:
        if isinstance(picture, TiffImageFile):
            value = picture.tag_v2.get(ORIENTATION_TAG, 1)
        else:
            exif = Exif()
            exif.load(picture.info.get("exif", b""))
            value = exif.get(ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF is no reason to refuse a picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _is_complete(name: str, data: bytes) -> bool:
    if name == "JPEG":
        return jpeg_ends(data)
    if name == "PNG":
        return png_ends(data)
    if name in ("AVIF", "HEIC"):
        return heif.is_whole(data)
    # Of GIF and TIFF the decoder refuses what is cut off.
    least = {"WEBP": 8 + int.from_bytes(data[4:8], "little"), "BMP": int.from_bytes(data[2:6], "little")}
    return len(data) >= least.get(name, 0)


def _decode(header: ImageHeader, data: bytes) -> Image:
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    why = "the decoder gave no picture of the promised size"
    image: Any = None
    try:
        if header.format in ("AVIF", "HEIC"):
            image = heif.decode(header.format, data)
        else:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except ImageError:
        raise
    except cv2.error as error:
        why = str(error.err)
    except Exception as error:  # Pillow's and libheif's share no base
        why = first_line(error)
    shapes = [(header.height, header.width, 3), (header.width, header.height, 3)]
    if image is None or image.dtype != np.uint8 or image.shape not in shapes:
        raise ImageError(
            "decode_failed",
            f"the {header.format} file of {header.width} x {header.height} pixels is damaged, cut off or of "
            f"a kind that is not read ({why}): save it again as an 8-bit JPEG or PNG.",
        )
    decoded: Image = image
    return decoded


def _encode(extension: str, image: Image, settings: list[int]) -> bytes:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"a picture to write is uint8 (H, W, 3) RGB, got {image.dtype} {image.shape}")
    done, buffer = cv2.imencode(extension, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), settings)
    if not done:
        raise ValueError(f"OpenCV did not write a picture of shape {image.shape} as {extension}")
    return bytes(buffer)
