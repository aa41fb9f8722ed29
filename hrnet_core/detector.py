"""A user's own person detector in ONNX, described by a small JSON file beside it: image in, boxes out.

    image -> resized and normalised as declared -> ONNX Runtime -> boxes and scores as declared
          -> people above the score threshold -> NMS, if declared -> image px

Two layouts cover what is common. "boxes": outputs with one box a row (torchvision, RT-DETR, D-FINE,
mmdeploy's exports). "yolox": YOLOX's own export, one output of (centre, size, objectness, classes) a cell.
docs/predict.md has a declaration for each. ONNX Runtime is imported when a detector is opened.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import unquote

import cv2
import numpy as np
from numpy.typing import NDArray

from hrnet_core.errors import ConfigError, first_line
from hrnet_core.files import from_json, read_object
from hrnet_core.geometry import FARTHEST, Float32, UInt8
from hrnet_core.locations import fetch, is_uri, one_line

Outputs = dict[str, NDArray[Any]]
"""By name, without the batch axis."""
STRIDES = (8, 16, 32)  # of YOLOX's three maps, in px of its input
LARGEST_SIDE = 8192  # px of its input, as float32 800 MB: a slip of the keyboard beyond
LARGEST_LOGIT = 80.0  # exp stays finite in float32


@dataclass(frozen=True)
class Declaration:
    """What a detector wants and gives: the fields of MODEL.json. ConfigError where they contradict."""

    layout: Literal["boxes", "yolox"]
    input_size: tuple[int, int]
    """(width, height) of its input, px."""
    person_class: int = 0
    """Index of the class person: 0 in most, 1 where 0 is the background (torchvision)."""
    score_threshold: float = 0.3
    nms_iou: float | None = None
    """Of two boxes with a higher IoU, the lower score goes. None: the model did it, or needs none."""
    resize: Literal["letterbox", "letterbox_center", "stretch"] = "letterbox"
    """letterbox: one scale for both sides, the image in the top left corner; letterbox_center: in the
    middle; stretch: each side to its own."""
    pad_value: int = 114
    """Of the letterbox's rest."""
    channels: Literal["RGB", "BGR"] = "RGB"
    divide_by: float = 255.0
    """Pixels 0..255 are divided by this first; then mean and std, in the order of `channels`."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    boxes: str = ""
    """Layout boxes: name of the output with (N, 4) boxes, or (N, 5) with the score behind."""
    scores: str = ""
    """Name of the output with (N,) scores or (N, classes); not needed where boxes has five columns."""
    labels: str = ""
    """Name of the output with (N,) class indices, where scores are (N,)."""
    box_format: Literal["xyxy", "cxcywh", "xywh"] = "xyxy"
    normalized: bool = False
    """Boxes are fractions of the input instead of its px."""
    logits: bool = False
    """Scores have not been through the sigmoid yet."""
    decoded: bool = False
    """Layout yolox: boxes are px already (exported with --decode_in_inference)."""

    def __post_init__(self) -> None:
        problems = []
        for name, hint in get_type_hints(Declaration).items():
            if get_origin(hint) is Literal and (value := getattr(self, name)) not in get_args(hint):
                problems.append(f"{name} is {value!r}, choose one of {', '.join(get_args(hint))}")
        if len(self.input_size) != 2 or not all(type(side) is int and side > 0 for side in self.input_size):
            problems.append(f"input_size must be [width, height] in px, got {list(self.input_size)}")
        elif max(self.input_size) > LARGEST_SIDE:
            problems.append(f"input_size goes to {LARGEST_SIDE} px a side, got {list(self.input_size)}")
        if self.layout == "boxes" and not self.boxes:
            problems.append("layout boxes needs the field boxes, the name of that output")
        if self.layout == "yolox" and (self.boxes or self.scores or self.labels):
            problems.append("layout yolox has one output: leave out boxes, scores and labels")
        if self.layout == "yolox" and any(side % max(STRIDES) for side in self.input_size):
            problems.append(f"layout yolox wants an input_size in multiples of {max(STRIDES)}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in (*self.std, self.divide_by)):
            problems.append("mean and std must be 3 numbers each, std and divide_by above 0")
        if self.nms_iou is not None and not 0 < self.nms_iou <= 1:
            problems.append(f"nms_iou must lie above 0 and at most at 1, got {self.nms_iou}")
        if problems:
            raise ConfigError("; ".join(problems))


def read_declaration(file: str | Path) -> Declaration:
    """MODEL.json. ConfigError names the field that is missing, unknown or wrong."""
    file = Path(file)
    way_out = "A detector MODEL.onnx is declared in MODEL.json beside it; docs/predict.md shows each kind."
    return from_json(Declaration, read_object(file, ConfigError, way_out), str(file), ConfigError, way_out)


@dataclass(frozen=True)
class View:
    """A picture as the detector sees it."""

    pixels: Float32
    """(3, h, w)"""
    scale: Float32
    """(2,) From px of the detector's input to image px, with `shift`."""
    shift: Float32


