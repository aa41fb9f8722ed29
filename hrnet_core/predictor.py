"""Image and boxes in, poses out: the one path that evaluation, prediction and serving share.

    prepare         boxes -> center, scale -> the codec's crop matrix -> crops
    predict_crops   crops -> the network, plain and mirrored -> decode
    finish          keypoints -> back into the image

A call is these three; whoever forms batches over several calls (serve/) takes them one by one.

Equal input gives equal output, with one condition: the network's batches must be the same. Batch size
picks the float kernels, so another one changes the last bits of the heatmaps (and, rarely, which of two
equal cells is the maximum). Batches here are as long as `batch_size` says, the last one is short. On a GPU
they are filled up to one of a few sizes (cuda_passes.py), at most 256.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from hrnet_core.checkpoint import CheckpointSpec, load_checkpoint, read_exported
from hrnet_core.cuda_passes import CudaPasses
from hrnet_core.errors import ConfigError, DataError, first_line
from hrnet_core.geometry import FARTHEST, Float32, Float64, box_to_center_scale, crop_people, place_in_image
from hrnet_core.heatmaps import Border
from hrnet_core.images import check_pixels, read_image
from hrnet_core.model import HRNet
from hrnet_core.modes import FORMS, Form, build_network, compiled_normalize, fastest_exact, files_of
from hrnet_core.passes import Answer, Ask, CropPass, PlainPasses, UInt8
from hrnet_core.results import Boxes, Keypoints, Poses

Images = UInt8 | str | Path | Iterable[UInt8 | str | Path]

IN_FLIGHT = 2
"""Batches of a call that are on a GPU: one is computed while the next is copied there."""

_computed_in: int | None = None
"""The process that has computed here first: one that is forked from it has this too, but not its threads."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """The people of one image on their way to the network. The image itself is not kept."""

    crops: UInt8
    """(P, h, w, 3) RGB"""
    image_to_crop: Float64
    """(P, 2, 3)"""
    boxes: Boxes
    boxes_source: Literal["given", "whole_image", "detector"]
    orig_shape: tuple[int, int]
    """(height, width) of the image."""
    path: str | None


class PosePredictor:
    """A network with everything that belongs to it. Calls from several threads do not disturb each other. In
    the modes of torch it can be pickled, so processes of the method spawn may be given it; in the others they
    load it (ConfigError). One that was forked from a process that had a predictor cannot compute
    (ConfigError).

    model: copied, so a network in training may be passed and goes on unchanged.
    device: "cpu", "cuda", "cuda:1" ..., or "auto": a GPU where there is one.
    mode: one of modes.MODES, or "auto": the fastest that checkpoint.json has measured on this kind of device
        within 0.001 AP of float32 and that can run here; float32 where nothing was measured. The attribute
        `mode` says which.
    exported: files of these weights for the modes that run from files (checkpoint.read_exported); without
        them they are made here, which takes a while.
    compile_cache: for modes that compile, the folder that keeps it (modes.keep_compiled).

    ConfigError: a device or mode there is not. CheckpointError: a file of other weights.
    """

    def __init__(
        self,
        model: HRNet,
        spec: CheckpointSpec,
        device: str = "auto",
        mode: str = "auto",
        exported: Mapping[str, bytes] = MappingProxyType({}),
        compile_cache: str | None = None,
    ) -> None:
        _refuse_fork()
        self.spec = spec
        self.device = _find_device(device)
        self.mode = mode
        if mode == "auto":
            self.mode = fastest_exact(spec.modes, self.device.type, exported)
            logger.info("mode auto on %s is %s", self.device.type, self.mode)
        form = FORMS.get(self.mode, Form(folded=False))
        self._network = network = build_network(model, spec, self.device, self.mode, exported, compile_cache)
        self._passes: PlainPasses | CudaPasses
        if self.device.type == "cuda":
            prepare = compiled_normalize(form, self.mode) if form.compiled else None
            crop_pass = CropPass(network, spec, form.layout, prepare)
            self._passes = CudaPasses(crop_pass, spec, self.device, form)
        else:
            self._passes = PlainPasses(CropPass(network, spec, form.layout), spec, self.device)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str = "auto",
        mode: str = "auto",
        threads: int | None = None,
        compile_cache: str | None = None,
    ) -> PosePredictor:
        """A predictor from a checkpoint folder of this machine. CheckpointError says what is wrong with it.

        threads: of torch on the CPU, for the whole process; None leaves them as they are.
        """
        if threads is not None:
            if threads < 1:
                raise ConfigError(f"threads must be 1 or more, got {threads}; None leaves them as they are.")
            torch.set_num_threads(threads)
        _refuse_fork()
        model, spec = load_checkpoint(folder)
        exported = read_exported(folder, files_of(mode, spec.modes))
        return cls(model, spec, device, mode, exported, compile_cache)

    def take_weights(self, model: HRNet) -> None:
        """From here on the weights of `model`, of the architecture of the one before: the answers are those
        of a new predictor, bit for bit. What was recorded on a GPU stays. No call may run meanwhile.

        ValueError in a mode that keeps weights elsewhere than in torch's parameters: all but float32 and
        channels_last.
        """
        form = FORMS.get(self.mode)
        if form is None or form.compiled or form.tf32 or not isinstance(self._network, nn.Module):
            raise ValueError(f"a predictor of mode {self.mode} keeps its weights: make a new one")
        network = build_network(model, self.spec, self.device, self.mode, {})
        assert isinstance(network, nn.Module)
        self._network.load_state_dict(network.state_dict())  # in place, where a recorded graph reads them
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # graphs are replayed in another stream

    def __call__(
        self,
        images: Images,
        boxes_xywh: Any = None,
        box_scores: Any = None,
        flip_test: bool | None = None,
        *,
        batch_size: int = 32,
        border: Border = "official",
    ) -> list[Poses]:
        """Poses of one image or of several, one Poses an image, one person a box in the order given.

        images: uint8 (H, W, 3) RGB, the path of a picture (its EXIF orientation is applied), or several of
            them, of any sizes. cv2.imread and cv2.VideoCapture give BGR: image[..., ::-1] is RGB.
        boxes_xywh: (P, 4) left, top, width, height in image px; for several images a sequence with one
            array, or None, for each. None: the whole image is one person, and Poses.boxes_source says so.
            Boxes are used as given. One that lies wholly or partly outside is answered like any other: the
            crop is black there, and the scores tell.
        box_scores: (P,) or a sequence of them; 1 where there are none.
        flip_test: average with the mirror image; None: as the checkpoint says.
        batch_size: people of a forward pass, over all images of the call.
        border: see HeatmapCodec.decode.

        DataError: images, boxes or scores of another shape or type, not finite, without width or height; a
        file that cannot be read. ImageError: one that is no picture. ConfigError: flip_test or batch_size.
        """
        clock = [time.perf_counter()]
        prepared = self.prepare(images, boxes_xywh, box_scores)
        if not prepared:
            return []
        clock.append(time.perf_counter())
        crops = np.concatenate([one.crops for one in prepared])
        keypoints, scores = self.predict_crops(crops, flip_test, batch_size, border)
        clock.append(time.perf_counter())
        finished = self.finish(prepared, keypoints, scores)
        clock.append(time.perf_counter())
        shares = (np.diff(clock) * 1000 / len(prepared)).tolist()
        parts = ("preprocess", "inference", "postprocess")
        return [replace(poses, speed=dict(zip(parts, shares, strict=True))) for poses in finished]

    def prepare(self, images: Images, boxes_xywh: Any = None, box_scores: Any = None) -> list[Prepared]:
        """The crops of one image or of several, one Prepared an image; arguments and errors as of a call."""
        if _is_one(images):
            return [self._prepare(images, boxes_xywh, box_scores, "")]
        images = list(cast(Iterable[Any], images))
        boxes = _one_each(boxes_xywh, len(images), "boxes_xywh")
        scores = _one_each(box_scores, len(images), "box_scores")
        each = zip(images, boxes, scores, strict=True)
        return [self._prepare(*of_one, f"[{i}]") for i, of_one in enumerate(each)]

    def _prepare(self, given: Any, boxes_xywh: Any, box_scores: Any, which: str) -> Prepared:
        image = _image(given, which)
        height, width = image.shape[:2]
        whole = np.array([[0, 0, width, height]], np.float32)
        xywh = whole if boxes_xywh is None else _boxes(boxes_xywh, which)
        boxes = Boxes(xywh, _scores(box_scores, len(xywh), which))
        image_to_crop = self.image_to_crop(xywh)
        return Prepared(
            crop_people(image, image_to_crop, self.spec.input_size),
            image_to_crop,
            boxes,
            "whole_image" if boxes_xywh is None else "given",
            (height, width),
            str(given) if isinstance(given, str | Path) else None,
        )

    def finish(self, prepared: Sequence[Prepared], keypoints: Float32, scores: Float32) -> list[Poses]:
        """keypoints (P, K, 2) in crop px and scores (P, K), of all people of `prepared` in their order ->
        one Poses an image, in image px."""
        finished = []
        for one, end in zip(prepared, np.cumsum([len(one.boxes) for one in prepared]), strict=True):
            rows = slice(end - len(one.boxes), end)
            xy = place_in_image(keypoints[rows], one.image_to_crop)
            data = Keypoints(np.concatenate([xy, scores[rows, :, None]], axis=-1))
            skeleton, source = self.spec.skeleton, one.boxes_source
            finished.append(Poses(data, one.boxes, one.orig_shape, skeleton, source, path=one.path))
        return finished

    def image_to_crop(self, boxes_xywh: ArrayLike) -> Float64:
        """Boxes (P, 4) in image px -> the crop matrices (P, 2, 3) of this checkpoint's codec and padding."""
        center, scale = box_to_center_scale(boxes_xywh, self.spec.input_size, self.spec.padding)
        return self.spec.codec.image_to_crop_matrix(center, scale)

    def predict_crops(
        self, crops: UInt8, flip_test: bool | None = None, batch_size: int = 32, border: Border = "official"
    ) -> tuple[Float32, Float32]:
        """Crops uint8 (P, h, w, 3) RGB -> keypoints float32 (P, K, 2) in crop px, scores float32 (P, K)."""
        found = np.zeros((len(crops), self.spec.skeleton.num_keypoints, 3), np.float32)
        for rows, of_rows in self._batches(crops, flip_test, batch_size, border):
            found[rows] = of_rows
        return found[..., :2], found[..., 2]

    def heatmaps(self, crops: UInt8, flip_test: bool | None = None, batch_size: int = 32) -> Float32:
        """Crops uint8 (P, h, w, 3) RGB -> heatmaps float32 (P, K, h/4, w/4), averaged in a flip test."""
        width, height = self.spec.codec.heatmap_size
        result = np.zeros((len(crops), self.spec.skeleton.num_keypoints, height, width), np.float32)
        for rows, heatmaps in self._batches(crops, flip_test, batch_size):
            result[rows] = heatmaps
        return result

    def warm_up(self, people: int = 2, flip_test: bool | None = None) -> None:
        """So that no request pays for what starts, is compiled or is recorded lazily: a batch of one and one
        of two, on a GPU one of each size that batches of up to `people` may have."""
        self._passes.warm_up(people, self._flips(flip_test))

    def _flips(self, flip_test: bool | None) -> bool:
        if flip_test not in (None, True, False):
            raise ConfigError(f"flip_test must be True, False or None, got {flip_test!r}.")
        return self.spec.flip_test if flip_test is None else bool(flip_test)

    def _batches(
        self, crops: UInt8, flip_test: bool | None, batch_size: int, border: Border | None = None
    ) -> Iterator[tuple[slice, Float32]]:
        """Rows and what passes.Answer gives for them, batch after batch; the next is begun before one is
        waited for."""
        _refuse_fork()
        width, height = self.spec.input_size
        if not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise ConfigError(f"batch_size must be a whole number from 1 up, got {batch_size!r}.")
        if not isinstance(crops, np.ndarray):
            raise ValueError(f"crops must be an array (P, {height}, {width}, 3), got {type(crops).__name__}")
        if crops.dtype != np.uint8 or crops.shape[1:] != (height, width, 3):
            raise ValueError(f"crops must be uint8 (P, {height}, {width}, 3): {crops.dtype} {crops.shape}")
        ask = Ask(self._flips(flip_test), border)
        size = min(batch_size, self._passes.largest or batch_size)
        begun: deque[tuple[slice, Answer]] = deque()
        for start in range(0, len(crops), size):
            rows = slice(start, start + size)
            begun.append((rows, self._passes.start(crops[rows], ask)))
            if len(begun) == IN_FLIGHT:
                done, answer = begun.popleft()
                yield done, answer()
        for rows, answer in begun:
            yield rows, answer()


