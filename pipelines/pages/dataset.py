"""The distributions of a dataset as figures, and the page that holds everything `hrnet inspect` shows."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.pages.frame import PAGE, definitions, embedded

if TYPE_CHECKING:
    from matplotlib.axes import Axes


SEEN, HIDDEN, UNLABELLED = "#2f6fde", "#a9c4f3", "#e6e9ee"
BARS = 12
"""Bins of 2 % that make one bar."""
MOST = 15
"""The last bar of people in one photo counts all above, too."""


# ---------------------------------------------------------------------------------- figures


def write_figures(card: Mapping[str, Any], folder: Path) -> list[tuple[str, Path]]:
    """(title, PNG file) of each figure: keypoints, people, views where there are augmented ones."""
    splits = card["splits"]
    figures = [("keypoints", "Keypoints", _keypoints, splits), ("people", "People", _people, splits)]
    augmented = {name: split for name, split in splits.items() if split["variants"] > 1}
    if augmented:
        figures.append(("views", "Augmented views", _views, augmented))
    return [(title, draw(shown, folder / f"figure-{name}.png")) for name, title, draw, shown in figures]


def _axes(columns: int, height: float) -> tuple[Any, list[Axes]]:
    """A figure with one row of plain axes; no pyplot, whose state is the whole process's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.6, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
    return figure, axes


def _keypoints(splits: Mapping[str, Any], file: Path) -> Path:
    """Of each keypoint the share of people where it is seen, hidden, not labelled."""
    names = list(next(iter(splits.values()))["keypoints"])
    figure, axes = _axes(len(splits), 0.9 + 0.22 * len(names))
    for ax, (split, card) in zip(axes, splits.items(), strict=True):
        left = np.zeros(len(names))
        for kind, color in (("seen", SEEN), ("hidden", HIDDEN), ("not_labelled", UNLABELLED)):
            counts = np.array([card["keypoints"][name][kind] for name in names])
            share = 100 * counts / max(card["people"], 1)
            ax.barh(np.arange(len(names)), share, left=left, color=color, label=kind.replace("_", " "))
            left += share
        ax.set(title=f"{split}: {card['people']:,} people", xlim=(0, 100), xlabel="% of people")
        ax.set_yticks(np.arange(len(names)), [name.replace("_", " ") for name in names])
        ax.invert_yaxis()
    _legend(figure, axes[0])
    figure.savefig(file, dpi=110)
    return file


def _people(splits: Mapping[str, Any], file: Path) -> Path:
    """Box heights, people of one photo, labelled keypoints of a person: shares, one line a split."""
    figure, axes = _axes(3, 3.2)
    for color, (split, card) in zip(_colors(), splits.items(), strict=False):
        _stairs(axes[0], card["box_height"], color, split)
        photos = np.array(card["people_per_photo"]["photos_with"])
        photos = np.append(photos[1:MOST], photos[MOST:].sum())
        _steps(axes[1], photos, 1, color, split)
        _steps(axes[2], np.array(card["labelled_keypoints"]["people_with"]), 0, color, split)
    axes[0].set(title="height of the box", xscale="log", xlabel="px of the photo", ylabel="% of people")
    axes[1].set(title="people in one photo", xlabel=f"people ({MOST}: or more)", ylabel="% of photos")
    axes[2].set(title="labelled keypoints", xlabel="of one person", ylabel="% of people")
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    axes[2].xaxis.get_major_locator().set_params(integer=True)
    _plain_numbers(axes[0])
    _legend(figure, axes[0])
    figure.savefig(file, dpi=110)
    return file


def _views(splits: Mapping[str, Any], file: Path) -> Path:
    """Rotation and zoom of the augmented views together, and what they lose of the keypoints."""
    figure, axes = _axes(3, 3.2)
    for color, (split, card) in zip(_colors(), splits.items(), strict=False):
        views = card["views"]
        _stairs(axes[0], _together([view["rotation_deg"] for view in views[1:]]), color, split, 5, log=False)
        _stairs(axes[1], _together([view["zoom"] for view in views[1:]]), color, split, 4)
        lost = [100 * (1 - view["targets"] / max(view["labelled"], 1)) for view in views]
        axes[2].bar([str(v["variant"] or "plain") for v in views], lost, color=color, label=split)
    axes[0].set(title="rotation, where rotated", xlabel="degrees", ylabel="% of rotated views")
    axes[1].set(title="scale against the plain view", xscale="log", xlabel="factor", ylabel="% of views")
    axes[2].set(title="labelled keypoints without heatmap", xlabel="view", ylabel="%")
    _plain_numbers(axes[1])
    _legend(figure, axes[1])
    figure.savefig(file, dpi=110)
    return file


