"""The loop of a training run, as each of its workers runs it.

    train_worker(job)               every worker
      train_epoch -> one_step       the feed's batches; an optimizer step each (step.py)
      score_epoch                   loss on stored heatmaps, AP with ground-truth boxes (val_gt/AP)
      save                          a Ray Train checkpoint to go on from; best/ is kept by AP

The defaults are the published recipe (official tools/train.py and the w32_256x192 yaml): Adam at 1e-3
without weight decay, rate x 0.1 from epoch 170 and 200 of 210 (counted from 0), batch 128, no warm-up.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
import traceback
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hrnet_core import memory
from hrnet_core.errors import ConfigError
from hrnet_core.predictor import PosePredictor
from pipelines.process.progress import time_left
from pipelines.settings.train import TrainSettings
from pipelines.storage.files import join
from pipelines.training.batch import Batch, Sent, on_device_ahead
from pipelines.training.ddp import all_objects, all_sum, share_buffers
from pipelines.training.epoch_ap import Predictions
from pipelines.training.pictures import draw_pictures
from pipelines.training.state import (
    Job,
    Standing,
    Training,
    keep_best,
    report_to_ray,
    save,
    saved_by_ray,
    set_rate,
    set_up,
)
from pipelines.training.step import one_step
from pipelines.training.usage import DeviceClock, Usage, named

FLAT_COSINE_END = 0.05
"""Of the rate: where flat_cosine ends."""


class Diverged(ConfigError):
    """The loss is not a finite number any more; raised on all ranks together."""


def train_worker(job: Job) -> Standing | Diverged:
    """What Ray Train runs in each worker; what rank 0 returns is the outcome of the run."""
    import ray.train
    import ray.train.torch

    logging.getLogger().setLevel(logging.WARNING)  # Ray Train says a line for each report of each worker
    context = ray.train.get_context()
    rank, world, device = context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()
    report = functools.partial(report_to_ray, job.folder)
    with saved_by_ray(job.folder) as saved:
        run = set_up(job, rank, world, device, report, saved)
    memory.collect_as_usual()
    run.usage = Usage(rank, device, context.get_node_rank(), context.get_local_rank())
    try:
        train_epochs(run)
    except Diverged as error:
        return error  # raised, it would make Ray Train start the workers again, to the same end
    except Exception as error:
        error.add_note(traceback.format_exc())  # on its way to the controller it loses its own
        raise
    return run.standing


def train_epochs(run: Training) -> None:
    """The loop: epochs, their AP, saving; `run.standing` is the outcome."""
    at, settings = run.standing, run.config.train
    read = run.feed.batches(at.epoch, at.step, settings.epochs)
    with contextlib.closing(read), contextlib.closing(on_device_ahead(read, run.device)) as batches:
        while at.epoch < settings.epochs and not at.stopped_early:
            train_epoch(run, batches)
            at.epoch, at.step = at.epoch + 1, 0
            figures: dict[str, float] = {}
            if at.epoch % settings.validate_every == 0 or at.epoch == settings.epochs:
                figures = score_epoch(run)
                if not math.isfinite(figures["val_gt/loss"]):
                    raise diverged(run, f"validation after epoch {at.epoch}")
            save(run)
            print_epoch(run, figures)
    if run.log is not None:
        run.send()


# --- an epoch -------------------------------------------------------------------------------------


def train_epoch(run: Training, batches: Iterator[tuple[Batch, Sent]]) -> None:
    """The rest of the current epoch; batches: from its next one on, those of later epochs stay in there."""
    settings, at, steps = run.config.train, run.standing, run.feed.steps
    interval = Interval(run.device)
    run.parallel.train()
    while at.step < steps:
        batch, sent = interval.wait_for(batches)
        if run.average:
            run.average.set_decay(average_decay(settings, at.total_steps))
        set_rate(run.optimizer, learning_rate(settings, at.total_steps, steps))
        with interval.at_work:
            loss = one_step(run, batch, sent)
        interval.add(loss, run.grad_norm, batch)
        at.step += 1
        at.total_steps += 1
        at.samples += batch.total
        if at.total_steps % settings.log_every == 0 or at.step == steps:
            if log_interval(run, interval) and at.step < steps:
                finite = [p.detach().isfinite().all() for p in run.model.parameters()]
                if not torch.stack(finite).all():  # the same on every rank
                    raise diverged(run, "weights")
                save(run)
            interval = Interval(run.device, interval.ended)


def learning_rate(settings: TrainSettings, step: int, steps_per_epoch: int) -> float:
    """The rate of batch `step` of the run, counted from 0; a function of its number alone.

    step: x gamma from the first batch of each milestone epoch on, epochs counted from 0. That is what the
    published code did on the torch it was written for; on torch >= 1.1 the same code, which steps its
    scheduler before the epoch, lowers the rate one epoch earlier (169 and 199).
    cosine: lr/2 (1 + cos(pi step / steps of the run)). flat_cosine: lr, from half of the steps on by the same
    cosine over the other half to lr / 20. All are multiplied by the linear warm-up.
    """
    warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    steps = settings.epochs * steps_per_epoch
    if settings.schedule == "cosine":
        return settings.lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
    if settings.schedule == "flat_cosine":
        fallen = 0.5 * (1 - math.cos(math.pi * max(0.0, 2 * step / steps - 1)))
        return settings.lr * warm * (1 - (1 - FLAT_COSINE_END) * fallen)
    passed = sum(step // steps_per_epoch >= milestone for milestone in settings.milestones)
    return settings.lr * warm * settings.gamma**passed


def average_decay(settings: TrainSettings, step: int) -> float:
    """The decay of the average after batch `step` of the run, counted from 0; of its number alone."""
    return min(settings.ema_decay, (1 + step) / (10 + step)) if settings.ema_warmup else settings.ema_decay


class Interval:
    """The steps since the last row of metrics.

    begun: when that row was measured; default: now. So the time in which it was written, and a checkpoint
    after it, counts: else `samples_per_s` would be that of a run that writes nothing.
    """

    def __init__(self, device: torch.device, begun: float | None = None) -> None:
        self.begun = time.perf_counter() if begun is None else begun
        self.ended = self.begun
        self.waited = 0.0
        self.at_work = DeviceClock(device)
        self.samples = 0
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.ann_ids: list[list[int]] = []

    def wait_for(self, batches: Iterator[tuple[Batch, Sent]]) -> tuple[Batch, Sent]:
        begun = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - begun
        return batch

    def add(self, loss: Tensor, norm: Tensor, batch: Batch) -> None:
        # Kept on the device: looking at a value would make the GPU wait for every step.
        self.losses.append(loss)
        self.norms.append(norm.clone())  # the next step writes over it
        self.ann_ids.append(batch.ann_ids.tolist())
        self.samples += batch.total


def log_interval(run: Training, interval: Interval) -> bool:
    """All ranks together: rank 0 writes the row of metrics; whether a checkpoint is due."""
    losses, norms = torch.stack(interval.losses + interval.norms).double().cpu().chunk(2)
    interval.ended = time.perf_counter()
    seconds = interval.ended - interval.begun
    due = time.monotonic() - run.saved_at > run.config.train.checkpoint_minutes * 60
    skipped = losses.isnan()
    wrong = losses.isinf().nonzero().flatten().tolist()
    looked = run.usage.look()
    sums = [float(losses[~skipped].sum()), interval.waited, interval.at_work.read()]
    sums += [float(bool(wrong)), float(due and run.rank == 0), *skipped.tolist()]
    sums += run.usage.row(run.world)
    totals = all_sum(torch.tensor(sums, dtype=torch.float64, device=run.device), run.world)
    loss, waited, busy, bad, save_now, *others = totals.tolist()
    skips, used = others[: len(losses)], others[len(losses) :]
    if bad:
        raise _diverged_in(run, interval, wrong)
    if any(skips):
        count_skipped(run, interval, [bool(skip) for skip in skips])
    else:
        run.standing.skipped_in_a_row = 0
    run.standing.seconds += seconds
    if run.log is not None:
        step = run.standing.total_steps
        figures = {
            "train/lr": learning_rate(run.config.train, step - 1, run.feed.steps),
            "train/samples_per_s": interval.samples / seconds,
            "train/data_wait": waited / run.world / seconds,
            "train/device_busy": busy / run.world / seconds,
            "train/skipped_steps": run.standing.skipped,
        }
        if taken := len(skips) - sum(map(bool, skips)):
            figures = {"train/loss": loss / run.world / taken, **figures}
        if len(finite := norms[norms.isfinite()]):  # the same on every rank
            figures |= {"train/grad_norm": float(finite.mean()), "train/grad_norm_max": float(finite.max())}
        if looked:
            figures |= named(used, run.world)
        run.log.write(step, figures)
        if run.send_due():  # all workers wait for the answer
            run.send()
        print_step(run, figures)
    return bool(save_now)


def count_skipped(run: Training, interval: Interval, skips: Sequence[bool]) -> None:
    """Count the steps of an interval that were left out, and say so. Diverged, on all ranks together, after
    `train.max_skipped_steps` in a row, and where such a batch left its mark in BatchNorm's statistics."""
    at, most = run.standing, run.config.train.max_skipped_steps
    begun, longest = -1, 0  # of the longest row of them: its first step in the interval, and its length
    for step, skip in enumerate(skips):
        at.skipped += skip
        at.skipped_in_a_row = (at.skipped_in_a_row + 1) * skip
        if at.skipped_in_a_row > longest:
            longest, begun = at.skipped_in_a_row, max(0, step + 1 - at.skipped_in_a_row)
    batch = at.step - len(skips) + begun + 1
    spoilt = torch.stack([~b.isfinite().all() for b in run.model.buffers()]).any()
    spoilt_anywhere = bool(all_sum(spoilt.double(), run.world))
    if longest >= most or spoilt_anywhere:
        rows = [ann_id for ids in all_objects(interval.ann_ids[begun], run.world) for ann_id in ids]
        why = "BatchNorm's statistics are not finite any more" if spoilt_anywhere else f"{longest} in a row"
        raise diverged(run, f"epoch {at.epoch + 1}, batch {batch} ({why})", rows)
    if run.log is not None:
        first = f"epoch {at.epoch + 1}, batch {at.step - len(skips) + skips.index(True) + 1}"
        print(
            f"left out {sum(skips)} of {len(skips)} batches, whose gradient is not finite, from {first} on; "
            f"{at.skipped} in all",
            flush=True,
        )


