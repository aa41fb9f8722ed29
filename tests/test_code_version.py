"""One text says which code it was, whoever writes it down."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.process import code_version as module
from pipelines.process.code_version import code_version

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    code_version.cache_clear()
    yield
    code_version.cache_clear()


def git(folder: Path, *words: str) -> str:
    author = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", str(folder), *author, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_checkout_has_its_commit_and_says_where_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "a")
    git(tmp_path, "tag", "-am", "a", "v9")
    number, commit = importlib.metadata.version("hrnet-ray"), git(tmp_path, "rev-parse", "--short", "HEAD")
    assert code_version() == f"{number}+g{commit}"
    (tmp_path / "a").write_text("2")
    assert code_version() == f"{number}+g{commit}", "asked once a process: shards of a run are one code's"
    code_version.cache_clear()
    assert code_version() == f"{number}+g{commit}-dirty"


def test_an_installed_package_has_no_commit_of_the_project_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-qm", "theirs", "--allow-empty")
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(module, "ROOT", tmp_path / "site-packages")
    assert code_version() == importlib.metadata.version("hrnet-ray")


def test_a_source_tree_that_is_not_installed_has_its_number_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    installed = importlib.metadata.version("hrnet-ray")
    monkeypatch.setattr(module, "version", absent)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert code_version() == "unknown"
    code_version.cache_clear()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert code_version() == installed


def test_nobody_else_asks_for_the_version_of_the_package() -> None:
    """Evaluations, predictions and shards said 0.1.0 where the checkpoint beside them named a commit."""
    files = [file for room in ("hrnet_core", "pipelines", "serve") for file in (ROOT / room).rglob("*.py")]
    assert [file.name for file in files if '"hrnet-ray"' in file.read_text()] == ["code_version.py"]
