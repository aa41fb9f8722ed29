"""What a training run says and shows while it runs."""

from __future__ import annotations

import time

from pipelines.pages.curves import draw_curves
from pipelines.training.state import Training
from pipelines.training.validation import Answers


def draw_pictures(run: Training, answers: Answers) -> None:
    """pictures/curves.png, and truth beside prediction: first and last epoch, and once a minute or so."""
    from hrnet_core.images import encode_png

    last = run.progress.epoch == run.config.train.epochs
    if run.log is None or (time.monotonic() - run.drawn < 60 and not last):
        return
    run.drawn = time.monotonic()
    folder = run.folder / "pictures"
    folder.mkdir(exist_ok=True)
    draw_curves(folder / "curves.png", run.log.rows, f"{run.folder.name}: best AP {run.progress.best_ap:.3f}")
    overlay = folder / f"people-epoch-{run.progress.epoch:04d}.png"
    overlay.write_bytes(encode_png(run.validation.overlay(answers)))
    for file in (folder / "curves.png", overlay):
        run.log.log_file(file, "pictures")


def tell(run: Training, figures: dict[str, float]) -> None:
    """One line an epoch, from rank 0."""
    if run.log is None:
        return
    progress = run.progress
    rows = [
        r for r in run.log.rows if "train/loss" in r and r["step"] > progress.total_steps - run.feed.steps
    ]
    loss, speed, wait = (
        sum(row[f"train/{name}"] for row in rows) / max(1, len(rows))
        for name in ("loss", "samples_per_s", "data_wait")
    )
    ap = f"AP {figures['val_gt/AP']:.3f} (best {progress.best_ap:.3f})  " if figures else ""
    print(
        f"epoch {progress.epoch}/{run.config.train.epochs}  loss {loss:.6f}  {ap}{speed:.0f} images/s  "
        f"data wait {wait:.0%}  left {_left(run)}",
        flush=True,
    )


def tell_step(run: Training, figures: dict[str, float]) -> None:
    """A line inside a long epoch, every half minute."""
    progress = run.progress
    if time.monotonic() - run.told < 30 or progress.step == run.feed.steps:
        return
    run.told = time.monotonic()
    print(
        f"  epoch {progress.epoch + 1}, batch {progress.step}/{run.feed.steps}  "
        f"loss {figures['train/loss']:.6f}  {figures['train/samples_per_s']:.0f} images/s  "
        f"data wait {figures['train/data_wait']:.0%}  left {_left(run)}",
        flush=True,
    )


def _left(run: Training) -> str:
    """Time to the end at the speed so far, h:mm:ss."""
    todo = run.config.train.epochs * run.feed.steps - run.progress.total_steps
    seconds = run.progress.seconds / max(1, run.progress.total_steps) * todo
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"
