"""Where things lie and how they are written: each stated once."""

from __future__ import annotations

import ast
import contextlib
import functools
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hrnet_core.errors import DataError
from hrnet_core.skeleton import COCO17
from pipelines.pages import gallery
from pipelines.pages.frame import write_page
from pipelines.poses.formats import ROW, json_list, write_all
from pipelines.settings.config import PredictSettings
from pipelines.shards.writer import write_rejected
from pipelines.sources.layout import annotations_of
from pipelines.storage.files import remove_leftovers, writable, write_json, write_whole
from pipelines.tracking.metric_log import MetricLog
from pipelines.training.pictures import draw_curves
from pipelines.validate import write_csv

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
    # annotations.py tells users in a message what such a file is called.
    assert found - {"annotations"} == {"layout"}


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


# ---------------------------------------------------------------------------------- whole or not at all

OLD = b"what an earlier run left"


@contextlib.contextmanager
def full_disk(size: int = 10) -> Iterator[None]:
    """Every file ends after so many bytes: writing on is an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def curves(file: Path) -> None:
    rows = [{"step": step, "train/loss": 1 / step} for step in range(1, 9)]
    draw_curves(file, rows, "a run")


def findings(file: Path) -> None:
    checked = SimpleNamespace(rows=lambda: [{"split": "val2017", "kind": "crowd", "detail": "x" * 10_000}])
    write_csv(checked, file)  # type: ignore[arg-type]


def entries(file: Path) -> None:
    with json_list(str(file)) as write:
        for number in range(10_000):
            write({"id": number})


def table(file: Path) -> None:
    settings = PredictSettings(formats=("parquet",))
    row = dict.fromkeys(ROW.names) | {"name": "a.jpg", "width": 64, "height": 64, "boxes_source": "boxes"}
    row |= {"boxes_xywh": [1.0, 1, 9, 9], "box_scores": [1.0], "keypoints": [1.0] * 51}
    write_all([row] * 200, (), str(file.parent), settings, COCO17)


def sheet(file: Path) -> None:
    gallery._write(str(file.parent), file.stem, "title", np.zeros((64, 64, 3), np.uint8))


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.json": lambda file: write_json(file, {"AP": 0.5, "AR": 0.6}),
    "a.txt": lambda file: write_whole(file, "a text of some length"),
    "a.html": lambda file: write_page(file, "a page", "of some", "length"),
    "a.csv": findings,
    "curves.png": curves,
    "sheet.jpg": sheet,
    "list.json": entries,
    "poses.parquet": table,
    "images.json": table,
    "rejected.parquet": lambda file: write_rejected(str(file), []),
    "metrics.jsonl": lambda file: MetricLog(file),
}


@pytest.mark.parametrize("name", ["file/a", "file/a/b"])
def test_a_file_in_place_of_a_folder_is_called_so(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="part of its path, is a file, not a folder"), writable("here"):
        write_whole(tmp_path / name, b"")


@pytest.mark.parametrize("name", WRITERS)
def test_what_cannot_be_written_to_its_end_leaves_what_was_there(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if name == "metrics.jsonl":  # what is read first, to be written again
        file.write_text('{"step": 1, "train/loss": 0.5}\n' * 3)
        writer: Callable[[Path], object] = functools.partial(MetricLog, step=1)
    else:
        file.write_bytes(OLD)
        writer = WRITERS[name]
    before = file.read_bytes()
    with pytest.raises((OSError, DataError)), full_disk():
        writer(file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == [name], "nor is anything else left"
    writer(file)
    assert (file.read_bytes() == before) == (name == "metrics.jsonl")


def test_a_writer_that_is_killed_leaves_what_was_there(tmp_path: Path) -> None:
    """Its temporary file goes with the next `remove_leftovers`."""
    file = tmp_path / "a.json"
    file.write_bytes(OLD)
    script = (
        "import os, sys, signal\n"
        "from pipelines.storage.files import writing\n"
        "with writing(sys.argv[1]) as part:\n"
        "    part.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(file)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert file.read_bytes() == OLD
    assert len(os.listdir(tmp_path)) == 2
    remove_leftovers(tmp_path.parent)
    assert os.listdir(tmp_path) == ["a.json"]


def test_links_stay_links_and_pipes_are_written_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "real" / "a.txt")
    write_whole(tmp_path / "link.txt", "ä")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real" / "a.txt").read_bytes() == "ä".encode()
    command = [
        sys.executable,
        "-c",
        "from pipelines.storage.files import *; write_whole('/dev/stdout', 'told')",
    ]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout == b"told"
    write_whole(tmp_path / "new" / "folder" / "a.txt", "a")  # made on the way
    with pytest.raises(OSError, match="Is a directory"):
        write_whole(tmp_path / "new", "a")


WRITES = re.compile(
    r"\b(write_text|write_bytes|savefig|imwrite|write_table|ParquetWriter|to_csv|np\.save|torch\.save"
    r"|(?:fd)?open(?=\((?:[^()]*, )?'[wax]b?'))\("
)
NOT_WHOLE = {
    ("export", "write_bytes"): "the name that `writing` gave, handed on",
    ("metric_log", "open"): "a line is added; read_rows leaves out one that was cut short",
    ("store", "open"): "a lock, empty",
    ("run_folder", "open"): "a lock, empty",
    ("session", "open"): "the terminal itself, while what engines say goes elsewhere",
    ("ingress", "write_text"): "a wrapper around HAProxy in a folder of this process",
    ("measure_modes", "write_bytes"): "a checkpoint's copy in a temporary folder",
    ("pinned", "write_bytes"): "in a temporary folder, from which `published` puts it in place",
    ("pictures", "write_bytes"): "in a temporary folder, put in place as a whole",
    ("state", "open"): "trainer.pt, as below",
    ("worker", "write_table"): "in memory",
    ("writer", "write_table"): "in the ParquetWriter below",
    ("writer", "ParquetWriter"): "in a stream to the name that `writing` gave",
    ("evaluate", "np.save"): "in memory",
    ("formats", "write_table"): "in the ParquetWriter of a file that `writing` gave",
    ("state", "torch.save"): "into the folder that Ray Train uploads as a whole",
}


def test_whoever_writes_a_result_writes_it_by_the_one_function() -> None:
    """Calls that write are made on a name that `writing` gave, or stand in the list with a reason."""
    found = set()
    for file in MODULES:
        tree = ast.parse(file.read_text())
        given = {
            item.optional_vars.id
            for node in ast.walk(tree)
            if isinstance(node, ast.With)
            for item in node.items
            if isinstance(item.optional_vars, ast.Name)
            and ast.unparse(item.context_expr).startswith("writing(")
        }
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            writes = WRITES.search(ast.unparse(call))
            if writes and not {part.id for part in ast.walk(call) if isinstance(part, ast.Name)} & given:
                found.add((file.stem, writes[1]))
    assert found == set(NOT_WHOLE)
