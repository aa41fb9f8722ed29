"""`hrnet inspect SHARDS`: is the dataset whole, what is in it, and what does it look like?

    every sha256 against the manifest -> figures from the small columns -> the card
    -> pictures and one page (gallery.py) -> on request a run in MLflow

Memory does not grow with the dataset: counts and histograms are added up a row group at a time, pictures
show a fixed number of rows, and both are the same whenever the digest is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hrnet_core.errors import DataError
from hrnet_core.locations import is_uri, open_folder
from pipelines.config import TrackSettings
from pipelines.pages.gallery import write_gallery
from pipelines.progress import ProgressLine
from pipelines.shards.figures import QUANTILES, Histogram, SplitFigures, figures_of
from pipelines.shards.manifest import REPAIR, Manifest
from pipelines.storage import sha256_of, write_json


@dataclass(frozen=True)
class Inspection:
    """What `inspect_shards` found and where it put it."""

    card: dict[str, Any]
    """Figures of the dataset, JSON types, no paths: equal for equal digests."""
    out: Path
    page: Path
    run_id: str | None
    """The MLflow run, where one was asked for."""

    def __str__(self) -> str:
        return f"pictures and page: {self.page}"


def inspect_shards(
    shards: str,
    out: str | Path | None = None,
    coco: str | None = None,
    log: bool = False,
    track: TrackSettings | None = None,
    storage: str | Path = "runs",
) -> Inspection:
    """Check, count and draw the dataset in `shards` (path or URI); prints as it goes.

    out: folder for card.json, the pictures and index.html; default: beside a local dataset, in `storage`
    for one in a bucket. coco: the COCO root that the dataset came from, to show the pictures of what was
    left out. log: also as an MLflow run with the dataset as input. DataError where a shard is missing,
    unknown or not as the manifest says, and where `out` cannot be written or lies inside the dataset.
    """
    manifest = Manifest.load(shards)
    folder = output_folder(manifest, out, storage)
    if coco is not None:
        _check_coco(manifest, Path(coco).expanduser())
    verify(manifest)
    card = make_card(manifest, {split: figures_of(manifest, split) for split in manifest.splits})
    print(card_text(card), flush=True)
    try:
        write_json(folder / "card.json", card)
        page, pictures = write_gallery(manifest, card, folder, coco)
    except OSError as error:
        raise DataError(
            f"{folder}: the pictures cannot be written ({error.strerror or error}). Give --out a folder "
            f"that you may write to."
        ) from None
    run_id = None
    if log:
        from pipelines.tracking import record_dataset

        files = [folder / "card.json", page, *pictures]
        run_id, others = record_dataset(card, files, manifest.folder, track, storage)
        print(f"MLflow run {run_id}; other runs on this dataset: {', '.join(others) or 'none yet'}")
    return Inspection(card, folder, page, run_id)


def output_folder(manifest: Manifest, out: str | Path | None, storage: str | Path) -> Path:
    """Where the pictures go: never into the dataset, whose folder holds nothing but its own files."""
    if out is None and is_uri(manifest.folder):
        name = re.sub(r"[^\w.-]+", "_", manifest.folder)
        return Path(storage).absolute() / "inspections" / name
    if out is None:
        return Path(f"{manifest.folder}_inspection")
    folder = Path(out).expanduser().absolute()
    if not is_uri(manifest.folder) and folder.resolve().is_relative_to(Path(manifest.folder).resolve()):
        raise DataError(
            f"--out {out} lies inside the dataset {manifest.folder}, which holds its own files only: hrnet "
            f"preprocess would refuse it the next time. Give a folder beside it."
        )
    return folder


def _check_coco(manifest: Manifest, coco: Path) -> None:
    missing = [split for split in manifest.splits if not (coco / split).is_dir()]
    if missing:
        raise DataError(
            f"--coco {coco}: no folder {', '.join(missing)} in it. Give the COCO root that the dataset was "
            f"made from, or leave --coco out: then rejections are told, not shown."
        )


# ---------------------------------------------------------------------------------- whole?


def verify(manifest: Manifest) -> None:
    """Every shard and rejected.parquet against the sha256 in the manifest, with progress."""
    shards = [shard for split in manifest.splits for shard in manifest.all_shards(split)]
    line = ProgressLine("inspect", len(shards), "shards", "MB")
    manifest.verify(progress=lambda shard: line.add(shard.bytes / 1e6))
    expected = manifest.fields["rejected"]["sha256"]
    files, root = open_folder(manifest.folder)
    try:
        found = sha256_of(files, f"{root}/rejected.parquet")
    except OSError:
        found = "missing"
    if found != expected:
        what = "is missing" if found == "missing" else "is not as written: sha256 differs"
        raise DataError(f"{manifest.folder}: rejected.parquet {what}. {REPAIR}")
    print(f"checked: {len(shards)} shards, {line.work:,.1f} MB, each sha256 as in manifest.json", flush=True)


# ---------------------------------------------------------------------------------- the card


def make_card(manifest: Manifest, figures: dict[str, SplitFigures]) -> dict[str, Any]:
    """The figures with what the manifest says, as JSON."""
    codec = manifest.recipe.codec
    names = manifest.recipe.skeleton.keypoints
    return {
        "digest": manifest.digest,
        "config": manifest.recipe.as_dict(),
        "heatmap_size": list(codec.heatmap_size),
        "code": manifest.fields["code"],
        "splits": {
            split: {
                **{key: manifest.split(split)[key] for key in ("people", "photos", "variants", "rejected")},
                "repaired": manifest.split(split)["repaired"],
                "annotation_sha256": manifest.split(split)["annotation_sha256"],
                "shards": len(manifest.all_shards(split)),
                "bytes": sum(shard.bytes for shard in manifest.all_shards(split)),
                **_split_card(found, names),
            }
            for split, found in figures.items()
        },
    }


def _split_card(figures: SplitFigures, names: Sequence[str]) -> dict[str, Any]:
    photos = int(figures.crowding.sum())
    people = int(np.arange(len(figures.crowding)) @ figures.crowding)
    joints = int(np.arange(len(figures.labelled)) @ figures.labelled)
    return {
        "keypoints": {
            name: dict(zip(("not_labelled", "hidden", "seen"), counts, strict=True))
            for name, counts in zip(names, figures.visibility.tolist(), strict=True)
        },
        "labelled_keypoints": {
            "mean": round(joints / max(people, 1), 2),
            "people_with": figures.labelled.tolist(),
        },
        "box_height": _spread(figures.heights),
        "box_width": _spread(figures.widths),
        "segment_area": figures.areas,
        "people_per_photo": {
            "mean": round(people / max(photos, 1), 2),
            "most": len(figures.crowding) - 1,
            "photos_with": figures.crowding.tolist(),
        },
        "views": [
            {
                "variant": variant,
                "rows": view.rows,
                "flipped": view.flipped,
                "rotated": view.rotated,
                "labelled": view.labelled,
                "targets": view.targets,
                "rotation_deg": _spread(view.rotation),
                "zoom": _spread(view.zoom),
            }
            for variant, view in enumerate(figures.views)
        ],
    }


def _spread(histogram: Histogram) -> dict[str, Any]:
    places = {name: float(f"{histogram.quantile(share):.3g}") for name, share in QUANTILES.items()}
    return {**places, **histogram.as_dict()}


def card_text(card: dict[str, Any]) -> str:
    """The card as it is printed."""
    config, splits = card["config"], card["splits"]
    width, height = config["input_size"]
    cells = "x".join(map(str, card["heatmap_size"][::-1]))
    names = list(next(iter(splits.values()))["keypoints"])
    codec = f"{config['codec']} heatmaps of {len(names)} x {cells} (float16, sigma {config['sigma']:g} cells)"
    quality = f"JPEG q{config['jpeg_quality']}" if config["image_format"] == "jpeg" else "PNG"
    made_by = ", ".join(f"{name} {version}" for name, version in card["code"].items() if version)
    lines = [
        f"digest {card['digest']}",
        f"crops of {height}x{width} in {quality}, {codec}, skeleton {config['skeleton']['name']}",
        f"made by {made_by}",
        "",
        f"{'split':<18}" + "".join(f"{name:>18}" for name in splits),
        *_rows_of(splits),
        "",
        f"{'labelled (hidden)':<18}" + "".join(f"{name:>18}" for name in splits),
    ]
    for name in names:
        cells = [_visibility_cell(split["keypoints"][name]) for split in splits.values()]
        lines.append(f"{name:<18}" + "".join(f"{cell:>18}" for cell in cells))
    for name, split in splits.items():
        lines += ["", f"left out of {name}: {_rejected_line(split)}", *_view_lines(name, split)]
    return "\n".join(lines)


def _rows_of(splits: dict[str, Any]) -> list[str]:
    """A line for each figure, a column for each split."""

    def spread(values: dict[str, Any]) -> str:
        return f"{values['5 %']:.0f} {values['median']:.0f} {values['95 %']:.0f}"

    def areas(split: dict[str, Any]) -> str:
        return " ".join(f"{100 * n / max(split['people'], 1):.0f}%" for n in split["segment_area"].values())

    tell = {
        "people": lambda s: f"{s['people']:,}",
        "photos": lambda s: f"{s['photos']:,}",
        "views of each": lambda s: f"{s['variants']}",
        "shards": lambda s: f"{s['shards']}",
        "MB": lambda s: f"{s['bytes'] / 1e6:,.1f}",
        "people a photo": lambda s: f"{s['people_per_photo']['mean']}, most {s['people_per_photo']['most']}",
        "labelled joints": lambda s: f"{s['labelled_keypoints']['mean']}",
        "small medium large": areas,
        "box height 5 50 95": lambda s: spread(s["box_height"]),
        "box width 5 50 95": lambda s: spread(s["box_width"]),
    }
    return [
        f"{what:<18}" + "".join(f"{of(split):>18}" for split in splits.values()) for what, of in tell.items()
    ]


def _visibility_cell(counts: dict[str, int]) -> str:
    people, labelled = sum(counts.values()), counts["hidden"] + counts["seen"]
    hidden = 100 * counts["hidden"] / max(labelled, 1)
    return f"{100 * labelled / max(people, 1):.0f}% ({hidden:.0f}%)"


def _rejected_line(split: dict[str, Any]) -> str:
    reasons = [f"{n['rows']:,} {reason} ({n['people']:,} people)" for reason, n in split["rejected"].items()]
    return ", ".join(reasons) or "none"


def _view_lines(name: str, split: dict[str, Any]) -> list[str]:
    lines = [f"views of {name}: mirrored, rotated, zoom 5 50 95, labelled joints with a heatmap"]
    for view in split["views"]:
        rows, zoom = max(view["rows"], 1), view["zoom"]
        shares = f"{100 * view['flipped'] / rows:>5.0f}%  {100 * view['rotated'] / rows:>4.0f}%"
        zooms = f"{zoom['5 %']:.2f} {zoom['median']:.2f} {zoom['95 %']:.2f}"
        kept = 100 * view["targets"] / max(view["labelled"], 1)
        lines.append(f"  {view['variant'] or 'plain':>5}  {shares}  {zooms}  {kept:6.2f}%")
    return lines
