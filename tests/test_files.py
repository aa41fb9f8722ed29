"""A file is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hrnet_core.files import whole_file


def stop_half_way(file: Path) -> None:
    with whole_file(file) as part:
        part.write_text("half of the n")
        raise ZeroDivisionError


def test_a_file_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    with whole_file(file) as part:
        assert part.suffix == ".png", "matplotlib and OpenCV write what a name ends in"
        part.write_text("old")
        assert not file.exists()
    with pytest.raises(ZeroDivisionError):
        stop_half_way(file)
    assert file.read_text() == "old"

    def full(_: int) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"), whole_file(file) as part:
            part.write_text("new")
    assert file.read_text() == "old"
    with whole_file(file) as part:
        part.write_text("new")
    assert file.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_there_is_one_way_to_put_a_file_in_place() -> None:
    source = {file.name: file.read_text() for file in (Path(__file__).parents[1] / "hrnet_core").glob("*.py")}
    assert {name for name, text in source.items() if "fsync" in text or "os.replace" in text} == {"files.py"}