def _legend(figure: Any, ax: Axes) -> None:
    """Under the figure, where it covers nothing."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


def _colors() -> list[str]:
    return [SEEN, "#ff8000", "#3a9e5c", "#8a5bd1"]


def _stairs(
    ax: Axes, histogram: Mapping[str, Any], color: str, label: str, bars: int = BARS, log: bool = True
) -> None:
    """A histogram of the card, `bars` of its fine bins in one; `log` where its edges grow by a factor."""
    counts, edges = np.array(histogram["counts"]), np.array(histogram["edges"])
    if not len(counts):
        return
    more = np.arange(1, -len(counts) % bars + 1)  # the last bar is as wide as the others
    beyond = (
        edges[-1] * (edges[-1] / edges[-2]) ** more if log else edges[-1] + (edges[-1] - edges[-2]) * more
    )
    grouped = np.add.reduceat(counts, np.arange(0, len(counts), bars))
    _area(ax, 100 * grouped / grouped.sum(), np.append(edges, beyond)[::bars], color, label)


def _area(ax: Axes, heights: Any, edges: Any, color: str, label: str) -> None:
    ax.stairs(heights, edges, color=color, label=label, fill=True, alpha=0.25)
    ax.stairs(heights, edges, color=color)


def _steps(ax: Axes, counts: Any, first: int, color: str, label: str) -> None:
    """Shares of whole numbers from `first` on."""
    share = 100 * counts / max(int(counts.sum()), 1)
    edges = np.arange(first, first + len(counts) + 1) - 0.5
    _area(ax, share, edges, color, label)


def _plain_numbers(ax: Axes) -> None:
    """0.5, 1, 2 on a logarithmic axis, not powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    ax.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _together(histograms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of trimmed histograms that were cut from the same edges."""
    total: dict[tuple[float, float], int] = {}
    for histogram in histograms:
        edges = histogram["edges"]
        for start, end, count in zip(edges, edges[1:], histogram["counts"], strict=False):
            total[start, end] = total.get((start, end), 0) + count
    bins = sorted(total)
    edges = [start for start, _ in bins] + [end for _, end in bins[-1:]]
    return {"edges": edges, "counts": [total[pair] for pair in bins]}


# ---------------------------------------------------------------------------------- the page


def write_page(
    file: Path,
    card: Mapping[str, Any],
    pictures: Mapping[str, Sequence[tuple[str, Path]]],
    rejected: Sequence[Mapping[str, Any]],
) -> None:
    """One page without any other file or address. pictures: (title, file) under figures, views, rejected."""
    splits = card["splits"]
    people = sum(split["people"] for split in splits.values())
    config = card["config"]
    width, height = config["input_size"]
    title = f"{people:,} people at {height}x{width}"
    views = "".join(f"<h3>{html.escape(name)}</h3>{embedded(path, name)}" for name, path in pictures["views"])
    body = f"""<header><h1>{title}</h1><p>{html.escape(_splits_line(splits))}</p>
<p class="quiet">digest {card["digest"]}</p></header>
<section class="stats">{_tiles(splits)}</section>
<section><h2>Keypoints and people</h2><p class="quiet">Of each keypoint how often it is seen, hidden or not
labelled; how large people are, how many stand together, and how many of their keypoints are labelled.</p>
{"".join(embedded(path, name) for name, path in pictures["figures"])}</section>
<section><h2>Views</h2><p class="quiet">The stored crops: on the left the labelled keypoints in place, on the
right the heatmaps over the same crop. Left limbs green, right limbs orange. The same
people in every view, spread evenly over the split.</p>{views}</section>
<section><h2>Left out</h2>{_left_out(splits, rejected, pictures["rejected"])}</section>
<section><h2>Settings</h2>{definitions({**config, "skeleton": config["skeleton"]["name"]})}</section>
<section><h2>Made by</h2>{definitions(card["code"])}</section>"""
    file.write_text(PAGE.format(title=html.escape(title), body=body), encoding="utf-8")


def _splits_line(splits: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name}: {split['people']:,} people in {split['photos']:,} photos, "
        f"views of each: {split['variants']}, shards: {split['shards']}, {split['bytes'] / 1e6:,.1f} MB"
        for name, split in splits.items()
    )


def _tiles(splits: Mapping[str, Any]) -> str:
    """Four figures of each split."""
    tiles = []
    for name, split in splits.items():
        heights, lost = split["box_height"], sum(n["people"] for n in split["rejected"].values())
        crowd = split["people_per_photo"]
        tiles += [
            (f"{split['people']:,}", name, f"people in {split['photos']:,} photos; {lost:,} left out"),
            (split["labelled_keypoints"]["mean"], name, f"labelled keypoints of {len(split['keypoints'])}"),
            (
                f"{heights['median']:.0f}",
                name,
                f"px of median height; 90 % between {heights['5 %']:.0f} and {heights['95 %']:.0f}",
            ),
            (crowd["mean"], name, f"people in a photo, at most {crowd['most']}"),
        ]
    return "".join(
        f'<div class="stat"><b>{html.escape(str(value))}</b><span>{html.escape(str(split))}</span>'
        f"<small>{html.escape(what)}</small></div>"
        for value, split, what in tiles
    )


def _left_out(
    splits: Mapping[str, Any],
    rejected: Sequence[Mapping[str, Any]],
    pictures: Sequence[tuple[str, Path]],
) -> str:
    counts = [
        (name, reason, f"{count['rows']:,}", f"{count['people']:,}")
        for name, split in splits.items()
        for reason, count in split["rejected"].items()
    ]
    if not counts:
        return '<p class="quiet">Nothing was left out.</p>'
    examples = [
        ["" if row[key] is None else row[key] for key in ("reason", "file", "ann_id", "people", "detail")]
        for row in rejected
    ]
    return (
        '<p class="quiet">crowd and no_keypoints are the published protocol, the other reasons are defects. '
        "rejected.parquet has all of them.</p>"
        + _table(("split", "reason", "rows", "people"), counts)
        + "<h3>The heaviest of each reason</h3>"
        + "".join(embedded(path, name) for name, path in pictures)
        + _table(("reason", "file", "annotation", "people", "detail"), examples)
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return f'<table class="fields"><tr>{top}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table>'
