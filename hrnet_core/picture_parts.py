"""What a picture's file is made of: segments, chunks, blocks. Whether they are all there, and whether there
are so many that reading them would take minutes.

Pillow's parsers walk over each in Python, with the interpreter's lock: 32 MB of empty segments keep them busy
for a minute. libjpeg goes over the whole picture for each scan, and has no limit: a file of 1.4 MB can ask
for hours. No encoder writes such files, so that they are refused before either sees them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from hrnet_core.errors import ImageError

MOST_SCANS = 100
"""Of a JPEG. Encoders write ten or so; libtiff stops at a hundred too."""
MOST_PARTS = 4096
"""Of a file's header, and of all of it beyond one in PART_BYTES."""
PART_BYTES = 128
"""A whole file's parts are larger on average: of a GIF 256 bytes, of a PNG thousands."""
# Not stuffed or fill bytes, nor what stands without a length: restarts, TEM, another start.
SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
START_OF_SCAN, END = 0xDA, 0xD9
FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)}
SEQUENTIAL = {0xC0, 0xC1}
"""Frames that may be of one scan."""


def readable_head(name: str, data: bytes) -> bytes:
    """What the parser of a picture's header is to see: of a JPEG its segments up to the first scan without
    what lies between them, else the file. ImageError `decode_failed` where a file has more parts than any
    encoder writes."""
    if name == "JPEG":
        return _jpeg_head(data)
    if name == "PNG":
        _refuse_more_chunks(data)
    if name == "GIF":
        _refuse_more_blocks(data)
    return data


def _too_many(name: str, what: str) -> ImageError:
    return ImageError(
        "decode_failed",
        f"the {name} file has {what}, more than any program writes and so many that reading them would take "
        f"minutes: save it again as an 8-bit JPEG or PNG.",
    )


# --- JPEG ----------------------------------------------------------------------------------------


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(code, start, end) of each, the end not beyond the file's; of a scan, its header alone."""
    at = 2
    while marker := SEGMENT.search(data, at):
        code = data[marker.end() - 1]
        at = marker.end()
        if code != END:
            at += int.from_bytes(data[at : at + 2], "big")
        yield code, marker.start(), min(at, len(data))


def _jpeg_head(data: bytes) -> bytes:
    head, exif, frame, components = [data[:2]], False, 0, 0
    for number, (code, start, end) in enumerate(_jpeg_segments(data)):
        if number >= MOST_PARTS:
            raise _too_many("JPEG", f"more than {MOST_PARTS:,} segments before its first scan")
        segment = data[start:end]
        if segment[4:10] == b"Exif\0\0":
            if exif:  # Pillow would put one behind the other, each time all of them
                continue
            exif = True
        head.append(segment)
        if code in FRAMES:
            frame, components = code, segment[9] if len(segment) > 9 else 0
        if code == START_OF_SCAN:
            whole = frame in SEQUENTIAL and segment[4:5] == bytes((components,))
            if not whole:  # else libjpeg wants the end behind this scan; looking for others takes a while
                _refuse_more_scans(data)
            break
    return b"".join(head)


def _refuse_more_scans(data: bytes) -> None:
    if data.count(bytes((0xFF, START_OF_SCAN))) <= MOST_SCANS:
        return  # of more, many may be a video's behind the picture, by chance
    scans = 0
    for number, (code, _, _) in enumerate(_jpeg_segments(data)):
        scans += code == START_OF_SCAN
        if scans > MOST_SCANS:
            raise _too_many("JPEG", f"more than {MOST_SCANS} scans")
        if number >= MOST_PARTS:
            raise _too_many("JPEG", f"more than {MOST_PARTS:,} segments")
        if code == END and scans:  # libjpeg reads no further
            return


def jpeg_ends(data: bytes) -> bool:
    """Whether an end marker follows the first scan. One inside a segment (a thumbnail's) does not count."""
    for code, _, end in _jpeg_segments(data):
        if code == START_OF_SCAN:  # in what follows, FF D9 is the end and nothing else
            return data.rfind(b"\xff\xd9", end) >= 0  # it is near the end
    return False


# --- PNG -----------------------------------------------------------------------------------------


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int]]:
    """(type, end) of each, as it declares it, up to IEND or to one that begins beyond the file's end. What
    lies behind IEND is no part of the picture, and nobody reads it."""
    kind, at = b"", 8
    while at + 12 <= len(data) and kind != b"IEND":
        kind, at = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield kind, at


def _refuse_more_chunks(data: bytes) -> None:
    most = MOST_PARTS
    for number, (kind, _) in enumerate(_png_chunks(data)):
        if kind == b"IDAT":
            most = MOST_PARTS + len(data) // PART_BYTES
        if number >= most:
            raise _too_many("PNG", f"more than {most:,} chunks")


def png_ends(data: bytes) -> bool:
    """Whether the chunks follow one another up to IEND. OpenCV would allocate whatever length a damaged
    chunk declares: gigabytes for a file of 500 bytes."""
    return any(kind == b"IEND" and end <= len(data) for kind, end in _png_chunks(data))


# --- GIF -----------------------------------------------------------------------------------------


def _refuse_more_blocks(data: bytes) -> None:
    """Of the blocks up to a second picture, as far as Pillow looks."""
    most = MOST_PARTS + len(data) // PART_BYTES
    for number, _ in enumerate(_gif_blocks(data)):
        if number >= most:
            raise _too_many("GIF", f"more than {most:,} blocks")


def _gif_blocks(data: bytes) -> Iterator[int]:
    """Where each block of an extension or picture begins, and each byte that belongs to none."""
    at, pictures = 13 + _palette(data[10:11]), 0
    while at < len(data) and data[at] != 0x3B:
        yield at
        kind = data[at]
        if kind == 0x21:
            at += 2
        elif kind == 0x2C:
            pictures += 1
            if pictures == 2:
                return
            at += 11 + _palette(data[at + 9 : at + 10])
        else:
            at += 1
            continue
        while at < len(data) and data[at]:
            yield at
            at += 1 + data[at]
        at += 1


def _palette(flags: bytes) -> int:
    """Bytes of the palette that follows, by its flags."""
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 0x80 else 0
