"""Promote: make a registered version the champion, if its AP is not worse on the same data.

Nothing is evaluated here: `hrnet evaluate` wrote each version's APs to the registry, with what they are
of. Two APs are compared only where data digest, boxes, flip test and preset are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrnet_core.errors import DataError
from pipelines.settings.config import TrackSettings
from pipelines.tracking.registry import Registry, champion_of, evaluations
from pipelines.tracking.store import Tracker

HARDLY_ANYBODY = 0.05
"""AP below which that is said. The published models have .74 and more on COCO's val2017."""


@dataclass(frozen=True)
class Comparison:
    """One protocol under which both versions were evaluated; `champion` None where there is none yet."""

    protocol: str
    candidate: float
    champion: float | None


@dataclass(frozen=True)
class Promotion:
    """What was decided."""

    candidate: str
    """"hrnet-pose/4"."""
    previous: str | None
    """The champion until now."""
    promoted: bool
    comparisons: tuple[Comparison, ...]

    @property
    def doubt(self) -> str | None:
        """What is said of a champion that finds next to nobody; None where there is nothing to say."""
        worst = min(self.comparisons, key=lambda c: c.candidate)
        if not self.promoted or worst.candidate >= HARDLY_ANYBODY:
            return None
        return (
            f"note: an AP of {worst.candidate:.4f} is that of a model that finds next to nobody, and hrnet "
            f"deploy will serve it. Train on, or promote another version (hrnet promote NUMBER)."
        )

    @property
    def exit_code(self) -> int:
        """0: the candidate is champion. 3: the old one stays."""
        return 0 if self.promoted else 3

    def __str__(self) -> str:
        lines = [
            f"  AP {c.candidate:.4f}"
            + (f" against {c.champion:.4f} of the champion" if c.champion is not None else "")
            + f"  ({c.protocol})"
            for c in self.comparisons
        ]
        if not self.promoted:
            head = f"{self.previous} stays champion: {self.candidate} is worse"
        elif self.previous in (None, self.candidate):
            head = f"{self.candidate} is champion"
        else:
            head = f"{self.candidate} is champion, {self.previous} was"
        return "\n".join([head, *lines, *([self.doubt] if self.doubt else [])])


def promote(
    candidate: str | None = None, *, track: TrackSettings | None = None, storage: str | Path = "runs"
) -> Promotion:
    """Move the alias `champion` to a version, if it is not worse under any protocol that both have.

    candidate: a version's number, "models:/hrnet-pose/4", a checkpoint folder that was registered; None:
        the newest version. Equal APs promote. The first evaluated version becomes champion.
    DataError: no such version, one that was never evaluated, or no protocol in common with the champion.
    """
    registry = Registry(Tracker(track or TrackSettings(), storage, create=False))
    store = registry.tracker.shown
    new = registry.version(candidate)
    if new is None:
        what = f"{candidate} is not" if candidate else "no version is"
        raise DataError(
            f"{what} registered as {registry.model} in {store}. hrnet train registers its best checkpoint; "
            f"--run.storage, --track.uri or MLFLOW_TRACKING_URI choose the store."
        )
    name, found = f"{new.name}/{new.version}", evaluations(new)
    if not found:
        other = "" if candidate else " It is the newest version; hrnet promote VERSION takes another."
        raise DataError(f"{name} has no AP in {store}. Run hrnet evaluate models:/{name} COCO.{other}")
    champion = registry.version(champion_of(new.name))
    old = f"{champion.name}/{champion.version}" if champion else None
    theirs = evaluations(champion) if champion else {}
    common = sorted(found.keys() & theirs.keys() if champion else found)
    if not common:
        raise DataError(
            f"{name} and the champion {old} were not evaluated under the same protocol (data, "
            f"boxes, flip test, preset), so their APs say nothing about each other. {name} has: "
            f"{_listed(found)}; {old} has: {_listed(theirs)}. Run hrnet evaluate on both with the same COCO "
            f"folder and options."
        )
    comparisons = []
    for key in common:
        ap, against = found[key]["stats"]["AP"], theirs[key]["stats"]["AP"] if champion else None
        comparisons.append(Comparison(_described(found[key]["protocol"]), ap, against))
    better = all(c.champion is None or c.candidate >= c.champion for c in comparisons)
    if better:
        registry.set_champion(new)
    return Promotion(name, old, better, tuple(comparisons))


def _listed(found: Mapping[str, Any]) -> str:
    return "; ".join(_described(e["protocol"]) for e in found.values()) or "nothing"


def _described(protocol: dict[str, Any]) -> str:
    return (
        f"data {str(protocol['data_digest'])[:8]}, boxes {protocol['boxes']}, "
        f"flip test {'on' if protocol['flip_test'] else 'off'}, {protocol['preset']}"
    )
