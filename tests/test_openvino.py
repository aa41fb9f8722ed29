"""OpenVINO's modes and the files that modes run from: torch's answers, also from threads, or a sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from dots import rows_here, write_solved
from numpy.typing import NDArray
from test_feed import dotted_shards
from test_predictor import assert_undisturbed

from hrnet_core.checkpoint import INT8, ONNX, load_checkpoint, read_exported, save_checkpoint
from hrnet_core.errors import CheckpointError, ConfigError, DataError
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.modes import MODES, fastest_exact, files_of, unusable
from hrnet_core.onnx_file import export_onnx
from hrnet_core.openvino_file import export_int8, open_openvino
from hrnet_core.predictor import PosePredictor
from pipelines.cli import main
from pipelines.export import export, shard_crops
from pipelines.sources.coco import read_coco
from serve.model import load_model
from serve.settings import ModelChoice, ServeArgs

CODEC = HeatmapCodec("official", (96, 128))


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A COCO root with 12 people and a checkpoint that finds most of them, with all exported files."""
    folder = tmp_path_factory.mktemp("openvino")
    root, checkpoint = write_solved(folder, CODEC)
    dotted_shards(folder / "shards", {"train2017": 24, "val2017": 8}, size=(96, 128))
    export(checkpoint)
    parity = export(checkpoint, format="openvino_int8", shards=folder / "shards")
    assert "OpenVINO against torch in float32, 24 crops" in str(parity)
    assert 0 < parity.keypoint_mean < 2
    return root, checkpoint


@pytest.fixture(scope="module")
def crops(solved: tuple[Path, Path]) -> NDArray[np.uint8]:
    """The 12 people, as the network sees them."""
    predictor = PosePredictor.load(solved[1], device="cpu", mode="float32")
    split = read_coco(solved[0], "val2017", predictor.spec.skeleton)
    found = []
    for photo in split.photos:
        here = split.people.bbox_xywh[split.people.image_id == photo.image_id]
        found.append(predictor.prepare(solved[0] / "val2017" / photo.file_name, here)[0].crops)
    return np.concatenate(found)


def heatmaps(folder: Path, crops: NDArray[np.uint8], mode: str) -> NDArray[np.float32]:
    return PosePredictor.load(folder, device="cpu", mode=mode).heatmaps(crops)


def test_how_far_each_mode_is_from_torch(solved: tuple[Path, Path], crops: NDArray[np.uint8]) -> None:
    """Measured: 1e-6, 6e-3 and 4e-2 of the range; with AMX, where the network comes out of its training as
    another one, 4e-6, 3e-2 and 1.4e-1. Of bfloat16 what test_predictor.py holds of all such modes."""
    truth = heatmaps(solved[1], crops, "float32")
    spread = np.ptp(truth)
    for mode, least, most in (
        ("openvino", 0, 1e-5), ("openvino_bfloat16", 1e-4, 0.05), ("openvino_int8", 1e-3, 0.15),
    ):  # fmt: skip
        if not unusable(mode, "cpu", INT8):
            difference = np.abs(heatmaps(solved[1], crops, mode) - truth).max() / spread
            assert least <= difference < most, mode


def test_bfloat16_rounds_no_further_than_torchs(solved: tuple[Path, Path], crops: NDArray[np.uint8]) -> None:
    """Root mean square: 0.0025 and 0.0028 of the range, with AMX. The largest is one cell's."""
    if why := unusable("openvino_bfloat16", "cpu"):
        pytest.skip(why)
    truth = heatmaps(solved[1], crops, "float32")
    ours, torchs = (
        float(np.sqrt(np.square(heatmaps(solved[1], crops, mode) - truth).mean()))
        for mode in ("openvino_bfloat16", "bfloat16")
    )
    assert 0 < ours < 1.1 * torchs


