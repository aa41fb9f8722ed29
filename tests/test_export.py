"""`hrnet export` and `--measure-modes`: ONNX gives the answers of torch, every mode has its figures."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from dots import SMALL, rows_here, truth_of, write_solved

from hrnet_core.checkpoint import CheckpointSpec, load_checkpoint, read_spec
from hrnet_core.errors import CheckpointError, ConfigError
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.modes import MODES
from hrnet_core.onnx_file import export_onnx
from hrnet_core.predictor import PosePredictor
from hrnet_core.skeleton import COCO17
from pipelines import measure_modes as measure_module
from pipelines.cli import main
from pipelines.config import EvaluateSettings
from pipelines.export import crop_px, export, first_people
from pipelines.measure_modes import keypoint_differences, measure_modes, time_modes
from pipelines.poses.oks_ap import evaluate_results
from pipelines.sources.evaluation_set import read_evaluation_set

CODEC = HeatmapCodec("official", (96, 128))


@pytest.fixture(scope="module")
def dots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A COCO root with 12 people and a checkpoint that finds most of them."""
    return write_solved(tmp_path_factory.mktemp("dots"), CODEC)


@pytest.fixture
def checkpoint(dots: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(dots[1], tmp_path / "checkpoint"))


def test_the_file_gives_torchs_answers(
    dots: tuple[Path, Path], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(checkpoint), "--coco", str(dots[0]), "--people", "5"]) == 0
    said = capsys.readouterr().out
    assert "6 people" in said, "whole photographs of two"
    assert "difference +0.0000" in said
    assert sorted(p.name for p in checkpoint.iterdir()) == [
        "checkpoint.json", "model.onnx", "model.safetensors", "selftest.safetensors",
    ]  # fmt: skip
    # Without any code of ours: the file on a real input, against torch.
    model, spec = load_checkpoint(checkpoint)
    images = torch.randn(3, 3, 128, 96, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(checkpoint / "model.onnx")
    (heatmaps,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = model(images).numpy()
    assert np.abs(heatmaps - expected).max() < 1e-4 * np.ptp(expected)
    assert PosePredictor.load(checkpoint, device="cpu", mode="onnx").spec == spec


@pytest.mark.slow
def test_another_place_and_no_coco(checkpoint: Path, tmp_path: Path) -> None:
    parity = export(checkpoint, tmp_path / "deep" / "pose.onnx")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["pose.onnx"]
    assert not (checkpoint / "model.onnx").exists()
    assert parity.ap is None
    assert "name a COCO folder" in str(parity)
    assert 0 < parity.heatmap < 1e-4 * parity.spread
    assert parity.crops == 4


def test_a_file_that_computes_something_else_is_not_left(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another(model: Any, spec: CheckpointSpec) -> bytes:
        with torch.no_grad():
            model.final_layer.bias[3] += 0.1
        content = export_onnx(model, spec)
        with torch.no_grad():
            model.final_layer.bias[3] -= 0.1
        return content

    monkeypatch.setattr("hrnet_core.onnx_file.export_onnx", another)
    with pytest.raises(ConfigError, match="do not compute the same network"):
        export(checkpoint)
    assert not list(checkpoint.glob("*.onnx*"))
    assert not list(checkpoint.glob(".*"))


def test_what_export_refuses(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        export(tmp_path / "none")
    with pytest.raises(ConfigError, match="name the file to write"):
        export("models:/hrnet-pose@champion")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        export(checkpoint, tmp_path / "file" / "x.onnx")
    assert main(["export", str(tmp_path / "none")]) == 2
    assert "no such checkpoint folder" in capsys.readouterr().err


def test_a_slice_is_whole_photographs_with_their_truth(dots: tuple[Path, Path]) -> None:
    everyone = read_evaluation_set(dots[0], "val2017", None, EvaluateSettings(), COCO17)
    some = first_people(everyone, 3)
    assert [p.image_id for p, _ in some.photos] == [100, 101]
    assert some.split.truth.image_ids.tolist() == [100, 101]
    assert some.split.truth.people.ann_id.tolist() == [1, 2, 3, 4]
    assert len(first_people(everyone, 999).photos) == 6
    assert len(everyone.split.truth.people) == len(truth_of(dots[0])["annotations"])
    # CrowdPose's figures by crowding are of the whole file; the slice is scored without them.
    crowded = replace(everyone.split.truth, crowd_index=np.full(6, 0.5))
    some = first_people(replace(everyone, split=replace(everyone.split, truth=crowded)), 3)
    assert "AP" in evaluate_results([], some.split.truth)


def test_distances_are_of_the_crop() -> None:
    """A box of 60 x 80 padded to 75 x 100 px fills a crop of 96 x 128: 1.28 crop px a photo px."""
    spec = CheckpointSpec(SMALL, CODEC)
    one = np.zeros((1, 17, 2))
    distances = crop_px(spec, one, one + np.array([3, 4]), np.array([[10, 10, 60, 80]]))
    assert distances == pytest.approx(np.full((1, 17), 5 * 1.28))


# --- all modes ------------------------------------------------------------------------------------------


def test_differences_of_two_results_files(tmp_path: Path) -> None:
    """Photograph 2 has another number of people in the second file: it cannot be compared."""

    def person(image_id: int, x: float) -> dict[str, Any]:
        return {"image_id": image_id, "keypoints": [x, 1, 0.5, x, 2, 0.5]}

    (tmp_path / "a.json").write_text(json.dumps([person(1, 0), person(1, 10), person(2, 0)]))
    (tmp_path / "b.json").write_text(json.dumps([person(1, 3), person(1, 10), person(2, 0), person(2, 9)]))
    assert keypoint_differences(tmp_path / "a.json", tmp_path / "b.json") == {
        "keypoint_px_mean": 1.5, "keypoint_px_max": 3.0, "people_compared": 2,
    }  # fmt: skip


def test_measured_modes_stand_in_the_checkpoint(
    dots: tuple[Path, Path], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process. The figures are those of evaluations, and auto follows them."""
    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", rows_here)

    def timed(folder: Path, modes: Any, settings: EvaluateSettings) -> Any:
        return time_modes(*load_checkpoint(folder), modes, "cpu", settings.threads)

    monkeypatch.setattr(measure_module, "_timed_on_ray", timed)
    monkeypatch.setattr(measure_module, "ray_session", lambda _: contextlib.nullcontext())
    monkeypatch.setenv("CXX", "no-such-compiler")
    threads = torch.get_num_threads()
    try:
        modes = ["channels_last", "bfloat16", "compiled", "compiled_bfloat16"]
        measured = measure_modes(checkpoint, dots[0], out=tmp_path / "out", modes=modes)
    finally:
        torch.set_num_threads(threads)
    assert list(measured.figures) == ["float32", "channels_last", "bfloat16"]
    assert set(measured.left_out) == {"compiled", "compiled_bfloat16"}
    assert read_spec(checkpoint).modes == {"cpu": measured.figures}
    for mode, figures in measured.figures.items():
        file = json.loads((tmp_path / "out" / mode / "evaluation.json").read_text())
        assert file["protocol"]["mode"] == mode
        assert figures["ap"] == file["stats"]["AP"]
        assert figures["ap_difference"] == figures["ap"] - measured.figures["float32"]["ap"]
        assert 0 < figures["ms_per_crop"] < 1000
        assert figures["people"] == figures["people_compared"] == 12
    assert measured.figures["float32"]["keypoint_px_max"] == 0
    assert measured.figures["bfloat16"]["keypoint_px_max"] > 0
    assert measured.chosen in MODES
    assert PosePredictor.load(checkpoint, device="cpu").mode == measured.chosen
    assert f"mode auto on cpu is now {measured.chosen}" in str(measured)
    assert "no compiler" in str(measured)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_on_ray_and_on_the_command_line(
    dots: tuple[Path, Path], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["evaluate", str(checkpoint), str(dots[0]), "--measure-modes", "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    out = capsys.readouterr().out
    measured = read_spec(checkpoint).modes["cpu"]
    assert set(measured) == set(MODES)
    for mode in MODES:
        assert f"\n{mode} " in out
    assert abs(measured["compiled"]["ap_difference"]) < 0.001
    assert abs(measured["onnx"]["ap_difference"]) < 0.001


def test_evaluating_in_a_mode_that_cannot_run_costs_a_paragraph(
    dots: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before Ray starts: an actor that dies in its constructor would leave pages of Ray's tracebacks."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("pipelines.poses.units.ray_session", lambda _: pytest.fail("Ray was started"))
    argv = ["evaluate", str(dots[1]), str(dots[0]), "--evaluate.mode", "compiled", "--out", str(tmp_path)]
    assert main(argv) == 2
    assert "--evaluate.mode compiled cannot run here: torch.compile builds C++" in capsys.readouterr().err


def test_the_registrys_files_are_left_alone(dots: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder of this machine"):
        measure_modes("models:/hrnet-pose@champion", dots[0], out=tmp_path)
