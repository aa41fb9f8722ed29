"""The shape of an HRNet as plain data: readable anywhere, imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class HRNetConfig:
    """Stem, stages and head of an HRNet (arXiv:1902.09212, section 3; official pose_hrnet.py).

    The published networks differ in `width` only: 32 (28,536,113 parameters) and 48 (63,595,745),
    both with 17 keypoints. Every field keeps the published parameter names.
    """

    width: int = 32
    """Channels of the highest-resolution branch; branch b has width * 2**b."""
    num_keypoints: int = 17
    """Heatmaps that the head returns."""
    stem_width: int = 64
    """Channels of the two stride-2 convolutions; layer1 has 4 times as many."""
    bottlenecks: int = 4
    """Bottleneck blocks of layer1."""
    modules: tuple[int, int, int] = (1, 4, 3)
    """Exchange modules of stage 2, 3 and 4."""
    blocks: int = 4
    """Basic blocks of each branch of a module."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", tuple(self.modules))  # JSON gives a list
        numbers = [*self.modules, *(v for k, v in asdict(self).items() if k != "modules")]
        if len(self.modules) != 3 or any(not isinstance(number, int) or number < 1 for number in numbers):
            raise ValueError(f"HRNetConfig wants positive whole numbers and three module counts, got {self}")

    def as_dict(self) -> dict[str, Any]:
        """Fields as JSON types; `HRNetConfig(**as_dict())` is the same config."""
        return {**asdict(self), "modules": list(self.modules)}
