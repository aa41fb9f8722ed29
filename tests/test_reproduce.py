"""`hrnet reproduce` on a stand-in of the published shape: a small weights file under the published key names,
a COCO root of dots and a detector's file. The truth is tests/published_protocol.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dots import fitted_network, rows_here, write_coco, write_detections
from published_protocol import published_stats

from hrnet_core.errors import ConfigError, DataError
from hrnet_core.heatmaps import HeatmapCodec
from pipelines.poses.oks_ap import STATS
from pipelines.reproduce import PUBLISHED, Published, Reproduction, reproduce
from pipelines.settings.config import EvaluateSettings
from pipelines.settings.config_file import load_config


def test_the_published_table_is_the_papers() -> None:
    """arXiv:1902.09212, table 1 and the README's: AP .744 .758 .751 .763 with AR .798 .809 .804 .812."""
    assert [p.stats["AP"] for p in PUBLISHED.values()] == [0.744, 0.758, 0.751, 0.763]
    assert [p.stats["AR"] for p in PUBLISHED.values()] == [0.798, 0.809, 0.804, 0.812]
    for name, row in PUBLISHED.items():
        width, height = load_config(row.config).data.input_size
        assert row.file == f"pose_hrnet_{name}.pth"
        assert name.endswith(f"_{height}x{width}")


def test_figures_of_the_published_protocol_are_reproduced_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", rows_here)
    root = write_coco(tmp_path / "coco")
    boxes = write_detections(root, tmp_path / "boxes.json")
    network = fitted_network(root, HeatmapCodec("official", (96, 128)))
    torch.save(network.state_dict(), tmp_path / "pose_hrnet_small.pth")
    config = tmp_path / "small.yaml"
    config.write_text("data: {input_size: [96, 128], codec: official}")
    expected = dict(zip(STATS, published_stats(network, root, boxes, (96, 128)), strict=True))
    assert 0.1 < expected["AP"] < 0.9  # neither nothing nor everything is right

    found = reproduce(
        root,
        tmp_path,
        boxes,
        out=tmp_path / "out",
        settings=EvaluateSettings(batch_size=4, flip_test=False),  # the protocol decides on the flip test
        published={"small": Published("pose_hrnet_small.pth", str(config), expected)},
    )
    assert found.ours["small"].stats == pytest.approx(expected, abs=1e-9)
    assert found.ours["small"].metric == "eval_det"
    assert found.passed
    printed = capsys.readouterr().out
    assert f"{expected['AP']:8.4f}" in printed
    assert "differs by more" not in printed
    assert (tmp_path / "out" / "small" / "evaluation" / "results.json").is_file()

    for distance, agrees in ((0.0019, True), (-0.0019, True), (0.0021, False), (-0.0021, False)):
        elsewhere = {**expected, "AP": expected["AP"] + distance}
        rows = {"small": Published("pose_hrnet_small.pth", str(config), elsewhere)}
        other = Reproduction(rows, found.ours)
        assert other.passed is agrees
        assert ("AP differs by more than 0.002" in other.table()) is not agrees


def test_missing_files_are_named_with_their_source(tmp_path: Path) -> None:
    (tmp_path / "pose_hrnet_w32_256x192.pth").touch()
    with pytest.raises(DataError) as caught:
        reproduce(tmp_path, tmp_path, tmp_path / "boxes.json", models=["w32_256x192", "w48_384x288"])
    text = str(caught.value)
    assert text.startswith("2 files are missing")
    assert "pose_hrnet_w48_384x288.pth (weights of w48_384x288, in the model zoo of leoxiaobin/" in text
    assert "COCO_val2017_detections_AP_H_56_person.json" in text
    assert "pose_hrnet_w32_256x192.pth" not in text
    with pytest.raises(ConfigError, match="no w64; there are w32_256x192, "):
        reproduce(tmp_path, tmp_path, tmp_path / "boxes.json", models=["w64"])
