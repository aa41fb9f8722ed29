"""What a run can choose of the method, as plain data: settings are read without numpy or torch.

What each choice does stands in heatmaps.py, modes.py, augment.py and noise.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

CodecName = Literal["official", "dark", "udp"]
CODECS: tuple[CodecName, ...] = get_args(CodecName)
ModeName = Literal[
    "float32",
    "channels_last",
    "tf32",
    "float16",
    "bfloat16",
    "compiled",
    "compiled_tf32",
    "compiled_float16",
    "compiled_bfloat16",
    "onnx",
    "openvino",
    "openvino_bfloat16",
    "openvino_int8",
    "ncnn",
]
MODES: tuple[ModeName, ...] = get_args(ModeName)
FormatName = Literal["onnx", "onnx_decoded", "onnx_float16", "openvino", "openvino_int8", "ncnn"]
PADDING = 1.25
"""Of a crop relative to the box of the person."""
MAX_PIXELS = 100_000_000
"""Of a picture, by its header: more is refused before it is decoded."""


def default_sigma(input_size: tuple[int, int]) -> float:
    """The Gaussian's, in heatmap cells, for an input of (width, height) px: 2 at 256x192, 3 at 384x288."""
    return 2.0 * input_size[1] / 256


@dataclass(frozen=True)
class Augmentation:
    """How far views may differ from the plain one; the defaults are the published yaml's."""

    scale_factor: float = 0.35
    """Standard deviation of the scale, and where it is clipped, around 1."""
    rotation_factor: float = 45.0
    """Standard deviation of the rotation in degrees, clipped at twice that."""
    half_body_probability: float = 0.3
    flip_probability: float = 0.5


OFFICIAL = Augmentation()


@dataclass(frozen=True)
class Noise:
    """How often what of a training crop's pixels is changed (noise.py). 0: never, as in published runs."""

    photometric: float = 0.0
    """Of each change of colour by itself."""
    coarse_dropout: float = 0.0
    """Of black rectangles in a crop."""
    information_dropping: float = 0.0
    """Of an ellipse over a keypoint or on the body."""
