"""Mean squared error of heatmaps, in the two forms of the field, with hard keypoint mining."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def joints_mse(
    predicted: Tensor,
    target: Tensor,
    weights: Tensor,
    *,
    kind: Literal["official", "linear"] = "official",
    hardest: int = 0,
    sample_weights: Tensor | None = None,
) -> Tensor:
    """Weighted MSE of heatmaps -> float32 scalar, mean over people, keypoints and cells.

    predicted, target (N, K, H, W); weights (N, K), 0 or 1 unless joint weights are on.
    kind: "official" is 0.5 (w p - w t)^2, so it squares the weight (published lib/core/loss.py:15-39);
        "linear" is w (p - t)^2 (mmpose). With weights 0 and 1, linear is twice official.
    hardest: only this many keypoints of each person with the largest error count (OHKM, published
        lib/core/loss.py:42-84, where it is 8 of 17; 0 takes all). More than K is a ValueError.
    sample_weights (N,): weight of each person in the mean over people, so that rows that only fill a
        batch count 0. The mean divides by their sum; if all are 0, the loss is 0 and so is its gradient.

    Computed in float32, also under autocast.
    """
    keypoints = predicted.shape[1]
    if predicted.shape != target.shape or weights.shape != predicted.shape[:2]:
        raise ValueError(
            f"heatmaps {tuple(predicted.shape)}, targets {tuple(target.shape)} and weights "
            f"{tuple(weights.shape)} do not belong together: (N, K, H, W) twice and (N, K)"
        )
    if kind not in ("official", "linear") or not 0 <= hardest <= keypoints:
        raise ValueError(f"kind is 'official' or 'linear', hardest 0 to {keypoints}; got {kind!r}, {hardest}")
    factors = 0.5 * weights.float() ** 2 if kind == "official" else weights.float()
    errors = factors * (predicted.float() - target.float()).square().mean(dim=(2, 3))  # (N, K)
    if hardest:
        errors = errors.topk(hardest, dim=1).values
    people = errors.mean(dim=1)
    if sample_weights is None:
        return people.mean()
    total = sample_weights.sum()
    return (people * sample_weights).sum() / torch.where(total > 0, total, torch.ones_like(total))
