"""What a training run prints: a line an epoch, and one every half minute inside a long one."""

from __future__ import annotations

from pipelines.progress import time_left
from pipelines.training.state import Training


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


def print_step(run: Training, figures: dict[str, float]) -> None:
    """A line inside a long epoch; figures: the row of metrics just written."""
    at = run.standing
    if at.step == run.feed.steps or not run.line_due():
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
    left = f"  {time_left(at.seconds / max(1, at.total_steps) * steps)}" if steps else ""
    print(f"{head}{speed:.0f} images/s  data wait {wait:.0%}{left}", flush=True)
