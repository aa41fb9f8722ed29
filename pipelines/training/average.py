"""The moving average of a network's weights (EMA), which is scored and saved in their place."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from hrnet_core.model import HRNet


class Average:
    """After each step decay x average + (1 - decay) x weights, on the device; it begins as the weights are.

    BatchNorm's running statistics are averaged with them, as in the published runs that use one (RTMPose's
    EMAHook with update_buffers, timm's ModelEma). Not torch's AveragedModel: its counter of updates lies on
    the CPU, and each update would wait for the GPU.
    """

    def __init__(self, model: HRNet, decay: float, recorded: bool = False) -> None:
        """recorded: by a CUDA graph, which holds numbers: 1 - decay is then a tensor on the device, as the
        optimizer's rate is."""
        self.network = copy.deepcopy(model).requires_grad_(False)
        pairs = list(zip(self.network.state_dict().values(), model.state_dict().values(), strict=True))
        moved = [pair for pair in pairs if pair[0].is_floating_point()]
        copied = [pair for pair in pairs if not pair[0].is_floating_point()]  # num_batches_tracked
        self._averages, self._weights = map(list, zip(*moved, strict=True))
        self._counts, self._counted = map(list, zip(*copied, strict=True))
        self._share: float | Tensor = 1 - decay
        if recorded:
            self._share = torch.tensor(1 - decay, device=self._averages[0].device)

    def set_decay(self, decay: float) -> None:
        """For the updates from now on."""
        if isinstance(self._share, Tensor):
            self._share.fill_(1 - decay)
        else:
            self._share = 1 - decay

    @torch.no_grad()
    def update(self) -> None:
        if isinstance(self._share, Tensor):
            moves = torch._foreach_sub(self._weights, self._averages)
            torch._foreach_mul_(moves, self._share)
            torch._foreach_add_(self._averages, moves)
        else:
            torch._foreach_lerp_(self._averages, self._weights, self._share)
        torch._foreach_copy_(self._counts, self._counted)