def _one_each(values: Any, count: int, name: str) -> list[Any]:
    each = [None] * count if values is None else list(values)
    if len(each) != count:
        raise DataError(f"{name} has {len(each)} entries for {count} images: give one for each, or None.")
    return each


def _is_one(images: Any) -> bool:
    """Whether this is meant as one image, right or wrong, and not as several."""
    if isinstance(images, np.ndarray):
        return images.ndim < 4 and images.dtype != object
    return isinstance(images, str | Path | bytes | bytearray | torch.Tensor) or not isinstance(
        images, Iterable
    )


def _image(given: Any, which: str) -> UInt8:
    image = read_image(given) if isinstance(given, str | Path) else given
    return check_pixels(image, f"images{which}")


def _boxes(given: Any, which: str) -> Float32:
    name = f"boxes_xywh{which}"
    boxes = _numbers(given, name)
    boxes = boxes.reshape(-1, 4) if boxes.size == 0 else boxes
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        scores = ", the scores into box_scores" if boxes.shape[1:] == (5,) else ""
        raise DataError(
            f"{name} must be (P, 4), a row [left, top, width, height] in px a person{scores}; got "
            f"{boxes.shape}."
        )
    usable = (np.abs(boxes) <= FARTHEST).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1)  # NaN is not usable
    if not usable.all():
        row = int(np.flatnonzero(~usable)[0])
        raise DataError(
            f"{name}, row {row}: {boxes[row].tolist()} is no box. left, top, width, height must be finite, "
            f"up to {FARTHEST:g} px, width and height above 0."
        )
    return boxes


