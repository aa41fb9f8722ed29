"""How a network runs: the modes of PosePredictor, each a function from images to heatmaps.

    float32             torch, as in training; on a GPU without TF32
    channels_last       the same numbers up to rounding: NHWC, BatchNorm folded into the convolutions
    tf32                the same with inputs of convolutions rounded to 10 bits; on a GPU
    float16, bfloat16   the same in 16 bits, but for the last layer; float16 on a GPU
    compiled            channels_last through torch.compile; on a CPU that takes a C++ compiler
    compiled_...        tf32, float16, bfloat16 through torch.compile
    onnx                ONNX Runtime, float32, from model.onnx
    openvino            OpenVINO, float32, from model.onnx
    openvino_bfloat16   the same in bfloat16, but for the last layer
    openvino_int8       OpenVINO, from the quantised file of `hrnet export`
    ncnn                ncnn, float32, from its own files

Which of them is exact enough is measured on an evaluation set (docs/modes.md), not assumed.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hrnet_core.checkpoint import INT8, NCNN, ONNX, CheckpointSpec
from hrnet_core.choices import MODES
from hrnet_core.errors import ConfigError, first_line
from hrnet_core.fused import fuse_where_it_runs, is_fused
from hrnet_core.model import BasicBlock, Bottleneck, Fusion, fold_batch_norms, normalize, to_16_bits
from hrnet_core.ncnn_file import NCNN_PACKAGES, export_ncnn, open_ncnn
from hrnet_core.onnx_file import ONNX_PACKAGES, export_onnx, missing_packages, open_onnx
from hrnet_core.openvino_file import INT8_AGAIN, IR_PACKAGES, open_openvino

EXACT_ENOUGH = 0.001  # |AP difference| up to which "auto" takes a faster mode
RUN_FROM: dict[str, tuple[str, ...]] = {
    "onnx": (ONNX,), "openvino": (ONNX,), "openvino_bfloat16": (ONNX,), "openvino_int8": INT8,
    "ncnn": NCNN,
}  # fmt: skip
"""The modes that run from exported files, and which. Without them all but int8's are made in memory."""
ON_PURPOSE = {"openvino_int8"}
"""Modes that "auto" never takes, whatever was measured."""
Network = Callable[[Tensor], Tensor]
"""Normalised images float32 (N, 3, h, w) -> heatmaps float32 (N, K, h/4, w/4)."""
CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Where torch.compile keeps what it made, by its own environment variable."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Form:
    """How torch runs the network of a mode."""

    dtype: torch.dtype = torch.float32
    """Of all layers but the last, which stays float32."""
    tf32: bool = False
    """Whether a GPU may round the inputs of a float32 convolution to 10 bits."""
    folded: bool = True
    """NHWC and BatchNorm folded; False: as in training."""
    compiled: bool = False

    @property
    def layout(self) -> torch.memory_format:
        """Of the images it takes."""
        return torch.channels_last if self.folded else torch.contiguous_format


FORMS = {
    "float32": Form(folded=False),
    "channels_last": Form(),
    "tf32": Form(tf32=True),
    "float16": Form(torch.float16, tf32=True),
    "bfloat16": Form(torch.bfloat16, tf32=True),
    "compiled": Form(compiled=True),
    "compiled_tf32": Form(tf32=True, compiled=True),
    "compiled_float16": Form(torch.float16, tf32=True, compiled=True),
    "compiled_bfloat16": Form(torch.bfloat16, tf32=True, compiled=True),
}
"""The modes of torch; the others have a runtime of their own."""


class InRuntime:
    """A network in ONNX Runtime, OpenVINO or ncnn: a copy is the same one; none of them can be pickled."""

    def __init__(self, mode: str, network: Network) -> None:
        self._mode, self._network = mode, network

    def __call__(self, images: Tensor) -> Tensor:
        return self._network(images)

    def __deepcopy__(self, _memo: dict[int, Any]) -> InRuntime:
        return self

    def __reduce__(self) -> str:
        raise ConfigError(
            f"a predictor of mode {self._mode} cannot be pickled, as its network lies in a runtime of its "
            f"own. Give other processes the folder: PosePredictor.load(folder, mode={self._mode!r})."
        )


