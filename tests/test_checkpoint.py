"""The checkpoint folder is whole or refused; published layouts are read, reported, and never trusted."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from hrnet_core.architecture import HRNetConfig
from hrnet_core.checkpoint import (
    CheckpointSpec,
    load_checkpoint,
    read_spec,
    read_trainer_state,
    record_modes,
    save_checkpoint,
    verify_checkpoint,
)
from hrnet_core.errors import CheckpointError
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.model import HRNet
from hrnet_core.published import fit_weights, read_weights, start_from
from hrnet_core.skeleton import COCO17, Skeleton

SMALL = HRNetConfig(width=8, stem_width=8, bottlenecks=1, modules=(1, 1, 1), blocks=1)
SPEC = CheckpointSpec(SMALL, HeatmapCodec("udp", (64, 96)), provenance={"run_id": "r1", "note": "x"})
FIELDS = tuple(SPEC.as_dict())
REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture(scope="module")
def model() -> HRNet:
    torch.manual_seed(0)
    network = HRNet(SMALL, initialization="kaiming")
    torch.nn.init.normal_(network.final_layer.weight, std=0.5)
    network(torch.randn(4, 3, 96, 64))  # running statistics that are not 0 and 1
    return network.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, model: HRNet) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "best"
    save_checkpoint(folder, model, SPEC)
    return folder


@pytest.fixture
def folder(tmp_path: Path, saved: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "best"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "checkpoint.json"
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


def reweigh(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Other weights together with their sha256: what only strict loading or the self-test can find."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    change(state)
    content = safetensors.torch.save(state)
    (folder / "model.safetensors").write_bytes(content)
    rewrite(folder, lambda f: f.update(weights_sha256=hashlib.sha256(content).hexdigest()))


def test_what_was_saved_comes_back(tmp_path: Path, model: HRNet) -> None:
    spec = replace(
        SPEC, mean=(0.5, 0.4, 0.3), flip_test=False, weights="ema", padding=1.5, modes={"a": {"b": 1}}
    )
    model.train()
    random = torch.get_rng_state()
    saved = save_checkpoint(tmp_path / "a" / "best", model, spec)
    assert model.training, "saving changed the caller's network"
    assert torch.equal(torch.get_rng_state(), random), "saving changed what a training draws next"
    model.eval()
    loaded, read = load_checkpoint(tmp_path / "a" / "best")
    assert not loaded.training
    assert loaded.config == SMALL
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert read == replace(saved, provenance=read.provenance)
    assert read.provenance == {
        "run_id": "r1", "dataset_digest": None, "config": None, "code_version": None, "note": "x",
    }  # fmt: skip
    assert replace(read, provenance=SPEC.provenance, weights_sha256=None) == spec
    content = (tmp_path / "a" / "best" / "model.safetensors").read_bytes()
    assert read.weights_sha256 == hashlib.sha256(content).hexdigest()
    assert verify_checkpoint(tmp_path / "a" / "best") < 1e-6
    assert sorted(os.listdir(tmp_path / "a")) == ["best"]
    assert set(json.loads((tmp_path / "a" / "best" / "checkpoint.json").read_text())) == set(FIELDS)


def test_measured_modes_are_written_and_nothing_else(folder: Path) -> None:
    before = json.loads((folder / "checkpoint.json").read_text())
    figures = {"bfloat16": {"ap_difference": -0.0004, "ms_per_crop": 58.1}}
    record_modes(folder, "cpu", {"channels_last": {"ap_difference": 0.0, "ms_per_crop": 9.0}})
    record_modes(folder, "cuda", {"float32": {"ap_difference": 0.0, "ms_per_crop": 1.0}})
    spec = record_modes(folder, "cpu", figures)
    after = json.loads((folder / "checkpoint.json").read_text())
    assert after.pop("modes") == spec.modes
    assert spec.modes == {"cpu": figures, "cuda": {"float32": {"ap_difference": 0.0, "ms_per_crop": 1.0}}}
    before.pop("modes")
    assert after == before
    assert load_checkpoint(folder)[1] == spec
    assert verify_checkpoint(folder) < 1e-6
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint.json", "model.safetensors", "selftest.safetensors",
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        record_modes(folder / "none", "cpu", figures)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_left_out_is_refused_by_name(folder: Path, field: str) -> None:
    rewrite(folder, lambda f: f.pop(field))
    with pytest.raises(CheckpointError, match=rf"checkpoint\.json: .*{field}"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("schema_version is 2", lambda f: f.update(schema_version=2)),
        ("unknown fields .'extra'", lambda f: f.update(extra=1)),
        ("input_size", lambda f: f.update(input_size=[192, 256])),
        ("channels", lambda f: f.update(channels="BGR")),
        ("num_keypoints is 16, but .* has 17", lambda f: f["architecture"].update(num_keypoints=16)),
        ("architecture", lambda f: f["architecture"].update(depth=3)),
        ("codec", lambda f: f["codec"].update(name="simcc")),
        ("codec: missing fields .'sigma'", lambda f: f["codec"].pop("sigma")),
        ("codec must state its sigma", lambda f: f["codec"].update(sigma=None)),
        ("architecture: missing fields .'blocks'", lambda f: f["architecture"].pop("blocks")),
        ("codec must be an object", lambda f: f.update(codec="udp")),
        ("multiples of 32", lambda f: [d.update(input_size=[64, 100]) for d in (f["codec"], f)]),
        ("skeleton", lambda f: f["skeleton"].pop("oks_sigmas")),
        ("mean", lambda f: f.update(mean=[0.5, 0.5])),
        ("std", lambda f: f.update(std=[0.2, 0.2, 0])),
        ("mean", lambda f: f.update(mean="dark")),
        ("padding", lambda f: f.update(padding=0)),
        ("flip_test", lambda f: f.update(flip_test="yes")),
        ("'raw' or 'ema'", lambda f: f.update(weights="best")),
        ("provenance leaves out .'run_id'", lambda f: f["provenance"].pop("run_id")),
        ("sha256", lambda f: f.update(weights_sha256="0" * 64)),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused_by_name(folder: Path, named: str, change: Any) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=named) as refused:
        load_checkpoint(folder)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("1 missing tensors: layer1.0.bn2.weight", lambda s: s.pop("layer1.0.bn2.weight")),
        ("1 unexpected tensors: extra", lambda s: s.update(extra=torch.zeros(1))),
        ("final_layer.bias is .*16", lambda s: s.update({"final_layer.bias": torch.zeros(16)})),
        ("conv1.weight is torch.float16", lambda s: s.update({"conv1.weight": s["conv1.weight"].half()})),
        ("1 not finite tensors: bn1.bias", lambda s: s["bn1.bias"].__setitem__(3, torch.nan)),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(folder: Path, named: str, change: Any) -> None:
    reweigh(folder, change)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{named}"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("field", "named"),
    [
        ("width", "branches.3.0.conv1.weight is .*8000000"),
        ("stem_width", "conv2.weight is .*1000000"),
        ("bottlenecks", "tensors, the architecture has 1,000,000 blocks"),
        ("blocks", "tensors, the architecture has 1,000,000 blocks"),
    ],
)
def test_a_network_that_no_memory_holds_is_refused_before_it_is_made(
    folder: Path, field: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hrnet_core.checkpoint.untrained", lambda _: pytest.fail("made"))
    rewrite(folder, lambda fields: fields["architecture"].update({field: 1_000_000}))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{named}"):
        load_checkpoint(folder)


def test_damaged_files_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its sha256"):
        load_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        load_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "selftest.safetensors").write_bytes(b"nonsense")
    load_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"selftest\.safetensors: not a whole safetensors file"):
        verify_checkpoint(folder)
    (folder / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: no readable JSON"):
        load_checkpoint(folder)
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        load_checkpoint(tmp_path / "nowhere")
    (folder / "checkpoint.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: no readable JSON"):
        load_checkpoint(folder)


def test_a_folder_of_checkpoints_and_an_address_say_what_to_load(tmp_path: Path) -> None:
    """A run's folder, which holds `best`; a URI or a registered version, which only the verbs fetch."""
    for name in ("best", "last"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "checkpoint.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"run: no checkpoint itself.* Name \S+/run/best, \S+/run/last\."
    ):
        load_checkpoint(tmp_path / "run")
    for address in ("s3://bucket/best", "models:/hrnet-pose@champion", Path("s3://bucket/best")):
        with pytest.raises(
            CheckpointError, match=r"fetch_checkpoint copies .*local_checkpoint also a registered"
        ):
            load_checkpoint(address)