def _scores(given: Any, count: int, which: str) -> Float32:
    if given is None:
        return np.ones(count, np.float32)
    scores = _numbers(given, f"box_scores{which}")
    if scores.shape != (count,) or not np.isfinite(scores).all():
        raise DataError(f"box_scores{which} must be {count} finite numbers, one a box: {scores.tolist()}.")
    return scores


def _numbers(given: Any, name: str) -> Float32:
    try:
        # asarray first: a tensor is copied by NumPy with a warning.
        return np.array(np.asarray(given), np.float32)
    except (TypeError, ValueError, RuntimeError) as error:  # the last of a tensor with a gradient
        raise DataError(f"{name} must be numbers: {first_line(error).rstrip('.')}.") from None


def _refuse_fork() -> None:
    """ConfigError where the threads that torch computes with were left behind by a fork: it would wait for
    them for ever."""
    global _computed_in
    if _computed_in is None:
        _computed_in = os.getpid()
    if _computed_in != os.getpid() and torch.get_num_threads() > 1:
        raise ConfigError(
            f"process {os.getpid()} was forked from one that had a PosePredictor, without the threads that "
            f"torch computes with, and would wait for them for ever. Start processes by the method spawn "
            f'(multiprocessing.get_context("spawn")), or call torch.set_num_threads(1) first in those that '
            f"are forked."
        )


def _find_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {first_line(error)} Use auto or cpu.") from None
    return torch.device(device)
