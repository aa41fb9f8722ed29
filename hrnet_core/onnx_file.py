"""The network as an ONNX file, and such a file in ONNX Runtime (mode onnx)."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hrnet_core.errors import CheckpointError, ConfigError, first_line
from hrnet_core.model import fold_batch_norms, to_16_bits

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec

ONNX_PACKAGES = ("onnxruntime", "onnx", "onnxscript")
"""What writes a file; the first alone opens one."""
METADATA = "hrnet"
"""Entry of model.onnx's metadata: checkpoint.json without what was measured."""
AGAIN = "Write it again: hrnet export CHECKPOINT."


def missing_packages(names: Sequence[str], extra: str = "onnx") -> str:
    """Which of these packages are not installed, with the way out; "" where all are."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} is not installed (pip install 'hrnet-ray[{extra}]')" if missing else ""


def told_of(spec: CheckpointSpec) -> str:
    """What an exported file says of itself: checkpoint.json without what was measured, as JSON."""
    return json.dumps({name: value for name, value in spec.as_dict().items() if name != "modes"})


def refuse_other_weights(
    told: str | bytes, spec: CheckpointSpec, name: str, again: str = AGAIN
) -> dict[str, Any]:
    """What a file says of itself. CheckpointError where that is of other weights than the checkpoint's, or
    does not say of which."""
    try:
        about: dict[str, Any] = json.loads(told)
        theirs = str(about["weights_sha256"])
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(f"{name}: damaged, it does not say what it should. {again}") from None
    if theirs != (ours := str(spec.weights_sha256)):
        raise CheckpointError(
            f"{name}: made from weights {theirs[:12]}, the checkpoint's are {ours[:12]}. {again}"
        )
    return about


def open_onnx(content: bytes, spec: CheckpointSpec, name: str) -> Callable[[Tensor], Tensor]:
    """An ONNX file that takes images, in ONNX Runtime, on as many threads as torch has now.

    CheckpointError: a damaged file, or one of other weights.
    """
    session = open_session(content, name)
    refuse_other_weights(session.get_modelmeta().custom_metadata_map.get(METADATA, "{}"), spec, name)
    images_name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        (heatmaps,) = session.run(None, {images_name: images.contiguous().numpy()})
        return torch.from_numpy(heatmaps)

    return run


def open_session(content: bytes, name: str) -> Any:
    """ONNX Runtime's session on the CPU, on as many threads as torch has now. CheckpointError: damaged."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise CheckpointError(f"{name}: ONNX Runtime cannot open it ({first_line(error)}). {AGAIN}") from None


def export_onnx(model: nn.Module, spec: CheckpointSpec) -> bytes:
    """The network as an ONNX file: images float32 (N, 3, h, w), normalised as the metadata says -> heatmaps.

    N is free. The metadata entry "hrnet" is checkpoint.json without measurements: mean, std, codec, skeleton,
    the weights' sha256. Neither decoding nor the flip test is part of it. ConfigError: packages are missing.
    """
    return write_onnx(folded_copy(model), spec, torch.float32, "images", ["heatmaps"])


def export_float16(model: nn.Module, spec: CheckpointSpec) -> bytes:
    """The same with weights and convolutions in float16, for GPUs; input, output, last layer in float32."""
    network = folded_copy(model)
    to_16_bits(network, torch.float16)
    return write_onnx(network, spec, torch.float32, "images", ["heatmaps"])


def folded_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU, ready to be exported. ConfigError: packages are missing."""
    if why := missing_packages(ONNX_PACKAGES):
        raise ConfigError(f"an ONNX file cannot be made here: {why}.")
    network = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    fold_batch_norms(network)
    return network


def write_onnx(
    network: nn.Module, spec: CheckpointSpec, dtype: torch.dtype, input_name: str, outputs: list[str]
) -> bytes:
    """A network as ONNX, of images float32 (N, 3, h, w) or of crops uint8 (N, h, w, 3), with its metadata."""
    width, height = spec.input_size
    shape = (2, height, width, 3) if dtype == torch.uint8 else (2, 3, height, width)
    with _quiet_exporter(), torch.inference_mode(False):
        program = torch.onnx.export(
            network,
            (torch.zeros(shape, dtype=dtype),),
            input_names=[input_name],
            output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("people", min=1)},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props[METADATA] = told_of(spec)
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
