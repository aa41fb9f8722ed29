"""One ONNX file from crops to keypoints, normalising and decoding included, for where only a runtime is.

`hrnet export --format onnx_decoded` writes it. No mode runs from it: PosePredictor decodes itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hrnet_core.decoder import Decoder
from hrnet_core.geometry import Float32
from hrnet_core.heatmaps import Border
from hrnet_core.onnx_file import folded_copy, open_session, write_onnx
from hrnet_core.passes import CropPass, UInt8
from hrnet_core.predictor import PosePredictor

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec
    from hrnet_core.model import HRNet


def export_decoding(model: nn.Module, spec: CheckpointSpec, flip_test: bool) -> bytes:
    """crops uint8 (N, h, w, 3) RGB -> keypoints float32 (N, K, 2) in crop px, scores float32 (N, K).

    N is free. The metadata is that of export_onnx, but `flip_test` is what the file does. ConfigError:
    packages are missing.
    """
    network = _Decoding(folded_copy(model), spec, flip_test)
    return write_onnx(
        network, replace(spec, flip_test=flip_test), torch.uint8, "crops", ["keypoints", "scores"]
    )


class DecodedPredictor(PosePredictor):
    """A predictor whose crops go through such a file in ONNX Runtime; `heatmaps` are the model's own.

    CheckpointError: a damaged file, called `name` there.
    """

    def __init__(self, model: HRNet, spec: CheckpointSpec, content: bytes, name: str) -> None:
        super().__init__(model, spec, "cpu", "float32")
        self._session = open_session(content, name)

    def predict_crops(
        self, crops: UInt8, flip_test: bool | None = None, batch_size: int = 32, border: Border = "official"
    ) -> tuple[Float32, Float32]:
        """As PosePredictor's, in one batch; flip test and border are those of the file."""
        keypoints, scores = self._session.run(None, {"crops": crops})
        return keypoints, scores


class _Decoding(nn.Module):
    def __init__(self, network: nn.Module, spec: CheckpointSpec, flip_test: bool) -> None:
        super().__init__()
        self.crop_pass = CropPass(network, spec, torch.contiguous_format)
        self.decode, self.flip_test = Decoder(spec.codec), flip_test

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        found = self.decode(self.crop_pass(crops, self.flip_test, together=True))
        return found[..., :2], found[..., 2]
