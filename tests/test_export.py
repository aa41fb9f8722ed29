"""`hrnet export` and `--measure-modes`: ONNX gives the answers of torch, every mode has its figures."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from dots import SMALL, rows_here, truth_of, write_solved

from hrnet_core.checkpoint import CheckpointSpec, load_checkpoint, read_spec
from hrnet_core.errors import CheckpointError, ConfigError, DataError
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.modes import MODES, unusable
from hrnet_core.onnx_file import export_float16, export_onnx
from hrnet_core.predictor import PosePredictor
from hrnet_core.skeleton import COCO17
from pipelines import measure_modes as measure_module
from pipelines.cli import main
from pipelines.export import crop_px, export, first_people, recorded_crops
from pipelines.measure_modes import keypoint_differences, measure_modes
from pipelines.poses.oks_ap import evaluate_results
from pipelines.poses.timing import AtSize, Speed, Timings
from pipelines.settings.config import EvaluateSettings
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
    assert 0 < parity.cell < 1e-4 * parity.spread
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
    with pytest.raises(ConfigError, match="does not compute the same network"):
        export(checkpoint)
    assert not list(checkpoint.glob("*.onnx*"))
    assert not list(checkpoint.glob(".*"))


@pytest.mark.parametrize("codec", ["official", "udp"])
def test_a_decoded_file_is_read_by_the_lines_of_the_docs_without_torch(codec: str, tmp_path: Path) -> None:
    """In a process where torch cannot be imported; against PosePredictor, on the same photograph."""
    root, checkpoint = write_solved(tmp_path, HeatmapCodec(codec, (96, 128)))  # type: ignore[arg-type]
    argv = ["export", str(checkpoint), str(tmp_path / "pose.onnx"), "--format", "onnx_decoded"]
    assert main([*argv, "--coco", str(root), "--people", "5"]) == 0
    photo = Path(shutil.copy(root / "val2017" / "picture-2.png", tmp_path / "photo.png"))
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    lines, _ = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)  # the other is of test_ncnn.py
    printed = "print(json.dumps([points.tolist(), scores[0].tolist()]))"
    code = f"import sys; sys.modules['torch'] = None\n{lines}\n{printed}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    points, scores = map(np.array, json.loads(done.stdout))
    (poses,) = PosePredictor.load(checkpoint, device="cpu", mode="float32")(photo, [[10, 12, 70, 130]])
    assert np.abs(points - poses.keypoints.data[0, :, :2]).max() < 0.01
    assert np.abs(scores - poses.keypoints.data[0, :, 2]).max() < 1e-4


@pytest.mark.parametrize("flip_test", [True, False])
def test_a_decoded_file_says_whether_it_mirrors(checkpoint: Path, tmp_path: Path, flip_test: bool) -> None:
    settings = EvaluateSettings(flip_test=flip_test)
    parity = export(checkpoint, tmp_path / "pose.onnx", format="onnx_decoded", settings=settings)
    assert "scores     largest difference" in str(parity)
    session = onnxruntime.InferenceSession(tmp_path / "pose.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["hrnet"])["flip_test"] is flip_test
    assert [n.name for n in session.get_outputs()] == ["keypoints", "scores"]
    predictor = PosePredictor.load(checkpoint, device="cpu", mode="float32")
    crops = recorded_crops(checkpoint)
    for count in (1, 4):
        keypoints, scores = session.run(None, {"crops": crops[:count]})
        expected, maxima = predictor.predict_crops(crops[:count], flip_test)
        assert np.abs(keypoints - expected).max() < 0.01
        assert np.abs(scores - maxima).max() < 1e-4 * np.ptp(predictor.heatmaps(crops))


def test_float16_is_near_and_half_the_size(checkpoint: Path, tmp_path: Path) -> None:
    parity = export(checkpoint, tmp_path / "half.onnx", format="onnx_float16")
    whole = export(checkpoint)
    assert parity.megabytes < 0.6 * whole.megabytes
    assert 1e-5 < parity.cell / parity.spread < 5e-3, "float16 that equals float32 is float32"


def test_an_ir_carries_the_same(checkpoint: Path, tmp_path: Path) -> None:
    parity = export(checkpoint, tmp_path / "pose.xml", format="openvino")
    assert sorted(p.name for p in tmp_path.glob("pose.*")) == ["pose.bin", "pose.xml"]
    assert parity.cell < 1e-5 * parity.spread
    # Without any code of ours.
    network = openvino.Core().read_model(tmp_path / "pose.xml")
    spec = json.loads(json.dumps(read_spec(checkpoint).as_dict()))
    assert json.loads(network.get_rt_info(["hrnet"]).value) == {k: v for k, v in spec.items() if k != "modes"}
    assert network.input(0).any_name == "images"
    assert network.input(0).partial_shape.to_string() == "[?,3,128,96]"


def test_a_file_that_gives_nan_is_not_left(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights beyond float16's largest number."""

    def overflowing(model: Any, spec: CheckpointSpec) -> bytes:
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.conv1.weight.mul_(1e6)
            model.conv2.weight.mul_(-1e6)
        return export_float16(model, spec)

    monkeypatch.setattr("hrnet_core.onnx_file.export_float16", overflowing)
    with pytest.raises(ConfigError, match=r"answers differ by nan.*Nothing was written"):
        export(checkpoint, tmp_path / "half.onnx", format="onnx_float16")
    assert not list(tmp_path.glob("*.onnx*"))


