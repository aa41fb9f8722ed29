"""Files with more parts than any program writes, which would keep a reader busy for minutes; and those that
look like it and are read."""

from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
import pytest

from hrnet_core.errors import ImageError
from hrnet_core.images import check_image, decode_image, encode_png, read_header

GREY = np.full((48, 64, 3), 128, np.uint8)


def jpeg(*options: int) -> bytes:
    return cv2.imencode(".jpg", GREY, list(options))[1].tobytes()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def gif(blocks: bytes = b"") -> bytes:
    """One pixel, with blocks before it."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    return head + blocks + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00;"


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times more. libjpeg decodes it, as often."""
    data = jpeg(cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * count + data[-2:]


def one_component_again(count: int) -> bytes:
    """A sequential JPEG of three components, with a scan of the first one, so many times."""
    data = jpeg()
    scan = b"\xff\xda" + struct.pack(">HB2s3s", 8, 1, b"\x01\x00", b"\0\x3f\0") + bytes(8)
    return data[: data.find(b"\xff\xda")] + scan * count + data[-2:]


def behind_start(segments: bytes) -> bytes:
    data = jpeg()
    return data[:2] + segments + data[2:]


def png_with(chunks: bytes) -> bytes:
    data = encode_png(GREY)
    return data[:33] + chunks + data[33:]


EXIF = b"\xff\xe1\x00\x09Exif\0\0x"
WORK = {
    "scans of a progressive JPEG": many_scans(100),
    "scans of one component": one_component_again(101),
    "a comment that hides the scans behind it": many_scans(0)[:-2]
    + b"\xff\xfe\x00\x04\xff\xd9"
    + many_scans(100)[len(many_scans(0)) - 2 :],
    "empty segments": behind_start(b"\xff\xe8\x00\x02" * 5000),
    "EXIF in pieces": behind_start(EXIF * 5000),
    "empty chunks": png_with(chunk(b"aaAa", b"") * 5000),
    "texts": png_with(chunk(b"tEXt", b"a\0b") * 5000),
    "comments of one letter": gif(b"!\xfe\x01a\0" * 5000),
    "a comment of one-letter blocks": gif(b"!\xfe" + b"\x01a" * 5000 + b"\0"),
    "bytes between blocks": gif(b"\x01" * 5000),
}


@pytest.mark.parametrize("what", WORK)
def test_more_parts_than_a_program_writes_are_refused(what: str) -> None:
    with pytest.raises(ImageError, match="more than any program writes") as caught:
        check_image(WORK[what])
    assert caught.value.reason == "decode_failed"


def test_what_lies_between_segments_is_not_walked_over_byte_by_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow reads a byte at a time there: 32 MB took it 10 s and more."""
    import hrnet_core.images as module

    seen = []

    class Counted(module.io.BytesIO):  # type: ignore[name-defined, misc]
        def read(self, size: int | None = -1, /) -> bytes:
            seen.append(size)
            return super().read(size)

    plain = jpeg()
    monkeypatch.setattr(module.io, "BytesIO", Counted)
    assert read_header(plain) == read_header(plain[:20] + bytes(100_000) + plain[20:])  # behind JFIF
    assert 0 < len(seen) < 1000


LEGAL = {
    "progressive": many_scans(0),
    "a hundred scans": many_scans(90),
    "restarts": jpeg(cv2.IMWRITE_JPEG_RST_INTERVAL, 1),
    "a video behind": jpeg(cv2.IMWRITE_JPEG_PROGRESSIVE, 1) + b"\xff\xda" * 5000,
    "large segments": behind_start((b"\xff\xe8\xff\xff" + bytes(65533)) * 300),
    "a photo's EXIF, XMP and colours": behind_start(
        EXIF + b"\xff\xe1\x00\x03x" * 200 + b"\xff\xe2\x00\x03i" * 255
    ),
    "large chunks": png_with(chunk(b"zzZz", bytes(4096)) * 2000),
    "nulls behind a PNG": encode_png(GREY) + bytes(5_000_000),
    "nulls behind a GIF": gif() + bytes(5_000_000),
    "nulls behind a JPEG": jpeg() + bytes(5_000_000),
    "a long comment": gif(b"!\xfe" + (b"\xff" + b"a" * 255) * 20_000 + b"\0"),
}


@pytest.mark.parametrize("what", LEGAL)
def test_large_files_that_programs_write_are_read(what: str) -> None:
    image = decode_image(LEGAL[what], apply_exif=True)
    assert image.shape in (GREY.shape, (1, 1, 3))
    assert (image[0, 0] == (128 if image.size > 3 else 0)).all()


def test_the_pixels_of_a_png_may_come_in_small_chunks() -> None:
    raw = zlib.compress(b"".join(b"\0" + row.tobytes() for row in GREY), 0)
    pieces = b"".join(chunk(b"IDAT", raw[at : at + 128]) for at in range(0, len(raw), 128))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 48, 8, 2, 0, 0, 0))
    image = decode_image(b"\x89PNG\r\n\x1a\n" + head + pieces + chunk(b"IEND", b""), apply_exif=True)
    assert (image == GREY).all()
