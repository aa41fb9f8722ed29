"""A URI where a path of this machine is wanted costs one sentence, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_coco import write_coco

from hrnet_core.errors import ConfigError
from hrnet_core.locations import here
from pipelines.cli import main

REFUSED = [
    "draw {uri}",
    "inspect {root} --out {uri}",
    "evaluate runs/w32/best {root} --out {uri}",
    "evaluate runs/w32/best {root} --report {uri}/page.html",
    "evaluate runs/w32/best {root} --measure-modes --out {uri}",
    "evaluate s3://bucket/w32/best {root} --run.storage {uri}",
    "evaluate --results r.json --ground-truth g.json --out {uri}",
    "predict {root} --out {uri}",
    "predict {root} --run.storage {uri} --checkpoint runs/w32/best",
    "import weights.pth {uri} --codec official --input-size 192 256",
    "export runs/w32/best {uri}/model.onnx",
    "reproduce {root} --weights-dir w --boxes b --out {uri}",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco") / "root", {"train2017": [1], "val2017": [1]})


@pytest.mark.parametrize("command", REFUSED)
def test_a_uri_is_refused_where_a_path_is_written(
    command: str,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if command.startswith("inspect"):
        from test_feed import dotted_shards

        root = Path(dotted_shards(tmp_path / "shards", {"train2017": 2, "val2017": 2}).folder)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(command.format(uri="s3://bucket/folder", root=root).split()) == 2
    told = capsys.readouterr().err.strip()
    assert "s3:/" in told
    assert "not to a bucket" in told
    assert "\n" not in told
    assert list(Path().iterdir()) == [], "nothing was made"


@pytest.mark.parametrize(
    "verb", ["promote", "evaluate runs/w32/best {root} --out out", "train tiny --data.shards x"]
)
def test_mlflows_database_cannot_lie_in_a_bucket(
    verb: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main([*verb.format(root=root).split(), "--run.storage", "s3://bucket/runs"]) == 2
    told = capsys.readouterr().err.strip()
    assert [
        word for word in ("MLFLOW_TRACKING_URI", "--track.uri", "s3://bucket/runs") if word not in told
    ] == []
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_lost_a_slash_is_still_a_uri() -> None:
    """As pathlib leaves it."""
    with pytest.raises(ConfigError, match="--out s3:/bucket/x"):
        here(Path("s3://bucket/x"), "--out")
    for path in ("a/b", "/a:/b", "./s3:/x", "~/a"):
        assert here(path, "--out") == Path(path)
