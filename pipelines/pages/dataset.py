"""The distributions of a dataset as figures, and the page that holds everything `hrnet inspect` shows."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hrnet_core.overlays import color_line
from hrnet_core.skeleton import skeleton_from_dict
from pipelines.pages.frame import definitions, embedded, figure, section, table, tiles, write_page
from pipelines.shards.figures import ANGLES, FACTORS, LENGTHS
from pipelines.storage.files import join

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEEN, HIDDEN, UNLABELLED = "#2f6fde", "#a9c4f3", "#e6e9ee"
COLORS = (SEEN, "#ff8000", "#3a9e5c", "#8a5bd1")
"""Of the splits."""
WIDTH = 10.6
"""Of a figure, 100 px."""
LONGEST = 24
"""Characters of a keypoint's name in a figure: longer ones would leave no room for its bars."""
MOST = 15
"""The last bar of people in one photo counts all above, too."""


# ---------------------------------------------------------------------------------- figures


def write_figures(card: Mapping[str, Any], folder: str) -> list[tuple[str, str]]:
    """(title, PNG file) of each figure: keypoints, people, views where there are augmented ones."""
    splits = card["splits"]
    files = [("Keypoints", _keypoints(splits, join(folder, "figure-keypoints.png")))]
    files.append(("People", _people(splits, join(folder, "figure-people.png"))))
    if augmented := {name: split for name, split in splits.items() if split["variants"] > 1}:
        files.append(("Augmented views", _views(augmented, join(folder, "figure-views.png"))))
    return files


def _keypoints(splits: Mapping[str, Any], file: str) -> str:
    """Of each keypoint the share of people where it is seen, hidden, not labelled."""
    names = list(next(iter(splits.values()))["keypoints"])
    with figure(file, 1, len(splits), (WIDTH, 0.9 + 0.22 * len(names))) as axes:
        for ax, (split, card) in zip(axes, splits.items(), strict=True):
            left = np.zeros(len(names))
            for kind, color in (("seen", SEEN), ("hidden", HIDDEN), ("not_labelled", UNLABELLED)):
                counts = np.array([card["keypoints"][name][kind] for name in names])
                share = 100 * counts / max(card["people"], 1)
                ax.barh(np.arange(len(names)), share, left=left, color=color, label=kind.replace("_", " "))
                left += share
            ax.set(title=f"{split}: {card['people']:,} people", xlim=(0, 100), xlabel="% of people")
            shown = [name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..." for name in names]
            shown = [name.replace("_", " ") for name in shown]
            ax.set_yticks(np.arange(len(names)), shown, parse_math=False)
            ax.set_ylim(len(names) - 0.4, -0.6)
        _legend(axes[0])
    return file


def _people(splits: Mapping[str, Any], file: str) -> str:
    """Box heights, people of one photo, labelled keypoints of a person: shares, one line a split."""
    with figure(file, 1, 3, (WIDTH, 3.2)) as axes:
        for color, (split, card) in zip(COLORS, splits.items(), strict=False):
            _bars(axes[0], [card["box_height"]], LENGTHS[::10], color, split)
            photos = np.array(card["people_per_photo"]["photos_with"])
            photos = np.append(photos[1:MOST], photos[MOST:].sum())
            _steps(axes[1], photos, 1, color, split)
            _steps(axes[2], np.array(card["labelled_keypoints"]["people_with"]), 0, color, split)
        axes[0].set(title="height of the box", xscale="log", xlabel="px of the photo", ylabel="% of people")
        axes[1].set(title="people in one photo", xlabel=f"people ({MOST}: or more)", ylabel="% of photos")
        axes[2].set(title="labelled keypoints", xlabel="of one person", ylabel="% of people")
        for ax in axes[1:]:
            ax.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # MaxNLocator's
        _plain_numbers(axes[0])
        _legend(axes[0])
    return file


def _views(splits: Mapping[str, Any], file: str) -> str:
    """Rotation and zoom of the augmented views together, and what they lose of the keypoints."""
    with figure(file, 1, 3, (WIDTH, 3.2)) as axes:
        for color, (split, card) in zip(COLORS, splits.items(), strict=False):
            views = card["views"]
            _bars(axes[0], [view["rotation_deg"] for view in views[1:]], ANGLES[::5], color, split)
            _bars(axes[1], [view["zoom"] for view in views[1:]], FACTORS[::4], color, split)
            lost = [100 * (1 - view["targets"] / max(view["labelled"], 1)) for view in views]
            axes[2].bar([str(v["variant"] or "plain") for v in views], lost, color=color, label=split)
        axes[0].set(title="rotation, where rotated", xlabel="degrees", ylabel="% of rotated views")
        axes[1].set(title="scale against the plain view", xscale="log", xlabel="factor", ylabel="% of views")
        axes[2].set(title="keypoints without heatmap", xlabel="view", ylabel="% of labelled ones")
        _plain_numbers(axes[1])
        if not any(sum(view["rotation_deg"]["counts"]) for card in splits.values() for view in card["views"]):
            axes[0].text(0.5, 0.5, "no view is rotated", transform=axes[0].transAxes, ha="center")
            axes[0].set(xticks=[], yticks=[])
        _legend(axes[1])
    return file


def _legend(ax: Axes) -> None:
    """Under the figure, where it covers nothing."""
    ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


def _bars(ax: Axes, histograms: Sequence[Mapping[str, Any]], edges: Any, color: str, label: str) -> None:
    """Histograms of the card added up, their fine bins in bars between `edges`."""
    ends = [np.array(histogram["edges"]) for histogram in histograms]
    middles = np.concatenate([(e[1:] + e[:-1]) / 2 for e in ends])
    counts, _ = np.histogram(middles, edges, weights=np.concatenate([h["counts"] for h in histograms]))
    some = np.flatnonzero(counts)
    if len(some):
        _area(ax, counts[some[0] : some[-1] + 1], edges[some[0] : some[-1] + 2], color, label)


def _area(ax: Axes, counts: Any, edges: Any, color: str, label: str) -> None:
    """Counts between edges as % of all."""
    share = 100 * counts / max(int(counts.sum()), 1)
    ax.stairs(share, edges, color=color, label=label, fill=True, alpha=0.25)
    ax.stairs(share, edges, color=color)


def _steps(ax: Axes, counts: Any, first: int, color: str, label: str) -> None:
    """Whole numbers from `first` on."""
    _area(ax, counts, np.arange(first, first + len(counts) + 1) - 0.5, color, label)


def _plain_numbers(ax: Axes) -> None:
    """0.5, 1, 2 on a logarithmic axis, not powers of ten."""
    ax.xaxis.get_major_locator().set_params(subs=(1, 2, 5))  # type: ignore[call-arg]  # LogLocator's
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")


# ---------------------------------------------------------------------------------- the page


def write_dataset_page(
    file: str,
    card: Mapping[str, Any],
    pictures: Mapping[str, Sequence[tuple[str, str]]],
    rejected: Sequence[Mapping[str, Any]],
) -> None:
    """The page of a dataset. pictures: (title, file) under figures, views, rejected."""
    splits, config = card["splits"], card["config"]
    people = sum(split["people"] for split in splits.values())
    width, height = config["input_size"]
    title = f"{people:,} people at {height}x{width}"
    views = [
        f"<h3>{html.escape(name)}</h3>{embedded(path, name, wide=True)}" for name, path in pictures["views"]
    ]
    colors = color_line(skeleton_from_dict(config["skeleton"]))
    write_page(
        file,
        title,
        _splits_line(splits),
        f"digest {card['digest']}",
        *(tiles(_tiles(name, split)) for name, split in splits.items()),
        section(
            "Keypoints and people",
            "Of each keypoint how often it is seen, hidden or not labelled; how large people are, how many "
            "stand together, and how many of their keypoints are labelled.",
            *(embedded(path, name, wide=True) for name, path in pictures["figures"]),
        ),
        section(
            "Views",
            f"The stored crops: on the left the labelled keypoints in place, on the right the heatmaps over "
            f"the same crop. {colors} The same people in every view, spread evenly over the split.",
            *views,
        ),
        _left_out(splits, rejected, pictures["rejected"]),
        section("Settings", "", definitions({**config, "skeleton": config["skeleton"]["name"]})),
        section("Made by", "", definitions(card["code"])),
    )


def _splits_line(splits: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name}: {split['people']:,} people in {split['photos']:,} photos, "
        f"views of each: {split['variants']}, shards: {split['shards']}, {split['bytes'] / 1e6:,.1f} MB"
        for name, split in splits.items()
    )


