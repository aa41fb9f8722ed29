"""Choosing at random, for everything that is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pick(rng: np.random.Generator, options: Sequence[str], shares: Sequence[float] | None = None) -> str:
    """One of the options, by share (default: equal). Many times faster than rng.choice."""
    if shares is None:
        return options[int(rng.random() * len(options))]
    mark, total = rng.random() * sum(shares), 0.0
    for option, share in zip(options, shares, strict=True):
        total += share
        if mark < total:
            return option
    return options[-1]
