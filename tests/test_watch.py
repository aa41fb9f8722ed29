"""infra/watch: dashboards and alerts ask for series that there are. promtool checks the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "infra" / "watch"
BOARDS = sorted(FOLDER.glob("*.json"))
SERIES = re.compile(r"\b(?:ray|autoscaler)_[a-z0-9_]+\b(?=[{\s)\[]|$)")


def known() -> set[str]:
    """Ray's own (tests/reference/ray_metrics.txt), and the endpoint's as docs/serving.md lists them."""
    lines = (ROOT / "tests/reference/ray_metrics.txt").read_text().splitlines()
    names = {line for line in lines if line and not line.startswith("#")}
    for row in (ROOT / "docs/serving.md").read_text().splitlines():
        if row.startswith("| `ray_hrnet_"):  # | `ray_x_bucket`, `_sum`, `_count` | ...: the first is whole
            whole, *ends = re.findall(r"`(\w+)`", row.split("|")[1])
            stem = whole.removesuffix("_bucket") if "_bucket" in whole else "ray_hrnet"
            names |= {whole, *(end if end.startswith("ray_") else stem + end for end in ends)}
    return names


def expressions() -> Iterator[tuple[str, str]]:
    for board in BOARDS:
        for panel in json.loads(board.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{board.stem}: {panel['title']}", target["expr"]
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def test_every_series_is_one_that_there_is() -> None:
    there = known()
    asked = {(where, name) for where, expression in expressions() for name in SERIES.findall(expression)}
    assert {name for _, name in asked if name.startswith("ray_hrnet_")}
    labels = {"ray_train_run_name", "ray_train_controller_state"}
    assert {(where, name) for where, name in asked if name not in there | labels} == set()


def test_each_alert_says_what_to_do() -> None:
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("page", "ticket")
            assert len(rule["annotations"]["runbook"]) > 40, rule["alert"]


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.stem)
def test_a_dashboard_has_its_panels_side_by_side(board: Path) -> None:
    content = json.loads(board.read_text())
    assert content["uid"] == f"hrnet-{board.stem}"
    panels = content["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [tuple(panel["gridPos"][side] for side in "xywh") for panel in panels]
    for index, (x, y, w, h) in enumerate(places):
        assert x + w <= 24
        for u, v, *size in places[:index]:
            assert x >= u + size[0] or u >= x + w or y >= v + size[1] or v >= y + h
    assert all(panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for panel in panels)
