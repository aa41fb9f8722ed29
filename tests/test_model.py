"""HRNet against the published key list, counts and operations, an independent forward, and timm's output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formula_weights import formula_weights
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hrnet_core.architecture import HRNetConfig
from hrnet_core.model import HRNet

REFERENCE = Path(__file__).parent / "reference"
SMALL = HRNetConfig(width=8, num_keypoints=5, stem_width=8, bottlenecks=2, modules=(1, 2, 2), blocks=2)


@pytest.fixture(scope="module")
def w32() -> HRNet:
    torch.manual_seed(0)
    return HRNet(HRNetConfig()).eval()


@pytest.fixture(scope="module")
def published_keys() -> dict[str, list[int]]:
    return json.loads((REFERENCE / "official_w32_keys.json").read_text())


def test_keys_order_and_shapes_are_the_published_ones(
    w32: HRNet, published_keys: dict[str, list[int]]
) -> None:
    ours = {key: list(value.shape) for key, value in w32.state_dict().items()}
    assert list(ours.items()) == list(published_keys.items())
    assert len(ours) == 1754


@pytest.mark.parametrize(
    ("width", "parameters", "buffers", "macs"),
    [(32, 28_536_113, 54_628, 7_645_003_776), (48, 63_595_745, 79_876, 15_691_825_152)],
)
def test_counts_are_the_published_ones(
    w32: HRNet, width: int, parameters: int, buffers: int, macs: int
) -> None:
    model = w32 if width == 32 else HRNet(HRNetConfig(width=width)).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(b.numel() for b in model.buffers()) == buffers
    assert len(model.state_dict()) == 1754
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = model(torch.zeros(1, 3, 64, 64))
    # Published for 256x192, which has 12 times as many pixels on every branch.
    assert counter.get_total_flops() * 12 == 2 * macs
    assert out.shape == (1, 17, 16, 16)


def test_forward_equals_timm_on_the_same_weights(published_keys: dict[str, list[int]]) -> None:
    truth = json.loads((REFERENCE / "forward_w32.json").read_text())
    model = HRNet(HRNetConfig())
    model.load_state_dict(formula_weights(published_keys))
    images = np.random.RandomState(9999).uniform(-2, 2, (1, 3, 128, 96))
    stds = {}
    for stage in truth["stage_std"]:
        getattr(model, stage).register_forward_hook(
            lambda _module, _inputs, out, stage=stage: stds.__setitem__(stage, out)
        )
    with torch.no_grad():
        heatmaps = model.eval()(torch.from_numpy(images.astype(np.float32)))
    assert list(heatmaps.shape) == truth["output_shape"]
    low, high = truth["range"]
    sampled = heatmaps.reshape(-1)[torch.tensor(truth["index"])].numpy()
    np.testing.assert_allclose(sampled, truth["value"], rtol=0, atol=1e-4 * (high - low))
    # timm's last module also makes branches 1 to 3, which heatmaps never use.
    for stage, expected in truth["stage_std"].items():
        branches = stds[stage] if isinstance(stds[stage], list) else [stds[stage]]
        assert [float(b.std()) for b in branches] == pytest.approx(expected[: len(branches)], rel=1e-4)


def plain_forward(state: dict[str, Tensor], config: HRNetConfig, x: Tensor) -> Tensor:
    """The layer table of the published network, written from key names alone: no module, no class."""

    def conv(x: Tensor, key: str, stride: int = 1) -> Tensor:
        kernel = state[f"{key}.weight"]
        return F.conv2d(x, kernel, state.get(f"{key}.bias"), stride, padding=kernel.shape[-1] // 2)

    def norm(x: Tensor, key: str) -> Tensor:
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{key}.{n}"] for n in names), eps=1e-5)

    def residual(x: Tensor, key: str, convolutions: int) -> Tensor:
        y = x
        for n in range(1, convolutions + 1):
            y = norm(conv(y, f"{key}.conv{n}"), f"{key}.bn{n}")
            y = y.relu() if n < convolutions else y
        if f"{key}.downsample.0.weight" in state:
            x = norm(conv(x, f"{key}.downsample.0"), f"{key}.downsample.1")
        return (x + y).relu()

    def route(x: Tensor, key: str, source: int, target: int) -> Tensor:
        if source == target:
            return x
        if source > target:
            x = norm(conv(x, f"{key}.0"), f"{key}.1")
            factor = 2 ** (source - target)
            return x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        for step in range(target - source):
            x = norm(conv(x, f"{key}.{step}.0", 2), f"{key}.{step}.1")
            x = x.relu() if step < target - source - 1 else x
        return x

    def modules(features: list[Tensor], stage: str, count: int) -> list[Tensor]:
        for m in range(count):
            for b in range(len(features)):
                for block in range(config.blocks):
                    features[b] = residual(features[b], f"{stage}.{m}.branches.{b}.{block}", 2)
            outputs = 1 if stage == "stage4" and m == count - 1 else len(features)
            features = [
                sum(
                    route(features[j], f"{stage}.{m}.fuse_layers.{i}.{j}", j, i) for j in range(len(features))
                ).relu()
                for i in range(outputs)
            ]
        return features

    x = norm(conv(x, "conv1", 2), "bn1").relu()
    x = norm(conv(x, "conv2", 2), "bn2").relu()
    for block in range(config.bottlenecks):
        x = residual(x, f"layer1.{block}", 3)
    features = [
        norm(conv(x, "transition1.0.0"), "transition1.0.1").relu(),
        norm(conv(x, "transition1.1.0.0", 2), "transition1.1.0.1").relu(),
    ]
    features = modules(features, "stage2", config.modules[0])
    for stage, key in (("stage3", "transition2.2.0"), ("stage4", "transition3.3.0")):
        features = [*features, norm(conv(features[-1], f"{key}.0", 2), f"{key}.1").relu()]
        features = modules(features, stage, config.modules[int(stage[-1]) - 2])
    return conv(features[0], "final_layer")


@pytest.mark.parametrize("config", [SMALL, HRNetConfig(6, 14, 12, 1, (2, 1, 1), 1)])
def test_forward_equals_a_plain_reading_of_the_layer_table(config: HRNetConfig) -> None:
    model = HRNet(config).eval()
    state = formula_weights({k: list(v.shape) for k, v in model.state_dict().items()})
    model.load_state_dict(state)
    images = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, plain = model(images), plain_forward(state, config, images)
    assert ours.shape == (2, config.num_keypoints, 24, 16)
    spread = float(plain.max() - plain.min())
    assert spread > 0.1
    assert float((ours - plain).abs().max()) < 1e-5 * spread


def test_published_initialisation_answers_almost_nothing(w32: HRNet) -> None:
    model = w32
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    kernels = torch.cat([m.weight.detach().flatten() for m in convolutions])
    assert float(kernels.std()) == pytest.approx(1e-3, rel=1e-3)
    assert float(kernels.mean()) == pytest.approx(0, abs=1e-6)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.momentum, module.eps) == (0.1, 1e-5)
            assert bool((module.weight == 1).all())
            assert bool((module.bias == 0).all())
    assert bool((model.final_layer.bias == 0).all())
    with torch.no_grad():
        answer = model(torch.randn(1, 3, 64, 64))
    assert float(answer.abs().max()) < 1e-8  # about 3e-10 in the reference


def test_kaiming_initialisation_keeps_the_signal_and_a_small_head() -> None:
    torch.manual_seed(0)
    model = HRNet(HRNetConfig(width=16), initialization="kaiming")
    kernel = model.stage2[0].branches[0][0].conv1.weight
    assert float(kernel.detach().std()) == pytest.approx((2 / (16 * 9)) ** 0.5, rel=0.05)
    assert float(model.final_layer.weight.detach().std()) == pytest.approx(1e-3, rel=0.2)
    with pytest.raises(ValueError, match="initialization"):
        HRNet(SMALL, initialization="xavier")  # type: ignore[arg-type]


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    model = HRNet(SMALL, initialization="kaiming").train()
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert without == []


def test_forward_leaves_its_input_alone_and_exports() -> None:
    model = HRNet(HRNetConfig(4, 5, 4, 1, (1, 1, 1), 1), initialization="kaiming").eval()
    images = torch.randn(2, 3, 64, 64)
    before = images.clone()
    with torch.no_grad():
        expected = model(images)
        batch = torch.export.Dim("batch")
        exported = torch.export.export(model, (images,), dynamic_shapes={"images": {0: batch}})
        assert torch.equal(images, before)
        assert torch.allclose(exported.module()(images), expected, atol=1e-7)
        assert exported.module()(images[:1].repeat(3, 1, 1, 1)).shape == (3, 5, 16, 16)