def test_where_a_format_goes(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="OUT --format onnx_decoded: no mode runs from"):
        export(checkpoint, format="onnx_decoded")
    with pytest.raises(ConfigError, match=r"pose\.onnx: a file of format openvino ends in \.xml"):
        export(checkpoint, tmp_path / "pose.onnx", format="openvino")


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


def test_a_coco_folder_that_is_none_is_refused_before_the_export(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.export._both", lambda *_: pytest.fail("the network was exported"))
    with pytest.raises(DataError, match="nowhere is not a folder"):
        export(checkpoint, tmp_path / "x.onnx", coco_root=tmp_path / "nowhere")
    assert not (tmp_path / "x.onnx").exists()


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
    """In this process, with times made up. AP and keypoints are of evaluations, and auto follows both."""
    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", rows_here)
    crop = {"float32": 0.009, "channels_last": 0.007, "bfloat16": 0.008}

    def timed(folder: Path, modes: Any, settings: EvaluateSettings) -> Any:
        sizes = {m: {n: AtSize([crop[m] * n, 1.0], [2.0]) for n in (1, 16)} for m in modes}
        return Timings({m: Speed(2.5, sizes[m], "batch 32: slow") for m in modes}), "Some CPU"

    monkeypatch.setattr(measure_module, "_timed_on_ray", timed)
    monkeypatch.setattr(measure_module, "ray_session", lambda _, quiet: contextlib.nullcontext())
    monkeypatch.setenv("CXX", "no-such-compiler")
    modes = ["channels_last", "bfloat16", "compiled", "compiled_bfloat16", "openvino_int8"]
    measured = measure_modes(checkpoint, dots[0], out=tmp_path / "out", modes=modes)
    assert list(measured.figures) == ["float32", "channels_last", "bfloat16"]
    assert set(measured.left_out) == {"compiled", "compiled_bfloat16", "openvino_int8"}
    assert "hrnet export CHECKPOINT --format openvino_int8" in measured.left_out["openvino_int8"]
    assert read_spec(checkpoint).modes == {"cpu": measured.figures}
    for mode, figures in measured.figures.items():
        file = json.loads((tmp_path / "out" / mode / "evaluation.json").read_text())
        assert file["protocol"]["mode"] == mode
        assert figures["ap"] == file["stats"]["AP"]
        assert figures["ap_difference"] == figures["ap"] - measured.figures["float32"]["ap"]
        assert figures["ms_per_crop"] == pytest.approx(1000 * crop[mode]), "the fastest call"
        assert figures["ms_per_crop_alone"] == pytest.approx(1000 * crop[mode])
        assert (figures["measured_on"], figures["threads"]) == ("Some CPU", 1)
        assert figures["speed"]["batch_size"] == [1, 16]
        assert figures["speed"]["people_per_second_flip"] == [0.5, 8.0]
        assert figures["people"] == figures["people_compared"] == 12
    assert measured.figures["float32"]["keypoint_px_max"] == 0
    assert measured.figures["bfloat16"]["keypoint_px_max"] > 0
    # On 12 people bfloat16 may be beyond .001 AP; channels_last is the fastest that cannot be.
    assert measured.chosen == "channels_last"
    assert PosePredictor.load(checkpoint, device="cpu").mode == measured.chosen
    assert f"mode auto on cpu is now {measured.chosen}" in str(measured)
    assert "no compiler" in str(measured)
    assert "- `bfloat16`, batch 32: slow" in str(measured)


def test_a_mode_without_its_batches_of_16_is_not_recorded(
    dots: tuple[Path, Path], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that did not suffice is no measurement that auto could go by."""
    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", rows_here)
    whole = {1: AtSize([0.01], [0.02]), 16: AtSize([0.1], [0.2])}
    half = Speed(1.0, {1: AtSize([0.01], [0.02])}, "batch 2 and larger: killed")
    found = Timings({"float32": Speed(1.0, whole), "channels_last": half})
    monkeypatch.setattr(measure_module, "_timed_on_ray", lambda *_: (found, "Some CPU"))
    monkeypatch.setattr(measure_module, "ray_session", lambda _, quiet: contextlib.nullcontext())
    measured = measure_modes(checkpoint, dots[0], out=tmp_path / "out", modes=["channels_last"])
    assert list(read_spec(checkpoint).modes["cpu"]) == ["float32"]
    assert measured.left_out == {"channels_last": "batch 2 and larger: killed"}
    assert "channels_last     not measured: batch 2 and larger: killed" in str(measured)


def test_a_folders_files_are_timed_wherever_they_arrive(checkpoint: Path) -> None:
    """What the Ray task does: the folder may lie on another machine."""
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    timed: dict[str, Any] = {}

    def time_here(folder: str, modes: Any, device: str, threads: int, always: int) -> Timings:
        timed.update(files={f.name: f.read_bytes() for f in Path(folder).iterdir()}, always=always)
        return Timings()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_module, "time_modes", time_here)
        _, measured_on = measure_module._time_files(files, ["float32"], "cpu", 1)
    assert timed == {"files": files, "always": 16}
    assert measured_on == torch.cpu.get_capabilities()["cpu_name"]


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
    usable = {mode for mode in MODES if not unusable(mode, "cpu")}
    assert set(measured) == usable > {"onnx", "openvino", "ncnn"}
    for mode in MODES:
        assert f"\n{mode} " in out
    for mode in measured:
        assert measured[mode]["speed"]["batch_size"][:5] == [1, 2, 4, 8, 16]
        assert measured[mode]["speed"]["calls"][0] == 100
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
    monkeypatch.setattr("pipelines.poses.units.ray_session", lambda _, quiet: pytest.fail("Ray was started"))
    argv = ["evaluate", str(dots[1]), str(dots[0]), "--evaluate.mode", "compiled", "--out", str(tmp_path)]
    assert main(argv) == 2
    assert "--evaluate.mode compiled cannot run here: torch.compile builds C++" in capsys.readouterr().err


def test_the_registrys_files_are_left_alone(dots: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a version of the registry"):
        measure_modes("models:/hrnet-pose@champion", dots[0], out=tmp_path)