def build_network(
    model: nn.Module,
    spec: CheckpointSpec,
    device: torch.device,
    mode: str,
    exported: Mapping[str, bytes],
    compile_cache: str | None = None,
) -> Network:
    """A copy of `model` that runs in `mode`. exported: files of these weights, as checkpoint.read_exported.
    compile_cache: see keep_compiled.

    ConfigError: an unknown mode, or one that cannot run here. CheckpointError: a file is of other weights.
    """
    if mode not in MODES:
        raise ConfigError(f"mode {mode!r} is unknown: choose auto or one of {', '.join(MODES)}.")
    if why := unusable(mode, device.type, exported):
        raise ConfigError(f"mode {mode!r} cannot run here: {why}.")
    if mode in RUN_FROM:
        return InRuntime(mode, _from_files(model, spec, mode, exported))
    network = copy.deepcopy(model).eval().requires_grad_(False).to(device)
    form = FORMS[mode]
    if not form.folded:
        return network
    fold_batch_norms(network)
    if form.dtype != torch.float32:
        to_16_bits(network, form.dtype)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # unknown to its stub
    if device.type == "cuda" and form.tf32:  # exact float32 has no such kernels
        width, height = spec.input_size
        images = torch.zeros(1, 3, height, width, device=device).contiguous(memory_format=form.layout)
        fuse_where_it_runs(network, images, inside_fusions=not form.compiled)
    if not form.compiled:
        return network
    folder = keep_compiled(compile_cache)
    logger.warning(
        "mode %s: compiling at the first batch of one person and at the first of several; a minute or two, "
        "less from the second start on, from what is kept in %s",
        mode,
        folder,
    )
    return _compiled(network, mode) if device.type == "cpu" else _blocks_compiled(network, mode)


def files_of(mode: str, measured: Mapping[str, Any]) -> set[str]:
    """Names of the exported files that a mode runs from where they are there; for "auto" those of all modes
    that it may become by the measurements of a checkpoint."""
    modes = {name for of in measured.values() for name in of} - ON_PURPOSE if mode == "auto" else {mode}
    return {name for mode in modes for name in RUN_FROM.get(mode, ())}


def unusable(mode: str, device_type: str, files: Collection[str] = ()) -> str:
    """Why a mode cannot run on "cpu" or "cuda" here, with the way out; "" where it can.

    files: names of the exported files that are there: without its own a mode also needs what makes them.
    """
    if mode in RUN_FROM:
        if mode == "openvino_int8" and not set(INT8) <= set(files):
            return (
                f"the checkpoint folder has no {' and '.join(INT8)}: hrnet export CHECKPOINT --format "
                f"openvino_int8 --shards SHARDS writes them"
            )
        # The first opens files, all make them. Where one of several is there, opening it asks for the others.
        packages = {"onnx": ONNX_PACKAGES, "ncnn": NCNN_PACKAGES}.get(mode, IR_PACKAGES)
        there = not set(RUN_FROM[mode]).isdisjoint(files)
        if why := missing_packages(packages[:1] if there else packages, mode.partition("_")[0]):
            return why
        if device_type != "cpu":
            return "it runs on the CPU; name device cpu, or another mode"
        if mode == "openvino_bfloat16" and not has_bfloat16():
            return (
                "this processor has no bfloat16 instructions (avx512_bf16 or amx_bf16), without which "
                "OpenVINO computes in float32; take mode openvino"
            )
    if mode in ("tf32", "float16", "compiled_tf32", "compiled_float16") and device_type == "cpu":
        return "it is a GPU's; on a CPU take channels_last or bfloat16"
    return cannot_compile(device_type) if mode.startswith("compiled") else ""


