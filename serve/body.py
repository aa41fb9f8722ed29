"""The body of a request: pictures and boxes, as a form or as JSON, under the limits.

Nothing large is decoded, or even read to its end, before it is allowed. Whatever is wrong is a Problem that
names the field. Reading (`read_body`) and understanding (`uploads_of`) are apart: a request takes a place in
the replica when its body is whole.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from hrnet_core.files import json_kind
from hrnet_core.geometry import FARTHEST
from serve.schemas import Problem
from serve.settings import Limits

FORM_TYPE, JSON_TYPE = "multipart/form-data", "application/json"
SPARE_VALUES = 10_000
"""Beyond those of a request as large as it may be: who sends somewhat more is told how many are taken."""
BEGINNING = 1000
"""Characters of a wrong text that are looked at for the way out."""


@dataclass(frozen=True)
class Upload:
    """One picture of a request, not decoded yet, and its boxes."""

    field: str
    """Its name in messages: image, or image[1] where there are several."""
    data: bytes
    boxes_xywh: NDArray[np.float32] | None
    """(P, 4) px of the displayed picture; None: people are found in it, or it is taken as one person."""

    @property
    def people(self) -> int:
        return 1 if self.boxes_xywh is None else len(self.boxes_xywh)


async def read_body(
    request: Request, limits: Limits, grown: Callable[[int], None], types: tuple[str, ...]
) -> bytes:
    """The whole body. Problem where its headers or its length are refused, or where it comes too slowly.

    grown: told the bytes of each chunk as it arrives; may raise.
    types: media types that are read; () for any.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise Problem("media-type", f"Content-Encoding {encoding!r} is not read: send the body as it is.")
    if types and _media_type(request) not in types:
        raise Problem(
            "media-type",
            f"Content-Type {_media_type(request) or 'nothing'!r} is not read: send multipart/form-data with "
            f"one or more `image` files, or application/json with base64.",
            headers={"Accept": ", ".join(types)},
        )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limits.max_body_bytes:
        raise _too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            async for chunk in _in_time(request.stream(), limits.body_idle_s):
                body += chunk
                grown(len(chunk))
                if len(body) > limits.max_body_bytes:
                    raise _too_large(limits)
    except TimeoutError:
        raise Problem(
            "slow-body",
            f"the body: {len(body):,} bytes came, then nothing for {limits.body_idle_s:g} s, or "
            f"not the whole within {limits.body_s:g} s. Send it again, smaller or over a faster line.",
            headers={"Connection": "close"},
        ) from None
    except ClientDisconnect:
        raise Problem("malformed-body", "the connection was closed before the body was whole.") from None
    return bytes(body)


async def _in_time(stream: AsyncIterator[bytes], idle_s: float) -> AsyncIterator[bytes]:
    """The chunks of a stream. TimeoutError where one lets itself be waited for."""
    while True:
        async with asyncio.timeout(idle_s):
            chunk = await anext(stream, None)
        if chunk is None:
            return
        yield chunk


async def uploads_of(request: Request, body: bytes, limits: Limits) -> list[Upload]:
    """The pictures and boxes of a whole body. Problem for anything else that it holds."""
    if _media_type(request) == FORM_TYPE:
        images, boxes = await _read_multipart(request, body, limits)
    else:
        images, boxes = _read_json(body, limits)
    return _with_boxes(images, boxes, limits)


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


class _WholeForm(MultiPartParser):
    """Starlette's parser, which takes a form that was cut off for one with fewer parts."""

    ended = False

    def on_end(self) -> None:
        self.ended = True


async def _read_multipart(request: Request, body: bytes, limits: Limits) -> tuple[list[bytes], Any]:
    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    # One more than allowed, so that it is our message that refuses, not the parser's.
    parser = _WholeForm(request.headers, once(), max_files=limits.max_images + 1, max_fields=8)
    parser.spool_max_size = len(body) + 1  # it is in memory already: no file on the disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "Too many files" in error.message:
            raise _too_many_images(limits) from None
        raise Problem("malformed-body", f"multipart/form-data: {error.message}") from None
    try:
        if not parser.ended:
            what = "ends before its closing boundary: it was cut off. Send it again, whole."
            raise Problem("malformed-body", f"multipart/form-data: the body of {len(body):,} bytes {what}")
        return await _form_fields(form, limits)
    finally:
        await form.close()


async def _form_fields(form: FormData, limits: Limits) -> tuple[list[bytes], Any]:
    _refuse_unknown(form)
    images = []
    for part in form.getlist("image"):
        if not isinstance(part, UploadFile):
            what = "not a file part. With curl: -F image=@photo.jpg"
            raise Problem.of_field("image", "invalid-field", what)
        images.append(await part.read())
    parts = form.getlist("boxes")
    if len(parts) > 1:
        raise Problem.of_field("boxes", "invalid-field", "sent twice. Several pictures share one JSON list.")
    if not parts:
        return images, None
    text = await parts[0].read() if isinstance(parts[0], UploadFile) else parts[0]
    return images, parse_json(text, "boxes", "invalid-boxes", limits)


def _read_json(body: bytes, limits: Limits) -> tuple[list[bytes], Any]:
    fields = parse_json(body, "the body", "malformed-body", limits)
    if not isinstance(fields, dict):
        raise Problem("malformed-body", f"the body: expected a JSON object, got {json_kind(fields)}.")
    _refuse_unknown(fields)
    image = fields.get("image", [])
    texts = image if isinstance(image, list) else [image]
    images = [_from_base64(text, _name("image", i, len(texts))) for i, text in enumerate(texts)]
    return images, fields.get("boxes")


