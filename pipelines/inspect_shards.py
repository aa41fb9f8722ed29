"""`hrnet inspect SHARDS`: is the dataset whole, what is in it, and what does it look like?

    every sha256 against the manifest -> figures from the small columns -> the card
    -> pictures and one page (gallery.py) -> on request a run in MLflow

Memory does not grow with the dataset: counts and histograms are added up a row group at a time, pictures
show a fixed number of rows, and both are the same whenever the digest is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hrnet_core.errors import DataError, shown
from hrnet_core.locations import destination, folder_to_write, is_uri, refuse_no_bucket
from pipelines.pages.gallery import write_gallery
from pipelines.process.progress import ProgressLine
from pipelines.settings.config import TrackSettings
from pipelines.shards.figures import QUANTILES, Histogram, SplitFigures, figures_of
from pipelines.shards.manifest import REPAIR, Manifest
from pipelines.sources.layout import locate
from pipelines.storage.files import (
    absolute,
    is_file,
    is_folder,
    join,
    on_this_machine,
    sha256_of,
    write_json,
)


def inspect_shards(
    shards: str,
    out: str | Path | None = None,
    coco_root: str | None = None,
    log: bool = False,
    track: TrackSettings | None = None,
    storage: str | Path = "runs",
) -> str:
    """Check, count and draw the dataset in `shards`; prints as it goes, returns the page. shards, out and
    coco_root are paths or URIs.

    out: folder for card.json (equal for equal digests), the pictures and index.html; default: beside a local
    dataset, in `storage` for one in a bucket. coco_root: where the dataset came from, to show the pictures of
    what was left out; that its annotations are others by now is told. log: also as an MLflow run with the
    dataset as input. DataError where a shard is missing, unknown or not as the manifest says, or `out`
    cannot be written or lies inside the dataset.
    """
    manifest = Manifest.load(shards)
    folder = output_folder(manifest, out, storage)
    coco = None if coco_root is None else absolute(coco_root)
    others = [] if coco is None else other_annotations(manifest, coco)
    verify(manifest)
    if others:
        print(
            f"--coco {coco}: the annotations of {', '.join(others)} there are not those that the dataset was "
            f"made from. Of what was left out, pictures and boxes may be others.",
            flush=True,
        )
    card = make_card(manifest, {split: figures_of(manifest, split) for split in manifest.splits})
    print(shown(card_text(card), keep="\n"), flush=True)
    try:
        write_json(join(folder, "card.json"), card)
        page, pictures = write_gallery(manifest, card, folder, coco)
    except OSError as error:
        raise DataError(
            f"{folder}: the pictures cannot be written ({error.strerror or error}). Give --out a folder "
            f"that you may write to."
        ) from None
    if log:
        from pipelines.tracking.store import record_dataset

        with on_this_machine([join(folder, "card.json"), page, *pictures]) as files:
            run_id, others = record_dataset(card, files, manifest.folder, track, storage)
        print(f"MLflow run {run_id}; other runs on this dataset: {', '.join(others) or 'none yet'}")
    return page


def output_folder(manifest: Manifest, out: str | Path | None, storage: str | Path) -> str:
    """Where the pictures go, path or URI: never into the dataset, whose folder holds its own files only."""
    if out is None and is_uri(manifest.folder):
        name = re.sub(r"[^\w.-]+", "_", manifest.folder)
        return join(absolute(destination(storage, "--run.storage")), f"inspections/{name}")
    if out is None:
        return f"{manifest.folder}_inspection"
    folder = absolute(folder_to_write(out, "--out"))
    if is_uri(folder) or is_uri(manifest.folder):
        inside = f"{folder}/".startswith(f"{manifest.folder.partition('?')[0]}/")
    else:
        inside = Path(folder).resolve().is_relative_to(Path(manifest.folder).resolve())
    if inside:
        raise DataError(
            f"--out {out} lies inside the dataset {manifest.folder}, which holds its own files only: hrnet "
            f"preprocess would refuse it the next time. Give a folder beside it."
        )
    return folder


def other_annotations(manifest: Manifest, coco: str) -> list[str]:
    """Splits whose annotation file in the COCO root is not, byte for byte, the dataset's, or is gone: mended
    since, or another set. DataError where their pictures have no folder there."""
    places = {split: locate(coco, split) for split in manifest.splits}
    if missing := [split for split, (_, pictures) in places.items() if not is_folder(pictures)]:
        refuse_no_bucket(coco, "--coco")
        raise DataError(
            f"--coco {coco}: no folder {', '.join(missing)} in it. Give the COCO root that the dataset was "
            f"made from, or leave --coco out: then rejections are told, not shown."
        )
    try:
        found = {split: sha256_of(file) if is_file(file) else "" for split, (file, _) in places.items()}
    except OSError as error:
        raise DataError(
            f"--coco {coco}: the annotations cannot be read ({error.strerror or error})."
        ) from None
    return [split for split in found if found[split] != manifest.split(split)["annotation_sha256"]]


# ---------------------------------------------------------------------------------- whole?


def verify(manifest: Manifest) -> None:
    """Every shard and rejected.parquet against the sha256 in the manifest, with progress."""
    shards = [shard for split in manifest.splits for shard in manifest.all_shards(split)]
    line = ProgressLine("inspect", len(shards), "shards", "MB")
    manifest.verify(progress=lambda shard: line.add(shard.bytes / 1e6))
    expected = manifest.fields["rejected"]["sha256"]
    try:
        found = sha256_of(join(manifest.folder, "rejected.parquet"))
    except OSError:
        found = "missing"
    if found != expected:
        what = "is missing" if found == "missing" else "is not as written: sha256 differs"
        raise DataError(f"{manifest.folder}: rejected.parquet {what}. {REPAIR}")
    print(f"checked: {len(shards)} shards, {line.work:,.1f} MB, each sha256 as in manifest.json", flush=True)


# ---------------------------------------------------------------------------------- the card


def make_card(manifest: Manifest, figures: dict[str, SplitFigures]) -> dict[str, Any]:
    """The figures with what the manifest says, as JSON."""
    names = manifest.recipe.skeleton.keypoints
    said = ("people", "photos", "variants", "rejected", "repaired", "annotation_sha256")
    return {
        "digest": manifest.digest,
        "config": manifest.recipe.as_dict(),
        "heatmap_size": list(manifest.recipe.codec.heatmap_size),
        "code": manifest.fields["code"],
        "splits": {
            split: {
                **{key: manifest.split(split)[key] for key in said},
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
                **{key: getattr(view, key) for key in ("rows", "flipped", "rotated", "labelled", "targets")},
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
    keypoints = len(next(iter(splits.values()))["keypoints"])
    codec = f"{config['codec']} heatmaps of {keypoints} x {cells} (float16, sigma {config['sigma']:g} cells)"
    quality = f"JPEG q{config['jpeg_quality']}" if config["image_format"] == "jpeg" else "PNG"
    made_by = ", ".join(f"{name} {version}" for name, version in card["code"].items() if version)
    lines = [
        f"digest {card['digest']}",
        f"crops of {height}x{width} in {quality}, {codec}, skeleton {config['skeleton']['name']}",
        f"made by {made_by}",
        "",
        *_table("split", {name: _figures(split) for name, split in splits.items()}),
        "* 5th, 50th and 95th percentile",
        "",
        *_table("labelled (hidden)", {name: _labelled(split) for name, split in splits.items()}),
    ]
    for name, split in splits.items():
        counts = split["rejected"].items()
        reasons = [f"{n['rows']:,} {reason} ({n['people']:,} people)" for reason, n in counts]
        lines += ["", f"left out of {name}: {', '.join(reasons) or 'none'}", *_view_lines(name, split)]
    return "\n".join(lines)


def _table(head: str, splits: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A line for each figure, a column for each split."""
    rows = [(head, list(splits))]
    rows += [(what, [cells[what] for cells in splits.values()]) for what in next(iter(splits.values()))]
    return [f"{what:<18}" + "".join(f"{cell:>18}" for cell in cells) for what, cells in rows]


