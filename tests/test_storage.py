"""Where things lie and how they are written: each stated once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.sources.layout import annotations_of

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "pipelines").rglob("*.py"))


def texts(file: Path) -> Iterator[str]:
    """The strings of a module that are no docstrings."""
    tree = ast.parse(file.read_text())
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield node.value


def test_where_annotations_lie_is_stated_once() -> None:
    found = {file.stem for file in MODULES if any("person_keypoints_" in text for text in texts(file))}
    # coco.py tells users in two messages what such a file is called.
    assert found - {"coco"} == {"layout"}


@pytest.mark.parametrize(
    ("root", "file"),
    [
        ("/data/coco", "/data/coco/annotations/person_keypoints_val2017.json"),
        (Path("/data/coco"), "/data/coco/annotations/person_keypoints_val2017.json"),
        ("s3://b/coco/?region=eu", "s3://b/coco/annotations/person_keypoints_val2017.json?region=eu"),
    ],
)
def test_annotations_lie_below_a_folder_or_uri(root: str | Path, file: str) -> None:
    assert annotations_of(root, "val2017") == file