Found = tuple[Float32, Float32]
"""Boxes float32 (P, 4) left, top, width, height in image px, best first, and their scores (P,)."""


@dataclass
class PersonDetector:
    """An ONNX detector that finds people. Can be sent to another process: it is opened where it works."""

    model: bytes = field(repr=False)
    """The ONNX file."""
    declaration: Declaration
    name: str = "the detector"
    """For messages."""
    threads: int = 1
    """CPU threads of a run, fixed because they decide the last digits."""
    use_gpu: bool = False
    """CUDA where ONNX Runtime has it (onnxruntime-gpu), else the CPU."""
    declared: bytes = field(default=b"", repr=False)
    """MODEL.json."""

    @classmethod
    def load(cls, file: str | Path, threads: int = 1, use_gpu: bool = False) -> PersonDetector:
        """MODEL.onnx (path or URI) with MODEL.json beside it, tried on a black image. ConfigError says what
        is wrong, DataError that of a URI."""
        if not is_uri(str(file)):
            return cls._open(Path(file), threads, use_gpu)
        address, mark, query = str(file).partition("?")
        folder, _, name = address.rpartition("/")
        model = Path(unquote(name))
        with tempfile.TemporaryDirectory(prefix="hrnet-detector-") as copy:
            try:
                names = [model.name, model.with_suffix(".json").name]
                at_hand = fetch(f"{folder}{mark}{query}", Path(copy), names)
            except OSError as error:
                raise ConfigError(
                    f"{address}: cannot be read ({one_line(error)}). Name an ONNX detector with MODEL.json "
                    f"beside it, and the bucket's credentials in the environment."
                ) from None
            try:
                return replace(cls._open(at_hand / model.name, threads, use_gpu), name=address)
            except ConfigError as error:
                raise ConfigError(str(error).replace(str(at_hand), folder)) from None

    @classmethod
    def _open(cls, file: Path, threads: int, use_gpu: bool) -> PersonDetector:
        try:
            model = file.read_bytes()
            declaration = read_declaration(file.with_suffix(".json"))
            declared = file.with_suffix(".json").read_bytes()
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read ({error.strerror}). Name an ONNX detector.") from None
        detector = cls(model, declaration, str(file), threads, use_gpu, declared)
        detector(np.zeros((64, 64, 3), np.uint8))
        return detector

    def __getstate__(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}  # without what is cached

    @functools.cached_property
    def sha256(self) -> str:
        """Of MODEL.onnx and MODEL.json, one behind the other: cat MODEL.onnx MODEL.json | sha256sum."""
        return hashlib.sha256(self.model + self.declared).hexdigest()

    def __call__(self, image: UInt8, score_threshold: float | None = None) -> Found:
        """The people in a picture uint8 (H, W, 3) RGB. score_threshold: instead of the declared one."""
        (found,) = self.find([self.view(image)], [score_threshold])
        return found

    def view(self, image: UInt8) -> View:
        """A picture uint8 (H, W, 3) RGB, resized and normalised: what of a call needs no network."""
        return _view(image, self.declaration)

    def find(self, views: Sequence[View], score_thresholds: Sequence[float | None]) -> list[Found]:
        """The people of each view: in one run where the model `batches`, else view by view."""
        together = len(views) > 1 and self.batches
        blobs = [np.stack([v.pixels for v in views])] if together else [v.pixels[None] for v in views]
        outputs = [of_one for blob in blobs for of_one in self._run(blob)]
        each = zip(outputs, views, score_thresholds, strict=True)
        return [self._people(*of_one) for of_one in each]

    @functools.cached_property
    def batches(self) -> bool:
        """Whether it takes several pictures in one run: its first axis is free, and two have two answers."""
        given = self._session.get_inputs()[0].shape
        if len(given) != 4 or isinstance(given[0], int):
            return False
        width, height = self.declaration.input_size
        try:
            return len(self._run(np.zeros((2, 3, height, width), np.float32))) == 2
        except ConfigError:
            return False

    def _people(self, outputs: Outputs, view: View, score_threshold: float | None) -> Found:
        declared = self.declaration
        threshold = declared.score_threshold if score_threshold is None else score_threshold
        read = _read_yolox if declared.layout == "yolox" else _read_boxes
        corners, scores = read(outputs, declared, self.name)
        keep = (scores >= threshold) & np.isfinite(corners).all(axis=1)
        keep &= (corners[:, 2:] > corners[:, :2]).all(axis=1)
        found = np.flatnonzero(keep)
        found = found[np.argsort(-scores[found], kind="stable")]
        if declared.nms_iou is not None:
            found = found[suppress(corners[found], declared.nms_iou)]
        corners, scores = corners[found], scores[found]
        start, end = corners[:, :2] * view.scale + view.shift, corners[:, 2:] * view.scale + view.shift
        boxes = np.concatenate([start, end - start], axis=1).astype(np.float32)
        usable = (np.abs(boxes) <= FARTHEST).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1)
        return boxes[usable], scores[usable]

    def _run(self, blob: Float32) -> list[Outputs]:
        """float32 (B, 3, h, w) -> the outputs of each of the B."""
        session = self._session
        given = session.get_inputs()[0]
        if len(given.shape) == 3:  # torchvision's exports take one image
            blob = blob[0]
        try:
            values = session.run(None, {given.name: blob})
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            width, height = self.declaration.input_size
            raise ConfigError(
                f"{self.name}: does not take float32 {blob.shape}, input_size {width}x{height} "
                f"({first_line(error)}). Check input_size in its declaration."
            ) from None
        outputs = {out.name: value for out, value in zip(session.get_outputs(), values, strict=True)}
        main = outputs.get(self.declaration.boxes, values[0])
        if main.ndim != 3:
            return [outputs]
        if len(main) == 1:
            return [{name: value[0] if value.ndim else value for name, value in outputs.items()}]
        if len(blob) != len(main) or any(value.shape[:1] != main.shape[:1] for value in values):
            shapes = ", ".join(f"{name} {value.shape}" for name, value in outputs.items())
            raise ConfigError(f"{self.name}: answers {len(blob)} pictures with {shapes}.")
        return [{name: value[i] for name, value in outputs.items()} for i in range(len(main))]

    @functools.cached_property
    def _session(self) -> Any:
        """ONNX Runtime's, opened by the first run of a process."""
        try:
            import onnxruntime
        except ImportError:
            raise ConfigError(f"{self.name} needs ONNX Runtime: pip install 'hrnet-ray[onnx]'.") from None
        wanted = ["CPUExecutionProvider"]
        if self.use_gpu and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            wanted.insert(0, "CUDAExecutionProvider")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 3
        # Its threads wait awake for the next layer; after the last one they leave the cores to others.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            session = onnxruntime.InferenceSession(self.model, options, providers=wanted)
        except Exception as error:
            why = first_line(error)
            raise ConfigError(f"{self.name}: not a model that ONNX Runtime opens ({why}).") from None
        if len(session.get_inputs()) != 1:
            names = ", ".join(i.name for i in session.get_inputs())
            raise ConfigError(f"{self.name}: has the inputs {names}. Export it with one, the image.")
        return session


