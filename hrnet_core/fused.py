"""Convolution, bias, sum and ReLU in one kernel of cuDNN: for a network that only answers, on a GPU.

A convolution of W32's first branch writes and reads as much memory as it multiplies: with bias, sum and ReLU
in kernels of their own, a GPU moves the same numbers three times. cuDNN's fused kernels keep them, add in
float32 and round once. Nothing is compiled for it (docs/benchmarks/gpu.md has both beside each other).
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor, nn

from hrnet_core.errors import first_line
from hrnet_core.model import BasicBlock, Bottleneck, Fusion, HRNet

logger = logging.getLogger(__name__)


def fuse_where_it_runs(network: nn.Module, images: Tensor, inside_fusions: bool = True) -> None:
    """In place: the network of modes.build_network, BatchNorm folded, on its GPU, tried with `images`. Where
    cuDNN has no such kernel (an old GPU), the network stays as it was and the log says so.

    inside_fusions: False leaves Fusion to torch.compile, which cannot look into these kernels.
    """
    fused = _fuse(network, inside_fusions)
    try:
        with torch.inference_mode():
            network(images)
    except RuntimeError as error:  # cuDNN's errors are such
        for module, name in fused:
            delattr(module, name)  # the class's again
        logger.warning("bias, sum and ReLU run as kernels of their own, more slowly: %s", first_line(error))


def is_fused(module: nn.Module) -> bool:
    return "forward" in vars(module)


def _fuse(network: nn.Module, inside_fusions: bool) -> list[tuple[nn.Module, str]]:
    """The modules, and the method of each, that now run otherwise."""
    fusions = [module for module in network.modules() if isinstance(module, Fusion)]
    left = set() if inside_fusions else {part for fusion in fusions for part in fusion.modules()}
    changed: list[tuple[nn.Module, str]] = []
    for module in network.modules():
        if module in left:
            continue
        if isinstance(module, HRNet):
            module.stem = functools.partial(_stem, module)  # type: ignore[method-assign]
            changed.append((module, "stem"))
            continue
        if isinstance(module, BasicBlock):
            module.forward = functools.partial(_basic_block, module)  # type: ignore[method-assign]
        elif isinstance(module, Bottleneck):
            module.forward = functools.partial(_bottleneck, module)  # type: ignore[method-assign]
        elif _is_convolution_and_relu(module):
            module.forward = functools.partial(_with_relu, module[0])  # type: ignore[index]
        else:
            continue
        changed.append((module, "forward"))
    return changed


def _is_convolution_and_relu(module: nn.Module) -> bool:
    """As model._layers makes them, BatchNorm folded."""
    kinds = [type(part) for part in module] if isinstance(module, nn.Sequential) else []
    return kinds == [nn.Conv2d, nn.Identity, nn.ReLU]


def _stem(network: HRNet, images: Tensor) -> Tensor:
    return _with_relu(network.conv2, _with_relu(network.conv1, images))


def _basic_block(block: BasicBlock, x: Tensor) -> Tensor:
    return _with_relu(block.conv2, _with_relu(block.conv1, x), add=x)


def _bottleneck(block: Bottleneck, x: Tensor) -> Tensor:
    y = _with_relu(block.conv2, _with_relu(block.conv1, x))
    return _with_relu(block.conv3, y, add=block.downsample(x))


def _with_relu(convolution: nn.Conv2d, x: Tensor, add: Tensor | None = None) -> Tensor:
    """relu(convolution(x) + add), everything channels_last."""
    weight, bias, groups = convolution.weight, convolution.bias, convolution.groups
    stride, dilation = convolution.stride, convolution.dilation
    padding = [size // 2 for size in convolution.kernel_size]  # as every convolution of HRNet has it
    if add is None:
        return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
    return torch.cudnn_convolution_add_relu(x, weight, add, 1.0, bias, stride, padding, dilation, groups)
