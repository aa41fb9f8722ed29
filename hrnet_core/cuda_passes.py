"""Passes on an NVIDIA GPU: copies beside the pass before, one CUDA graph from crops to keypoints.

    pinned crops --up--> the graph's crops --> normalise, network, flip, decode --> keypoints --down--> pinned

Launched one by one, the kernels of a crop keep an H200 busy a sixth of the time. A graph is recorded for each
of SIZES when a batch first needs it; smaller batches are filled up with black crops, whose answers are thrown
away. All graphs share one pool of memory: it holds what the largest needs, and the heatmaps and keypoints of
each. Where recording fails, the same work is launched, and the log says so.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hrnet_core.decoder import Decoder
from hrnet_core.errors import first_line
from hrnet_core.geometry import Float32
from hrnet_core.heatmaps import Border
from hrnet_core.model import ExchangeModule
from hrnet_core.modes import Form
from hrnet_core.passes import Answer, Ask, CropPass, UInt8

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""People of a batch."""
APART_UP_TO = 32
"""People up to which a recording with the branches beside each other is tried: larger batches fill a GPU."""
TOGETHER = 64
"""People up to which plain and mirrored crops are one batch: they fill a GPU better than two in turn."""
WARM = 3
"""Passes before one is recorded: libraries choose their kernels, and blocks are compiled."""
SAME = 1e-3
"""Of the heatmaps' range: a recording that differs more from what is launched is not used."""

logger = logging.getLogger(__name__)
# cuDNN's switches are process-wide: who sets them takes turns.
_cudnn = threading.Lock()
Found = tuple[Tensor, Tensor]
"""Keypoints (N, K, 3) and heatmaps (N, K, H, W)."""
Launch = Callable[[Tensor], Found]
"""Work on crops uint8 (N, h, w, 3) on the device."""


def padded(people: int) -> int:
    """The size of the batch in which so many people, at most 256, run."""
    return next(size for size in SIZES if size >= people)


