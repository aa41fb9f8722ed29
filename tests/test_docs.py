"""The documentation: its links lead to files and headings, and every `hrnet` command in it exists with its
flags."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from pipelines.cli import VERBS, main
from pipelines.settings.config_file import SHIPPED, load_config

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "infra").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), flags=re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 0
        while (anchor := f"{name}-{number}" if number else name) in found:
            number += 1
        found.add(anchor)
    return found


@cache
def help_text(verb: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([verb, "--help"])
    return out.getvalue()


def commands(page: Path) -> list[str]:
    """`hrnet VERB ...` lines of the page's fenced blocks, continuation lines joined, comments cut."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    cut = [line.split(" # ")[0].strip().removeprefix("$ ") for line in lines]
    found = [re.search(r"(?:^|-- |\bbin/)(?:hrnet|python -m pipelines\.cli) .*", line) for line in cut]
    return [m.group(0).removeprefix("-- ").removeprefix("bin/") for m in found if m]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_commands(page: Path) -> None:
    for target in LINK.findall(FENCED.sub("", page.read_text())):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), f"{page.name} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(there), f"{page.name} links to {target}: no such heading"
    for command in commands(page):
        words = shlex.split(command.replace("python -m pipelines.cli", "hrnet"))
        assert words[1] in VERBS, f"{page.name}: {command!r} is no verb"
        flags = [w.split("=")[0] for w in words if w.startswith("--") and w != "--help"]
        for flag in flags:
            assert re.search(rf"{re.escape(flag)}\b", help_text(words[1])), (
                f"{page.name}: {command!r} has no {flag}"
            )


@pytest.mark.parametrize("page", ["recipes", "sweep"])
def test_configs_are_of_the_datasets_that_the_pages_make(page: str, tmp_path: Path) -> None:
    """What data a config is for is said by its base: without one, shards of a shipped config are refused."""
    shipped = [load_config(file.stem).data for file in SHIPPED.glob("*.yaml")]
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        file = tmp_path / "mine.yaml"
        file.write_text(block)
        assert load_config(str(file)).data in shipped, (
            f"{page}.md: no shipped config has the data settings of\n{block}"
        )


def test_there_are_pages_and_commands_to_check() -> None:
    assert len(PAGES) > 5
    assert sum(len(commands(page)) for page in PAGES) > 10
