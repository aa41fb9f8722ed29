"""What a training run draws while it goes on: its curves, and people as annotated and as predicted."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrnet_core.geometry import apply_affine
from hrnet_core.images import encode_png
from hrnet_core.oks import oks
from hrnet_core.overlays import draw_poses, side_by_side, tile
from pipelines.pages.evaluation import DRAWN_ABOVE, truth_and_prediction
from pipelines.pages.frame import figure
from pipelines.pages.gallery import annotated, enlarged, read_rows, spread_rows
from pipelines.shards.manifest import Manifest
from pipelines.storage.files import base_name, join, put_file
from pipelines.training.epoch_ap import Predictions
from pipelines.training.state import Training

SHOWN = 12
"""People of a sheet: spread over the split, the same each time."""
PANELS = {
    "loss": ("train/loss", "val_gt/loss"),
    "AP (ground-truth boxes)": ("val_gt/AP", "val_gt/AP50", "val_gt/AP75"),
    "learning rate": ("train/lr",),
    "images/s": ("train/samples_per_s",),
    "share of time": ("train/data_wait", "train/device_busy"),
    "gradient norm before clipping": ("train/grad_norm", "train/grad_norm_max"),
}


def draw_pictures(run: Training, found: Predictions) -> None:
    """pictures/curves.png, and a sheet of people: first and last epoch, and once a minute or so."""
    at = run.standing
    last = at.stopped_early or at.epoch == run.config.train.epochs
    if run.log is None or not (run.pictures_due() or last):
        return
    with tempfile.TemporaryDirectory(prefix="hrnet-pictures-") as folder:
        curves, people = Path(folder) / "curves.png", Path(folder) / f"people-epoch-{at.epoch:04d}.png"
        draw_curves(curves, run.log.rows, f"{base_name(run.folder)}: best AP {at.best_ap:.3f}")
        people.write_bytes(encode_png(people_sheet(run.manifest, run.config.data.val_split, found)))
        for file in (curves, people):
            put_file(file, join(run.folder, f"pictures/{file.name}"))
            run.log.log_file(file, "pictures")


def draw_curves(file: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Loss, AP, rate, speed, shares of time, gradient norm over steps, as one PNG. rows: of a MetricLog."""
    with figure(file, 2, 3, (11, 6)) as panels:
        panels[0].figure.suptitle(title)
        for axes, (name, metrics) in zip(panels, PANELS.items(), strict=True):
            axes.set_title(name, fontsize=10)
            for metric, line in zip(metrics, itertools.cycle(("-", "--", ":")), strict=False):
                points = [(row["step"], row[metric]) for row in rows if metric in row]
                if points:
                    marker = "." if len(points) < 30 else None
                    axes.plot(*zip(*points, strict=True), label=metric, marker=marker, linestyle=line)
            if len(metrics) > 1 and axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)
            axes.set_xlabel("step", fontsize=8)
        if any(row.get("train/loss", 0) > 0 for row in rows):
            panels[0].set_yscale("log")


def people_sheet(manifest: Manifest, split: str, found: Predictions) -> NDArray[np.uint8]:
    """Of SHOWN people the truth beside the prediction, OKS underneath, above all what is seen; uint8
    (H, W, 3)."""
    rows = read_rows(manifest, split, 0, spread_rows(manifest, split, SHOWN))
    skeleton, truth = manifest.recipe.skeleton, rows["keypoints"]
    index = np.searchsorted(found.ann_ids, rows["ann_id"])
    predicted, scores = found.keypoints[index], found.scores[index]
    fits = oks(truth[..., :2], predicted, rows["area"], skeleton.oks_sigmas, truth[..., 2])
    in_crop = apply_affine(rows["image_to_crop"], predicted)
    pairs = []
    for person, left in enumerate(annotated(rows, skeleton)):
        crop, factor = enlarged(rows["images"][person])
        right = draw_poses(crop, factor * in_crop[person, None], scores[person, None], skeleton, DRAWN_ABOVE)
        pairs.append(side_by_side(left, right))
    said = zip(rows["ann_id"].tolist(), fits.tolist(), strict=True)
    labels = [f"OKS {fit:.2f}, annotation {ann_id}" for ann_id, fit in said]
    return tile(pairs, 4, labels, truth_and_prediction(skeleton))