def _diverged_in(run: Training, interval: Interval, wrong: list[int]) -> Diverged:
    """wrong: the batches of the interval that this rank found not finite."""
    # The gradient carries it to all workers one step later: the earliest have the rows that began it.
    count = len(interval.losses)
    found = all_objects((wrong[0], interval.ann_ids[wrong[0]]) if wrong else (count, []), run.world)
    first = min(step for step, _ in found)
    batch = run.standing.step - count + first + 1
    rows = [ann_id for step, ids in found if step == first for ann_id in ids]
    return diverged(run, f"epoch {run.standing.epoch + 1}, batch {batch}", rows)


def diverged(run: Training, where: str, ann_ids: Sequence[int] = ()) -> Diverged:
    rows = f" The rows of that batch: ann_id {', '.join(map(str, ann_ids))}." if ann_ids else ""
    best = (
        f"{join(run.folder, 'best')} is the best so far" if run.standing.best_epoch else "no epoch is through"
    )
    return Diverged(
        f"the loss is not finite: {where}.{rows} Nothing after the last checkpoint was saved; {best}. "
        f"Lower train.lr or lengthen train.warmup_steps under "
        f"another --run.name, or look at those rows."
    )


# --- the AP of an epoch ---------------------------------------------------------------------------


def score_epoch(run: Training) -> dict[str, float]:
    """val_gt/loss (on every rank), and on rank 0 the ten val_gt figures and PCK of the network as it is (AP
    is NaN elsewhere). Rank 0 keeps the best checkpoint, its predictions and the pictures."""
    begun = time.perf_counter()
    settings, at = run.config.train, run.standing
    share_buffers(run.scored, run.world)
    own = run.val.predict(predictor_of(run), settings.flip_test, run.config.evaluate.batch_size)
    found = Predictions.join(all_objects(own, run.world))
    figures = {"val_gt/loss": found.loss / len(found.ann_ids), "val_gt/AP": math.nan}
    log = run.log if math.isfinite(figures["val_gt/loss"]) else None
    if log is not None:
        stats, results = run.val.score(found, run.spec, run.config.evaluate)
        joints = run.val.pck(found)
        figures |= {f"val_gt/{name}": value for name, value in stats.items()}
        figures |= {"val_gt/PCK": sum(joints.values()) / max(1, len(joints))}
        figures |= {f"val_pck/{name}": value for name, value in joints.items()}
        log.write(at.total_steps, figures)
        if stats["AP"] >= at.best_ap:  # equal counts as better, as published
            keep_best(run, stats["AP"], results)
    stop_early(run, figures["val_gt/AP"])
    if log is not None:
        draw_pictures(run, found)
        run.send()
    at.seconds += time.perf_counter() - begun
    return figures


