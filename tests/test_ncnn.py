"""Mode ncnn and its files: float32's heatmaps, also from threads, or a sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from dots import rows_here, write_solved
from numpy.typing import NDArray
from test_predictor import EXACT, assert_undisturbed, forked

from hrnet_core.checkpoint import EXPORTED, NCNN, load_checkpoint, read_exported, read_spec, save_checkpoint
from hrnet_core.errors import CheckpointError, ConfigError
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.modes import fastest_exact, files_of, unusable
from hrnet_core.ncnn_file import export_ncnn, open_ncnn
from hrnet_core.predictor import PosePredictor
from pipelines.cli import main
from pipelines.export import export
from serve.model import load_model
from serve.settings import ModelChoice, ServeArgs

PARAM, BIN, JSON = NCNN


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A COCO root with 12 people and a checkpoint that finds most of them, with ncnn's files."""
    root, checkpoint = write_solved(tmp_path_factory.mktemp("ncnn"), HeatmapCodec("official", (96, 128)))
    parity = export(checkpoint, format="ncnn")
    assert "ncnn against torch in float32, 4 crops" in str(parity)
    assert parity.file == str(checkpoint / PARAM)
    assert 0 < parity.cell < EXACT * parity.spread
    return root, checkpoint


@pytest.fixture
def checkpoint(solved: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(solved[1], tmp_path / "checkpoint"))


def noise(people: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (people, 128, 96, 3), dtype=np.uint8)


def predictor_of(folder: Path, mode: str = "ncnn") -> PosePredictor:
    return PosePredictor.load(folder, device="cpu", mode=mode)


# --- answers ----------------------------------------------------------------------------------------------


def test_heatmaps_are_float32s_whatever_the_batch(solved: tuple[Path, Path]) -> None:
    exact, other = predictor_of(solved[1], "float32"), predictor_of(solved[1])
    crops = noise(5)
    for flip in (False, True):
        truth = exact.heatmaps(crops, flip)
        whole = other.heatmaps(crops, flip)
        assert whole.dtype == np.float32
        assert np.abs(whole - truth).max() < EXACT * np.ptp(truth)
        for size in (1, 2, 3):
            assert np.array_equal(other.heatmaps(crops, flip, batch_size=size), whole), (
                "one by one in any batch"
            )


def test_several_threads_and_predictors_get_the_answers_of_one(solved: tuple[Path, Path]) -> None:
    predictors = [predictor_of(solved[1]) for _ in range(2)]
    asked = [(predictors[i % 2], noise(1 + i, seed=i)) for i in range(4)]
    assert_undisturbed(asked)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_with_one_thread_is_told_to_load_again(solved: tuple[Path, Path]) -> None:
    """It computes on as many threads as there were when it was loaded, and waited for them for ever."""
    *_, ended, along, own, again_ended = forked(solved[1], "ncnn")
    assert along.startswith("ConfigError mode ncnn was loaded on 2 threads in the process")
    assert (ended, own, again_ended) == ("ended", "1", "ended")


def test_answers_are_not_of_a_buffer_that_is_used_again(solved: tuple[Path, Path]) -> None:
    network = open_ncnn(read_exported(solved[1], NCNN), read_spec(solved[1]))
    first = network(torch.zeros(1, 3, 128, 96))
    kept = first.clone()
    network(torch.ones(1, 3, 128, 96))
    assert torch.equal(first, kept)
    # Images that do not lie one after the other in memory.
    images = torch.randn(2, 3, 128, 96, generator=torch.Generator().manual_seed(0))
    strided = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(network(strided), network(images))


