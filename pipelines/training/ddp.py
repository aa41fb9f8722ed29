"""What the workers of a run do together: gradients, sums, messages, one network for all."""

from __future__ import annotations

import contextlib
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
    kept = isinstance(model, DistributedDataParallel) and not now
    return model.no_sync() if kept else contextlib.nullcontext()


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
