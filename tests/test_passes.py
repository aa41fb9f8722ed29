"""Crops to heatmaps and keypoints as tensors: what a GPU runs, on the CPU's tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_predictor import SMALL, hrnet_predictor, noise

from hrnet_core.choices import CODECS
from hrnet_core.cuda_passes import SIZES, padded
from hrnet_core.decoder import Decoder
from hrnet_core.modes import FORMS, build_network
from hrnet_core.passes import Ask, CropPass, PlainPasses
from hrnet_core.predictor import PosePredictor


def crop_pass(predictor: PosePredictor, mode: str = "float32") -> CropPass:
    model, _ = hrnet_predictor(mode)
    network = build_network(model, predictor.spec, torch.device("cpu"), mode)
    return CropPass(network, predictor.spec, FORMS[mode].layout)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("codec", CODECS)
def test_tensors_give_the_keypoints_of_the_numpy_side(codec: str, flip: bool) -> None:
    """Normalisation, both passes, flip back, average and decoding as one chain of tensors."""
    _, predictor = hrnet_predictor(codec=codec)
    crops = noise(5)
    with torch.inference_mode():
        heatmaps = crop_pass(predictor)(torch.from_numpy(crops), flip)
        found = Decoder(predictor.spec.codec)(heatmaps).numpy()
    keypoints, scores = predictor.spec.codec.decode(predictor.heatmaps(crops, flip))
    np.testing.assert_array_equal(heatmaps.numpy(), predictor.heatmaps(crops, flip))
    np.testing.assert_allclose(found[..., :2], keypoints, atol=1e-3)
    np.testing.assert_array_equal(found[..., 2], scores)
    assert np.ptp(keypoints) > 10


def test_plain_and_mirrored_crops_as_one_batch_or_as_two() -> None:
    _, predictor = hrnet_predictor()
    crops = torch.from_numpy(noise(3))
    with torch.inference_mode():
        two, one = (crop_pass(predictor)(crops, True, together) for together in (False, True))
    assert (one - two).abs().max() < 1e-5 * (two.max() - two.min())


def test_a_batch_is_filled_up_to_the_next_size() -> None:
    assert [padded(people) for people in (1, 2, 3, 5, 64, 65, 200, 256)] == [1, 2, 4, 8, 64, 128, 256, 256]
    assert list(SIZES) == sorted(SIZES)


def test_keypoints_or_heatmaps_are_asked_for() -> None:
    _, predictor = hrnet_predictor()
    passes = PlainPasses(crop_pass(predictor), predictor.spec, torch.device("cpu"))
    crops = noise(2)
    crops.flags.writeable = False  # as they come from Ray
    found, heatmaps = (passes.start(crops, Ask(False, border))() for border in ("official", None))
    assert found.shape == (2, SMALL.num_keypoints, 3)
    assert heatmaps.shape == (2, SMALL.num_keypoints, 32, 24)
    np.testing.assert_array_equal(found[..., 2], heatmaps.max(axis=(2, 3)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_blocks_compiled_one_by_one_give_the_same(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiled modes run on a GPU; on the CPU's compiler here."""
    from hrnet_core.modes import _blocks_compiled

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    model, _ = hrnet_predictor()
    images = torch.randn(3, 3, 128, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.eval()(images)
        blocks = _blocks_compiled(model, "compiled")
        for count in (3, 1, 2):
            found = blocks(images[:count])
            assert (found - expected[:count]).abs().max() < 1e-5 * (expected.max() - expected.min())
    torch._dynamo.reset()
