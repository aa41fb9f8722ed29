"""Distillation: targets mixed with a teacher's heatmaps, their gradient, going on, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_feed import dotted_shards
from test_train import losses, made_up_part, new_model, one_worker, small_config

from hrnet_core.architecture import HRNetConfig
from hrnet_core.checkpoint import CheckpointSpec, save_checkpoint
from hrnet_core.errors import CheckpointError, ConfigError
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.loss import joints_mse
from hrnet_core.model import HRNet
from pipelines import train as driver
from pipelines.settings.train import TrainSettings
from pipelines.shards.manifest import Manifest
from pipelines.training.loop import train_epochs
from pipelines.training.state import make_optimizer
from pipelines.training.step import Part, parts_of, train_step
from pipelines.training.teacher import Teacher

HEAVIER = HRNetConfig(width=16, stem_width=16, bottlenecks=1, modules=(1, 1, 1), blocks=1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """37 people: batches of 16, 16 and 5."""
    return dotted_shards(tmp_path_factory.mktemp("shards"), {"train2017": 37, "val2017": 12})


def teacher_in(folder: Path, seed: int = 3, codec: HeatmapCodec | None = None) -> str:
    torch.manual_seed(seed)
    spec = CheckpointSpec(HEAVIER, codec or HeatmapCodec("official", (64, 64), 0.5))
    save_checkpoint(folder, HRNet(HEAVIER, "kaiming").state_dict(), spec)
    return str(folder)


def test_the_gradient_is_that_of_both_losses_weighed() -> None:
    """The published form, a loss for the labels and one for the teacher, against the mixed target."""
    part, share = made_up_part(0, slice(0, 8), 1.0), 0.3
    torch.manual_seed(9)
    teacher = Teacher(HRNet(HEAVIER, "kaiming").eval(), share, "")
    gradients = []
    for mixed in (False, True):
        model = new_model().eval()
        if mixed:
            target = teacher.mixed(part.images, part.heatmaps)
            assert not target.requires_grad
            optimizer = make_optimizer(model, TrainSettings())
            train_step(model, optimizer, [Part(part.images, target, part.weights, 1.0)], TrainSettings())
        else:
            predicted = model(part.images)
            with torch.no_grad():
                told = teacher.network(part.images)
            loss = (1 - share) * joints_mse(predicted, part.heatmaps, part.weights)
            (loss + share * joints_mse(predicted, told, part.weights)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_learns_what_its_teacher_says_and_goes_on_exactly(
    manifest: Manifest, tmp_path: Path, precision: Any
) -> None:
    teacher = teacher_in(tmp_path / "teacher")
    how = {"checkpoint_minutes": 1e-9, "validate_every": 2, "accumulate": 2, "precision": precision}
    config = small_config(manifest, tmp_path, teacher=teacher, teacher_share=1.0, **how)
    driver.check_start(config, manifest)
    run, reports = one_worker(config, tmp_path / "r")
    before = {key: value.clone() for key, value in run.teacher.network.state_dict().items()}
    sent = next(iter(run.feed.batches(0))).on_device(CPU)
    parts = parts_of(run, 1.0, sent)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        expected = run.teacher.network(torch.cat([part.images for part in parts])).float()
    assert torch.equal(torch.cat([part.heatmaps for part in parts]), expected)
    train_epochs(run)
    again, _ = one_worker(config, tmp_path / "again", Path(reports[3]["folder"]))
    train_epochs(again)
    assert losses(again) == {step: loss for step, loss in losses(run).items() if step > 4}
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    for key, value in run.teacher.network.state_dict().items():
        assert torch.equal(value, before[key]), "BatchNorm too"
    teacher_in(tmp_path / "teacher", seed=4)
    with pytest.raises(ConfigError, match=r"train\.teacher: .*other weights than when this run began"):
        one_worker(config, tmp_path / "other", Path(reports[3]["folder"]))


def test_a_teacher_of_other_heatmaps_is_refused_before_anything_starts(
    manifest: Manifest, tmp_path: Path
) -> None:
    udp = teacher_in(tmp_path / "udp", codec=HeatmapCodec("udp", (64, 64), 0.5))
    with pytest.raises(ConfigError, match=r"train\.teacher: .*codec .*udp.*train it on the same shards"):
        driver.check_start(small_config(manifest, tmp_path, teacher=udp), manifest)
    with pytest.raises(CheckpointError, match=r"train\.teacher: .*nothing.* Correct --train\.teacher"):
        driver.check_start(small_config(manifest, tmp_path, teacher=str(tmp_path / "nothing")), manifest)
    assert manifest.recipe.codec == HeatmapCodec("official", (64, 64), 0.5)
