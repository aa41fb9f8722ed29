"""Open Inference Protocol v2: what tritonclient and KServe speak. Here over HTTP, with Triton's binary
tensors; v2_grpc.py has the same tensors in messages.

inputs    image      BYTES [N]         N pictures as files; in JSON base64
          boxes      FP32  [P, 4]      left, top, width, height, px of the displayed picture; optional, found
                                       by the detector where there is one
          counts     INT32 [N]         how many of the boxes are of each picture; optional for one picture
outputs   keypoints  FP32  [P, K, 3]   x, y, score; px of the displayed picture
          scores     FP32  [P]
          boxes      FP32  [P, 4]      as asked for, found, or each whole picture
          counts     INT32 [N]
          box_scores FP32  [P]         the detector's; 1 where it did not find the box
parameters           boxes_from, score_threshold, max_found, as of /v1/poses
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from pydantic import ValidationError

from hrnet_core.results import Poses
from serve.body import Upload, boxes_of_json, check_counts, check_values, parse_json
from serve.detector import Find
from serve.schemas import ModelInfo, Problem
from serve.settings import Limits

SERVER = {"name": "hrnet", "version": "1"}
HEADER_LENGTH = "inference-header-content-length"
INPUTS = {"image": ("BYTES", [-1]), "boxes": ("FP32", [-1, 4]), "counts": ("INT32", [-1])}
OUTPUTS = {"keypoints": "FP32", "scores": "FP32", "boxes": "FP32", "counts": "INT32", "box_scores": "FP32"}
DTYPES = {"FP32": "<f4", "FP64": "<f8", "INT32": "<i4", "INT64": "<i8"}


def metadata(model: ModelInfo, keypoints: int) -> dict[str, Any]:
    """What GET /v2/models/NAME says."""
    outputs = {"keypoints": [-1, keypoints, 3], "scores": [-1], "boxes": [-1, 4], "counts": [-1]}
    outputs |= {"box_scores": [-1]}
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": "hrnet",
        "inputs": [{"name": n, "datatype": d, "shape": s} for n, (d, s) in INPUTS.items()],
        "outputs": [{"name": n, "datatype": OUTPUTS[n], "shape": s} for n, s in outputs.items()],
    }


@dataclass(frozen=True)
class Wish:
    """What a request says beside its pictures."""

    id: str
    outputs: tuple[str, ...]
    binary: frozenset[str]
    """Outputs that are wanted as bytes behind the JSON."""


async def uploads_of_v2(request: Request, body: bytes, limits: Limits) -> list[Upload]:
    """The pictures and boxes of an inference request; its Wish and Find are put into request.state. Problem
    for anything else that it holds."""
    fields, tail = _split(body, request.headers.get(HEADER_LENGTH), limits)
    request.state.wish, request.state.find = wish_of(fields), find_of(fields.get("parameters") or {})
    return uploads_of_inputs(fields.get("inputs"), tail, limits)


def uploads_of_inputs(inputs: Any, tail: bytes, limits: Limits) -> list[Upload]:
    """The pictures and boxes of [{name, datatype, data}, ...]; in place of data binary_data_size among the
    parameters, for so many bytes of `tail`. Problem names the input that is wrong."""
    tensors = _tensors(inputs, tail, limits)
    images = [_picture(one, i) for i, one in enumerate(tensors.get("image", []))]
    boxes = tensors.get("boxes")
    check_counts(len(images), len(images) if boxes is None else len(boxes), limits)
    lists = _boxes_of_each(len(images), boxes, tensors.get("counts"))
    return [
        Upload(f"image[{i}]", image, boxes_of_json(of_one, f"boxes[{i}]"))
        for i, (image, of_one) in enumerate(zip(images, lists, strict=True))
    ]


def _boxes_of_each(images: int, boxes: list[Any] | None, counts: list[int] | None) -> list[list[Any] | None]:
    if boxes is None:
        if counts is not None:
            raise Problem.of_field("counts", "invalid-field", "counts are of boxes, and there are none.")
        return [None] * images
    counts = [len(boxes)] if counts is None and images == 1 else counts
    if counts is None or len(counts) != images or min(counts) < 0 or sum(counts) != len(boxes):
        what = f"give how many of the {len(boxes)} boxes are of each of the {images} pictures."
        raise Problem.of_field("counts", "invalid-field", what)
    return [boxes[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)]


def answer_of_v2(wish: Wish, model: ModelInfo, poses: list[Poses], more: dict[str, Any]) -> tuple[bytes, int]:
    """(body, length of the JSON at its beginning). more: parameters of the answer."""
    arrays, outputs, tail = arrays_of(poses), [], b""
    for name in wish.outputs:
        array = arrays[name]
        output: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name], "shape": list(array.shape)}
        if name in wish.binary:
            output["parameters"] = {"binary_data_size": array.nbytes}
            tail += array.tobytes()
        else:
            output["data"] = array.reshape(-1).tolist()
        outputs.append(output)
    head = {"model_name": model.name, "model_version": model.version, "id": wish.id, "parameters": more}
    text = json.dumps({**head, "outputs": outputs}, allow_nan=False).encode()
    return text + tail, len(text)


def arrays_of(poses: list[Poses]) -> dict[str, NDArray[Any]]:
    """The outputs, little-endian."""
    return {
        "keypoints": np.concatenate([one.keypoints.data for one in poses]).astype("<f4"),
        "scores": np.concatenate([one.scores for one in poses]).astype("<f4"),
        "boxes": np.concatenate([one.boxes.xywh for one in poses]).astype("<f4"),
        "counts": np.array([len(one) for one in poses], "<i4"),
        "box_scores": np.concatenate([one.boxes.conf for one in poses]).astype("<f4"),
    }


def _split(body: bytes, header_length: str | None, limits: Limits) -> tuple[dict[str, Any], bytes]:
    """The JSON of a body and the bytes behind it."""
    length = len(body)
    if header_length is not None:
        if not header_length.isdigit() or int(header_length) > length:
            what = (
                f"Inference-Header-Content-Length {header_length!r} is no length within the {length:,} bytes."
            )
            raise Problem("malformed-body", f"the body: {what}")
        length = int(header_length)
    fields = parse_json(body[:length], "the body", "malformed-body", limits)
    if not isinstance(fields, dict):
        raise Problem("malformed-body", "the body: expected a JSON object with inputs.")
    return fields, body[length:]


def wish_of(fields: dict[str, Any]) -> Wish:
    """Of {id, parameters, outputs}. Problem names an output that there is not."""
    parameters, asked = fields.get("parameters") or {}, fields.get("outputs") or []
    if not isinstance(parameters, dict) or not _named(asked):
        raise Problem("malformed-body", "the body: parameters are an object, outputs a list of {name, ...}.")
    for one in asked:
        if one["name"] not in OUTPUTS:
            what = f"no such output; there are {', '.join(OUTPUTS)}."
            raise Problem.of_field(one["name"], "invalid-field", what)
    whole = parameters.get("binary_data_output") is True
    names = [one["name"] for one in asked] or list(OUTPUTS)
    own = {one["name"]: _parameters(one).get("binary_data", whole) for one in asked}
    binary = frozenset(name for name in names if own.get(name, whole) is True)
    return Wish(str(fields.get("id", "")), tuple(dict.fromkeys(names)), binary)


def find_of(parameters: dict[str, Any]) -> Find:
    """Where the boxes of a request are to come from. Other parameters are none of ours."""
    try:
        return Find(**{name: parameters[name] for name in Find.model_fields if name in parameters})
    except ValidationError as error:
        first = error.errors()[0]
        raise Problem.of_field(str(first["loc"][0]), "invalid-field", f"{first['msg']}.") from None


def _parameters(tensor: dict[str, Any]) -> dict[str, Any]:
    return tensor.get("parameters") or {}


def _named(entries: Any) -> bool:
    """Whether it is a list of tensors: objects with a name and at most an object of parameters."""
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        return False
    return all(isinstance(one.get("name"), str) and isinstance(_parameters(one), dict) for one in entries)


def _tensors(inputs: Any, tail: bytes, limits: Limits) -> dict[str, Any]:
    """Name -> list of bytes or texts, or nested lists of numbers."""
    if not _named(inputs):
        raise Problem("malformed-body", "the body: inputs must be a list of {name, datatype, shape, data}.")
    tensors: dict[str, Any] = {}
    for one in inputs:
        name, size = one["name"], (one.get("parameters") or {}).get("binary_data_size")
        if name not in INPUTS or name in tensors:
            raise Problem.of_field(
                name, "invalid-field", f"unknown or twice. The inputs are {', '.join(INPUTS)}."
            )
        if size is not None:
            if type(size) is not int or not 0 <= size <= len(tail):
                raise Problem.of_field(name, "invalid-field", "binary_data_size is more than the body has.")
            data, tail = tail[:size], tail[size:]
            tensors[name] = _of_bytes(name, one, data, limits)
        else:
            tensors[name] = _shaped(name, one, one.get("data"), limits)
    if tail:
        raise Problem("malformed-body", f"the body: {len(tail):,} bytes at its end belong to no input.")
    return tensors


def _of_bytes(name: str, tensor: dict[str, Any], data: bytes, limits: Limits) -> Any:
    if INPUTS[name][0] == "BYTES":
        return list(_byte_strings(name, data, limits))
    dtype = DTYPES.get(tensor.get("datatype", ""))
    if dtype is None or len(data) % np.dtype(dtype).itemsize:
        raise Problem.of_field(name, "invalid-field", f"expected {INPUTS[name][0]} (or {', '.join(DTYPES)}).")
    values = np.frombuffer(data, dtype)
    check_values(len(values), name, "invalid-field", limits)
    return _shaped(name, tensor, values.tolist(), limits)


def _byte_strings(name: str, data: bytes, limits: Limits) -> Iterable[bytes]:
    """Triton's BYTES: each with its length before it."""
    at = count = 0
    while at < len(data):
        count += 1
        check_values(count, name, "too-many-images", limits)
        (length,) = struct.unpack_from("<I", data, at) if at + 4 <= len(data) else (len(data),)
        if at + 4 + length > len(data):
            raise Problem.of_field(name, "invalid-field", "its bytes end within an element.")
        yield data[at + 4 : at + 4 + length]
        at += 4 + length


def _shaped(name: str, tensor: dict[str, Any], data: Any, limits: Limits) -> Any:
    """Flat or nested data as INPUTS has it: boxes in rows of four."""
    if not isinstance(data, list):
        raise Problem.of_field(name, "invalid-field", "data must be a list.")
    check_values(len(data), name, "invalid-field", limits)
    if name != "boxes":
        if name == "counts" and not all(type(one) is int for one in data):
            raise Problem.of_field(name, "invalid-field", "expected whole numbers.")
        return data
    if data and not isinstance(data[0], list):
        if len(data) % 4:
            raise Problem.of_field(name, "invalid-boxes", f"{len(data)} numbers are no rows of x, y, w, h.")
        data = [data[i : i + 4] for i in range(0, len(data), 4)]
    return data


def _picture(one: Any, index: int) -> bytes:
    if isinstance(one, bytes):
        return one
    try:
        return base64.b64decode(one, validate=True)
    except (TypeError, ValueError):
        what = "in JSON a picture is base64; or send it as binary data."
        raise Problem.of_field(f"image[{index}]", "invalid-field", what) from None
