"""The moving average of a network's weights (EMA), which is scored and saved in their place."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """After each step decay x average + (1 - decay) x weights, on the device; it begins as the weights are.

    BatchNorm's running statistics are averaged with them, as in the published runs that use one (RTMPose's
    EMAHook with update_buffers, timm's ModelEma). Not torch's AveragedModel: its counter of updates lies on
    the CPU, and each update would wait for the GPU.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(model).requires_grad_(False)
        self._move = get_ema_multi_avg_fn(decay)
        pairs = list(zip(self.network.state_dict().values(), model.state_dict().values(), strict=True))
        moved = [pair for pair in pairs if pair[0].is_floating_point()]
        copied = [pair for pair in pairs if not pair[0].is_floating_point()]  # num_batches_tracked
        self._averages, self._weights = map(list, zip(*moved, strict=True))
        self._counts, self._counted = map(list, zip(*copied, strict=True))

    @torch.no_grad()
    def update(self) -> None:
        self._move(self._averages, self._weights, None)
        torch._foreach_copy_(self._counts, self._counted)
