"""One ONNX file from crops to keypoints, normalising and decoding included, for where only a runtime is.

`hrnet export --format onnx_decoded` writes it. No mode runs from it: PosePredictor decodes itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hrnet_core.decoder import Decoder
from hrnet_core.onnx_file import folded_copy, open_session, write_onnx
from hrnet_core.passes import CropPass

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec


def export_decoding(model: nn.Module, spec: CheckpointSpec, flip_test: bool) -> bytes:
    """crops uint8 (N, h, w, 3) RGB -> keypoints float32 (N, K, 2) in crop px, scores float32 (N, K).

    N is free. The metadata is that of export_onnx, but `flip_test` is what the file does. ConfigError:
    packages are missing.
    """
    network = _Decoding(folded_copy(model), spec, flip_test)
    return write_onnx(
        network, replace(spec, flip_test=flip_test), torch.uint8, "crops", ["keypoints", "scores"]
    )


def open_decoding(content: bytes, name: str) -> Callable[[NDArray[np.uint8]], tuple[Any, Any]]:
    """Such a file in ONNX Runtime: crops -> keypoints, scores. CheckpointError: a damaged file."""
    session = open_session(content, name)

    def run(crops: NDArray[np.uint8]) -> tuple[Any, Any]:
        keypoints, scores = session.run(None, {"crops": crops})
        return keypoints, scores

    return run


class _Decoding(nn.Module):
    def __init__(self, network: nn.Module, spec: CheckpointSpec, flip_test: bool) -> None:
        super().__init__()
        self.crop_pass = CropPass(network, spec, torch.contiguous_format)
        self.decode, self.flip_test = Decoder(spec.codec), flip_test

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        found = self.decode(self.crop_pass(crops, self.flip_test, together=True))
        return found[..., :2], found[..., 2]
