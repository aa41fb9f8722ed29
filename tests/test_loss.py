"""joints_mse against the values that the published code, mmpose and WZM's code give on one input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hrnet_core.loss import joints_mse
from hrnet_core.skeleton import COCO17
from pipelines.settings.train import TrainSettings


@pytest.fixture(scope="module")
def sample() -> tuple[Tensor, Tensor, Tensor]:
    """The input that reference_vectors.json `losses` describes."""
    n = np.arange(2 * 17 * 4 * 3, dtype=np.float64).reshape(2, 17, 4, 3)
    weights = np.ones((2, 17))
    weights[0, 3] = weights[1, 7] = 0
    arrays = (np.sin(0.37 * n), np.abs(np.cos(0.11 * n)), weights)
    return tuple(torch.from_numpy(a.astype(np.float32)) for a in arrays)  # type: ignore[return-value]


JOINTS = torch.tensor(COCO17.joint_weights)


@pytest.mark.parametrize(
    ("name", "weigh", "options"),
    [
        ("official_w01", lambda w: w, {}),
        ("official_w_joint", lambda w: w * JOINTS, {}),
        ("official_no_weight", torch.ones_like, {}),
        ("official_ohkm_top8_w01", lambda w: w, {"hardest": 8}),
        ("mmpose_w01", lambda w: w, {"kind": "linear"}),
        ("mmpose_w_joint", lambda w: w * JOINTS, {"kind": "linear"}),
    ],
)
def test_values_of_the_published_losses(
    reference: dict[str, Any],
    sample: tuple[Tensor, Tensor, Tensor],
    name: str,
    weigh: Any,
    options: dict[str, Any],
) -> None:
    predicted, target, weights = sample
    value = joints_mse(predicted, target, weigh(weights), **options)
    assert float(value) == pytest.approx(reference["losses"]["values"][name], rel=1e-6)


def test_trap_3_official_squares_the_weight_and_halves(sample: tuple[Tensor, Tensor, Tensor]) -> None:
    predicted, target, weights = sample
    one, three = joints_mse(*sample), joints_mse(predicted, target, 3 * weights)
    assert float(three / one) == pytest.approx(9, rel=1e-6)
    linear = joints_mse(*sample, kind="linear")
    assert float(joints_mse(predicted, target, 3 * weights, kind="linear") / linear) == pytest.approx(
        3, rel=1e-6
    )
    assert float(linear / one) == pytest.approx(2, rel=1e-6)
    # The definition itself: the mask multiplies prediction and target before the square.
    mask = (3 * weights)[:, :, None, None]
    by_hand = 0.5 * ((mask * predicted - mask * target) ** 2).mean(dim=(0, 2, 3)).mean()
    assert float(three) == pytest.approx(float(by_hand), rel=1e-6)


def test_trap_4_joint_weights_are_off_in_the_published_recipe() -> None:
    assert TrainSettings().joint_weights is False
    assert TrainSettings().loss == "official"
    assert TrainSettings().ohkm == 0
    published = [1] * 7 + [1.2, 1.2, 1.5, 1.5, 1, 1, 1.2, 1.2, 1.5, 1.5]
    assert list(COCO17.joint_weights) == published


@pytest.mark.parametrize("hardest", [0, 8])
def test_sample_weights_count_rows(sample: tuple[Tensor, Tensor, Tensor], hardest: int) -> None:
    """A batch filled up with rows of weight 0 gives the loss and the gradients of the rows that count."""
    filled = [torch.cat([t, torch.full_like(t, 7.0)]) for t in sample]
    filled[0].requires_grad_()
    loss = joints_mse(*filled, hardest=hardest, sample_weights=torch.tensor([1.0, 1, 0, 0]))
    loss.backward()
    short = sample[0].clone().requires_grad_()
    expected = joints_mse(short, *sample[1:], hardest=hardest)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert torch.allclose(filled[0].grad[:2], short.grad, rtol=1e-6)
    assert float(filled[0].grad[2:].abs().max()) == 0


def test_no_row_counts(sample: tuple[Tensor, Tensor, Tensor]) -> None:
    predicted = sample[0].clone().requires_grad_()
    loss = joints_mse(predicted, *sample[1:], sample_weights=torch.zeros(2))
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(predicted.grad.abs().max()) == 0


def test_float32_under_bfloat16(sample: tuple[Tensor, Tensor, Tensor]) -> None:
    loss = joints_mse(sample[0].bfloat16(), *sample[1:])
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(joints_mse(*sample)), rel=1e-2)


def test_what_does_not_belong_together_is_refused(sample: tuple[Tensor, Tensor, Tensor]) -> None:
    predicted, target, weights = sample
    with pytest.raises(ValueError, match="belong together"):
        joints_mse(predicted, target[:1], weights)
    with pytest.raises(ValueError, match="belong together"):
        joints_mse(predicted, target, weights[:, :, None])
    with pytest.raises(ValueError, match="hardest"):
        joints_mse(predicted, target, weights, hardest=18)
    with pytest.raises(ValueError, match="kind"):
        joints_mse(predicted, target, weights, kind="mean")  # type: ignore[arg-type]
