"""How a network runs: the modes of PosePredictor, each a function from images to heatmaps.

    float32             torch, as in training
    channels_last       the same numbers up to rounding: NHWC, BatchNorm folded into the convolutions
    bfloat16            the same in bfloat16, but for the last layer
    compiled            channels_last through torch.compile; on a CPU that takes a C++ compiler
    compiled_bfloat16   bfloat16 through torch.compile
    onnx                ONNX Runtime, float32, from model.onnx
    openvino            OpenVINO, float32, from model.onnx
    openvino_bfloat16   the same in bfloat16, but for the last layer
    openvino_int8       OpenVINO, from the quantised file of `hrnet export`

Which of them is exact enough is measured on an evaluation set (docs/modes.md), not assumed.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hrnet_core.checkpoint import INT8, ONNX, CheckpointSpec
from hrnet_core.choices import MODES
from hrnet_core.errors import ConfigError, first_line
from hrnet_core.model import fold_batch_norms
from hrnet_core.onnx_file import ONNX_PACKAGES, export_onnx, missing_packages, open_onnx
from hrnet_core.openvino_file import open_openvino

EXACT_ENOUGH = 0.001  # |AP difference| up to which "auto" takes a faster mode
RUN_FROM: dict[str, tuple[str, ...]] = {
    "onnx": (ONNX,), "openvino": (ONNX,), "openvino_bfloat16": (ONNX,), "openvino_int8": INT8,
}  # fmt: skip
"""The modes that run from exported files, and which. Without a model.onnx it is made in memory."""
ON_PURPOSE = {"openvino_int8"}
"""Modes that "auto" never takes, whatever was measured."""
Network = Callable[[Tensor], Tensor]
"""Normalised images float32 (N, 3, h, w) -> heatmaps float32 (N, K, h/4, w/4)."""


def build_network(
    model: nn.Module, spec: CheckpointSpec, device: torch.device, mode: str, exported: Mapping[str, bytes]
) -> Network:
    """A copy of `model` that runs in `mode`. exported: files of these weights, as checkpoint.read_exported.

    ConfigError: an unknown mode, or one that cannot run here. CheckpointError: a file is of other weights.
    """
    if mode not in MODES:
        raise ConfigError(f"mode {mode!r} is unknown: choose auto or one of {', '.join(MODES)}.")
    if why := unusable(mode, device.type, exported):
        raise ConfigError(f"mode {mode!r} cannot run here: {why}.")
    if mode in RUN_FROM:
        return _from_files(model, spec, mode, exported)
    network = copy.deepcopy(model).eval().requires_grad_(False).to(device)
    if mode == "float32":
        return network
    fold_batch_norms(network)
    if mode.endswith("bfloat16"):
        _to_bfloat16(network)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # unknown to its stub
    return _compiled(network, mode) if mode.startswith("compiled") else network


def files_of(mode: str, measured: Mapping[str, Any]) -> set[str]:
    """Names of the exported files that a mode runs from where they are there; for "auto" those of all modes
    that it may become by the measurements of a checkpoint."""
    modes = {name for of in measured.values() for name in of} - ON_PURPOSE if mode == "auto" else {mode}
    return {name for mode in modes for name in RUN_FROM.get(mode, ())}


def unusable(mode: str, device_type: str, files: Collection[str] = ()) -> str:
    """Why a mode cannot run on "cpu" or "cuda" here, with the way out; "" where it can.

    files: names of the exported files that are there: without model.onnx its modes also need what makes one.
    """
    if mode in RUN_FROM:
        there = set(RUN_FROM[mode]) <= set(files)
        if mode == "openvino_int8" and not there:
            return (
                f"the checkpoint folder has no {' and '.join(INT8)}: hrnet export CHECKPOINT --format "
                f"openvino_int8 --shards SHARDS writes them"
            )
        engine = "onnxruntime" if mode == "onnx" else "openvino"
        packages = [engine] if there else [engine, *ONNX_PACKAGES]
        if why := missing_packages(list(dict.fromkeys(packages)), mode.partition("_")[0]):
            return why
        if device_type != "cpu":
            return "it runs on the CPU; name device cpu, or another mode"
        if mode == "openvino_bfloat16" and not has_bfloat16():
            return (
                "this processor has no bfloat16 instructions (avx512_bf16 or amx_bf16), without which "
                "OpenVINO computes in float32; take mode openvino"
            )
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


def fastest_exact(modes: Mapping[str, Any], device_type: str, files: Collection[str] = ()) -> str:
    """What "auto" means for the measurements of a checkpoint on "cpu" or "cuda".

    The fastest mode measured there within 0.001 AP of float32 that can run here; float32 where nothing was
    measured. bfloat16 measured on a CPU with instructions for it is not taken on one without; int8 is never
    taken: only by its name.
    """
    exact = {
        name: figures["ms_per_crop"]
        for name, figures in modes.get(device_type, {}).items()
        if name in MODES
        and name not in ON_PURPOSE
        and abs(figures.get("ap_difference", 1.0)) <= EXACT_ENOUGH
        and "ms_per_crop" in figures
        and not unusable(name, device_type, files)
        and not (name.endswith("bfloat16") and device_type == "cpu" and not has_bfloat16())
    }
    return min(exact, key=lambda name: exact[name], default="float32")


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; elsewhere it is emulated, several times slower."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"))


def _from_files(model: nn.Module, spec: CheckpointSpec, mode: str, exported: Mapping[str, bytes]) -> Network:
    """The network in ONNX Runtime or OpenVINO."""
    if mode == "openvino_int8":
        return open_openvino([exported[name] for name in INT8], spec, INT8[0])
    content = exported.get(ONNX) or export_onnx(model, spec)
    if mode == "onnx":
        return open_onnx(content, spec, ONNX)
    head = copy.deepcopy(model.get_submodule("final_layer")).cpu() if mode.endswith("bfloat16") else None
    return open_openvino([content], spec, ONNX, head)


# --- in torch -------------------------------------------------------------------------------------------


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
