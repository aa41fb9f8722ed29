"""One worker of a training run: the loop, and what it calls.

    train_worker(job)               every worker runs it
      train_epoch -> train_step     the feed's batches; one optimizer step
      validate                      loss on stored heatmaps, AP with ground-truth boxes (val_gt/AP)
      save                          a Ray Train checkpoint to go on from; best/ is kept by AP

The defaults are the published recipe (official tools/train.py and the w32_256x192 yaml): Adam at 1e-3
without weight decay, rate x 0.1 from epoch 170 and 200 of 210 (counted from 0), batch 128, no warm-up.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipelines.config import TrainSettings
from pipelines.training.feed import Batch, FreshBatch
from pipelines.training.state import Place, Training, report_to_ray, save, set_up
from pipelines.training.telling import draw_pictures, tell, tell_step
from pipelines.training.validation import Answers, save_predictions

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def train_worker(job: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs in each worker. job: config (JSON fields), shards, folder, tracking_uri, run_id."""
    import ray.train
    import ray.train.torch

    logging.getLogger().setLevel(logging.WARNING)  # Ray Train says a line for each report of each worker
    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    checkpoint = ray.train.get_checkpoint()
    with checkpoint.as_directory() if checkpoint else contextlib.nullcontext() as folder:
        run = set_up(job, place, report_to_ray, folder)
    return train_epochs(run)


def train_epochs(run: Training) -> dict[str, Any]:
    """The loop: epochs, validation, saving. The run's outcome, or {"diverged": text} on every rank."""
    progress, settings = run.progress, run.config.train
    while progress.epoch < settings.epochs:
        problem = train_epoch(run)
        if problem:
            return {"diverged": problem}
        progress.epoch, progress.step = progress.epoch + 1, 0
        figures: dict[str, float] = {}
        if progress.epoch % settings.validate_every == 0 or progress.epoch == settings.epochs:
            figures = validate(run)
            if not math.isfinite(figures["val_gt/loss"]):
                return {"diverged": diverged(run, f"validation after epoch {progress.epoch}", [])}
        save(run)
        tell(run, figures)
    if run.log is not None:
        run.log.flush()
    return {
        "best_ap": progress.best_ap,
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch,
        "step": progress.total_steps,
        "samples": progress.samples,
        "seconds": round(progress.seconds, 1),
        "dataset_digest": run.manifest.digest,
        "codec": run.spec.codec.name,
        "input_size": "x".join(map(str, run.spec.input_size)),
    }


# --- an epoch -------------------------------------------------------------------------------------


def train_epoch(run: Training) -> str | None:
    """The rest of the current epoch; a text where the loss was not finite (the same on every rank)."""
    settings, progress = run.config.train, run.progress
    steps = run.feed.steps
    window = Window()
    run.parallel.train()
    batches = run.feed.batches(progress.epoch, progress.step)
    with contextlib.closing(batches):
        while (batch := window.wait_for(batches)) is not None:
            set_learning_rate(run.optimizer, learning_rate(settings, progress.total_steps, steps))
            part = Part(*to_device(batch, run), share=batch.rows * run.place.world / batch.total)
            window.add(train_step(run.parallel, run.optimizer, [part], settings), batch)
            progress.step += 1
            progress.total_steps += 1
            progress.samples += batch.total
            if progress.total_steps % settings.log_every == 0 or progress.step == steps:
                problem, save_now = close_window(run, window, steps)
                if problem:
                    return problem
                if save_now and progress.step < steps:
                    if not all_finite(run.model):
                        return diverged(run, "weights", [])
                    save(run)
                window = Window()
    return None


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
    """Factor that makes the average over workers the mean over all rows of the global batch: rows x
    workers / rows of the global batch. 1 in a full batch, 0 for a worker that only keeps company."""


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, parts: Sequence[Part], settings: TrainSettings
) -> Tensor:
    """One optimizer step; the loss (detached), weighted by share and summed over `parts`.

    A worker has one part, and DDP averages the gradients over workers. One process that is given the
    parts of W workers, with their shares / W, runs them one after the other and does the same
    (tests/test_train.py holds the two against each other).
    """
    import torch

    from hrnet_core.loss import joints_mse

    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=parts[0].images.device)
    for part in parts:
        bfloat16 = settings.precision == "bfloat16"
        with torch.autocast(part.images.device.type, torch.bfloat16, enabled=bfloat16):
            predicted = model(part.images)
        loss = part.share * joints_mse(
            predicted, part.heatmaps, part.weights, kind=settings.loss, hardest=settings.ohkm
        )
        loss.backward()
        total += loss.detach()
    optimizer.step()
    return total


