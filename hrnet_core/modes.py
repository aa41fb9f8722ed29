"""How a network runs: the modes of PosePredictor, each a function from images to heatmaps.

    float32             torch, as in training
    channels_last       the same numbers up to rounding: NHWC, BatchNorm folded into the convolutions
    bfloat16            the same in bfloat16, but for the last layer
    compiled            channels_last through torch.compile; on a CPU that takes a C++ compiler
    compiled_bfloat16   bfloat16 through torch.compile
    onnx                ONNX Runtime, float32, from model.onnx

Which of them is exact enough is measured on an evaluation set (docs/modes.md), not assumed.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hrnet_core.choices import MODES
from hrnet_core.errors import CheckpointError, ConfigError, first_line

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec

EXACT_ENOUGH = 0.001  # |AP difference| up to which "auto" takes a faster mode
ONNX_PACKAGES = ("onnxruntime", "onnx", "onnxscript")
METADATA = "hrnet"
"""Entry of model.onnx's metadata: checkpoint.json without what was measured."""
Network = Callable[[Tensor], Tensor]
"""Normalised images float32 (N, 3, h, w) -> heatmaps float32 (N, K, h/4, w/4)."""


def build_network(
    model: nn.Module, spec: CheckpointSpec, device: torch.device, mode: str, onnx_file: Path | None = None
) -> Network:
    """A copy of `model` that runs in `mode`. onnx_file: a model.onnx of these weights; None: made here.

    ConfigError: an unknown mode, or one that cannot run here. CheckpointError: the file is of other weights.
    """
    if mode not in MODES:
        raise ConfigError(f"mode {mode!r} is unknown: choose auto or one of {', '.join(MODES)}.")
    if why := unusable(mode, device.type, onnx_file is not None):
        raise ConfigError(f"mode {mode!r} cannot run here: {why}.")
    if mode == "onnx":
        return _onnx(str(onnx_file) if onnx_file else export_onnx(model, spec), spec)
    network = copy.deepcopy(model).eval().requires_grad_(False).to(device)
    if mode == "float32":
        return network
    fold_batch_norms(network)
    if mode.endswith("bfloat16"):
        _to_bfloat16(network)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # unknown to its stub
    return _compiled(network, mode) if mode.startswith("compiled") else network


def unusable(mode: str, device_type: str, with_file: bool = False) -> str:
    """Why a mode cannot run on "cpu" or "cuda" here, with the way out; "" where it can.

    with_file: there is a model.onnx; else mode "onnx" also needs what makes one.
    """
    if mode == "onnx":
        needed = ONNX_PACKAGES[:1] if with_file else ONNX_PACKAGES
        if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
            return f"{', '.join(missing)} is not installed (pip install 'hrnet-ray[onnx]')"
        if device_type != "cpu":
            return "it runs on the CPU; name device cpu, or another mode"
    if mode.startswith("compiled") and device_type == "cpu" and compiler() is None:
        return (
            "torch.compile builds C++ for the CPU and there is no compiler: install g++ "
            "(apt-get install g++), name one in CXX, or take another mode"
        )
    return ""


def compiler() -> str | None:
    """The C++ compiler that torch.compile would call on a CPU, or None: CXX, else g++ (clang++ on a Mac)."""
    usual = "clang++" if shutil.which("xcrun") else "g++"
    return shutil.which(os.environ.get("CXX") or usual)


def fastest_exact(modes: dict[str, Any], device_type: str, with_file: bool = False) -> str:
    """What "auto" means for the measurements of a checkpoint on "cpu" or "cuda".

    The fastest mode measured there within 0.001 AP of float32 that can run here; float32 where nothing was
    measured. bfloat16 measured on a CPU with instructions for it is not taken on one without.
    """
    exact = {
        name: figures["ms_per_crop"]
        for name, figures in modes.get(device_type, {}).items()
        if name in MODES
        and abs(figures.get("ap_difference", 1.0)) <= EXACT_ENOUGH
        and "ms_per_crop" in figures
        and not unusable(name, device_type, with_file)
        and not (name.endswith("bfloat16") and device_type == "cpu" and not has_bfloat16())
    }
    return min(exact, key=lambda name: exact[name], default="float32")


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; elsewhere it is emulated, several times slower."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"))