def _tiles(name: str, split: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Four figures of a split."""
    heights, crowd = split["box_height"], split["people_per_photo"]
    lost = sum(count["people"] for count in split["rejected"].values())
    spread = f"90 % between {heights['5 %']:.0f} and {heights['95 %']:.0f}"
    labelled = split["labelled_keypoints"]["mean"]
    return [
        (f"{split['people']:,}", name, f"people in {split['photos']:,} photos; {lost:,} left out"),
        (str(labelled), name, f"labelled keypoints of {len(split['keypoints'])}"),
        (f"{heights['median']:.0f}", name, f"px of median height; {spread}"),
        (str(crowd["mean"]), name, f"people in a photo, at most {crowd['most']}"),
    ]


def _left_out(
    splits: Mapping[str, Any],
    rejected: Sequence[Mapping[str, Any]],
    pictures: Sequence[tuple[str, str]],
) -> str:
    counts = [
        (name, reason, f"{count['rows']:,}", f"{count['people']:,}")
        for name, split in splits.items()
        for reason, count in split["rejected"].items()
    ]
    if not counts:
        return section("Left out", "Nothing was left out.")
    columns = ("reason", "file", "ann_id", "people", "detail")
    return section(
        "Left out",
        "crowd and no_keypoints are the published protocol, the other reasons are defects. rejected.parquet "
        "has all of them.",
        table(counts, ("split", "reason", "rows", "people")),
        "<h3>The heaviest of each reason</h3>",
        *(embedded(path, name, wide=True) for name, path in pictures),
        table(([row[key] for key in columns] for row in rejected), columns),
    )