def to_device(batch: Batch | FreshBatch, run: Training) -> tuple[Tensor, Tensor, Tensor]:
    """A batch as the network's input (n, 3, h, w), its targets (n, K, H, W) and weights (n, K)."""
    import torch

    from hrnet_core.model import normalize

    layout = torch.channels_last if run.config.train.channels_last else torch.contiguous_format
    images, heatmaps = fresh_views(batch, run) if isinstance(batch, FreshBatch) else stored_views(batch, run)
    weights = torch.tensor(batch.weights)
    if run.config.train.joint_weights and run.spec.skeleton.joint_weights:
        weights = weights * torch.tensor(run.spec.skeleton.joint_weights)
    return normalize(images, run.spec.mean, run.spec.std, layout), heatmaps, weights.to(run.place.device)


def stored_views(batch: Batch, run: Training) -> tuple[Tensor, Tensor]:
    """Crops uint8 (n, h, w, 3) and heatmaps float32 (n, K, H, W) on the device."""
    import torch

    device = run.place.device
    return torch.from_numpy(batch.images).to(device), torch.tensor(batch.heatmaps).to(device).float()


def fresh_views(batch: FreshBatch, run: Training) -> tuple[Tensor, Tensor]:
    """The same of a batch of fresh views, made on the device."""
    import torch

    from hrnet_core.views import multiply_factors, warp_pictures

    device = run.place.device
    pixels = torch.from_numpy(batch.pixels).to(device)
    factors = (torch.from_numpy(a).to(device) for a in (batch.heatmap_rows, batch.heatmap_columns))
    sizes, matrices = torch.from_numpy(batch.sizes), torch.from_numpy(batch.picture_to_crop)
    return warp_pictures(pixels, sizes, matrices, run.spec.input_size), multiply_factors(*factors)