def suppress(boxes_xyxy: Float32, iou: float) -> NDArray[np.int64]:
    """Greedy NMS: boxes float32 (N, 4), best first -> indices of the kept, in order."""
    area = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)
    rest, kept = np.arange(len(boxes_xyxy)), []
    while len(rest):
        best, rest = rest[0], rest[1:]
        kept.append(best)
        start = np.maximum(boxes_xyxy[best, :2], boxes_xyxy[rest, :2])
        end = np.minimum(boxes_xyxy[best, 2:], boxes_xyxy[rest, 2:])
        shared = (end - start).clip(min=0).prod(axis=1)
        rest = rest[shared <= iou * (area[best] + area[rest] - shared)]
    return np.array(kept, np.int64)


def _view(image: UInt8, declared: Declaration) -> View:
    """Here px are edges, not centres: (0, 0) is the corner of the first pixel, as detectors count."""
    width, height = declared.input_size
    sides = np.array([image.shape[1], image.shape[0]], np.float64)
    factor = np.array([width, height]) / sides
    if declared.resize != "stretch":
        factor[:] = factor.min()
    inner = np.maximum(1, (sides * factor + 1e-6).astype(int))
    canvas = np.full((height, width, 3), declared.pad_value, np.uint8)
    offset = (np.array([width, height]) - inner) // 2
    if declared.resize != "letterbox_center":
        offset[:] = 0
    (x, y), (w, h) = offset, inner
    canvas[y : y + h, x : x + w] = cv2.resize(image, (int(w), int(h)), interpolation=cv2.INTER_LINEAR)
    if declared.channels == "BGR":
        canvas = canvas[..., ::-1]
    pixels: Float32 = canvas.astype(np.float32) / np.float32(declared.divide_by)
    mean, std = np.array(declared.mean, np.float32), np.array(declared.std, np.float32)
    pixels = (pixels - mean) / std
    scale = (1 / factor).astype(np.float32)
    return View(np.ascontiguousarray(pixels.transpose(2, 0, 1)), scale, -offset.astype(np.float32) * scale)


