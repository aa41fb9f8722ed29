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

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hrnet_core.choices import MODES
from hrnet_core.errors import ConfigError, first_line
from hrnet_core.model import fold_batch_norms
from hrnet_core.onnx_file import ONNX_PACKAGES, export_onnx, missing_packages, open_onnx

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec

EXACT_ENOUGH = 0.001  # |AP difference| up to which "auto" takes a faster mode
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
        return open_onnx(str(onnx_file) if onnx_file else export_onnx(model, spec), spec)
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
        if why := missing_packages(needed):
            return why
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