def _figures(split: dict[str, Any]) -> dict[str, str]:
    def spread(values: dict[str, Any]) -> str:
        return f"{values['5 %']:.0f} {values['median']:.0f} {values['95 %']:.0f}"

    areas = (f"{100 * n / max(split['people'], 1):.0f}%" for n in split["segment_area"].values())
    return {
        "people": f"{split['people']:,}",
        "photos": f"{split['photos']:,}",
        "views of each": f"{split['variants']}",
        "shards": f"{split['shards']}",
        "MB": f"{split['bytes'] / 1e6:,.1f}",
        "people a photo": "{mean}, most {most}".format(**split["people_per_photo"]),
        "labelled keypoints": f"{split['labelled_keypoints']['mean']}",
        "small/medium/large": " ".join(areas),
        "box height, px *": spread(split["box_height"]),
        "box width, px *": spread(split["box_width"]),
    }


def _labelled(split: dict[str, Any]) -> dict[str, str]:
    """Of each keypoint, in % of people, and in % of those where it is labelled but hidden."""
    cells = {}
    for name, counts in split["keypoints"].items():
        people, labelled = sum(counts.values()), counts["hidden"] + counts["seen"]
        hidden = 100 * counts["hidden"] / max(labelled, 1)
        cells[name] = f"{100 * labelled / max(people, 1):.0f}% ({hidden:.0f}%)"
    return cells


def _view_lines(name: str, split: dict[str, Any]) -> list[str]:
    lines = [f"views of {name}:", "   view  mirrored  rotated            zoom *  keypoints with a heatmap"]
    for view in split["views"]:
        rows, zoom = max(view["rows"], 1), view["zoom"]
        shares = f"{100 * view['flipped'] / rows:>7.0f}%  {100 * view['rotated'] / rows:>6.0f}%"
        zooms = f"{zoom['5 %']:.2f} {zoom['median']:.2f} {zoom['95 %']:.2f}"
        kept = 100 * view["targets"] / max(view["labelled"], 1)
        lines.append(f"  {view['variant'] or 'plain':>5}  {shares}  {zooms:>16}  {kept:>23.2f}%")
    return lines
