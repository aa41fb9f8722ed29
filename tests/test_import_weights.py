"""hrnet import: a published file becomes a checkpoint that is used like any other, or nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hrnet_core.architecture import HRNetConfig
from hrnet_core.checkpoint import load_checkpoint, verify_checkpoint
from hrnet_core.choices import CodecName
from hrnet_core.errors import CheckpointError, ConfigError
from hrnet_core.model import HRNet
from hrnet_core.published import start_from
from hrnet_core.skeleton import Skeleton
from pipelines.import_weights import import_weights

SMALL = HRNetConfig(width=8, stem_width=8, bottlenecks=1, modules=(1, 1, 1), blocks=1)


@pytest.fixture(scope="module")
def mmpose_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("published") / "td-hm_hrnet-w8_udp.pth"
    state = HRNet(SMALL, initialization="kaiming").state_dict()
    named = {("head." if k.startswith("final_layer") else "backbone.") + k: v for k, v in state.items()}
    torch.save({"state_dict": named, "meta": {"epoch": 210}}, file)
    return file


def test_a_published_file_becomes_a_checkpoint(
    mmpose_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_weights(mmpose_file, tmp_path / "out", "udp", (96, 128), "coco17", sigma=1.5)
    model, spec = load_checkpoint(tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out") < 1e-6
    assert model.config == SMALL
    assert (spec.codec.name, spec.input_size, spec.codec.sigma) == ("udp", (96, 128), 1.5)
    published = torch.load(mmpose_file, weights_only=True)["state_dict"]
    assert torch.equal(model.final_layer.weight, published["head.final_layer.weight"])
    assert torch.equal(model.conv1.weight, published["backbone.conv1.weight"])
    assert spec.provenance["imported_from"] == mmpose_file.name
    assert spec.provenance["key_names"] == "mmpose 1.x"
    assert spec.provenance["run_id"] is None
    told = capsys.readouterr().out
    assert f"matched  {len(published)} tensors" in told
    assert "mmpose 1.x key names" in told
    assert "input 128x96, codec udp, sigma 1.5" in told


def test_what_cannot_be_imported_leaves_nothing_behind(mmpose_file: Path, tmp_path: Path) -> None:
    fourteen = Skeleton("fourteen", tuple(f"k{i}" for i in range(14)), (), (0.1,) * 14)
    (tmp_path / "fourteen.json").write_text(json.dumps(fourteen.as_dict()))
    headless = {
        k: v for k, v in torch.load(mmpose_file, weights_only=True)["state_dict"].items() if "final" not in k
    }
    torch.save(headless, tmp_path / "backbone.pth")
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"17 heatmaps, but skeleton 'fourteen' has 14"):
        import_weights(mmpose_file, out, "udp", (96, 128), str(tmp_path / "fourteen.json"))
    with pytest.raises(CheckpointError, match=r"no keypoint head .* --model\.init"):
        import_weights(tmp_path / "backbone.pth", out, "udp", (96, 128))
    with pytest.raises(ConfigError, match="codec must be one of"):
        import_weights(mmpose_file, out, "simcc", (96, 128))
    with pytest.raises(ConfigError, match="multiples of 32"):
        import_weights(mmpose_file, out, "udp", (100, 128))
    assert not out.exists()


@pytest.mark.parametrize("layers", [("head.conv_layers.0.", "head."), ("keypoint_head.final_layer.0.", None)])
def test_a_head_over_all_resolutions_is_a_start_alone(
    mmpose_file: Path, tmp_path: Path, layers: tuple[str, str | None]
) -> None:
    """HRNetV2, of mmpose's hands and faces, 1.x and 0.x: 15 x the width goes into its last layer."""
    inner, last = layers
    state = torch.load(mmpose_file, weights_only=True)["state_dict"]
    backbone = {key: value for key, value in state.items() if key.startswith("backbone.")}
    head = {f"{inner}weight": torch.zeros(120, 120, 1, 1)}
    if last:
        head |= {f"{last}final_layer.weight": torch.zeros(17, 120, 1, 1)}
        head |= {f"{last}final_layer.bias": torch.zeros(17)}
    file = tmp_path / "hrnetv2.pth"
    torch.save({"state_dict": backbone | head}, file)
    with pytest.raises(CheckpointError, match=r"--model\.init .*hrnetv2\.pth$"):
        import_weights(file, tmp_path / "out", "udp", (96, 128))
    model = HRNet(SMALL)
    report = start_from(model, file)
    assert torch.equal(model.conv1.weight, backbone["backbone.conv1.weight"])
    assert set(report.missing) == {"final_layer.weight", "final_layer.bias"}
    assert len(report.dropped) == len(head)
    assert not any("keypoints" in why for why in report.dropped.values()), "it has as many"


def test_which_of_two_averages_is_read_is_told(
    mmpose_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(mmpose_file, weights_only=True)
    raw = {f"module.{key}": value + 1 for key, value in content["state_dict"].items()}
    torch.save({**content, "ema_state_dict": raw}, tmp_path / "ema.pth")
    import_weights(tmp_path / "ema.pth", tmp_path / "out", "udp", (96, 128))
    assert "'ema_state_dict' is not read" in capsys.readouterr().out
    model, _ = load_checkpoint(tmp_path / "out")
    assert torch.equal(model.conv1.weight, content["state_dict"]["backbone.conv1.weight"])


@pytest.mark.parametrize(
    ("name", "codec", "size", "told"),
    [
        ("pose_hrnet_w32_256x192.pth", "official", (256, 192), "--input-size 192 256"),
        ("td-hm_hrnet-w32_8xb64-210e_coco-384x288-c161b7de_20220915.pth", "official", (192, 256), "288 384"),
        ("td-hm_hrnet-w32_udp-8xb64-210e_coco-256x192.pth", "official", (192, 256), "--codec udp"),
        ("hrnet_w48_coco_256x192_dark-8cba3197_20200812.pth", "official", (192, 256), "--codec dark"),
        ("pose_hrnet_w32_256x192.pth", "official", (192, 256), None),
        ("td-hm_hrnet-w32_udp-8xb64-210e_coco-256x192.pth", "udp", (192, 256), None),
        ("darkroom_8x64.pth", "official", (192, 256), None),
    ],
)
def test_a_name_that_says_otherwise_is_believed(
    mmpose_file: Path, tmp_path: Path, name: str, codec: CodecName, size: tuple[int, int], told: str | None
) -> None:
    """Names as the official code and MMPose publish them: the height comes first. Swapped, or of the wrong
    codec, weights load without an error and give a low AP."""
    file, out = tmp_path / name, tmp_path / "out"
    file.symlink_to(mmpose_file)
    if told is None:
        import_weights(file, out, codec, size)
        return
    with pytest.raises(ConfigError) as refused:
        import_weights(file, out, codec, size)
    assert told in str(refused.value)
    assert not out.exists()


def test_a_checkpoint_folder_needs_no_import(mmpose_file: Path, tmp_path: Path) -> None:
    """Its own codec and size were replaced by the defaults of the command line."""
    import_weights(mmpose_file, tmp_path / "ours", "udp", (96, 128))
    with pytest.raises(CheckpointError, match="a checkpoint folder already"):
        import_weights(tmp_path / "ours", tmp_path / "again", "official", (192, 256))
