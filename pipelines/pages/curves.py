"""The curves of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.pages.frame import figure, save_figure

PANELS = {
    "loss": ("train/loss", "val_gt/loss"),
    "AP (ground-truth boxes)": ("val_gt/AP", "val_gt/AP50", "val_gt/AP75"),
    "learning rate": ("train/lr",),
    "images/s": ("train/samples_per_s",),
    "data wait, share of time": ("train/data_wait",),
}


def draw_curves(file: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Loss, AP, learning rate, images/s and data wait over steps, as one PNG. rows: of a MetricLog."""
    drawn, panels = figure(2, 3, (11, 6))
    drawn.suptitle(title)
    panels[-1].set_axis_off()  # five of six
    for axes, (name, metrics) in zip(panels, PANELS.items(), strict=False):
        axes.set_title(name, fontsize=10)
        for metric in metrics:
            points = [(row["step"], row[metric]) for row in rows if metric in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=metric, marker="." if len(points) < 30 else None)
        if len(metrics) > 1 and axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        axes.set_xlabel("step", fontsize=8)
    if any(row.get("train/loss", 0) > 0 for row in rows):
        panels[0].set_yscale("log")
    save_figure(drawn, file)
