"""A worker's part of a global batch: as the feed makes it, and on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from hrnet_core.noise import PlacedNoise, add_noise
from hrnet_core.views import multiply_factors, warp_pictures

Sent = tuple[Tensor, Tensor, Tensor]
"""Crops uint8 (n, h, w, 3), heatmaps float32 (n, K, H, W) and weights float32 (n, K) on the device."""


@dataclass(frozen=True)
class Batch:
    """n rows: stored or fresh views."""

    weights: NDArray[np.float32]
    """(n, K)."""
    ann_ids: NDArray[np.int64]
    """(n,) COCO's annotation ids."""
    rows: int
    """Rows that count: n, or 0 where this worker has none in a short batch and runs one for company."""
    total: int
    """Rows of the global batch."""
    noise: PlacedNoise = field(default=PlacedNoise(None, None, None), kw_only=True)
    """What is done to the n crops, once they are there."""

    SENT: ClassVar[tuple[str, ...]]
    """The arrays that go to the device, beside those of the noise."""

    def arrays(self) -> tuple[NDArray[Any], ...]:
        noise = (array for array in self.noise if array is not None)
        return (*(getattr(self, name) for name in self.SENT), *noise)

    def pinned(self) -> Self:
        """The same, with all that goes to the device in page-locked memory; what is not there is copied."""
        tensors = {name: torch.from_numpy(getattr(self, name)).pin_memory() for name in self.SENT}
        noise = (None if one is None else torch.from_numpy(one).pin_memory().numpy() for one in self.noise)
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        return replace(self, **arrays, noise=PlacedNoise(*noise))

    def finish(self, *arrays: Tensor) -> Sent:
        """What becomes of `arrays()` on the device, where they are already."""
        own, rest = arrays[: len(self.SENT)], iter(arrays[len(self.SENT) :])
        crops, heatmaps, weights = self.views(*own)
        noise = (None if array is None else next(rest) for array in self.noise)
        return add_noise(crops, *noise), heatmaps, weights

    def views(self, *arrays: Tensor) -> Sent:
        """What becomes of the arrays of SENT there."""
        raise NotImplementedError

    def on_device(self, device: str | torch.device) -> Sent:
        """Sent there, and waited for."""
        return self.finish(*(torch.from_numpy(array).to(device) for array in self.arrays()))


@dataclass(frozen=True)
class StoredBatch(Batch):
    """As the shards have them."""

    images: NDArray[np.uint8]
    """(n, h, w, 3) RGB crops."""
    heatmaps: NDArray[np.float16]
    """(n, K, H, W) targets."""

    SENT = ("images", "heatmaps", "weights")

    def views(self, *arrays: Tensor) -> Sent:
        images, heatmaps, weights = arrays
        return images, heatmaps.float(), weights


@dataclass(frozen=True)
class FreshBatch(Batch):
    """What hrnet_core/views.py makes views of."""

    pixels: NDArray[np.uint8]
    """(M, 3) RGB: of each of the n stored pictures the part that its view reaches, row by row."""
    sizes: NDArray[np.int64]
    """(n, 2) width and height of the pictures."""
    reaches: NDArray[np.int64]
    """(n, 4) x0, y0, x1, y1 of those parts."""
    picture_to_crop: NDArray[np.float64]
    """(n, 2, 3) of each view; `crop_to_picture` (n, 2, 3) is its inverse."""
    crop_to_picture: NDArray[np.float32]
    heatmap_rows: NDArray[np.float32]
    """(n, K, H) and `heatmap_columns` (n, K, W): the factors of the targets."""
    heatmap_columns: NDArray[np.float32]
    input_size: tuple[int, int]
    """(width, height) of the crops."""

    SENT = ("pixels", "sizes", "reaches", "crop_to_picture", "heatmap_rows", "heatmap_columns", "weights")

    def views(self, *arrays: Tensor) -> Sent:
        pixels, sizes, reaches, crop_to_picture, rows, columns, weights = arrays
        crops = warp_pictures(pixels, sizes, reaches, crop_to_picture, self.input_size)
        return crops, multiply_factors(rows, columns), weights


def pinned(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """np.empty in page-locked memory, which a GPU copies from while the program goes on. PyTorch keeps such
    memory and gives it out again: locking it costs more than the copy."""
    like = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.empty(shape, dtype=like, pin_memory=True).numpy()


def on_device_ahead(
    batches: Iterator[Batch], device: torch.device
) -> Generator[tuple[Batch, Sent], None, None]:
    """Each batch with its crops, heatmaps and weights on the device.

    On CUDA the next batch is copied there, on a stream of its own, while the network works on this one.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch, batch.on_device(device)
        return
    copies = torch.cuda.Stream(device)
    sent: deque[tuple[Batch, tuple[Tensor, ...], torch.cuda.Event]] = deque()
    reading: deque[tuple[Batch, torch.cuda.Event]] = deque()  # batches whose memory a copy still reads
    try:
        for batch in batches:
            while reading and reading[0][1].query():
                reading.popleft()
            tensors, there = _send(batch, device, copies)
            reading.append((batch, there))
            sent.append((batch, tensors, there))
            if len(sent) > 1:
                yield _arrived(*sent.popleft())
        while sent:
            yield _arrived(*sent.popleft())
    finally:
        copies.synchronize()  # before the memory that a copy reads or writes is given to others


def _send(
    batch: Batch, device: torch.device, copies: torch.cuda.Stream
) -> tuple[tuple[Tensor, ...], torch.cuda.Event]:
    """Starts the copy of a batch's arrays; the tensors, and the event that they are there."""
    arrays = [torch.from_numpy(array) for array in batch.arrays()]
    # The tensors are the working stream's. Their memory may be that of a step which it has not done yet, so
    # the copy waits for what is asked of that stream so far: it runs beside the step that is asked for next.
    tensors = tuple(torch.empty_like(array, device=device) for array in arrays)
    copies.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(copies):
        for tensor, array in zip(tensors, arrays, strict=True):
            tensor.copy_(array, non_blocking=True)
    return tensors, copies.record_event()


def _arrived(batch: Batch, tensors: tuple[Tensor, ...], there: torch.cuda.Event) -> tuple[Batch, Sent]:
    """The working stream waits for the copy, the program does not: it goes on asking for steps."""
    torch.cuda.current_stream(tensors[0].device).wait_event(there)
    return batch, batch.finish(*tensors)
