"""HRNet for heatmaps, under the published parameter names.

Source: arXiv:1902.09212, and the layer tables of the published pose_hrnet.py (docs/reproduce.md).
The state_dict has the published keys in the published order, so weights move both ways without a map.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hrnet_core.architecture import HRNetConfig

EXPANSION = 4  # a bottleneck returns this many times its planes


class HRNet(nn.Module):
    """High-resolution network: four branches at 1/4, 1/8, 1/16, 1/32 that exchange after each module.

    `initialization` says how the weights start where nothing is loaded:
    "published": every convolution N(0, 0.001), biases 0, BatchNorm 1 and 0, as the reference does; its
        answer is about 3e-10 everywhere, so the first loss is the targets' mean energy.
    "kaiming": convolutions N(0, 2 / fan_out) and the head N(0, 0.001): learns faster from scratch.
    """

    def __init__(
        self, config: HRNetConfig, initialization: Literal["published", "kaiming"] = "published"
    ) -> None:
        super().__init__()
        self.config = config
        stem = config.stem_width
        channels = [config.width * 2**branch for branch in range(4)]
        # The order of these lines is the order of the published keys.
        self.conv1 = nn.Conv2d(3, stem, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.conv2 = nn.Conv2d(stem, stem, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(stem)
        self.layer1 = nn.Sequential(
            *(Bottleneck(stem if i == 0 else stem * EXPANSION, stem) for i in range(config.bottlenecks))
        )
        self.transition1 = _transition([stem * EXPANSION], channels[:2])
        self.stage2 = _stage(config, channels[:2], config.modules[0])
        self.transition2 = _transition(channels[:2], channels[:3])
        self.stage3 = _stage(config, channels[:3], config.modules[1])
        self.transition3 = _transition(channels[:3], channels)
        self.stage4 = _stage(config, channels, config.modules[2], last_returns_one=True)
        self.final_layer = nn.Conv2d(config.width, config.num_keypoints, 1)
        self._initialize(initialization)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised float images (N, 3, h, w), sides multiples of 32 -> heatmaps (N, K, h/4, w/4)."""
        x = self.layer1(self.stem(images))
        branches = self.stage2([step(x) for step in self.transition1])
        branches = self.stage3(_grow(self.transition2, branches))
        branches = self.stage4(_grow(self.transition3, branches))
        heatmaps: Tensor = self.final_layer(branches[0])
        return heatmaps

    def stem(self, images: Tensor) -> Tensor:
        """Images (N, 3, h, w) -> (N, stem_width, h/4, w/4)."""
        x = self.bn1(self.conv1(images)).relu_()
        stemmed: Tensor = self.bn2(self.conv2(x)).relu_()
        return stemmed

    def _initialize(self, initialization: str) -> None:
        if initialization not in ("published", "kaiming"):
            raise ValueError(f"initialization is 'published' or 'kaiming', got {initialization!r}")
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if initialization == "published" or module is self.final_layer:
                    nn.init.normal_(module.weight, std=0.001)
                else:
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the identity: (N, C, H, W) -> the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu_()
        total: Tensor = self.bn2(self.conv2(y)) + x
        return total.relu_()


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and the identity: (N, inputs, H, W) -> (N, 4 planes, H, W)."""

    def __init__(self, inputs: int, planes: int) -> None:
        super().__init__()
        outputs = planes * EXPANSION
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if inputs != outputs:
            self.downsample = _layers(inputs, outputs, kernel=1, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y)).relu_()
        total: Tensor = self.bn3(self.conv3(y)) + self.downsample(x)
        return total.relu_()


class ExchangeModule(nn.Module):
    """Blocks on each branch, then each output is the sum of all branches at its resolution."""

    def __init__(self, channels: list[int], blocks: int, outputs: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*(BasicBlock(width) for _ in range(blocks))) for width in channels
        )
        self.fuse_layers = nn.ModuleList(
            Fusion(_fuse(channels, source, target) for source in range(len(channels)))
            for target in range(outputs)
        )

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        features = [branch(x) for branch, x in zip(self.branches, inputs, strict=True)]
        return [fusion(features) for fusion in self.fuse_layers]


class Fusion(nn.ModuleList):
    """The sum of all branches, each brought to one resolution and width."""

    def forward(self, features: list[Tensor]) -> Tensor:
        total: Tensor = self[0](features[0])
        for branch in range(1, len(self)):  # upwards, as the reference does: float addition has an order
            total = total + self[branch](features[branch])
        return total.relu()


class Stage(nn.Sequential):
    """Exchange modules one after the other, on a list of branches."""

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        for module in self:
            branches = module(branches)
        return branches


def _stage(config: HRNetConfig, channels: list[int], modules: int, last_returns_one: bool = False) -> Stage:
    """The heatmaps need branch 0 only: the last module of stage 4 does not make the others."""
    outputs = [len(channels)] * modules
    if last_returns_one:
        outputs[-1] = 1
    return Stage(*(ExchangeModule(channels, config.blocks, n) for n in outputs))


def _fuse(channels: list[int], source: int, target: int) -> nn.Module:
    """Branch `source` at the resolution and width of branch `target`."""
    wide, narrow = channels[source], channels[target]
    if source == target:
        return nn.Identity()
    if source > target:
        enlarge = nn.Upsample(scale_factor=float(2 ** (source - target)), mode="nearest")
        return nn.Sequential(*_layers(wide, narrow, kernel=1, relu=False), enlarge)
    halvings = [_layers(wide, wide, stride=2) for _ in range(target - source - 1)]
    return nn.Sequential(*halvings, _layers(wide, narrow, stride=2, relu=False))


def _transition(old: list[int], new: list[int]) -> nn.ModuleList:
    """Branches of the stage before -> of the next: kept, widened, or made anew from the last one."""
    steps: list[nn.Module] = []
    for branch, width in enumerate(new):
        if branch >= len(old):
            steps.append(nn.Sequential(_layers(old[-1], width, stride=2)))
        elif width == old[branch]:
            steps.append(nn.Identity())
        else:
            steps.append(_layers(old[branch], width))
    return nn.ModuleList(steps)


def _grow(transition: nn.ModuleList, branches: list[Tensor]) -> list[Tensor]:
    """The branches there are, and one more at half the resolution of the last."""
    return [*branches, transition[len(branches)](branches[-1])]


def _layers(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, relu: bool = True) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), *([nn.ReLU(inplace=True)] if relu else []))


def fold_batch_norms(network: nn.Module) -> None:
    """In place: a BatchNorm that follows a convolution becomes part of it; in eval mode the same."""
    for parent in list(network.modules()):
        for (first, convolution), (second, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, first, fuse_conv_bn_eval(convolution, norm))
                setattr(parent, second, nn.Identity())


def to_16_bits(network: nn.Module, dtype: torch.dtype) -> None:
    """In place. The last layer stays float32: rounded to 8 or 11 bits, neighbouring cells of a heatmap become
    equal, and the maximum and the quarter step are read from their order."""
    network.to(dtype).register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
    head = getattr(network, "final_layer", None)
    if isinstance(head, nn.Module):
        head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def normalize(
    crops: Tensor,
    mean: tuple[float, float, float] | Tensor,
    std: tuple[float, float, float] | Tensor,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """uint8 RGB crops (P, h, w, 3) -> the network's input, float32 (P, 3, h, w) on the same device.

    (x / 255 - mean) / std, mean and std on the 0 to 1 scale (published train.py:123-131). Black borders
    become -mean / std: the crop is warped before it is normalised. mean, std: 3 numbers, or a float32 tensor
    (3,) that is on the device already.
    """
    scaled = crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format).div_(255)
    # Numbers made there at once would wait for all that a GPU has to do before.
    shift, factor = (
        torch.as_tensor(v).view(3, 1, 1).to(crops.device, non_blocking=True) for v in (mean, std)
    )
    return scaled.sub_(shift).div_(factor)
