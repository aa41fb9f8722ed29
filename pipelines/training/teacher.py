"""A trained network whose heatmaps are a part of the targets (`train.teacher`): distillation.

Fast Pose Distillation (Zhang et al., arXiv 1811.05419) adds the squared distance to the teacher's heatmaps to
that to the labels'. Of two squared distances to one prediction, weighed a and 1 - a, the gradient is that of
the distance to the mixed target: so targets are mixed, and the loss stays the one it is. Where a keypoint has
weight 0 the teacher was not taught either: it says nothing there.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hrnet_core.checkpoint import CheckpointSpec, fetch_checkpoint, load_checkpoint
from hrnet_core.errors import ConfigError


@dataclass(frozen=True)
class Teacher:
    network: nn.Module
    """In eval mode, on the run's device."""
    share: float
    """Of its heatmaps in the targets."""
    sha256: str
    """Of its weights."""

    def mixed(self, images: Tensor, heatmaps: Tensor) -> Tensor:
        """Targets (n, K, H, W) of normalised images (n, 3, h, w), whose own are `heatmaps`; no gradient."""
        with torch.no_grad():
            return torch.lerp(heatmaps, self.network(images).float(), self.share)


def load_teacher(place: str, share: float, spec: CheckpointSpec, device: torch.device) -> Teacher:
    """The checkpoint folder that a path or URI names. CheckpointError where it cannot be read, ConfigError
    where its heatmaps are others than those of `spec`, the run's own."""
    with tempfile.TemporaryDirectory(prefix="hrnet-teacher-") as copy:
        network, of = load_checkpoint(fetch_checkpoint(place, Path(copy)))
    pairs = {
        "codec": (of.codec, spec.codec),
        "keypoints": (of.skeleton.keypoints, spec.skeleton.keypoints),
        "mean and std": ((of.mean, of.std), (spec.mean, spec.std)),
    }
    if differ := [f"{name} {its}, the run has {own}" for name, (its, own) in pairs.items() if its != own]:
        raise ConfigError(
            f"train.teacher: {place} answers in other heatmaps: {'; '.join(differ)}. A teacher needs the "
            f"input size, codec, sigma and skeleton of its student: train it on the same shards."
        )
    return Teacher(network.requires_grad_(False).to(device), share, str(of.weights_sha256))