def predictor_of(run: Training) -> PosePredictor:
    """With the weights as they are now; the same one each epoch, as on a GPU it records what it runs."""
    if run.predictor is None:
        mode = "channels_last" if run.config.train.channels_last else "float32"
        run.predictor = PosePredictor(run.scored, run.spec, str(run.device), mode)
    else:
        run.predictor.take_weights(run.scored)
    return run.predictor


def stop_early(run: Training, ap: float) -> None:
    """Whether this validation is the last, as `train.early_stop` says; all ranks together, by rank 0's AP."""
    at, settings = run.standing, run.config.train
    if not settings.early_stop:
        return
    if ap > at.risen_ap + settings.early_stop_min_delta:
        at.risen_ap, at.not_risen = ap, 0
    else:
        at.not_risen += 1
    count = torch.tensor(float(at.not_risen if run.rank == 0 else 0), device=run.device)
    at.not_risen = int(all_sum(count, run.world))
    at.stopped_early = at.not_risen >= settings.early_stop


# --- what is printed ------------------------------------------------------------------------------


def print_epoch(run: Training, figures: dict[str, float]) -> None:
    """One line an epoch, from rank 0; figures: of score_epoch, empty where the epoch was not scored."""
    if run.log is None:
        return
    at = run.standing
    rows = [r for r in run.log.rows if "train/loss" in r and r["step"] > at.total_steps - run.feed.steps]
    loss, speed, wait = (
        sum(row[f"train/{name}"] for row in rows) / max(1, len(rows))
        for name in ("loss", "samples_per_s", "data_wait")
    )
    ap = f"AP {figures['val_gt/AP']:.3f} (best {at.best_ap:.3f})  " if figures else ""
    _say(run, f"epoch {at.epoch}/{run.config.train.epochs}  loss {loss:.6f}  {ap}", speed, wait)
    if at.stopped_early:
        print(
            f"stopped early: in {at.not_risen} validations AP has not risen by more than "
            f"{run.config.train.early_stop_min_delta:g} above {at.risen_ap:.3f} (train.early_stop)",
            flush=True,
        )


def print_step(run: Training, figures: dict[str, float]) -> None:
    """A line inside a long epoch; figures: the row of metrics just written."""
    at = run.standing
    if at.step == run.feed.steps or "train/loss" not in figures or not run.line_due():
        return
    _say(
        run,
        f"  epoch {at.epoch + 1}, batch {at.step}/{run.feed.steps}  loss {figures['train/loss']:.6f}  ",
        figures["train/samples_per_s"],
        figures["train/data_wait"],
    )


def _say(run: Training, head: str, speed: float, wait: float) -> None:
    """The line with its end: speed, data wait, and the time that is left at the speed so far."""
    at = run.standing
    steps = run.config.train.epochs * run.feed.steps - at.total_steps
    going_on = steps and not at.stopped_early
    left = f"  {time_left(at.seconds / max(1, at.total_steps) * steps)}" if going_on else ""
    print(f"{head}{speed:.0f} images/s  data wait {wait:.0%}{left}", flush=True)
