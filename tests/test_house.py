"""One owner for each fact: what is done in one file of the house and nowhere else, as data.

Beside these: names and defaults of the method (test_config), one way to put a file in place (test_files), the
version of the code (test_code_version), the one verdict on a picture (test_bad_data), checkpoints' names
(test_checkpoints).
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    str(file.relative_to(ROOT)): ast.parse(file.read_text())
    for room in ("hrnet_core", "pipelines", "serve")
    for file in sorted((ROOT / room).rglob("*.py"))
}

# Name of a function or class: the files that call it.
CALLED_IN: dict[str, set[str]] = {
    "COCOeval": {"pipelines/poses/oks_ap.py"},
    "rescore": {"pipelines/poses/protocol.py", "hrnet_core/results.py"},
    "poses_to_results": {"pipelines/poses/protocol.py"},
    "random_view": {"hrnet_core/augment.py"},
    "view_to_crop": {"hrnet_core/augment.py"},
    "judge": {"pipelines/sources/annotations.py", "pipelines/sources/yolo.py"},
    "sanitize_boxes": {"pipelines/sources/rows.py"},
    "place_in_image": {"hrnet_core/predictor.py", "pipelines/training/epoch_ap.py"},
    "temporary_name": {"pipelines/storage/files.py"},
    "ParquetFile": {"pipelines/shards/rows.py", "pipelines/shards/writer.py"},
}


def called(tree: ast.AST) -> set[str]:
    """Last names of all that is called."""
    functions = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {getattr(f, "attr", getattr(f, "id", "")) for f in functions}


@pytest.mark.parametrize("name", CALLED_IN)
def test_what_is_done_in_one_place_is_done_nowhere_else(name: str) -> None:
    assert {file for file, tree in FILES.items() if name in called(tree)} == CALLED_IN[name]


def test_the_fields_of_a_coco_file_are_known_to_its_reader_alone() -> None:
    """Who subscripts "annotations" or "iscrowd" parses the file a second time; writing one is no reading."""
    fields = {"annotations", "iscrowd", "num_keypoints"}
    reading = {
        file
        for file, tree in FILES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Constant)
        and node.slice.value in fields
        and isinstance(node.ctx, ast.Load)
    }
    readers = {"pipelines/sources/annotations.py", "pipelines/draw.py"}  # draw reads what it wrote itself
    assert reading <= readers
