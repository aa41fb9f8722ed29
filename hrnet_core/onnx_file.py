"""The network as an ONNX file, and such a file in ONNX Runtime (mode "onnx")."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hrnet_core.errors import CheckpointError, ConfigError, first_line
from hrnet_core.model import fold_batch_norms

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec

ONNX_PACKAGES = ("onnxruntime", "onnx", "onnxscript")
"""What writes a file; the first alone opens one."""
METADATA = "hrnet"
"""Entry of model.onnx's metadata: checkpoint.json without what was measured."""


def missing_packages(names: Sequence[str]) -> str:
    """Which of these packages are not installed, with the way out; "" where all are."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} is not installed (pip install 'hrnet-ray[onnx]')" if missing else ""


def open_onnx(model: str | bytes, spec: CheckpointSpec) -> Callable[[Tensor], Tensor]:
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
    if why := missing_packages(ONNX_PACKAGES):
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
