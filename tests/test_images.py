"""Pictures of every kind that is read, every way of being broken, and Pillow as the outside truth."""

from __future__ import annotations

import base64
import io
import json
import pickle
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from hrnet_core.errors import ImageError, PoseError
from hrnet_core.images import ImageHeader, check_image, decode_image, encode_jpeg, encode_png, read_header

RNG = np.random.default_rng(0)
# 96 x 64 in soft tiles: no two rotations or mirrors are alike, and JPEG keeps it within a few levels.
PICTURE = np.kron(RNG.integers(0, 256, (4, 6, 3)), np.ones((16, 16, 1))).astype(np.uint8)


def save(picture: Image.Image | NDArray[Any], kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def pillow_rgb(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def reason(data: bytes, **options: Any) -> str:
    """The reason for which decode_image refuses `data`, both ways round."""
    reasons = set()
    for apply_exif in (False, True):
        with pytest.raises(ImageError) as caught:
            decode_image(data, apply_exif=apply_exif, **options)
        assert len(str(caught.value)) > 20
        reasons.add(caught.value.reason)
    assert len(reasons) == 1
    return reasons.pop()


KINDS = {
    "JPEG": {"quality": 95},
    "PNG": {},
    "WEBP": {"lossless": True},
    "BMP": {},
    "GIF": {},
    "TIFF": {},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}
AVIF_START = b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif"
HEIC = {
    name: base64.b64decode(text)
    for name, text in json.loads((Path(__file__).parent / "reference" / "heic.json").read_text()).items()
}
"""PICTURE by an encoder of its own, as its README says."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_read_as_pillow_reads_it(kind: str) -> None:
    data = save(PICTURE, kind, **KINDS[kind])
    assert read_header(data) == ImageHeader(kind, 96, 64, orientation=1, frames=1)
    image = decode_image(data, apply_exif=True)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert difference(image, pillow_rgb(data)) < 0.5
    assert difference(image, PICTURE) < 6, "RGB, not BGR: the tiles differ by 85 on average"


@pytest.mark.parametrize("name", HEIC)
def test_a_heic_is_read_in_eight_bits_of_rgb(name: str) -> None:
    """Of several pictures the primary one; ten bits as eight; alpha dropped; as its container turns it."""
    turn = int(name.rpartition("-")[2]) if name.startswith("turned") else 1
    stored = np.asarray(Image.fromarray(PICTURE).convert("L").convert("RGB")) if name == "grey" else PICTURE
    expected = as_exif_says(stored, turn)
    height, width = expected.shape[:2]
    assert read_header(HEIC[name]) == ImageHeader("HEIC", width, height, orientation=1, frames=1)
    for apply_exif in (True, False):
        image = decode_image(HEIC[name], apply_exif=apply_exif)
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous
        seen = slice(0, 48 if name == "alpha" else None)  # what is transparent has no colour to keep
        assert difference(image[:, seen], expected[:, seen]) < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_avif_is_displayed_as_its_container_says(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(PICTURE, "AVIF", exif=exif, **KINDS["AVIF"])  # Pillow writes irot and imir
    expected = as_exif_says(PICTURE, orientation)
    height, width = expected.shape[:2]
    assert read_header(data) == ImageHeader("AVIF", width, height, orientation=1, frames=1)
    assert difference(decode_image(data, apply_exif=True), expected) < 6
    assert difference(decode_image(data, apply_exif=False), expected) < 6


def as_exif_says(picture: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """By Pillow, of a PNG."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(save(picture, "PNG", exif=exif)))))


def test_a_heic_without_its_reader_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    with pytest.raises(ImageError, match=r"pip install 'hrnet-ray\[heif\]'") as told:
        decode_image(HEIC["grey"], apply_exif=True)
    assert told.value.reason == "unsupported_format"
    monkeypatch.setattr("PIL.AvifImagePlugin.SUPPORTED", False)
    with pytest.raises(ImageError, match="wheel of Pillow") as told:
        decode_image(AVIF_START, apply_exif=True)
    assert told.value.reason == "unsupported_format"


@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
def test_the_size_of_a_heic_and_of_an_avif_is_judged_before_a_pixel_is_decoded(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = HEIC["turned-6"] if kind == "HEIC" else save(PICTURE, "AVIF")
    monkeypatch.setattr("hrnet_core.heif.decode", None)
    assert reason(data, max_pixels=96 * 64 - 1) == "too_large"
    assert check_image(data, max_pixels=96 * 64).format == kind


def test_kinds_of_pixels() -> None:
    rgb = Image.fromarray(PICTURE)
    same_as_pillow = {
        "grey JPEG": save(rgb.convert("L"), "JPEG"),
        "grey PNG": save(rgb.convert("L"), "PNG"),
        "one bit": save(rgb.convert("1"), "PNG"),
        "palette": save(rgb.quantize(16), "PNG"),
        "grey and alpha": save(rgb.convert("LA"), "PNG"),
        "progressive JPEG": save(rgb, "JPEG", progressive=True),
        "CMYK TIFF": save(rgb.convert("CMYK"), "TIFF"),
    }
    for name, data in same_as_pillow.items():
        assert difference(decode_image(data, apply_exif=False), pillow_rgb(data)) < 0.5, name
    cmyk = save(rgb.convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(cmyk)).mode == "CMYK"
    assert difference(decode_image(cmyk, apply_exif=False), pillow_rgb(cmyk)) < 2


def test_sixteen_bits_keep_the_upper_eight() -> None:
    """Pillow clips at 255 here, so the truth is arithmetic."""
    values = (np.arange(64 * 96).reshape(64, 96) * 10).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        image = decode_image(save(values, kind), apply_exif=False)
        for channel in range(3):
            np.testing.assert_array_equal(image[..., channel], values >> 8)


def test_a_tiff_of_float_colours_is_no_damaged_one() -> None:
    done, tiff = cv2.imencode(".tiff", PICTURE.astype(np.float32) / 255)
    assert done
    with pytest.raises(ImageError, match="8-bit JPEG or PNG") as told:
        check_image(tiff.tobytes())
    assert told.value.reason == "unsupported_format"


def test_alpha_is_dropped_and_the_colours_stay() -> None:
    alpha = np.zeros((64, 96, 1), np.uint8)
    alpha[:, :48] = 255
    rgba = np.concatenate([PICTURE, alpha], axis=-1)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        np.testing.assert_array_equal(decode_image(save(rgba, kind, **options), apply_exif=False), PICTURE)
    palette = Image.fromarray(PICTURE).quantize(16)
    data = save(palette, "PNG", transparency=3)
    np.testing.assert_array_equal(decode_image(data, apply_exif=False), np.asarray(palette.convert("RGB")))
    # OpenCV's reader of GIF leaves the background where a pixel is transparent.
    looked_up, index = np.asarray(palette.convert("RGB")).copy(), np.asarray(palette)
    data = save(palette, "GIF", transparency=3, background=5)
    stored = Image.open(io.BytesIO(data))
    background = np.array(stored.getpalette()).reshape(-1, 3)[stored.info["background"]]
    clear = np.asarray(stored) == stored.info["transparency"]
    gif = decode_image(data, apply_exif=False)
    assert 0 < clear.sum() < index.size
    np.testing.assert_array_equal(gif[~clear], looked_up[~clear])
    assert (gif[clear] == background).all()
    # libtiff's own reader multiplies: what is transparent is black.
    tiff = decode_image(save(rgba, "TIFF"), apply_exif=False)
    np.testing.assert_array_equal(tiff[:, :48], PICTURE[:, :48])
    assert tiff[:, 48:].max() == 0


def test_of_an_animation_the_first_frame() -> None:
    more = {"save_all": True, "append_images": [Image.fromarray(255 - PICTURE)]}
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "AVIF"):
        data = save(PICTURE, kind, **KINDS[kind], **more)
        assert read_header(data) == ImageHeader(kind, 96, 64, orientation=1, frames=2)
        assert difference(decode_image(data, apply_exif=False), PICTURE) < 3, kind
    stereo = save(PICTURE, "MPO", **more)  # a JPEG with another behind it, as some cameras write
    assert read_header(stereo).format == "JPEG"
    assert difference(decode_image(stereo, apply_exif=False), PICTURE) < 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_ignored_or_applied_as_asked(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(PICTURE, kind, exif=exif, **KINDS[kind])
    assert read_header(data) == ImageHeader(kind, 96, 64, orientation=orientation, frames=1)
    assert difference(decode_image(data, apply_exif=False), PICTURE) < 6
    displayed = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert displayed.shape[:2] == ((96, 64) if orientation >= 5 else (64, 96))
    assert difference(decode_image(data, apply_exif=True), displayed) < 1


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01"]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_no_reason_to_refuse(exif: bytes) -> None:
    data = save(PICTURE, "JPEG", exif=exif)
    assert read_header(data).orientation == 1
    assert decode_image(data, apply_exif=True).shape == (64, 96, 3)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert read_header(save(PICTURE, "JPEG", exif=exif)).orientation == 1


# --- broken ------------------------------------------------------------------------------------------

CUTS = ["one byte", "two bytes", 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9]


def cut(data: bytes, how: str | float) -> bytes:
    lost = {"one byte": 1, "two bytes": 2}.get(how) if isinstance(how, str) else int(len(data) * how) + 3
    return data[:-lost]  # type: ignore[operator]


@pytest.mark.parametrize("how", CUTS)
def test_a_cut_jpeg_is_refused_wherever_it_was_cut(how: str | float) -> None:
    thumbnail = save(Image.fromarray(PICTURE).resize((24, 16)), "JPEG")
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + thumbnail  # a complete JPEG inside the header
    for options in ({}, {"progressive": True}, {"exif": exif}):
        data = save(np.tile(PICTURE, (4, 4, 1)), "JPEG", quality=95, **options)
        assert decode_image(data, apply_exif=False).shape == (256, 384, 3)
        assert reason(cut(data, how)) == "truncated", options
        # As a download leaves it that had reserved the room.
        assert reason(cut(data, how) + bytes(500)) == "truncated", options


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_other_formats_cut_off(kind: str, how: str | float) -> None:
    noise = RNG.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    told = {"truncated"} if kind in ("PNG", "WEBP", "BMP") else {"truncated", "decode_failed"}
    assert reason(cut(save(noise, kind, **KINDS[kind]), how)) in told


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
def test_an_avif_or_a_heic_cut_off(kind: str, how: str | float) -> None:
    data = HEIC["turned-1"] if kind == "HEIC" else save(PICTURE, "AVIF")
    assert reason(cut(data, how)) == "truncated"


def test_every_length_of_a_cut_heic_is_refused() -> None:
    data = HEIC["turned-3"]
    for length in range(40, len(data)):
        with pytest.raises(ImageError):
            decode_image(data[:length], apply_exif=True)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "AVIF"])
def test_bytes_after_the_end_are_tolerated(kind: str) -> None:
    data = save(PICTURE, kind, **KINDS[kind])
    expected = decode_image(data, apply_exif=False)
    for tail in (b"\0", bytes(2000), b"\r\n", b"some camera's own notes" * 50):
        np.testing.assert_array_equal(decode_image(data + tail, apply_exif=False), expected)


@pytest.mark.parametrize(
    ("expected", "data"),
    [
        ("empty", b""),
        ("not_an_image", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
        ("not_an_image", b"\0" * 1000),
        ("not_an_image", b"\xff\xd8"),
        ("not_an_image", b"BMW is a car"),
        ("truncated", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
        ("truncated", AVIF_START),
        ("unsupported_format", b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41"),
        ("unsupported_format", b"%PDF-1.7\n"),
        ("unsupported_format", b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>'),
        ("unsupported_format", b"8BPS\0\x01" + bytes(30)),
        ("truncated", b"\xff\xd8\xff"),
        ("truncated", b"\x89PNG\r\n\x1a\n"),
        ("truncated", b"GIF89a"),
        ("truncated", b"II*\0"),
        ("truncated", b"RIFF\x10\0\0\0WEBPVP8 "),
    ],
)
def test_what_is_no_picture(expected: str, data: bytes) -> None:
    assert reason(data) == expected


def test_damage_inside_is_refused_by_the_decoder(capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(save(RNG.integers(0, 256, (64, 96, 3), dtype=np.uint8), "PNG"))
    data[len(data) // 2] ^= 0xFF  # a chunk's checksum does not hold any more
    assert reason(bytes(data)) == "decode_failed"
    floats = save(np.ones((64, 96), np.float32), "TIFF")
    assert reason(floats) == "decode_failed", "a picture, but of no kind that is read"
    capfd.readouterr()  # the decoders' own words


def test_an_error_survives_the_way_between_processes() -> None:
    with pytest.raises(PoseError) as caught:
        decode_image(b"", apply_exif=False)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), again.reason, str(again)) == (ImageError, "empty", str(caught.value))


# --- bombs -------------------------------------------------------------------------------------------


def jpeg_header(width: int, height: int) -> bytes:
    """A JPEG of 16 x 16 whose frame header says something else."""
    data = bytearray(save(np.zeros((16, 16, 3), np.uint8), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header() -> None:
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    rows = pack.compress(bytes(500 * 20_001)) + pack.flush(zlib.Z_FULL_FLUSH)  # 500 rows, to be repeated
    grey = png(20_000, 20_000, 8, 0, b"\x78\xda" + 40 * rows + b"\x03\0" + bytes(4))
    assert len(grey) < 500_000  # 400 million pixels
    bombs = {
        "grey PNG": grey,
        "JPEG": jpeg_header(60_000, 60_000),
        "GIF": b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + save(PICTURE, "GIF")[10:],
        "BMP": save(PICTURE, "BMP")[:18] + struct.pack("<ii", 60_000, 60_000) + save(PICTURE, "BMP")[26:],
        "WEBP": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\x3f\0\xff\x3f\0" + bytes(12),
    }
    for name, data in bombs.items():
        tracemalloc.start()
        assert reason(data) == "too_large", name
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5_000_000, name
    header = read_header(grey)
    assert (header.width, header.height) == (20_000, 20_000), "reading a header judges nothing"


def test_the_limit_is_the_callers() -> None:
    data = save(PICTURE, "PNG")
    assert decode_image(data, apply_exif=False, max_pixels=96 * 64).shape == (64, 96, 3)
    with pytest.raises(ImageError, match=r"96 x 64 = 6,144 pixels, above max_pixels = 6,143"):
        decode_image(data, apply_exif=False, max_pixels=96 * 64 - 1)


@pytest.mark.parametrize("length", [0x7FFFFFFF, 0x94000000, 0xFFFFFFFF, 1000])
def test_a_chunk_longer_than_the_file_is_not_allocated(length: int) -> None:
    """OpenCV 5 allocates what a PNG chunk declares: 3.7 GB and 12 s for a file of 500 bytes."""
    data = bytearray(png(4, 4, 8, 0, zlib.compress(bytes(20))))
    data[33:37] = struct.pack(">I", length)
    assert data[37:41] == b"IDAT"
    assert reason(bytes(data)) == "truncated"


# --- writing -----------------------------------------------------------------------------------------


def test_png_is_exact_and_jpeg_keeps_full_colour() -> None:
    before = PICTURE.copy()
    np.testing.assert_array_equal(decode_image(encode_png(PICTURE), apply_exif=False), PICTURE)
    data = encode_jpeg(PICTURE)
    assert difference(pillow_rgb(data), PICTURE) < 2
    sampling = [(s[1], s[2]) for s in Image.open(io.BytesIO(data)).layer]  # type: ignore[attr-defined]
    assert sampling == [(1, 1)] * 3, "4:4:4"
    assert len(encode_jpeg(PICTURE, quality=30)) < len(data)
    assert encode_jpeg(PICTURE) == data
    np.testing.assert_array_equal(PICTURE, before)
    flipped = PICTURE[:, ::-1]  # not contiguous
    np.testing.assert_array_equal(decode_image(encode_png(flipped), apply_exif=False), flipped)


@pytest.mark.parametrize(
    "image", [PICTURE[..., 0], PICTURE.astype(np.float32), PICTURE[..., :2], PICTURE[:0]]
)
def test_only_rgb_pictures_are_written(image: NDArray[Any]) -> None:
    for write in (encode_jpeg, encode_png):
        with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\) RGB"):
            write(image)
