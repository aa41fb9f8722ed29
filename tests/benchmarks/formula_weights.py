"""The weights of tests/reference/forward_w32.json, whose heatmaps another implementation computed.

It lies here because a benchmark imports from its own folder alone; pytest looks there too (pyproject.toml).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def formula_weights(shapes: dict[str, Any]) -> dict[str, Tensor]:
    """The weights that forward_w32.json describes: tensor i from RandomState(i)."""
    state = {}
    for i, (key, shape) in enumerate(shapes.items()):
        wave = np.random.RandomState(i).uniform(-1, 1, shape)  # a frozen stream
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
            continue
        if key.endswith("running_var"):
            values = 1 + 0.5 * wave
        elif key.endswith(("running_mean", "bias")):
            values = 0.1 * wave
        elif len(shape) == 1:
            values = 0.75 + 0.25 * wave
        else:
            values = wave * np.sqrt(2 / np.prod(shape[1:]))
        state[key] = torch.from_numpy(np.asarray(values, np.float32))
    return state