def cannot_compile(device_type: str) -> str:
    """Why torch.compile has nothing to build with on "cpu" or "cuda" here; "" where it has."""
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile builds for the GPU with Triton, which is not installed (pip install triton)"
    if device_type == "cpu" and compiler() is None:
        return (
            "torch.compile builds C++ for the CPU and there is no compiler: install g++ "
            "(apt-get install g++), name one in CXX, or do without"
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


def keep_compiled(folder: str | None) -> str:
    """Where torch.compile keeps its work, for the whole process: `folder`, else TORCHINDUCTOR_CACHE_DIR, else
    hrnet/compiled in the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ[CACHE] = folder or os.environ.get(CACHE) or os.path.join(user, "hrnet", "compiled")
    return os.environ[CACHE]


def _from_files(model: nn.Module, spec: CheckpointSpec, mode: str, exported: Mapping[str, bytes]) -> Network:
    """The network in ONNX Runtime, OpenVINO or ncnn."""
    if mode == "ncnn":
        files = {name: exported[name] for name in NCNN if name in exported}
        return open_ncnn(files or dict(zip(NCNN, export_ncnn(model, spec), strict=True)), spec)
    if mode == "openvino_int8":
        return open_openvino([exported[name] for name in INT8], spec, INT8[0], again=INT8_AGAIN)
    content = exported.get(ONNX) or export_onnx(model, spec)
    if mode == "onnx":
        return open_onnx(content, spec, ONNX)
    head = copy.deepcopy(model.get_submodule("final_layer")).cpu() if mode.endswith("bfloat16") else None
    return open_openvino([content], spec, ONNX, head)


# --- in torch -------------------------------------------------------------------------------------------


def _compiled(network: nn.Module, mode: str) -> Network:
    """For a CPU: the whole network through TorchInductor, weights frozen in. Compiles at the first call of
    one image and at the first of several. (Block by block W32 was 6 % slower, and longer in starting.)"""
    compiled = torch.compile(network, options={"freezing": True})
    return functools.partial(_run_compiled, compiled, mode)


def blocks_to_compile(network: nn.Module) -> list[nn.Module]:
    """BasicBlock, Bottleneck and Fusion, to be compiled one by one, so that blocks of one shape are compiled
    once (14 s of W32 on an H200 where the whole network took 50). Raises torch.compile's limits for it."""
    _allow_many_shapes()
    return [block for block in network.modules() if isinstance(block, BasicBlock | Bottleneck | Fusion)]


def _allow_many_shapes() -> None:
    """Of this thread: from torch 2.13 on each has settings of its own, and beyond the limit a function is
    run uncompiled. Each width of a branch is a compilation of the same few functions."""
    config = torch._dynamo.config
    # Asked at each call of each block: looking takes half as long as setting.
    if config.recompile_limit < 256:
        config.recompile_limit = 256
    if config.accumulated_recompile_limit < 4096:
        config.accumulated_recompile_limit = 4096


def compiled_normalize(form: Form, mode: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """model.normalize of crops, mean and std, into the form's layout and type, for a GPU: one kernel, where
    six in a row took as long as a fortieth of W32."""

    def prepare(crops: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return normalize(crops, mean, std, form.layout).to(form.dtype)

    return functools.partial(_run_compiled, torch.compile(prepare, dynamic=False), mode)


def _blocks_compiled(network: nn.Module, mode: str) -> nn.Module:
    """For a GPU, in place: the blocks that cuDNN has not fused."""
    for block in blocks_to_compile(network):
        if is_fused(block):
            continue
        compiled = torch.compile(block.forward, dynamic=False)
        block.forward = functools.partial(_run_compiled, compiled, mode)
    return network


def _run_compiled(
    compiled: Callable[..., Tensor], mode: str, given: Tensor | list[Tensor], *others: Tensor
) -> Tensor:
    """others: what has no rows of images."""
    _allow_many_shapes()  # the thread that compiles is not always the one that loaded the network
    for tensor in [given] if isinstance(given, Tensor) else given:
        if len(tensor) > 1:
            torch._dynamo.mark_dynamic(tensor, 0)  # one compilation for every number of images
    try:
        return compiled(given, *others)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise compile_failed(f"mode {mode!r}", error) from error


def compile_failed(what: str, error: Exception) -> ConfigError:
    """what: the setting that asked for it."""
    return ConfigError(
        f"{what}: torch.compile failed here ({first_line(error)}). On a CPU it needs a working C++ compiler "
        f"({compiler()}) with the headers of Python, on a GPU Triton; do without it where there is none."
    )