def _refuse_unknown(fields: Iterable[str]) -> None:
    for unknown in sorted(set(fields) - {"image", "boxes"}):
        raise Problem.of_field(unknown, "invalid-field", "unknown field. There are image and boxes.")


def _from_base64(text: Any, field: str) -> bytes:
    if not isinstance(text, str):
        raise Problem.of_field(field, "invalid-field", f"expected base64 text, got {json_kind(text)}.")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise Problem.of_field(field, "invalid-field", f"not base64 ({error}).{_way_out(text)}") from None


def _way_out(text: str) -> str:
    """What programs write that is nearly base64, and how it becomes it."""
    text = text[:BEGINNING]
    if text.startswith("data:"):
        return " Leave the data: prefix out."
    if re.search(r"\s", text):
        return " Leave line breaks and spaces out (base64 -w0; in Python base64.b64encode)."
    if set("-_") & set(text):
        return " - and _ are of the alphabet for URLs: + and / are in their place here (RFC 4648, section 4)."
    return ""


def parse_json(text: str | bytes, field: str, slug: str, limits: Limits) -> Any:
    """What the text says. Problem of the field where it is no JSON, or of many times more values than a
    request may have: the parser lets nobody else work, for ten seconds of 30 MB of empty lists."""
    check_values(text.count(",") if isinstance(text, str) else text.count(b","), field, slug, limits)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise Problem.of_field(field, slug, f"not JSON ({error}).") from None


def check_values(count: int, field: str, slug: str, limits: Limits) -> None:
    """Problem of the field for many times more values than a request may have, before each is looked at."""
    most = SPARE_VALUES + 8 * (limits.max_people + limits.max_images)
    if count > most:
        what = f"more than {most:,} values. One request has at most {limits.max_people} people."
        raise Problem.of_field(field, slug, what)


def _with_boxes(images: list[bytes], boxes: Any, limits: Limits) -> list[Upload]:
    """Pair pictures with boxes: one list for one picture, a list (or null) for each of several."""
    count = len(images)
    check_counts(count, 0, limits)
    if boxes is None or count == 1:
        lists = [boxes] * count
    elif isinstance(boxes, list) and len(boxes) == count:
        lists = boxes
    else:
        given = f"{len(boxes)} entries" if isinstance(boxes, list) else json_kind(boxes)
        raise Problem.of_field(
            "boxes",
            "invalid-boxes",
            f"{count} pictures need a list of {count} lists of boxes (null: none), got {given}.",
        )
    people = sum(1 if one is None else len(one) for one in lists if one is None or isinstance(one, list))
    check_counts(count, people, limits)
    return [
        Upload(_name("image", i, count), data, boxes_of_json(one, _name("boxes", i, count)))
        for i, (data, one) in enumerate(zip(images, lists, strict=True))
    ]


def check_counts(images: int, people: int, limits: Limits) -> None:
    """Problem where a request has no picture, or more pictures or people than one may have."""
    if not images:
        raise Problem.of_field("image", "invalid-field", "missing. Send at least one picture.")
    if images > limits.max_images:
        raise _too_many_images(limits)
    if people > limits.max_people:
        what = f"{people} people in one request, at most {limits.max_people}: send several requests."
        raise Problem.of_field("boxes", "too-many-people", what, limit=limits.max_people)


def boxes_of_json(boxes: Any, field: str) -> NDArray[np.float32] | None:
    """[[x, y, w, h], ...] as float32 (P, 4); None stays None. Problem names the box that is wrong."""
    if boxes is None:
        return None
    if not isinstance(boxes, list):
        raise Problem.of_field(
            field, "invalid-boxes", f"expected [[x, y, w, h], ...], got {json_kind(boxes)}."
        )
    for i, box in enumerate(boxes):
        wrong = _what_is_wrong(box)
        if wrong:
            raise Problem.of_field(f"{field}[{i}]", "invalid-boxes", f"{wrong}.")
    return np.array(boxes, np.float32).reshape(-1, 4)


def _what_is_wrong(box: Any) -> str | None:
    if not isinstance(box, list) or len(box) != 4:
        return f"expected four numbers x, y, w, h, got {json_kind(box)}"
    for name, value in zip("xywh", box, strict=True):
        if type(value) not in (int, float):
            return f"{name} is {json_kind(value)}, not a number"
        if not abs(value) <= FARTHEST:  # nor is NaN
            return f"{name} must be finite and within ±{FARTHEST:,.0f} px"
    if not (np.array(box[2:], np.float32) > 0).all():  # 1e-50 is 0 to the predictor
        return f"w and h must be positive, got {box[2]} and {box[3]}"
    if max(box[2:]) <= 1:
        return (
            f"w {box[2]} and h {box[3]} are no more than one px. Boxes are in px of the displayed picture: "
            f"those in fractions of it are multiplied by its width and height first"
        )
    return None


def _name(field: str, index: int, count: int) -> str:
    return field if count == 1 else f"{field}[{index}]"


def _too_large(limits: Limits) -> Problem:
    limit = limits.max_body_bytes
    what = f"the body: at most {limit:,} bytes are read."
    return Problem("body-too-large", what, limit=limit, headers={"Connection": "close"})


def _too_many_images(limits: Limits) -> Problem:
    limit = limits.max_images
    what = f"at most {limit} pictures in one request."
    return Problem.of_field("image", "too-many-images", what, limit=limit)
