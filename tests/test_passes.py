"""Crops to heatmaps and keypoints as tensors: what a GPU runs, on the CPU's tensors."""

from __future__ import annotations

import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from test_predictor import SMALL, hrnet_predictor, noise

from hrnet_core.choices import CODECS
from hrnet_core.cuda_passes import SIZES, CudaPasses, padded
from hrnet_core.decoder import Decoder
from hrnet_core.fused import fuse_where_it_runs, is_fused
from hrnet_core.model import BasicBlock, Bottleneck, Fusion, HRNet, fold_batch_norms
from hrnet_core.modes import FORMS, _run_compiled, build_network
from hrnet_core.passes import Ask, CropPass, PlainPasses
from hrnet_core.predictor import PosePredictor


def crop_pass(predictor: PosePredictor, mode: str = "float32") -> CropPass:
    model, _ = hrnet_predictor(mode)
    network = build_network(model, predictor.spec, torch.device("cpu"), mode, {})
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_a_thread_compiles_as_many_shapes_as_there_are() -> None:
    """Which need not be the one that loaded the network. Torch's own limit is 8; what is beyond it runs
    uncompiled, without an error."""
    compiled = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    twice = torch.compile(lambda x: x * 2, backend=backend, dynamic=False)
    with ThreadPoolExecutor(1) as pool:
        for width in range(2, 13):
            found = pool.submit(_run_compiled, twice, "compiled", torch.ones(1, width)).result()
            assert found.tolist() == [[2.0] * width]
    assert len(compiled) == 11


# --- fused.py without a GPU: cuDNN's kernels stood in for ---------------------------------------------------


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Of each call the kernel's size, and whether there was a sum in it."""
    calls: list[tuple[int, bool]] = []

    def add_relu(x: Any, weight: Any, add: Any, alpha: float, bias: Any, *how: Any) -> torch.Tensor:
        calls.append((weight.shape[2], not isinstance(add, float)))
        return (torch.nn.functional.conv2d(x, weight, bias, *how) + alpha * add).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    plain = lambda x, weight, bias, *how: add_relu(x, weight, 0.0, 1.0, bias, *how)  # noqa: E731
    monkeypatch.setattr(torch, "cudnn_convolution_relu", plain)
    return calls


def folded() -> HRNet:
    model, _ = hrnet_predictor()
    fold_batch_norms(model.eval().requires_grad_(False))
    return model


@pytest.mark.parametrize("inside_fusions", [True, False])
def test_fused_convolutions_give_the_same(cudnn: list[tuple[int, bool]], inside_fusions: bool) -> None:
    images = torch.randn(2, 3, 128, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = folded()(images)
        model = folded()
        fuse_where_it_runs(model, images, inside_fusions)
        cudnn.clear()
        found = model(images)
    assert (found - expected).abs().max() < 1e-6 * (expected.max() - expected.min())
    blocks = [block for block in model.modules() if isinstance(block, BasicBlock | Bottleneck)]
    assert all(is_fused(block) for block in blocks)
    assert sum(add for _, add in cudnn) == len(blocks)
    relus = [part for part in model.modules() if isinstance(part, torch.nn.ReLU)]
    inside = {
        part for one in model.modules() if isinstance(one, Fusion) for part in one.modules() if part in relus
    }
    assert inside
    of_blocks = sum(2 if isinstance(block, BasicBlock) else 3 for block in blocks)
    assert len(cudnn) == 2 + of_blocks + len(relus) - (0 if inside_fusions else len(inside))


def test_where_cudnn_has_no_such_kernel_the_network_stays_as_it_was(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: Any) -> None:
        raise RuntimeError("FIND was unable to find an engine to execute this computation\nmore")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", none)
    images = torch.randn(1, 3, 128, 96)
    model = folded()
    fuse_where_it_runs(model, images)
    with torch.inference_mode():
        np.testing.assert_array_equal(model(images), folded()(images))
    assert "more slowly: FIND was unable to find an engine to execute this computation" in caplog.text


# --- cuda_passes.py without a GPU: its streams and graphs stood in for --------------------------------------


class Stream:
    """Everything is done in order here: there is nothing to wait for."""

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)

    def record_event(self) -> Stream:
        return self

    record = synchronize = record_event

    def elapsed_time(self, end: Stream) -> float:
        return 1.0


