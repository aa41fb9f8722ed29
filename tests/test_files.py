"""A file is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hrnet_core.files import write_whole


def test_a_file_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    write_whole(file, b"old")

    def full(_: int) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_whole(file, b"new")
    assert file.read_bytes() == b"old"
    write_whole(file, b"new")
    assert file.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.json"]


def test_there_is_one_way_to_put_a_file_in_place() -> None:
    root = Path(__file__).parents[1]
    files = [file for room in ("hrnet_core", "pipelines", "serve") for file in (root / room).rglob("*.py")]
    stating = {file.name for file in files if "fsync(" in file.read_text()}
    assert stating == {"files.py"}