def _read_boxes(outputs: Outputs, declared: Declaration, name: str) -> tuple[Float32, Float32]:
    """Corners float32 (N, 4) in input px and the scores (N,) of people, 0 for other classes."""
    for role in ("boxes", "scores", "labels"):
        if (wanted := getattr(declared, role)) and wanted not in outputs:
            raise ConfigError(
                f"{name}: {role} is declared as output {wanted!r}, but its outputs are "
                f"{', '.join(sorted(outputs))}."
            )
    boxes = outputs[declared.boxes].astype(np.float32)
    if boxes.ndim != 2 or boxes.shape[1] not in (4, 5) or (boxes.shape[1] == 4 and not declared.scores):
        raise ConfigError(
            f"{name}: output {declared.boxes!r} has shape {boxes.shape} without the batch; (N, 4) with an "
            f"output of scores, or (N, 5), is what layout boxes reads."
        )
    scores = outputs[declared.scores].astype(np.float32) if declared.scores else boxes[:, 4]
    if declared.logits:
        scores = np.float32(1) / (1 + np.exp(-scores.clip(-LARGEST_LOGIT, LARGEST_LOGIT)))
    if scores.ndim == 2 and declared.person_class < scores.shape[1]:
        scores = scores[:, declared.person_class]
    elif declared.labels:
        scores = np.where(outputs[declared.labels] == declared.person_class, scores, 0)
    if scores.shape != boxes.shape[:1]:
        raise ConfigError(
            f"{name}: {len(boxes)} boxes, but scores of shape {scores.shape} for person_class "
            f"{declared.person_class}. Check scores, labels and person_class in its declaration."
        )
    corners = _corners(boxes[:, :4], declared.box_format)
    if declared.normalized:
        corners = corners * np.tile(np.array(declared.input_size, np.float32), 2)
    return corners, scores


def _read_yolox(outputs: Outputs, declared: Declaration, name: str) -> tuple[Float32, Float32]:
    """As _read_boxes, of YOLOX's one output (cells, 5 + classes): (cx, cy, w, h, objectness, classes ...).

    Undecoded, cx and cy count from the cell's corner in strides, w and h are logarithms of strides
    (YOLOX demo_postprocess); cells are those of stride 8, then 16, then 32, row by row.
    """
    width, height = declared.input_size
    cells = []
    for stride in STRIDES:
        y, x = np.mgrid[: height // stride, : width // stride]
        cells.append(np.stack([x.ravel(), y.ravel(), np.full(x.size, stride)], axis=1))
    grid, stride_px = np.split(np.concatenate(cells).astype(np.float32), [2], axis=1)
    found = next(iter(outputs.values())).astype(np.float32)
    columns_needed = 6 + declared.person_class
    if len(outputs) != 1 or found.ndim != 2 or len(found) != len(grid) or found.shape[1] < columns_needed:
        shapes = ", ".join(f"{k} {v.shape}" for k, v in outputs.items())
        raise ConfigError(
            f"{name}: its outputs are {shapes}; layout yolox reads one of ({len(grid)}, {columns_needed} or "
            f"more) at input_size {width}x{height}."
        )
    centers, sizes = found[:, :2], found[:, 2:4]
    if not declared.decoded:
        centers = (centers + grid) * stride_px
        sizes = np.exp(np.minimum(sizes, LARGEST_LOGIT)) * stride_px
    scores = found[:, 4] * found[:, 5 + declared.person_class]
    return _corners(np.concatenate([centers, sizes], axis=1), "cxcywh"), scores


def _corners(boxes: Float32, box_format: str) -> Float32:
    start, other = boxes[:, :2], boxes[:, 2:]
    if box_format == "xyxy":
        return boxes
    if box_format == "cxcywh":
        start = start - other / np.float32(2)
    return np.concatenate([start, start + other], axis=1)