class Graph:
    """Replays by running again, into the tensors of the recording."""

    def __init__(self, launch: Any, crops: torch.Tensor) -> None:
        self.launch, self.crops = launch, crops
        self.found = tuple(tensor.clone() for tensor in launch(crops))
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for own, new in zip(self.found, self.launch(self.crops), strict=True):
            own.copy_(new)


@pytest.fixture
def stood_in(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graphs that are recorded, in order."""
    graphs: list[Graph] = []

    def capture(self: CudaPasses, launch: Any, crops: torch.Tensor) -> Any:
        graphs.append(Graph(launch, crops))
        return graphs[-1], graphs[-1].found

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **how: empty(*a, **how))
    for name in ("Stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, lambda **_: Stream())
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(CudaPasses, "_capture", capture)
    return graphs


def as_on_a_gpu(mode: str = "channels_last") -> tuple[PosePredictor, PosePredictor]:
    """One weights' predictors: as they are, and with the passes of a GPU."""
    _, plain = hrnet_predictor(mode)
    _, there = hrnet_predictor(mode)
    there._passes = CudaPasses(crop_pass(there, mode), there.spec, torch.device("cpu"), FORMS[mode])
    return plain, there


@pytest.mark.parametrize("mode", ["channels_last", "bfloat16"])
def test_recorded_batches_give_the_same_people(stood_in: list[Graph], mode: str) -> None:
    plain, there = as_on_a_gpu(mode)
    crops = noise(11)
    expected = plain.heatmaps(crops, True, batch_size=4)
    spread = float(np.ptp(expected))
    found = there.heatmaps(crops, True, batch_size=4)  # batches of 4, 4, and 3 filled up to 4
    assert np.abs(found - expected).max() < (1e-5 if mode == "channels_last" else 5e-2) * spread
    assert len(stood_in) == 2  # of size 4: launched in order, and branches beside each other
    keypoints, scores = there.predict_crops(crops, True, batch_size=4)
    own, own_scores = there.spec.codec.decode(found)
    np.testing.assert_allclose(keypoints, own, atol=1e-3)
    np.testing.assert_array_equal(scores, own_scores)
    assert len(stood_in) == 2  # nothing is recorded twice
    assert len(there.predict_crops(crops[:0])[0]) == 0


def test_more_people_than_a_graph_holds_run_in_several(stood_in: list[Graph]) -> None:
    _, there = as_on_a_gpu()
    keypoints, _ = there.predict_crops(noise(260), False, batch_size=300)
    assert len(keypoints) == 260
    assert [len(graph.crops) for graph in stood_in] == [256, 4, 4]  # 256 fill a GPU: not tried beside


def test_warm_up_records_all_sizes_that_may_come(stood_in: list[Graph]) -> None:
    _, there = as_on_a_gpu()
    there.warm_up(people=5, flip_test=True)
    assert [len(graph.crops) for graph in stood_in] == [1, 1, 2, 2, 4, 4, 8, 8]
    assert all(graph.replays for graph in stood_in)


def test_calls_of_several_threads_do_not_meet(stood_in: list[Graph]) -> None:
    _, there = as_on_a_gpu()
    several = [noise(n, seed=n) for n in (1, 3, 2, 5)] * 3
    alone = [there.heatmaps(crops, True, 2) for crops in several]
    with ThreadPoolExecutor(4) as pool:
        beside = list(pool.map(lambda crops: there.heatmaps(crops, True, 2), several))
    for one, other in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("how", ["fails", "differs", "gives NaN"])
def test_what_cannot_be_recorded_is_launched(
    stood_in: list[Graph], how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, there = as_on_a_gpu()
    replay = Graph.replay

    def spoiled(self: Graph) -> None:
        replay(self)
        if how == "fails":
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        self.found[1][0, 0, 0, 0] = torch.nan if how == "gives NaN" else self.found[1].max() * 1.1

    monkeypatch.setattr(Graph, "replay", spoiled)
    with caplog.at_level(logging.WARNING, "hrnet_core.cuda_passes"):
        found = there.heatmaps(noise(3), False)
    expected = plain.heatmaps(noise(3), False)
    assert np.abs(found - expected).max() < 1e-5 * np.ptp(expected)
    (told,) = [r.getMessage() for r in caplog.records if r.name == "hrnet_core.cuda_passes"]
    assert told.startswith("batches of 4 are launched kernel by kernel, more slowly: ")
    words = {"fails": "not permitted when stream", "differs": "differs by 0", "gives NaN": "differs by nan"}
    assert words[how] in told
