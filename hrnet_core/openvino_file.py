"""The network in OpenVINO on the CPU (modes openvino, openvino_bfloat16, openvino_int8), and as its files.

OpenVINO reads ONNX itself. Its own converter of torch modules is not used: that tells its maker of each use
over the network, unless somebody turned it off.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hrnet_core.errors import CheckpointError, ConfigError, DataError
from hrnet_core.model import normalize
from hrnet_core.onnx_file import (
    AGAIN,
    METADATA,
    ONNX_PACKAGES,
    export_onnx,
    missing_packages,
    refuse_other_weights,
    told_of,
)

if TYPE_CHECKING:
    import openvino

    from hrnet_core.checkpoint import CheckpointSpec

IR_PACKAGES = ("openvino", *ONNX_PACKAGES)
"""What writes an IR; openvino alone opens one."""
INT8_PACKAGES = (*IR_PACKAGES, "nncf")
INT8_AGAIN = "Write it again: hrnet export CHECKPOINT --format openvino_int8 --shards SHARDS."
BIN_SHA256 = "hrnet_bin_sha256"
"""Entry of an IR's rt_info: which .bin belongs to the .xml."""
_CORES: list[openvino.Core] = []
_ONE_CORE = threading.Lock()


def open_openvino(
    content: Sequence[bytes],
    spec: CheckpointSpec,
    name: str,
    head: nn.Module | None = None,
    again: str = AGAIN,
) -> Callable[[Tensor], Tensor]:
    """An ONNX file, or an IR (.xml and .bin), in OpenVINO, on as many threads as torch has now.

    head: the network's last layer. Given, all before it computes in bfloat16 and this in torch, in float32:
    its inputs and weights are not rounded then, and half as many keypoints move as with all in bfloat16.
    again: how such a file is written, for an error's way out.

    CheckpointError: a damaged file, or one of other weights. ConfigError: no bfloat16 in this processor.
    """
    import openvino as ov

    options = {
        # Not said, it would choose by the processor.
        "INFERENCE_PRECISION_HINT": "f32" if head is None else "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        # Pinned, the threads of two predictors, or of two actors, would share one core.
        "ENABLE_CPU_PINNING": False,
    }
    try:
        network = _core().read_model(*content)
        _refuse_others(network, content, spec, name, again)
        if head is not None:
            network = ov.Model([_convolutions(network)[-1].input_value(0)], network.get_parameters())
        compiled = _core().compile_model(network, "CPU", options)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(f"{name}: OpenVINO cannot open it ({reason}). {again}") from None
    if head is not None and compiled.get_property("INFERENCE_PRECISION_HINT") != ov.Type.bf16:
        raise ConfigError("OpenVINO does not compute in bfloat16 on this processor. Take mode openvino.")

    def run(images: Tensor) -> Tensor:
        # A request of its own for each call (40 microseconds): threads do not meet, and nobody writes again
        # where the answer lies.
        request = compiled.create_infer_request()
        (found,) = request.infer([images.contiguous().numpy()]).values()
        answer = torch.from_numpy(found)
        return answer if head is None else head(answer)

    # The first look at a tensor's data in a process fills a C++ static. Of two threads that look at once, one
    # waits in it for the GIL and the other, which holds that, for the static: so whoever loads looks first.
    width, height = spec.input_size
    with torch.inference_mode():
        run(torch.zeros(1, 3, height, width))
    return run


def export_ir(model: nn.Module, spec: CheckpointSpec) -> tuple[bytes, bytes]:
    """The network as OpenVINO's IR, .xml and .bin: float32, inputs, output and metadata as of export_onnx.

    ConfigError: packages are missing.
    """
    if why := missing_packages(IR_PACKAGES, "openvino"):
        raise ConfigError(f"OpenVINO's files cannot be made here: {why}.")
    return _ir(_core().read_model(export_onnx(model, spec)), spec)


def export_int8(model: nn.Module, spec: CheckpointSpec, crops: NDArray[np.uint8]) -> tuple[bytes, bytes]:
    """The same in int8 by nncf's post-training quantisation: weights int8 by channel, activations uint8.

    crops: uint8 (P, h, w, 3) RGB, a few hundred as the network will meet them; they set the ranges.
    The last layer stays float32: its output is what is read. So do the first two: that moves a quarter fewer
    keypoints, for some time at the highest resolutions.

    ConfigError: packages are missing. DataError: no crops.
    """
    if why := missing_packages(INT8_PACKAGES, "openvino"):
        raise ConfigError(f"an int8 file cannot be made here: {why}.")
    if not len(crops):
        raise DataError(
            "quantisation needs crops of people to find the ranges of the activations: none given."
        )
    network = _core().read_model(export_onnx(model, spec))
    first, second, *_, last = _convolutions(network)
    kept = [layer.get_friendly_name() for layer in (first, second, last)]

    def images(crop: NDArray[np.uint8]) -> NDArray[np.float32]:
        return normalize(torch.from_numpy(crop[None].copy()), spec.mean, spec.std).numpy()

    with _quiet_nncf() as nncf:
        quantized = nncf.quantize(
            network,
            nncf.Dataset(crops, images),
            preset=nncf.QuantizationPreset.MIXED,  # symmetric weights, asymmetric activations: after a ReLU
            subset_size=len(crops),
            ignored_scope=nncf.IgnoredScope(names=kept),
        )
    return _ir(quantized, spec)


def _core() -> openvino.Core:
    """The one of this process, which stays. OpenVINO's part for the CPU belongs to it, and gives the thread
    that loads it another stack for signals; dropped in another thread it would take that away from under the
    first, which the next signal then ends by SIGSEGV."""
    import openvino as ov

    with _ONE_CORE:
        if not _CORES:
            _CORES.append(ov.Core())
        return _CORES[0]


def _convolutions(network: openvino.Model) -> list[Any]:
    return [op for op in network.get_ordered_ops() if op.get_type_name() == "Convolution"]


def _ir(model: openvino.Model, spec: CheckpointSpec) -> tuple[bytes, bytes]:
    """Content of the .xml and .bin, with what the ONNX file says of itself in rt_info."""
    import openvino as ov

    with tempfile.TemporaryDirectory(prefix="hrnet-openvino-") as folder:
        file = Path(folder) / "model.xml"
        model.set_rt_info(told_of(spec), [METADATA])
        ov.save_model(model, file, compress_to_fp16=False)
        weights = file.with_suffix(".bin").read_bytes()
        model.set_rt_info(hashlib.sha256(weights).hexdigest(), [BIN_SHA256])
        ov.save_model(model, file, compress_to_fp16=False)
        return file.read_bytes(), weights


def _refuse_others(
    model: openvino.Model, content: Sequence[bytes], spec: CheckpointSpec, name: str, again: str
) -> None:
    """CheckpointError for a file of other weights, and for a .bin that is not the .xml's."""
    place = [METADATA] if model.has_rt_info([METADATA]) else ["framework", METADATA]  # of an ONNX file
    told = model.get_rt_info(place).value if model.has_rt_info(place) else "{}"
    refuse_other_weights(told, spec, name, again)
    for weights in content[1:]:
        if model.get_rt_info([BIN_SHA256]).value != hashlib.sha256(weights).hexdigest():
            raise CheckpointError(f"{name}: its .bin is not the one that was written with its .xml. {again}")


@contextlib.contextmanager
def _quiet_nncf() -> Iterator[Any]:
    """nncf without its notes, and without its reports to its maker, which this variable stops."""
    os.environ.setdefault("NNCF_CI", "1")
    import nncf

    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield nncf
    finally:
        logger.setLevel(level)
