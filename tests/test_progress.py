"""The one progress line: how often it is said, and in which words."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from pipelines.process.progress import Every, ProgressLine, time_left

ROOT = Path(__file__).parents[1]


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_every_so_many_seconds() -> None:
    clock = Clock()
    for due, expected in (
        (Every(10, clock), [10, 20, 30]),
        (Every(10, clock, at_once=True), [0, 10, 20, 30]),
    ):
        said = []
        for second in range(35):
            clock.now = 1000.0 + second
            said += [second] if due() else []
        assert said == expected
        clock.now = 1000.0


def test_a_line_every_two_seconds_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    """A part a second, of 75 people each."""
    clock = Clock()
    line = ProgressLine("preprocess", 14, "shards", "people", clock=clock)
    for _ in range(14):
        clock.now += 1
        line.add(75)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "preprocess: 2 of 14 shards, 150 people, 75 people/s, about 12 s left"
    assert [text.split()[1] for text in lines] == ["2", "4", "6", "8", "10", "12", "14"]
    assert lines[-1] == "preprocess: 14 of 14 shards, 1,050 people, 75 people/s"
    assert line.work == 1050


def test_short_work_stays_silent(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    line = ProgressLine("validate val2017", 3, "pictures", clock=clock)
    for _ in range(3):
        clock.now += 0.6
        line.add()
    assert capsys.readouterr().out == ""


def test_a_stage_may_know_better_than_the_clock(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    line = ProgressLine("preprocess", 16, "shards", "people", clock=clock)
    clock.now += 5
    line.add(2000, seconds=20, left=3)
    assert (
        capsys.readouterr().out == "preprocess: 1 of 16 shards, 2,000 people, 100 people/s, about 3 s left\n"
    )


def test_parts_may_be_the_work_itself_and_no_time_may_have_passed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    line = ProgressLine("validate val2017", 5000, "pictures", clock=clock)
    for _ in range(1000):
        line.add()
    clock.now += 4
    line.add()
    ProgressLine("inspect", 2, "shards", "MB", seconds=0, clock=clock).add(12.4, left=7)
    assert capsys.readouterr().out.splitlines() == [
        "validate val2017: 1,001 of 5,000 pictures, 250 pictures/s, about 16 s left",
        "inspect: 1 of 2 shards, 12 MB, about 7 s left",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "about 0 s left"),
        (99, "about 99 s left"),
        (100, "about 2 min left"),
        (5990, "about 100 min left"),
        (9000, "about 2.5 h left"),
        (9_000_000, "about 2,500.0 h left"),
    ],
)
def test_time_left(seconds: float, text: str) -> None:
    assert time_left(seconds) == text


def test_nobody_else_counts_the_seconds_between_two_lines() -> None:
    """A throttle is `now - then > so many seconds`; these compare clocks for another reason."""
    others = {
        "session": "gives up after wait_minutes",
        "joining": "gives up after so many seconds",
        "live": "gives up after so many seconds",
        "loop": "a checkpoint every so many minutes",
        "metric_log": "leaves MLflow alone for a minute after an error",
        "progress": "this one",
        "files": "files of another machine that nobody touched for a day",
    }
    found = set()
    for file in (ROOT / "pipelines").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Compare) else ""
            if "monotonic()" in text or "time.time()" in text or "now -" in text:
                found.add(file.stem)
    assert found - set(others) == set()