@pytest.mark.parametrize("threads", [1, 2])
def test_as_many_threads_as_torch(
    threads: int, solved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ncnn

    class Watched(ncnn.Net):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            nets.append(self)

    nets: list[Any] = []
    monkeypatch.setattr(ncnn, "Net", Watched)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    open_ncnn(read_exported(solved[1], NCNN), read_spec(solved[1]))
    assert [net.opt.num_threads for net in nets] == [threads]


def test_evaluating_in_the_mode(
    solved: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", rows_here)
    aps = []
    for mode in ("float32", "ncnn"):
        argv = ["evaluate", str(solved[1]), str(solved[0]), "--evaluate.mode", mode]
        assert main([*argv, "--out", str(tmp_path / mode)]) == 0
        file = json.loads((tmp_path / mode / "evaluation.json").read_text())
        assert file["protocol"]["mode"] == mode
        aps.append(file["stats"]["AP"])
    assert aps[0] > 0.3
    assert abs(aps[1] - aps[0]) <= 1e-9


def test_the_endpoints_predictor(solved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """From a URI: the files come along, and nothing is made."""
    monkeypatch.setattr("hrnet_core.modes.export_ncnn", lambda *_: pytest.fail("the files were made again"))
    served = load_model(
        ModelChoice(checkpoint=solved[1].as_uri()), ServeArgs(checkpoint="", num_cpus=1, mode="ncnn")
    )
    assert served.info().mode == "ncnn"
    crops = noise(2)
    alone = predictor_of(solved[1]).predict_crops(crops)[0]
    assert np.array_equal(served.predictor.predict_crops(crops)[0], alone)


# --- files ------------------------------------------------------------------------------------------------


def test_the_files_say_what_they_are(checkpoint: Path) -> None:
    told = json.loads((checkpoint / JSON).read_text())
    spec = json.loads(json.dumps(read_spec(checkpoint).as_dict()))
    assert told.keys() == spec.keys() - {"modes"} | {"param_sha256", "bin_sha256"}
    assert all(told[name] == value for name, value in spec.items() if name != "modes")
    # Saving other weights there takes them away.
    model, old = load_checkpoint(checkpoint)
    with torch.no_grad():
        model.final_layer.bias.add_(1)
    save_checkpoint(checkpoint, model, old)
    assert not read_exported(checkpoint)


def test_without_files_they_are_made(checkpoint: Path) -> None:
    crops = noise(2)
    with_files = predictor_of(checkpoint).heatmaps(crops)
    for name in NCNN:
        (checkpoint / name).unlink()
    assert np.array_equal(predictor_of(checkpoint).heatmaps(crops), with_files)
    assert not read_exported(checkpoint)


def test_only_the_files_of_the_mode_are_read(solved: tuple[Path, Path]) -> None:
    assert files_of("ncnn", {}) == set(NCNN) <= set(EXPORTED)
    assert files_of("auto", {"cpu": {"ncnn": {}}}) == set(NCNN)
    assert set(read_exported(solved[1])) == set(NCNN)


def test_a_file_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pose\.param: a file of format ncnn ends in \.ncnn\.param\."):
        export(checkpoint, tmp_path / "pose.param", format="ncnn")
    parity = export(checkpoint, tmp_path / "pose.ncnn.param", format="ncnn")
    assert sorted(file.name for file in tmp_path.glob("pose.*")) == [
        "pose.ncnn.bin", "pose.ncnn.json", "pose.ncnn.param",
    ]  # fmt: skip
    assert parity.megabytes == sum(file.stat().st_size for file in tmp_path.glob("pose.*")) / 2**20


def test_the_files_are_read_by_the_lines_of_the_docs_without_torch(checkpoint: Path, tmp_path: Path) -> None:
    for name in NCNN:
        shutil.copy(checkpoint / name, tmp_path / name.replace("model", "pose"))
    crops = noise(1)
    cv2.imwrite(str(tmp_path / "crop.png"), crops[0, ..., ::-1])
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    (lines,) = (each for each in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "ncnn" in each)
    code = f"import sys; sys.modules['torch'] = None\n{lines}\nnp.save('heatmaps.npy', heatmaps)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    truth = predictor_of(checkpoint, "float32").heatmaps(crops, flip_test=False)
    assert np.abs(np.load(tmp_path / "heatmaps.npy") - truth[0]).max() < EXACT * np.ptp(truth)


# --- refusals ---------------------------------------------------------------------------------------------

AGAIN = r"Write it again: hrnet export CHECKPOINT --format ncnn\."


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        (BIN, lambda old: old[: len(old) // 2], "damaged, or not the one"),
        (BIN, lambda old: old[:-1], "damaged, or not the one"),
        (BIN, lambda old: b"", "damaged, or not the one"),
        (BIN, lambda old: old[:500] + bytes([old[500] ^ 1]) + old[501:], "damaged, or not the one"),
        (PARAM, lambda old: old[: len(old) // 2], "damaged, or not the one"),
        (PARAM, lambda old: old.replace(b"0=17", b"0=18"), "damaged, or not the one"),
        (JSON, lambda old: old[: len(old) // 2], "damaged, it does not say"),
        (JSON, lambda old: b"[]", "damaged, it does not say"),
        (JSON, lambda old: b"{}", "damaged, it does not say"),
        (JSON, lambda old: b"\xff\xfe", "damaged, it does not say"),
    ],
)
def test_a_damaged_file_is_refused(checkpoint: Path, name: str, damage: Any, says: str) -> None:
    old = (checkpoint / name).read_bytes()
    assert damage(old) != old
    (checkpoint / name).write_bytes(damage(old))
    with pytest.raises(CheckpointError, match=rf"^{re.escape(name)}: {says}.* {AGAIN}$"):
        predictor_of(checkpoint)


@pytest.mark.parametrize("gone", NCNN)
def test_a_part_of_the_files_is_refused(checkpoint: Path, gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name, also where pnnx is not installed, which nobody needs for it."""
    (checkpoint / gone).unlink()
    without(monkeypatch, "pnnx")
    with pytest.raises(CheckpointError, match=rf"^{re.escape(gone)}: not there, beside .*\. {AGAIN}$"):
        predictor_of(checkpoint)


def test_files_of_other_weights_are_refused(checkpoint: Path) -> None:
    """All of them, and the .bin alone, which is as long as the right one."""
    model, spec = load_checkpoint(checkpoint)
    files = read_exported(checkpoint)
    with pytest.raises(CheckpointError, match=rf"made from weights .*are 000000000000\. {AGAIN}"):
        PosePredictor(model, replace(spec, weights_sha256="0" * 64), "cpu", "ncnn", files)
    with torch.no_grad():
        model.final_layer.bias.add_(1)
    other = export_ncnn(model, spec)[1]
    assert len(other) == len(files[BIN])
    with pytest.raises(CheckpointError, match=rf"{re.escape(BIN)}: damaged, or not the one"):
        PosePredictor(model, spec, "cpu", "ncnn", files | {BIN: other})


def test_files_that_this_ncnn_cannot_open_are_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written whole, with a layer of another version."""
    import hrnet_core.ncnn_file as module

    model, spec = load_checkpoint(checkpoint)
    convert = module._convert

    def another(*given: Any) -> tuple[bytes, bytes]:
        param, weights = convert(*given)
        return param.replace(b"Convolution ", b"Convolusion "), weights

    monkeypatch.setattr(module, "_convert", another)
    with pytest.raises(CheckpointError, match=r"model\.ncnn\.param: this version of ncnn cannot open it"):
        PosePredictor(model, spec, "cpu", "ncnn")


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else name)


def test_what_is_missing_is_said(solved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert unusable("ncnn", "cpu") == ""
    assert "it runs on the CPU" in unusable("ncnn", "cuda")
    without(monkeypatch, "ncnn")
    for files in ((), NCNN):
        assert unusable("ncnn", "cpu", files) == "ncnn is not installed (pip install 'hrnet-ray[ncnn]')"
    without(monkeypatch, "pnnx", "onnxscript")
    assert unusable("ncnn", "cpu", NCNN) == "", "the files are there"
    assert unusable("ncnn", "cpu").startswith("pnnx, onnxscript is not installed")
    with pytest.raises(ConfigError, match=r"ncnn's files cannot be made here: pnnx, onnxscript is not inst"):
        export_ncnn(*load_checkpoint(solved[1]))


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("false", r"pnnx did not convert the network \(exit code 1; it says nothing\)\. Install"),
        ("true", r"pnnx did not convert the network \(exit code 0; it says nothing\)\. Install"),
        ("echo", r"pnnx did not convert the network \(exit code 0; model\.onnx inputshape=.*\)\. Install"),
        ("no-such-program", r"pnnx cannot be run here \(No such file or directory\)\. Install"),
    ],
)
def test_a_pnnx_that_fails_is_one_sentence(
    program: str, says: str, solved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hrnet_core.ncnn_file.export_onnx", lambda *_: b"pnnx is not run")
    monkeypatch.setattr("pnnx.EXEC_PATH", shutil.which(program) or f"/{program}")
    with pytest.raises(ConfigError, match=says):
        export_ncnn(*load_checkpoint(solved[1]))


def test_pnnx_is_quiet_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    model, spec = load_checkpoint(checkpoint)
    files = dict(zip(NCNN, export_ncnn(model, spec), strict=True))
    open_ncnn(files, spec)
    assert not list((tmp_path / "temporary").iterdir())
    assert capfd.readouterr() == ("", "")


def test_auto_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def figures(ms: float, difference: float = 0.0) -> dict[str, float]:
        return {"ap_difference": difference, "ms_per_crop": ms}

    measured = {"cpu": {"ncnn": figures(1), "onnx": figures(2), "float32": figures(3)}}
    assert fastest_exact(measured, "cpu") == "ncnn"
    assert fastest_exact(measured, "cuda") == "float32"
    assert fastest_exact({"cpu": measured["cpu"] | {"ncnn": figures(1, 0.002)}}, "cpu") == "onnx"
    without(monkeypatch, "pnnx")
    assert fastest_exact(measured, "cpu") == "onnx"
    assert fastest_exact(measured, "cpu", NCNN) == "ncnn"
