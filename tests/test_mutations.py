"""Any JSON whatever: one thing of a good file is changed, and commands answer with exit 0 or 2 and words.

What validate calls good is evaluated too. Changes are drawn from a fixed seed, so a failure names its own.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from dots import SMALL, fitted_network, rows_here, truth_of, write_coco, write_detections

from hrnet_core.checkpoint import CheckpointSpec, save_checkpoint
from hrnet_core.heatmaps import HeatmapCodec
from pipelines.cli import main

CODEC = HeatmapCodec("official", (96, 128))
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7.0, 1.5, -0.0, 1e9, 1e300, 10**30, 10**400, float("nan"), float("inf"),
    "", "1", "person", "x" * 300, "\ud800", "a\0b", "../a.png", "/a.png", "C:\\a.png", [], [[]], [None], [0],
    [1, 2, 3, 4], [float("nan")] * 4, [1] * 5, ["a"] * 51, [None] * 51, [0] * 51, [1e300] * 51, {}, {"id": 1},
]  # fmt: skip
GONE = object()
TIMES = 40
"""Changes of one part; the parts after the first are for make test-slow."""
PARTS = [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 12))]


def mutated(content: Any, seed: int) -> tuple[Any, str]:
    """A copy with one change, and what it is."""
    draw = random.Random(seed)
    content = copy.deepcopy(content)
    here, path = content, []
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = draw.choice(keys)
        path.append(key)
        deeper = isinstance(here[key], dict | list) and len(here[key]) > 0
        if not deeper or draw.random() < 0.1:
            break
        here = here[key]
    value = draw.choice([*VALUES, GONE, GONE, "double", "double", "sign"])
    if value is GONE:
        del here[key]
    elif value == "double" and isinstance(here, list):
        here.append(copy.deepcopy(here[key]))
    elif value == "sign" and isinstance(here[key], int | float):
        here[key] = -here[key]
    else:
        here[key] = value
    return content, f"{path} = {'gone' if value is GONE else repr(value)[:60]}"


@pytest.fixture(scope="module")
def dots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """coco/ of 3 pictures a split, checkpoint/, boxes.json, results.json"""
    folder = tmp_path_factory.mktemp("dots")
    for split in ("train2017", "val2017"):
        write_coco(folder / "coco", photos=3, split=split, seed=len(split))
    save_checkpoint(
        folder / "checkpoint", fitted_network(folder / "coco", CODEC), CheckpointSpec(SMALL, CODEC)
    )
    write_detections(folder / "coco", folder / "boxes.json")
    people = truth_of(folder / "coco")["annotations"]
    results = [{k: p[k] for k in ("image_id", "category_id", "keypoints")} | {"score": 0.5} for p in people]
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The actors' work in this process."""
    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", rows_here)


def answers(capsys: pytest.CaptureFixture[str], change: str, *command: str | Path) -> int:
    """The exit code: 0, or 2 with words that are no traceback."""
    try:
        code = main([str(word) for word in command])
    except SystemExit as ended:
        code = int(ended.code or 0)
    out, err = capsys.readouterr()
    assert code in (0, 2), (change, code, err)
    assert "Traceback" not in out + err, (change, err)
    if code == 2:
        said = err.strip() or out.strip()
        assert len(said) > 20, change
        assert "internal" not in said.lower(), (change, said)
    return code


@pytest.mark.parametrize("part", PARTS)
def test_annotations(part: int, dots: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = dots / "coco"
    (tmp_path / "coco").mkdir()
    for name in ("train2017", "val2017"):
        (tmp_path / "coco" / name).symlink_to(root / name)
    folder = tmp_path / "coco" / "annotations"
    folder.mkdir()
    (folder / "person_keypoints_train2017.json").write_text(json.dumps(truth_of(root, "train2017")))
    good = truth_of(root)
    codes = []
    for seed in range(part * TIMES, part * TIMES + TIMES):
        content, change = mutated(good, seed)
        (folder / "person_keypoints_val2017.json").write_text(json.dumps(content))
        code = answers(capsys, change, "validate", tmp_path / "coco", "--workers", "1")
        scored = answers(
            capsys, change, "evaluate", dots / "checkpoint", tmp_path / "coco", "--out", tmp_path / str(seed)
        )
        assert code == 2 or scored == 0, f"validate calls it good and evaluate does not: {change}"
        codes.append(scored)
    assert set(codes) == {0, 2}


@pytest.mark.parametrize("part", PARTS)
def test_boxes_and_results(part: int, dots: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, file = dots / "coco", tmp_path / "changed.json"
    boxes, results = (json.loads((dots / name).read_text()) for name in ("boxes.json", "results.json"))
    truth = root / "annotations" / "person_keypoints_val2017.json"
    of_pictures = [row | {"image_id": f"picture-{row['image_id'] - 100}.png"} for row in boxes]
    named = {"picture-0.png": [[10, 12, 70, 130]], "picture-1.png": [[10, 12, 70, 130, 0.9], [1, 2, 3, 4]]}
    predict = ("predict", root / "val2017", "--checkpoint", dots / "checkpoint", "--boxes", file)
    commands: dict[str, tuple[Any, tuple[str | Path, ...]]] = {
        "evaluated boxes": (boxes, ("evaluate", dots / "checkpoint", root, "--boxes", file)),
        "predicted boxes": (of_pictures, predict),
        "boxes by name": (named, predict),
        "annotations as boxes": (truth_of(root), predict),
        "results": (results, ("evaluate", "--results", file, "--ground-truth", truth)),
        "ground truth": (
            truth_of(root),
            ("evaluate", "--results", dots / "results.json", "--ground-truth", file),
        ),
    }
    codes = []
    for kind, (good, command) in commands.items():
        for seed in range(part * TIMES // 4, (part + 1) * TIMES // 4):
            content, change = mutated(good, seed)
            file.write_text(json.dumps(content))
            out = () if "--results" in command else ("--out", tmp_path / f"{kind}-{seed}")
            codes.append(answers(capsys, f"{kind}: {change}", *command, *out))
    assert set(codes) == {0, 2}
