"""Where no URI can be: MLflow's own database. What verbs do in buckets: test_verbs_in_bucket.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_coco import write_coco

from pipelines.cli import main


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco") / "root", {"train2017": [1], "val2017": [1]})


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
