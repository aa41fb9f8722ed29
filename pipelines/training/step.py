"""The step of a training run: this worker's part of a global batch becomes new weights.

    one_step        a batch that is on the device
      launch        normalised, in `train.accumulate` parts
        train_step
          gradients   forward, backward
          (workers average them: under DDP inside the backward, else here)
          update      clipping, optimizer, average

Nothing in launch waits for the device: that is what lets both halves of a full batch be recorded
(recording.py), and the program run ahead of the GPU where they are not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hrnet_core.loss import joints_mse
from hrnet_core.model import normalize
from pipelines.settings.train import TrainSettings
from pipelines.training.average import Average
from pipelines.training.batch import Batch, Sent
from pipelines.training.compiled import compile_first
from pipelines.training.ddp import SharedGradients, exchange
from pipelines.training.recording import Halves, record
from pipelines.training.state import Training

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Of autocast, by `train.precision`."""
UNSCALED = torch.amp.GradScaler("cpu", enabled=False)
"""Does nothing: for all precisions but float16."""


@dataclass(frozen=True)
class Part:
    """Rows that go through the network together, on the device."""

    images: Tensor
    """Normalised (n, 3, h, w)."""
    heatmaps: Tensor
    """(n, K, H, W)."""
    weights: Tensor
    """(n, K)."""
    share: float
    """Factor that makes the sum over parts, averaged over workers, the mean over all rows of the global
    batch: rows of the part x workers / rows of the global batch. 1 in a full batch of one part, 0 for a
    worker that only keeps company."""


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Part],
    settings: TrainSettings,
    scaler: torch.amp.GradScaler = UNSCALED,
    average: Average | None = None,
    norm: Tensor | None = None,
    shared: SharedGradients | None = None,
) -> Tensor:
    """One optimizer step; the loss (detached), weighted by share and summed over `parts`. norm: float32 (),
    takes the norm of the gradient over all weights, averaged over workers and before clipping. shared: of
    several workers where `model` is not under DDP.

    Where that norm is not finite, weights and optimizer stay as they are, and the loss that is returned is
    NaN. In float16 the scaler decides: it leaves steps out on purpose, to find its scale, and NaN is only a
    loss that is.

    A worker has `train.accumulate` parts, and the gradients are averaged over workers once, at the last. One
    process that is given the parts of W workers, with their shares / W, runs them one after the other and
    does the same (tests/test_train.py holds the two against each other).
    """
    loss = gradients(model, optimizer, parts, settings, scaler, shared)
    if shared is not None:
        shared.average()
    return update(model, optimizer, loss, settings, scaler, average, norm)


def gradients(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Part],
    settings: TrainSettings,
    scaler: torch.amp.GradScaler = UNSCALED,
    shared: SharedGradients | None = None,
) -> Tensor:
    """The first half of train_step: this worker's gradients, under DDP averaged over all; the loss."""
    optimizer.zero_grad(set_to_none=True)
    device = parts[0].images.device
    total = torch.zeros((), device=device)
    for number, part in enumerate(parts, start=1):
        with exchange(model, now=number == len(parts)):
            with autocast(device, settings):
                predicted = model(part.images)
            loss = part.share * joints_mse(
                predicted, part.heatmaps, part.weights, kind=settings.loss, hardest=settings.ohkm
            )
            scaler.scale(loss).backward()
        total += loss.detach()
    if shared is not None:
        shared.take()
    return total


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    settings: TrainSettings,
    scaler: torch.amp.GradScaler = UNSCALED,
    average: Average | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """The second half of train_step, from averaged gradients to new weights; the loss that it returns."""
    scaler.unscale_(optimizer)
    found = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None], foreach=True)
    if norm is not None:
        norm.copy_(found)
    if settings.clip_norm:
        nn.utils.clip_grads_with_norm_(model.parameters(), settings.clip_norm, found, foreach=True)
    if not scaler.is_enabled():
        loss = torch.where(skip_if_not_finite(optimizer, found), torch.nan, loss)
    scaler.step(optimizer)  # a fused optimizer leaves a step out by itself, on the device
    scaler.update()
    if average is not None:
        average.update()
    return loss


def skip_if_not_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> Tensor:
    """Have the next step of a fused optimizer change nothing where the gradient's norm is not finite; bool ()
    whether.

    Decided and done on the device: nobody waits for it. Every worker has the same averaged gradient, so all
    decide alike without asking each other.
    """
    skip = ~norm.isfinite()
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells it
    return skip


def one_step(run: Training, batch: Batch, sent: Sent) -> Tensor:
    """The step of a batch, whose part for this worker is `sent`; its loss as train_step gives it.

    A short batch comes once an epoch: it is launched as it is, without a search for the fastest kernels of
    its shape, and without being compiled.
    """
    full = batch.total == run.config.train.batch_size
    torch.backends.cudnn.benchmark = full
    if not full:
        with torch.compiler.set_stance("force_eager"):
            return launch(run, batch.rows * run.world / batch.total, sent)
    if run.full_step is None:
        run.full_step = prepare(run, sent)
    return run.full_step(sent)


def prepare(run: Training, sent: Sent) -> Callable[[Sent], Tensor]:
    """The step of full batches, compiled and recorded with a first one as the settings say; the run stands
    where it stood. ConfigError where it cannot be compiled."""
    step = functools.partial(launch, run, 1.0)
    if run.config.train.compile:
        compile_first(run, step, sent)
    return record(run, step, halves(run), sent) if run.config.train.recorded else step


def halves(run: Training) -> Halves:
    """What launch does with a full batch, before and after workers average."""
    settings = run.config.train

    def first(sent: Sent) -> Tensor:
        parts = parts_of(run, 1.0, sent)
        return gradients(run.parallel, run.optimizer, parts, settings, run.scaler, run.shared)

    def second(loss: Tensor) -> Tensor:
        how = settings, run.scaler, run.average, run.grad_norm
        return update(run.parallel, run.optimizer, loss, *how)

    return Halves(first, second)


def launch(run: Training, share: float, sent: Sent) -> Tensor:
    """train_step, its kernels launched one by one. share: of all rows in `sent`, as in Part."""
    parts = parts_of(run, share, sent)
    how = run.config.train, run.scaler, run.average, run.grad_norm, run.shared
    return train_step(run.parallel, run.optimizer, parts, *how)


def parts_of(run: Training, share: float, sent: Sent) -> list[Part]:
    """What of a worker's batch is on the device, as its network takes it."""
    settings, (images, heatmaps, weights) = run.config.train, sent
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    if run.joint_weights is not None:
        weights = weights * run.joint_weights
    images = normalize(images, run.mean, run.std, layout)
    if run.teacher is not None:
        with autocast(images.device, settings):
            heatmaps = run.teacher.mixed(images, heatmaps)
    arrays = images, heatmaps, weights
    chunks = zip(*(array.chunk(settings.accumulate) for array in arrays), strict=True)
    return [Part(x, y, w, share * len(x) / len(images)) for x, y, w in chunks]


def autocast(device: torch.device, settings: TrainSettings) -> torch.autocast:
    """For a forward in `train.precision`."""
    dtype = DTYPES[settings.precision]
    # No cache: each weight is used once, and what lies in it must not outlive a recording.
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)