def test_a_float32_head_is_nearer_than_all_in_bfloat16(
    solved: tuple[Path, Path], crops: NDArray[np.uint8]
) -> None:
    if why := unusable("openvino_bfloat16", "cpu"):
        pytest.skip(why)
    model, spec = load_checkpoint(solved[1])
    core = openvino.Core()
    whole = core.compile_model(core.read_model(solved[1] / ONNX), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    images = torch.randn(4, 3, 128, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        truth = model(images)
        ours = open_openvino([export_onnx(model, spec)], spec, "file", model.final_layer)(images)
    all_in_bfloat16 = torch.from_numpy(whole(images.numpy())[0])
    assert (ours - truth).square().mean() < 0.9 * (all_in_bfloat16 - truth).square().mean()


def test_predictors_and_threads_do_not_disturb_each_other(
    solved: tuple[Path, Path], crops: NDArray[np.uint8]
) -> None:
    """Two predictors, four threads, batches of different sizes."""
    predictors = [PosePredictor.load(solved[1], device="cpu", mode=m) for m in ("openvino", "openvino_int8")]
    asked = [(predictors[i % 2], crops[i : i + 2 + i // 2]) for i in range(4)]
    assert_undisturbed(asked)


SIGNALLED = """
import faulthandler, gc, os, signal, sys, threading
from hrnet_core.predictor import PosePredictor

faulthandler.enable()  # as Ray does: a stack for signals
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
held = [PosePredictor.load(sys.argv[1], device="cpu", mode=sys.argv[2])]

def dropped():
    held.clear()
    gc.collect()

thread = threading.Thread(target=dropped)
thread.start()
thread.join()
os.kill(os.getpid(), signal.SIGTERM)
signal.pause()
"""


@pytest.mark.parametrize("mode", ["openvino", "openvino_int8"])
def test_a_signal_after_another_thread_has_dropped_the_network(solved: tuple[Path, Path], mode: str) -> None:
    """OpenVINO gives the thread that loads its part for the CPU a stack for signals, and takes it away in the
    thread that drops that part: the next signal ended the process by SIGSEGV."""
    done = subprocess.run([sys.executable, "-c", SIGNALLED, solved[1], mode], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (7, "")


def test_answers_are_not_of_a_buffer_that_is_used_again(solved: tuple[Path, Path]) -> None:
    _, spec = load_checkpoint(solved[1])
    network = open_openvino([(solved[1] / ONNX).read_bytes()], spec, ONNX)
    first = network(torch.zeros(1, 3, 128, 96))
    kept = first.clone()
    network(torch.ones(1, 3, 128, 96))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("whole", [True, False])
def test_the_thread_that_loads_has_run_the_network_once(
    solved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Two threads that are the first of a process to do so can wait for each other for ever."""
    model, spec = load_checkpoint(solved[1])
    if not whole and (why := unusable("openvino_bfloat16", "cpu")):
        pytest.skip(why)
    infer, seen = openvino.InferRequest.infer, []

    def watched(request: Any, inputs: Any, *rest: Any) -> Any:
        found = infer(request, inputs, *rest)
        seen.append((threading.get_ident(), inputs[0].shape, len(found)))
        return found

    monkeypatch.setattr(openvino.InferRequest, "infer", watched)
    head = None if whole else model.final_layer
    open_openvino([(solved[1] / ONNX).read_bytes()], spec, ONNX, head)
    assert seen == [(threading.get_ident(), (1, 3, 128, 96), 1)]


# --- through evaluate and the endpoint --------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["openvino", "openvino_int8"])
def test_evaluating_in_a_mode(
    mode: str, solved: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", rows_here)
    aps = []
    for name in ("float32", mode):
        argv = [
            "evaluate",
            str(solved[1]),
            str(solved[0]),
            "--evaluate.mode",
            name,
            "--out",
            str(tmp_path / name),
        ]
        assert main(argv) == 0
        file = json.loads((tmp_path / name / "evaluation.json").read_text())
        assert file["protocol"]["mode"] == name
        aps.append(file["stats"]["AP"])
    assert aps[0] > 0.3
    assert abs(aps[1] - aps[0]) <= (1e-9 if mode == "openvino" else 0.05)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_the_files_of_a_mode_travel_to_the_actors(solved: tuple[Path, Path], tmp_path: Path) -> None:
    argv = ["evaluate", str(solved[1]), str(solved[0]), "--evaluate.mode", "openvino_int8"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["protocol"]["mode"] == "openvino_int8"


def test_the_endpoints_predictor(solved: tuple[Path, Path], crops: NDArray[np.uint8]) -> None:
    """From a URI: model.onnx comes along."""
    args = ServeArgs(checkpoint="", num_cpus=1, mode="openvino_int8")
    served = load_model(ModelChoice(checkpoint=solved[1].as_uri()), args)
    assert served.info().mode == "openvino_int8"
    loaded = PosePredictor.load(solved[1], device="cpu", mode="openvino_int8")
    assert np.array_equal(served.predictor.predict_crops(crops)[0], loaded.predict_crops(crops)[0])


# --- files and refusals -----------------------------------------------------------------------------------


def test_only_the_files_of_the_mode_are_read(solved: tuple[Path, Path]) -> None:
    assert files_of("float32", {}) == set()
    assert files_of("openvino_bfloat16", {}) == {ONNX}
    assert files_of("openvino_int8", {}) == set(INT8)
    assert files_of("auto", {}) == set()
    measured = {"cpu": {"channels_last": {}, "openvino": {}, "openvino_int8": {}}}
    assert files_of("auto", measured) == {ONNX}
    assert set(read_exported(solved[1])) == {ONNX, *INT8}
    assert list(read_exported(solved[1], {ONNX})) == [ONNX]


def test_files_of_other_weights_and_damaged_files_are_refused(
    solved: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(solved[1], tmp_path / "c"))
    model, spec = load_checkpoint(folder)
    exported = read_exported(folder)
    other = replace(spec, weights_sha256="0" * 64)
    again = r"Write it again: hrnet export CHECKPOINT"
    int8_again = rf"{again} --format openvino_int8 --shards SHARDS\.$"
    for mode, name, out in (("openvino", ONNX, rf"{again}\.$"), ("openvino_int8", INT8[0], int8_again)):
        with pytest.raises(CheckpointError, match=rf"{name}: made from weights .*are 000000000000\. {out}"):
            PosePredictor(model, other, "cpu", mode, exported)
        cut = exported | {name: exported[name][:1000]}
        with pytest.raises(CheckpointError, match=rf"{name}: OpenVINO cannot open it .*\. {out}"):
            PosePredictor(model, spec, "cpu", mode, cut)
        # What it says of itself: JSON as text of an XML attribute, or as it is.
        key = b"&quot;weights_sha256&quot;" if name == INT8[0] else b'"weights_sha256"'
        assert key in exported[name]
        for put in (key.replace(b"weights", b"weightz"), key.replace(b"w", b"\\")):
            damaged = exported | {name: exported[name].replace(key, put)}
            with pytest.raises(CheckpointError, match=rf"{name}: damaged, it does not say .*\. {out}"):
                PosePredictor(model, spec, "cpu", mode, damaged)
    weights = exported[INT8[1]]
    swapped = weights[: len(weights) // 2] + b"12345678" + weights[len(weights) // 2 + 8 :]
    with pytest.raises(
        CheckpointError, match=rf"its \.bin is not the one that was written .*\. {int8_again}"
    ):
        PosePredictor(model, spec, "cpu", "openvino_int8", exported | {INT8[1]: swapped})
    with torch.no_grad():
        model.final_layer.bias.add_(1)
    save_checkpoint(folder, model, spec)
    assert not read_exported(folder), "saving other weights left files of the old ones"


def test_a_mode_that_cannot_run_says_what_is_missing(
    solved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, spec = load_checkpoint(solved[1])
    with pytest.raises(
        ConfigError, match=r"'openvino_int8' cannot run here: the checkpoint folder has no .*--shards"
    ):
        PosePredictor(model, spec, "cpu", "openvino_int8")
    assert "it runs on the CPU" in unusable("openvino", "cuda")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    assert "no bfloat16 instructions" in unusable("openvino_bfloat16", "cpu", [ONNX])
    assert unusable("openvino", "cpu", [ONNX]) == ""

    def without(missing: str) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else name)

    without("openvino")
    for mode in ("openvino", "openvino_int8"):
        why = unusable(mode, "cpu", [ONNX, *INT8])
        assert why == "openvino is not installed (pip install 'hrnet-ray[openvino]')"
    without("onnxscript")
    assert unusable("openvino", "cpu", [ONNX]) == "", "model.onnx is there"
    assert "onnxscript is not installed" in unusable("openvino", "cpu")
    without("nncf")
    with pytest.raises(ConfigError, match="an int8 file cannot be made here: nncf is not installed"):
        export_int8(model, spec, np.zeros((1, 128, 96, 3), np.uint8))


def test_auto_takes_openvino_and_never_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    def figures(ms: float) -> dict[str, float]:
        return {"ap_difference": 0.0, "ms_per_crop": ms}

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    cpu = {"openvino_int8": figures(1), "openvino_bfloat16": figures(2), "openvino": figures(3)}
    measured = {"cpu": cpu | {"onnx": figures(4)}}
    assert fastest_exact(measured, "cpu", [ONNX, *INT8]) == "openvino_bfloat16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    assert fastest_exact(measured, "cpu", [ONNX, *INT8]) == "openvino"
    assert fastest_exact(measured, "cuda", [ONNX, *INT8]) == "float32"


def test_shards_for_int8(
    solved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, spec = load_checkpoint(solved[1])
    with pytest.raises(ConfigError, match="name the preprocessed shards, --shards SHARDS"):
        shard_crops(None, "train2017", spec)
    assert main(["export", str(solved[1]), str(tmp_path / "x.xml"), "--format", "openvino_int8"]) == 2
    assert "--shards SHARDS" in capsys.readouterr().err
    shards = solved[1].parent / "shards"
    assert shard_crops(shards, "train2017", spec).shape == (24, 128, 96, 3)
    with pytest.raises(
        DataError, match=r"--shards-split train: .*no split 'train'; it has train2017, val2017\."
    ):
        shard_crops(shards, "train", spec)
    dotted_shards(tmp_path / "square", {"train2017": 8})
    with pytest.raises(DataError, match=r"crops of 64 x 64 px, the checkpoint's are 96 x 128 px"):
        shard_crops(tmp_path / "square", "train2017", spec)


# --- real photographs -------------------------------------------------------------------------------------

# Mode: share of keypoints that may be further than half a px of the crop from float32's. Of 20 people, 340
# keypoints, of a network that never saw a photograph: its maps have maxima of nearly equal height.
REAL = {
    "channels_last": 0.0, "bfloat16": 0.2, "onnx": 0.0, "openvino": 0.0, "openvino_bfloat16": 0.2,
    "ncnn": 0.0,
}  # fmt: skip


def test_real_photographs_through_every_mode(
    solved: tuple[Path, Path], real_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = PosePredictor.load(solved[1], device="cpu", mode="float32")
    split = read_coco(real_data / "coco", "val2017", exact.spec.skeleton)
    crops: list[NDArray[np.uint8]] = []
    for photo in split.photos[:10]:
        here = split.people.bbox_xywh[split.people.image_id == photo.image_id]
        crops.extend(exact.prepare(real_data / "coco" / "val2017" / photo.file_name, here)[0].crops)
    some = np.stack(crops[:20])
    truth = exact.predict_crops(some)[0]
    for mode in (*REAL, "openvino_int8"):
        if unusable(mode, "cpu", [ONNX, *INT8]):
            continue
        found = PosePredictor.load(solved[1], device="cpu", mode=mode).predict_crops(some)[0]
        px = np.linalg.norm(found - truth, axis=-1)
        with capsys.disabled():
            print(f"{mode}: mean {px.mean():.4f} px, largest {px.max():.2f}, moved {(px > 0.5).mean():.4f}")
        assert (px > 0.5).mean() <= REAL.get(mode, 0.5), mode


def test_every_mode_of_the_cpu_is_known_here() -> None:
    """A mode that is added belongs into the table above, or is a GPU's, a compiler's, or int8."""
    others = {"float32", "tf32", "float16", "openvino_int8"} | {m for m in MODES if m.startswith("compiled")}
    assert set(MODES) - others == set(REAL)
