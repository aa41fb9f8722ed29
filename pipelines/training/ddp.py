"""What the workers of a run do together: gradients, sums, messages, one network for all."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def wrap(model: nn.Module, device: torch.device, world: int) -> nn.Module:
    """DDP, gradients averaged. BatchNorm counts over each worker's own part, as the published runs did;
    its running statistics are rank 0's, sent to the others when an epoch is scored instead of every step."""
    if world == 1:
        return model
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # its new name is 2.13's
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def exchange(model: nn.Module, now: bool) -> contextlib.AbstractContextManager[None]:
    """For a forward and its backward: whether DDP averages the gradients then, or only adds them up."""
    if isinstance(model, DistributedDataParallel) and not now:
        return model.no_sync()
    return contextlib.nullcontext()


class SharedGradients:
    """The gradients of a network in one buffer that stays, for workers to average them between the two
    recordings of a step (recording.py). Made and averaged by all workers together.

    DDP exchanges from hooks inside the backward, and no hook runs in a replay. What it does is done here:
    at first all workers get rank 0's weights (as there, without buffers); gradients are divided by the number
    of workers, then summed.
    """

    def __init__(self, model: nn.Module, world: int) -> None:
        self._world = world
        self._weights: list[Tensor] = list(model.parameters())
        sizes = [weight.numel() for weight in self._weights]
        self._all = torch.zeros(sum(sizes), device=self._weights[0].device)
        starts = itertools.accumulate(sizes, initial=0)
        # Each laid out as its weight is: fused optimizers walk through both side by side.
        self._each = [
            self._all.as_strided(weight.size(), weight.stride(), start)
            for weight, start in zip(self._weights, starts, strict=False)
        ]
        with torch.no_grad():
            torch._foreach_copy_(self._each, self._weights)
            dist.broadcast(self._all, 0)
            torch._foreach_copy_(self._weights, self._each)

    @torch.no_grad()
    def take(self) -> None:
        """What a backward made goes into the buffer, divided, and is the weights' gradients there."""
        # Each has one: a list that is shorter would be refused.
        torch._foreach_copy_(self._each, [g for weight in self._weights if (g := weight.grad) is not None])
        self._all.mul_(1 / self._world)
        for weight, gradient in zip(self._weights, self._each, strict=True):
            weight.grad = gradient

    def average(self) -> None:
        """Over workers. Never recorded: gloo cannot be, and over a recorded exchange NCCL keeps no watch."""
        dist.all_reduce(self._all)


def share_buffers(model: nn.Module, world: int) -> None:
    """Rank 0's BatchNorm statistics for all, so that every rank scores one network."""
    if world > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def all_sum(values: Tensor, world: int) -> Tensor:
    """Sum over workers, on each of them."""
    if world > 1:
        dist.all_reduce(values)
    return values


def all_objects(value: Any, world: int) -> list[Any]:
    """One value from each worker, on each of them."""
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values