def swap_sides(state: dict[str, Tensor]) -> None:
    state["final_layer.weight"] = state["final_layer.weight"][COCO17.flip_order.tolist()].contiguous()


def repeat_a_layer(state: dict[str, Tensor]) -> None:
    block = "stage2.0.branches.0.0"
    state[f"{block}.conv1.weight"] = state[f"{block}.conv2.weight"].clone()


def widen_statistics(state: dict[str, Tensor]) -> None:
    state["bn1.running_var"] *= 1.5


@pytest.mark.parametrize("exchange", [swap_sides, repeat_a_layer, widen_statistics])
def test_self_test_finds_exchanged_weights_with_a_right_sha256(folder: Path, exchange: Any) -> None:
    assert verify_checkpoint(folder) < 1e-6
    reweigh(folder, exchange)
    load_checkpoint(folder)
    with pytest.raises(CheckpointError, match="self-test differs"):
        verify_checkpoint(folder)


def test_self_test_finds_an_exchanged_mean(folder: Path) -> None:
    rewrite(folder, lambda f: f.update(mean=f["mean"][::-1]))
    with pytest.raises(CheckpointError, match="self-test differs"):
        verify_checkpoint(folder)


def test_overwriting_keeps_the_old_one_until_the_new_one_is_whole(
    folder: Path, model: HRNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(folder, model, replace(SPEC, provenance={"config": object()}))
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    rename = Path.rename
    with monkeypatch.context() as patch:

        def fail_once(path: Path, target: Path) -> Path:
            if ".new-" in path.name:
                raise OSError("disk is gone")
            return rename(path, target)

        patch.setattr(Path, "rename", fail_once)
        with pytest.raises(OSError, match="disk is gone"):
            save_checkpoint(folder, model, replace(SPEC, flip_test=False))
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    save_checkpoint(folder, model, replace(SPEC, flip_test=False))
    assert read_spec(folder).flip_test is False
    assert os.listdir(folder.parent) == ["best"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"other files \(notes.txt\)"):
        save_checkpoint(folder, model, SPEC)
    (folder.parent / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        save_checkpoint(folder.parent / "file", model, SPEC)


def test_diverged_or_foreign_weights_are_not_saved(tmp_path: Path, model: HRNet) -> None:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["bn1.weight"][0] = torch.inf
    with pytest.raises(CheckpointError, match=r"not finite tensors: bn1\.weight"):
        save_checkpoint(tmp_path / "a", state, SPEC)
    with pytest.raises(CheckpointError, match=r"unexpected tensors: module\.conv1\.weight"):
        save_checkpoint(tmp_path / "a", {f"module.{k}": v for k, v in model.state_dict().items()}, SPEC)
    assert os.listdir(tmp_path) == []


def test_the_memory_layout_does_not_change_the_file(folder: Path, tmp_path: Path, model: HRNet) -> None:
    striped = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    spec = save_checkpoint(tmp_path / "striped", striped, SPEC)
    assert spec.weights_sha256 == read_spec(folder).weights_sha256


def test_trainer_state_holds_data_only(tmp_path: Path, model: HRNet) -> None:
    state = {"epoch": 3, "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}}, "names": ["a"]}
    save_checkpoint(tmp_path / "a", model, SPEC, trainer_state=state)
    assert read_trainer_state(tmp_path / "a") == state
    with pytest.raises(CheckpointError, match="run code of its own"):
        save_checkpoint(tmp_path / "b", model, SPEC, trainer_state={"rng": np.zeros(3)})
    assert os.listdir(tmp_path) == ["a"]
    save_checkpoint(tmp_path / "b", model, SPEC)
    with pytest.raises(CheckpointError, match=r"trainer\.pt: not there"):
        read_trainer_state(tmp_path / "b")


# --- Published layouts ----------------------------------------------------------------------------

TIMM_EXTRAS = {
    "incre_modules.0.0.conv1.weight": (8, 8, 1, 1),
    "downsamp_modules.0.0.weight": (16, 8, 3, 3),
    "final_layer.0.weight": (2048, 1024, 1, 1),
    "final_layer.1.bias": (2048,),
    "classifier.weight": (1000, 2048),
    "classifier.bias": (1000,),
}
IMAGENET_EXTRAS = {
    "head.0.0.0.conv1.weight": (64, 8, 1, 1),
    "head.1.0.bn1.num_batches_tracked": (),
    "fc.weight": (1000, 2048),
    "fc.bias": (1000,),
}
LAST_FUSION = {f"stage4.0.fuse_layers.{i}.0.0.0.weight": (8, 8, 3, 3) for i in (1, 2, 3)}


def extra(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {key: torch.zeros(()).expand(shape).clone() for key, shape in shapes.items()}


def headless(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.startswith("final_layer")}


def mmpose(state: dict[str, Tensor], head: str) -> dict[str, Tensor]:
    return {(f"{head}." if k.startswith("final_layer") else "backbone.") + k: v for k, v in state.items()}


LAYOUTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str, int]] = {
    # name: (state_dict -> what the file holds, scheme in the report, tensors dropped)
    "official": (lambda s: s, "official", 0),
    "official training": (
        lambda s: {
            "epoch": 9,
            "model": "pose_hrnet",  # the official code keeps the network's name under this key
            "state_dict": {f"module.{k}": v for k, v in s.items()},
            "best_state_dict": s,
            "perf": 0.7,
        },
        "module. prefixed official",
        0,
    ),
    "module": (lambda s: {f"module.{k}": v for k, v in s.items()}, "module. prefixed official", 0),
    "compiled": (
        lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
        "module._orig_mod. prefixed official",
        0,
    ),
    "Lightning": (
        lambda s: {
            "pytorch-lightning_version": "2.4.0",
            "state_dict": {f"model.{k}": v for k, v in mmpose(s, "head").items()},
        },
        "model. prefixed mmpose 1.x",
        0,
    ),
    "mmpose 1.x": (
        lambda s: {"state_dict": mmpose(s, "head"), "meta": {"epoch": 210}, "message_hub": {}},
        "mmpose 1.x",
        0,
    ),
    "mmpose 0.x": (lambda s: {"state_dict": mmpose(s, "keypoint_head"), "meta": {}}, "mmpose 0.x", 0),
    "WZM": (lambda s: {"model": s, "optimizer": {}, "epoch": 1}, "WZM", 0),
    "no counters": (
        lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
        "official",
        0,
    ),
    "half": (lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()}, "official", 0),
    "with the last module's other outputs": (lambda s: {**s, **extra(LAST_FUSION)}, "official", 3),
}
HEADLESS_LAYOUTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str, int]] = {
    "timm": (lambda s: {**headless(s), **extra({**TIMM_EXTRAS, **LAST_FUSION})}, "timm", 9),
    "ImageNet": (lambda s: {**headless(s), **extra({**IMAGENET_EXTRAS, **LAST_FUSION})}, "ImageNet", 7),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pose_layouts_are_read_whole(tmp_path: Path, model: HRNet, layout: str) -> None:
    write, scheme, dropped = LAYOUTS[layout]
    truth = dict(model.state_dict())
    torch.save(write(truth), tmp_path / "w.pth")
    published = read_weights(tmp_path / "w.pth")
    assert published.architecture == SMALL
    state, report = fit_weights(published, published.architecture)
    assert report.scheme == scheme
    assert len(report.dropped) == dropped
    assert list(state) == list(truth)
    assert len(report.matched) + len(report.missing) == len(truth)
    if layout == "no counters":
        assert set(report.missing) == {k for k in truth if k.endswith("num_batches_tracked")}
        assert all(int(state[k]) == 0 for k in report.missing)
    else:
        assert report.missing == {}
        close = (
            torch.equal if layout != "half" else lambda a, b: torch.equal(a, b.half().float()) or a.ndim == 0
        )
        assert all(close(state[k], truth[k]) for k in truth)
    HRNet(SMALL).load_state_dict(state, strict=True)
    assert f"matched  {len(report.matched)} tensors" in str(report)


@pytest.mark.parametrize("layout", HEADLESS_LAYOUTS)
def test_layouts_without_a_head_are_starts_for_training_only(
    tmp_path: Path, model: HRNet, layout: str
) -> None:
    write, scheme, dropped = HEADLESS_LAYOUTS[layout]
    truth = dict(model.state_dict())
    torch.save(write(truth), tmp_path / "w.pth")
    published = read_weights(tmp_path / "w.pth")
    assert published.scheme == scheme
    with pytest.raises(CheckpointError, match="no keypoint head"):
        _ = published.architecture
    with pytest.raises(CheckpointError, match=r"2 missing tensors: final_layer\.weight"):
        fit_weights(published, SMALL)
    fresh = HRNet(SMALL)
    head = fresh.final_layer.weight.detach().clone()
    report = start_from(fresh, tmp_path / "w.pth")
    assert set(report.missing) == {"final_layer.weight", "final_layer.bias"}
    assert len(report.dropped) == dropped
    assert "the head starts untrained" in str(report)
    assert torch.equal(fresh.final_layer.weight, head)
    started = fresh.state_dict()
    assert all(torch.equal(started[k], truth[k]) for k in headless(truth))


def test_the_published_w32_key_list_matches_in_full(tmp_path: Path) -> None:
    shapes = json.loads((REFERENCE / "official_w32_keys.json").read_text())
    state = {
        key: torch.tensor(0) if key.endswith("tracked") else torch.full(shape, 0.5)
        for key, shape in shapes.items()
    }
    safetensors.torch.save_file(state, tmp_path / "pose_hrnet_w32_256x192.safetensors")
    published = read_weights(tmp_path / "pose_hrnet_w32_256x192.safetensors")
    assert published.architecture == HRNetConfig()
    _, report = fit_weights(published, published.architecture)
    assert len(report.matched) == 1754
    assert (report.missing, report.dropped) == ({}, {})


def test_the_old_torch_file_format_is_read(tmp_path: Path, model: HRNet) -> None:
    """The published files come from torch 1.0."""
    torch.save(model.state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert len(read_weights(tmp_path / "w.pth").state) == len(model.state_dict())


def test_mmpose_metadata_is_read_without_its_classes(
    tmp_path: Path, model: HRNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("mmengine.logging.history_buffer")
    history = type("HistoryBuffer", (), {"__module__": module.__name__, "__init__": lambda self: None})
    module.HistoryBuffer = history  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        for name in ("mmengine", "mmengine.logging"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        log = history()
        log.values = np.arange(3.0)  # type: ignore[attr-defined]
        content = {
            "state_dict": mmpose(dict(model.state_dict()), "head"),
            "message_hub": {"log_scalars": {"loss": log}},
            "meta": {"sigmas": np.ones(17, np.float32), "lr": np.float64(5e-4)},
        }
        torch.save(content, tmp_path / "w.pth")
    assert "mmengine" not in sys.modules
    fit_weights(read_weights(tmp_path / "w.pth"), SMALL)


PADDLE = {"StructuredToParameterName@@": {"conv1.weight": "conv2d_0.w_0"}, "conv1.weight": np.zeros((2, 2))}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html>\n<html><title>Sign in</title>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n", "git lfs pull"),
        (pickle.dumps(PADDLE, protocol=2), "PaddlePaddle"),
        (safetensors.torch.save({"conv1.weight": torch.zeros(2)}), r"name it \.safetensors"),
        (b"PK\x03\x04 and no more", "not a whole torch file"),
    ],
)
def test_other_files_under_this_name_are_called_by_theirs(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"w\.pth: .*{words}"):
        read_weights(tmp_path / "w.pth")


class Canary:
    """Unpickled carelessly, this makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_never_runs(tmp_path: Path, model: HRNet, zipped: bool) -> None:
    sung = tmp_path / "sung"
    content = {"state_dict": dict(model.state_dict()), "meta": Canary(sung)}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"w\.pth: reading it would run code of its own \(\w+\.mkdir\)"):
        read_weights(tmp_path / "w.pth")
    assert not sung.exists()
    torch.load(tmp_path / "w.pth", weights_only=False)  # the canary does sing
    assert sung.exists()


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("1 missing tensors: transition3.3.0.0.weight", lambda s: s.pop("transition3.3.0.0.weight")),
        ("1 unexpected tensors: neck.weight", lambda s: s.update({"neck.weight": torch.zeros(1)})),
        ("1 unexpected tensors: head.conv.weight", lambda s: s.update({"head.conv.weight": torch.zeros(1)})),
        ("1 missing tensors: final_layer.bias", lambda s: s.pop("final_layer.bias")),
        ("not finite", lambda s: s.update({"bn1.bias": torch.full((8,), torch.nan)})),
        ("conv2.weight is", lambda s: s.update({"conv2.weight": torch.zeros(8, 8, 1, 1)})),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, model: HRNet, named: str, change: Any) -> None:
    state = dict(model.state_dict())
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=named) as refused:
        fit_weights(read_weights(tmp_path / "w.pth"), SMALL)
    assert str(tmp_path / "w.pth") in str(refused.value)


def test_another_number_of_keypoints_drops_the_head_for_training_only(tmp_path: Path, model: HRNet) -> None:
    torch.save(model.state_dict(), tmp_path / "w.pth")
    other = replace(SMALL, num_keypoints=14)
    with pytest.raises(CheckpointError, match=r"final_layer\.weight is .*17.* not .*14"):
        fit_weights(read_weights(tmp_path / "w.pth"), other)
    report = start_from(HRNet(other), tmp_path / "w.pth")
    assert report.dropped == dict.fromkeys(
        ("final_layer.weight", "final_layer.bias"), "a head of 17 keypoints, this network has 14"
    )
    # Of another width nothing fits, head or not.
    with pytest.raises(CheckpointError, match="does not fit width 16"):
        start_from(HRNet(replace(SMALL, width=16)), tmp_path / "w.pth")


def test_training_starts_from_our_own_folder_too(folder: Path, model: HRNet) -> None:
    fresh = HRNet(SMALL)
    report = start_from(fresh, folder)
    assert report.scheme == "hrnet checkpoint"
    assert all(
        torch.equal(a, b)
        for a, b in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not a whole torch file"),
        (b"PK\x03\x04 cut off", "not a whole torch file"),
        ({"optimizer": {"lr": 1}}, "no weights in it"),
        ([1, 2], "no weights in it"),
        ({"layer.weight": torch.zeros(2)}, "no HRNet in it"),
        (
            {"conv1.weight": torch.zeros(8, 3, 3, 3), "final_layer.weight": torch.zeros(17, 8, 1, 1),
             "stage2.0.branches.0.0.conv1.weight": torch.zeros(8, 8, 3, 3)},
            "parts of the HRNet",
        ),
    ],
)  # fmt: skip
def test_files_that_are_not_weights(tmp_path: Path, content: Any, named: str) -> None:
    file = tmp_path / "w.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=named):
        _ = read_weights(file).architecture


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"w\.pth: no such file"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("models:/hrnet-pose@champion", ["version of the registry is not taken here", "STORAGE/RUN/best"]),
        ("https://host/w.pth?download=1", ["https://host/w.pth: nothing is read", "downloaded first"]),
        ("https://me:hidden@host/w.pth", ["https://...@host/w.pth: nothing is read"]),
    ],
)
def test_places_that_weights_are_not_read_from_are_told_with_those_that_they_are(
    place: str, words: list[str]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_weights(place)
    told = str(caught.value)
    taken = [".safetensors", "checkpoint folder", "s3://", "gs://", "az://"]
    assert [word for word in (*words, *taken) if word not in told] == [], told
    assert "hidden" not in told


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("checkpoint.json", r"best/checkpoint\.json: describes weights.*Name the folder"),
        ("notes.pth", r"notes\.pth: not a whole torch file \(no tensors in torch's format\)\. Download"),
    ],
)
def test_torchs_advice_to_switch_its_protection_off_is_not_passed_on(
    tmp_path: Path, name: str, named: str
) -> None:
    """torch says of any JSON that it may be read with weights_only=False, which would run what is in it."""
    file = tmp_path / "best" / name
    file.parent.mkdir()
    file.write_text('{"schema_version": 1}')
    with pytest.raises(CheckpointError, match=named) as caught:
        read_weights(file)
    with pytest.raises(CheckpointError, match=named):
        read_weights(file.as_uri())
    assert "weights_only" not in str(caught.value)


def test_spec_of_another_skeleton_is_refused() -> None:
    skeleton = Skeleton("three", ("a", "b", "c"), (), (0.1, 0.1, 0.1))
    with pytest.raises(CheckpointError, match="num_keypoints is 17, but skeleton 'three' has 3"):
        CheckpointSpec(SMALL, SPEC.codec, skeleton)