class CudaPasses:
    """Batches on one GPU. `start` does not wait; calls from several threads take turns in it."""

    largest: int | None = SIZES[-1]

    def __init__(self, crop_pass: CropPass, spec: CheckpointSpec, device: torch.device, form: Form) -> None:
        self._pass, self._form, self._device = crop_pass.to(device), form, device
        self._crop = (*spec.input_size[::-1], 3)
        borders: tuple[Border, ...] = ("official", "mmpose")
        self._decoders = {border: Decoder(spec.codec, border).to(device) for border in borders}
        with torch.cuda.device(device):
            self._up, self._main, self._down, *self._beside = (_stream() for _ in range(6))
            self._pool = torch.cuda.graph_pool_handle()
            self._main.wait_stream(torch.cuda.current_stream())  # the weights may still be on their way
        self._work: dict[tuple[int, bool, Border], Launch] = {}
        self._turn = threading.Lock()

    def start(self, crops: UInt8, ask: Ask) -> Answer:
        """crops (n, h, w, 3), n at most `largest`. Returns when all is on its way; the answer waits."""
        count, size = len(crops), padded(len(crops))
        host = torch.zeros((size, *self._crop), dtype=torch.uint8, pin_memory=True)
        host.numpy()[:count] = crops
        with self._turn, torch.cuda.device(self._device), torch.inference_mode():
            work = self._work_on(size, ask.flip, ask.border or "official")
            with torch.cuda.stream(self._up):
                there = host.to(self._device, non_blocking=True)
            self._main.wait_stream(self._up)
            with torch.cuda.stream(self._main):
                keypoints, heatmaps = work(there)
                # A copy: the next batch writes into the graph's own.
                made = (heatmaps if ask.border is None else keypoints).clone()
            self._down.wait_stream(self._main)
            with torch.cuda.stream(self._down):
                back = torch.empty(made.shape, dtype=made.dtype, pin_memory=True)
                back.copy_(made, non_blocking=True)
                done = self._down.record_event()
        in_use = [host, there, made]  # until the GPU is done with them

        def answer() -> Float32:
            done.synchronize()
            in_use.clear()
            found: Float32 = back[:count].numpy()
            return found

        return answer

    def warm_up(self, people: int, flip: bool) -> None:
        """Record every size that a batch of up to `people` may need."""
        for size in SIZES[: SIZES.index(padded(min(people, SIZES[-1]))) + 1]:
            self.start(np.zeros((size, *self._crop), np.uint8), Ask(flip, "official"))()

    def _work_on(self, size: int, flip: bool, border: Border) -> Launch:
        """What is done with `size` crops; recorded where that is possible."""
        key = size, flip, border
        if key not in self._work:
            launch = functools.partial(self._launch, flip=flip, border=border)
            try:
                self._work[key] = self._record(size, launch)
            except _NotTheSame as error:
                self._not_recorded(size, str(error))
                self._work[key] = launch
            except RuntimeError as error:
                self._not_recorded(size, first_line(error))
                self._work[key] = launch
        return self._work[key]

    def _not_recorded(self, size: int, why: str) -> None:
        logger.warning("batches of %d are launched kernel by kernel, which is slower: %s", size, why)

    def _launch(self, crops: Tensor, flip: bool, border: Border) -> Found:
        with self._kernels():
            heatmaps: Tensor = self._pass(crops, flip, together=len(crops) <= TOGETHER)
            keypoints: Tensor = self._decoders[border](heatmaps)
        return keypoints, heatmaps

    @contextlib.contextmanager
    def _kernels(self) -> Iterator[None]:
        """float32 that is float32, also on a GPU that would take TF32, by kernels that are the same in every
        process. For the fast modes cuDNN times its kernels: their last bits may differ between processes."""
        exact = self._form.dtype is torch.float32 and not self._form.tf32
        with (
            _cudnn,
            torch.backends.cudnn.flags(
                enabled=True, benchmark=not exact, deterministic=exact, allow_tf32=not exact
            ),
        ):
            yield

    def _record(self, size: int, launch: Launch) -> Launch:
        """A graph of it, of two the faster; checked against it."""
        crops = torch.randint(0, 256, (size, *self._crop), dtype=torch.uint8, device=self._device)
        self._main.wait_stream(torch.cuda.current_stream())
        recordings = [self._capture(launch, crops)]
        if size <= APART_UP_TO:
            with branches_apart(self._pass, self._beside):
                recordings.append(self._capture(launch, crops))
        with torch.cuda.stream(self._main):
            graph, found = min(recordings, key=lambda one: _milliseconds(one[0]))
            crops.random_(0, 256)  # other input than it was recorded with
            _, expected = launch(crops)
            graph.replay()
            difference = float((found[1] - expected).abs().max() / (expected.max() - expected.min()))
        if not difference <= SAME:
            raise _NotTheSame(f"the recording differs by {difference:.2g} of the heatmaps' range")

        def replay(given: Tensor) -> Found:
            crops.copy_(given)
            graph.replay()
            return found

        return replay

    def _capture(self, launch: Launch, crops: Tensor) -> tuple[torch.cuda.CUDAGraph, Found]:
        with torch.cuda.stream(self._main):
            for _ in range(WARM):
                launch(crops)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may wait for an earlier batch meanwhile.
        with torch.cuda.graph(graph, self._pool, self._main, capture_error_mode="thread_local"):
            found = launch(crops)
        return graph, found


def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


class _NotTheSame(Exception):
    """A recording computes something else than what it was recorded of."""


def _milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Of ten passes, after one."""
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(10):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


# --- branches beside each other -------------------------------------------------------------------------


@contextlib.contextmanager
def branches_apart(network: torch.nn.Module, streams: Sequence[torch.cuda.Stream]) -> Iterator[None]:
    """Within it, the branches of each exchange module run beside each other, and so do its sums: they do not
    need each other, and one of them alone does not fill a GPU at small batches."""
    modules = [module for module in network.modules() if isinstance(module, ExchangeModule)]
    for module in modules:
        module.forward = functools.partial(_exchange_apart, module, streams)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the class's again


def _exchange_apart(
    module: ExchangeModule, streams: Sequence[torch.cuda.Stream], inputs: list[Tensor]
) -> list[Tensor]:
    """ExchangeModule.forward. The caller holds the inputs until this returns, and each stream comes back to
    its own memory only after the next fork: nothing is written over that another stream still reads."""
    pairs = zip(module.branches, inputs, strict=True)
    branches = [functools.partial(branch, x) for branch, x in pairs]
    features = _apart(branches, streams)
    return _apart([functools.partial(fusion, features) for fusion in module.fuse_layers], streams)


def _apart(calls: Sequence[Callable[[], Any]], streams: Sequence[torch.cuda.Stream]) -> list[Any]:
    """The results of the calls, the first on the current stream, the others on one each."""
    main = torch.cuda.current_stream()
    beside = streams[: len(calls) - 1]
    for stream in beside:
        stream.wait_stream(main)
    results = []
    for call, stream in zip(calls, [main, *beside], strict=True):
        with torch.cuda.stream(stream):
            results.append(call())
    for stream in beside:
        main.wait_stream(stream)
    return results