# --- in torch -------------------------------------------------------------------------------------------


def fold_batch_norms(network: nn.Module) -> None:
    """In place: a BatchNorm that follows a convolution becomes part of it; in eval mode the same."""
    for parent in list(network.modules()):
        for (first, convolution), (second, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, first, fuse_conv_bn_eval(convolution, norm))
                setattr(parent, second, nn.Identity())


def _to_bfloat16(network: nn.Module) -> None:
    """In place. The last layer stays float32: rounded to 8 bits, neighbouring cells of a heatmap become
    equal, and the maximum and the quarter step are read from their order."""
    network.to(torch.bfloat16).register_forward_pre_hook(lambda _, inputs: (inputs[0].bfloat16(),))
    head = getattr(network, "final_layer", None)
    if isinstance(head, nn.Module):
        head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def _compiled(network: nn.Module, mode: str) -> Network:
    """`network` through TorchInductor, weights frozen in. The first call of one image compiles, and so does
    the first call of several (any number of them then)."""
    compiled = torch.compile(network, options={"freezing": True})

    def run(images: Tensor) -> Tensor:
        if len(images) > 1:
            torch._dynamo.mark_dynamic(images, 0)  # one compilation for every batch size
        try:
            heatmaps: Tensor = compiled(images)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise ConfigError(
                f"mode {mode!r}: torch.compile failed here ({first_line(error)}). On a CPU it needs "
                f"a working C++ compiler ({compiler()}) with the headers of Python; take another mode where "
                f"there is none."
            ) from error
        return heatmaps

    return run


# --- ONNX -----------------------------------------------------------------------------------------------


def _onnx(model: str | bytes, spec: CheckpointSpec) -> Network:
    """A model.onnx, by its path or content, in ONNX Runtime, on as many threads as torch has now."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    name = model if isinstance(model, str) else "the exported network"
    again = "Write it again: hrnet export CHECKPOINT."
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise CheckpointError(f"{name}: ONNX Runtime cannot open it ({first_line(error)}). {again}") from None
    told = session.get_modelmeta().custom_metadata_map.get(METADATA, "{}")
    sha256 = json.loads(told).get("weights_sha256")
    if sha256 != spec.weights_sha256:
        theirs, ours = str(sha256)[:12], str(spec.weights_sha256)[:12]
        raise CheckpointError(f"{name}: made from weights {theirs}, the checkpoint's are {ours}. {again}")
    images_name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        (heatmaps,) = session.run(None, {images_name: images.contiguous().numpy()})
        return torch.from_numpy(heatmaps)

    return run


def export_onnx(model: nn.Module, spec: CheckpointSpec) -> bytes:
    """The network as an ONNX file: images float32 (N, 3, h, w), normalised as the metadata says -> heatmaps.

    N is free. The metadata entry "hrnet" is checkpoint.json without measurements: mean, std, codec, skeleton,
    the weights' sha256. Neither decoding nor the flip test is part of it. ConfigError: packages are missing.
    """
    if why := unusable("onnx", "cpu"):
        raise ConfigError(f"an ONNX file cannot be made here: {why}.")
    network = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    fold_batch_norms(network)
    width, height = spec.input_size
    with _quiet_exporter(), torch.inference_mode(False):
        program = torch.onnx.export(
            network,
            (torch.zeros(2, 3, height, width),),
            input_names=["images"],
            output_names=["heatmaps"],
            dynamic_shapes=({0: torch.export.Dim("people", min=1)},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    told = {name: value for name, value in spec.as_dict().items() if name != "modes"}
    program.model.metadata_props[METADATA] = json.dumps(told)
    return bytes(program.model_proto.SerializeToString())


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the exporter's notes about its passes, itself, and torchvision, which is not there."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
