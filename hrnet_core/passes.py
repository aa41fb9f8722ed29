"""What runs for a batch: crops to heatmaps where the network is, and keypoints from them.

CropPass       uint8 crops -> normalised -> network, plain and mirrored -> heatmaps
PlainPasses    a batch as it comes: the CPU, decoded by numpy
cuda_passes    on an NVIDIA GPU, decoded there, as recorded graphs
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hrnet_core.decoder import FlipBack
from hrnet_core.geometry import Float32
from hrnet_core.heatmaps import Border
from hrnet_core.model import normalize
from hrnet_core.modes import Network

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec

UInt8 = NDArray[np.uint8]


class Ask(NamedTuple):
    """What is wanted of a batch."""

    flip: bool
    """Average with the mirror image."""
    border: Border | None
    """Keypoints, decoded with this border (HeatmapCodec.decode); None: the heatmaps."""


Answer = Callable[[], Float32]
"""Waits for a batch: keypoints (n, K, 3) as x, y in crop px and score, or heatmaps (n, K, H, W)."""


class CropPass(nn.Module):
    """Crops uint8 (N, h, w, 3) RGB -> heatmaps float32 (N, K, H, W), averaged with the mirror image's.

    network: of modes.build_network. layout: memory format of the images it takes. prepare: crops, mean and
    std -> those images, where it is not model.normalize.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: Network,
        spec: CheckpointSpec,
        layout: torch.memory_format,
        prepare: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.layout = network, layout
        self.prepare = prepare or functools.partial(normalize, memory_format=layout)
        self.flip_back = FlipBack(spec.codec, spec.skeleton.flip_order)
        # On the device once and for all: a recorded graph copies nothing from the host.
        self.register_buffer("mean", torch.tensor(spec.mean), False)
        self.register_buffer("std", torch.tensor(spec.std), False)

    def forward(self, crops: Tensor, flip: bool, together: bool = False) -> Tensor:
        """together: plain and mirrored crops as one batch of twice the size."""
        images = self.prepare(crops, self.mean, self.std)
        if not flip:
            return self.network(images).float()
        mirrored = images.flip(3).contiguous(memory_format=self.layout)
        if together:
            both = self.network(torch.cat([images, mirrored])).float()
            # chunk would fix their number when it is exported.
            heatmaps, back = both.reshape(2, -1, *both.shape[1:])
        else:
            heatmaps, back = self.network(images).float(), self.network(mirrored).float()
        averaged: Tensor = (heatmaps + self.flip_back(back)) * 0.5
        return averaged


class PlainPasses:
    """Batches as they come, each as long as it is. Calls from several threads run beside each other."""

    largest: int | None = None
    """People of a batch at most."""

    def __init__(self, crop_pass: CropPass, spec: CheckpointSpec, device: torch.device) -> None:
        self._pass, self._codec, self._device = crop_pass.to(device), spec.codec, device

    def start(self, crops: UInt8, ask: Ask) -> Answer:
        """crops (n, h, w, 3). The answer is there when this returns."""
        # np.array copies: torch wants writable memory, and arrays that come from Ray are read-only.
        pixels = torch.from_numpy(np.array(crops, order="C")).to(self._device)
        with torch.inference_mode():
            heatmaps: Float32 = self._pass(pixels, ask.flip).cpu().numpy()
        if ask.border is None:
            return lambda: heatmaps
        keypoints, scores = self._codec.decode(heatmaps, ask.border)
        return lambda: np.concatenate([keypoints, scores[..., None]], axis=-1)

    def warm_up(self, people: int, flip: bool) -> None:
        """A batch of one and one of two, as PosePredictor.warm_up says."""
        width, height = self._codec.input_size
        for count in (1, 2):
            self.start(np.zeros((count, height, width, 3), np.uint8), Ask(flip, "official"))()