def learning_rate(settings: TrainSettings, step: int, steps_per_epoch: int) -> float:
    """The rate of batch `step` of the run, counted from 0; a function of the place alone.

    step: x gamma from the first batch of each milestone epoch on, epochs counted from 0. That is what the
    published code did on the torch it was written for; on torch >= 1.1 the same code, which steps its
    scheduler before the epoch, lowers the rate one epoch earlier (169 and 199).
    cosine: lr/2 (1 + cos(pi step / steps of the run)). Both are multiplied by the linear warm-up.
    """
    warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    if settings.schedule == "cosine":
        return settings.lr * warm * 0.5 * (1 + math.cos(math.pi * step / (settings.epochs * steps_per_epoch)))
    passed = sum(step // steps_per_epoch >= milestone for milestone in settings.milestones)
    return settings.lr * warm * settings.gamma**passed


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


class Window:
    """The steps since the last row of metrics."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.waited = 0.0
        self.samples = 0
        self.losses: list[Tensor] = []
        self.ann_ids: list[list[int]] = []

    def wait_for(self, batches: Iterator[Batch | FreshBatch]) -> Batch | FreshBatch | None:
        begun = time.perf_counter()
        batch = next(batches, None)
        self.waited += time.perf_counter() - begun
        return batch

    def add(self, loss: Tensor, batch: Batch | FreshBatch) -> None:
        # Kept on the device: looking at a value would make the GPU wait for every step.
        self.losses.append(loss)
        self.ann_ids.append(batch.ann_ids.tolist())
        self.samples += batch.total


def close_window(run: Training, window: Window, steps: int) -> tuple[str | None, bool]:
    """All ranks together: (why training must stop or None, whether a checkpoint is due); rank 0 logs."""
    import torch

    losses = torch.stack(window.losses).double().cpu()
    seconds = time.perf_counter() - window.begun
    due = time.monotonic() - run.saved > run.config.train.checkpoint_minutes * 60
    wrong = (~losses.isfinite()).nonzero().flatten().tolist()
    sums = [float(losses.sum()), window.waited, float(bool(wrong)), float(due and run.place.rank == 0)]
    totals = all_sum(torch.tensor(sums, dtype=torch.float64, device=run.place.device), run.place.world)
    loss, waited, bad, save_now = totals.tolist()
    if bad:
        # The gradient carries it to all workers one step later: the earliest have the rows that began it.
        own = (wrong[0], window.ann_ids[wrong[0]]) if wrong else (len(losses), [])
        found = all_objects(own, run.place.world)
        first = min(step for step, _ in found)
        batch = run.progress.step - len(losses) + first + 1
        rows = [ann_id for step, ids in found if step == first for ann_id in ids]
        return diverged(run, f"epoch {run.progress.epoch + 1}, batch {batch}", rows), False
    run.progress.seconds += seconds
    if run.log is not None:
        step = run.progress.total_steps
        figures = {
            "train/loss": loss / run.place.world / len(losses),
            "train/lr": learning_rate(run.config.train, step - 1, steps),
            "train/samples_per_s": window.samples / seconds,
            "train/data_wait": waited / run.place.world / seconds,
        }
        run.log.write(step, figures)
        run.log.flush()
        tell_step(run, figures)
    return None, bool(save_now)


def all_finite(model: nn.Module) -> bool:
    """Whether every weight is a number; the same on every rank."""
    import torch

    return bool(torch.stack([p.detach().isfinite().all() for p in model.parameters()]).all())


def diverged(run: Training, place: str, ann_ids: list[int]) -> str:
    who = f" The rows of that batch: ann_id {', '.join(map(str, ann_ids))}." if ann_ids else ""
    return (
        f"the loss is not finite: {place}.{who} Nothing after the last checkpoint was saved; "
        f"{run.folder / 'best'} is the best so far. Lower train.lr or lengthen train.warmup_steps under "
        f"another --run.name, or look at those rows."
    )


def all_sum(values: Tensor, world: int) -> Tensor:
    """Sum over workers, on each of them."""
    import torch.distributed as dist

    if world > 1:
        dist.all_reduce(values)
    return values


def all_objects(value: Any, world: int) -> list[Any]:
    """One value from each worker, on each of them."""
    import torch.distributed as dist

    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


# --- validation, saving, telling ------------------------------------------------------------------


def validate(run: Training) -> dict[str, float]:
    """val_gt/loss (on every rank) and the ten val_gt figures (rank 0; NaN elsewhere) of the network as it
    is. Rank 0 keeps the best checkpoint, its predictions and the pictures."""
    from hrnet_core.predictor import PosePredictor

    begun = time.perf_counter()
    settings, progress = run.config.train, run.progress
    share_buffers(run)
    mode = "channels_last" if settings.channels_last else "float32"
    predictor = PosePredictor(run.model, run.spec, str(run.place.device), mode)
    own = run.validation.answer(predictor, settings.flip_test, run.config.evaluate.batch_size)
    answers = Answers.join(all_objects(own, run.place.world))
    figures = {"val_gt/loss": answers.loss / len(answers.ann_ids), "val_gt/AP": math.nan}
    if run.log is not None and math.isfinite(figures["val_gt/loss"]):
        stats, results = run.validation.score(answers, run.config.evaluate)
        figures |= {f"val_gt/{name}": value for name, value in stats.items()}
        run.log.write(progress.total_steps, figures)
        if stats["AP"] >= progress.best_ap:
            keep_best(run, stats["AP"], results)
        progress.seconds += time.perf_counter() - begun
        draw_pictures(run, answers)
        run.log.flush()
    else:
        progress.seconds += time.perf_counter() - begun
    return figures


def keep_best(run: Training, ap: float, results: list[dict[str, Any]]) -> None:
    """best/ and predictions.json of the epoch just validated. Equal counts as better, as published."""

    from hrnet_core.checkpoint import save_checkpoint

    run.progress.best_ap, run.progress.best_epoch = ap, run.progress.epoch
    found = {"epoch": run.progress.epoch, "val_gt/AP": ap}
    spec = replace(run.spec, provenance={**run.spec.provenance, **found})
    save_checkpoint(run.folder / "best", run.model.state_dict(), spec)
    save_predictions(run.folder / "predictions.json", results)


def share_buffers(run: Training) -> None:
    """Rank 0's BatchNorm statistics for all, so that every rank validates one network."""
    import torch.distributed as dist

    if run.place.world > 1:
        for buffer in run.model.buffers():
            dist.broadcast(buffer, 0)
