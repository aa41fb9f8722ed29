"""The training feed: which rows make which global batch, and the thread that reads them ahead.

The order of an epoch follows from (seed, epoch, dataset digest, lanes, global batch) alone, so it is
the same for every number of workers and after every restart:

    row groups of all shards, permuted -> one sequence of rows, cut into L lanes of equal length (within
    one row) -> each lane shuffled in windows of several row groups -> batch b takes the rows
    [b q, (b + 1) q) of every lane, q = batch / L.   Worker r of W reads lanes r, r + W, ...

Every row comes exactly once an epoch. The last batch is short: `Batch.rows` of `Batch.total` weigh it.
Going on in the middle of an epoch is arithmetic: no row is read to be thrown away. Each worker reads only
its own lanes' row groups (a group on a lane's border is read twice).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from hrnet_core.augment import draw_fresh, place_views, view_targets
from hrnet_core.geometry import compose_affine, invert_affine
from hrnet_core.views import multiply_factors, warp_pictures
from pipelines.config import TrainSettings
from pipelines.shards.manifest import Manifest
from pipelines.shards.rows import decode_pictures, decode_rows, read_row_group
from pipelines.shards.schema import CROP_COLUMNS

Ints = NDArray[np.int64]
Item = TypeVar("Item")
STORED = (*CROP_COLUMNS, "heatmaps", "weights", "ann_id")
FRESH = ("image", "image_to_picture", "keypoints", "center", "scale", "width", "ann_id")


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch over row groups of the given sizes; pure arithmetic, reads nothing."""

    group_rows: tuple[int, ...]
    """Rows of each row group, in the manifest's order of shards."""
    seed: int
    epoch: int
    digest: str
    """The dataset's digest (hex): another dataset is another order."""
    lanes: int
    batch_size: int
    """Global batch, a multiple of `lanes`."""
    window_groups: int
    """A lane is shuffled in windows of this many row groups (of the largest size)."""

    @property
    def rows(self) -> int:
        return sum(self.group_rows)

    @property
    def steps(self) -> int:
        """Global batches of the epoch, the short one included."""
        return -(-self.rows // self.batch_size)

    @property
    def window_rows(self) -> int:
        return self.window_groups * max(self.group_rows)

    def lane_length(self, lane: int) -> int:
        first, last = self._bounds(lane)
        return last - first

    def batch_rows(self, step: int) -> int:
        """Rows of global batch `step`, over all lanes."""
        return min(self.batch_size, self.rows - step * self.batch_size)

    def window(self, lane: int, number: int) -> Ints:
        """(M, 2) of (row group, row within it): one shuffled window of a lane, in reading order."""
        first, last = self._bounds(lane)
        first += number * self.window_rows
        size = min(self.window_rows, last - first)
        rows = first + self._rng("window", lane, number).permutation(size)
        index = np.searchsorted(self._starts, rows, side="right") - 1
        return np.stack([self._groups[index], rows - self._starts[index]], axis=1)

    @cached_property
    def _groups(self) -> Ints:
        """(G,) the row groups in the order of this epoch."""
        return self._rng("row groups").permutation(len(self.group_rows))

    @cached_property
    def _starts(self) -> Ints:
        """(G + 1,) where each of them begins in the sequence of rows, and where the last one ends."""
        return np.concatenate([[0], np.cumsum(np.asarray(self.group_rows, np.int64)[self._groups])])

    def _bounds(self, lane: int) -> tuple[int, int]:
        return lane * self.rows // self.lanes, (lane + 1) * self.rows // self.lanes

    def _rng(self, purpose: str, *numbers: int) -> np.random.Generator:
        word = int.from_bytes(purpose.encode(), "big")
        return np.random.default_rng([self.seed, self.epoch, int(self.digest, 16), word, *numbers])


@dataclass(frozen=True)
class Batch:
    """One worker's part of a global batch, n rows: stored or fresh views."""

    weights: NDArray[np.float32]
    """(n, K)."""
    ann_ids: Ints
    """(n,) COCO's annotation ids."""
    rows: int
    """Rows that count: n, or 0 where this worker has none in a short batch and runs one for company."""
    total: int
    """Rows of the global batch."""

    def on_device(self, device: str | torch.device) -> tuple[Tensor, Tensor]:
        """Crops uint8 (n, h, w, 3) and heatmaps float32 (n, K, H, W), both there."""
        raise NotImplementedError


@dataclass(frozen=True)
class StoredBatch(Batch):
    """As the shards have them."""

    images: NDArray[np.uint8]
    """(n, h, w, 3) RGB crops."""
    heatmaps: NDArray[np.float16]
    """(n, K, H, W) targets."""

    def on_device(self, device: str | torch.device) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.images).to(device), torch.tensor(self.heatmaps).to(device).float()


@dataclass(frozen=True)
class FreshBatch(Batch):
    """What hrnet_core/views.py makes views of."""

    pixels: NDArray[np.uint8]
    """(M, 3) RGB: the pixels of the n stored pictures, one picture after the other, row by row."""
    sizes: Ints
    """(n, 2) width and height of the pictures."""
    picture_to_crop: NDArray[np.float64]
    """(n, 2, 3) of each view."""
    heatmap_rows: NDArray[np.float32]
    """(n, K, H) and `heatmap_columns` (n, K, W): the factors of the targets."""
    heatmap_columns: NDArray[np.float32]
    input_size: tuple[int, int]
    """(width, height) of the crops."""

    def on_device(self, device: str | torch.device) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(self.pixels).to(device)
        factors = (torch.from_numpy(a).to(device) for a in (self.heatmap_rows, self.heatmap_columns))
        sizes, matrices = torch.from_numpy(self.sizes), torch.from_numpy(self.picture_to_crop)
        return warp_pictures(pixels, sizes, matrices, self.input_size), multiply_factors(*factors)


class Feed:
    """The batches of one split for worker `rank` of `world`.

    Stored views: epoch e reads variant (e + ann_id) mod variants of each person. A row group is read
    in all its variants for that, so the reading grows with their number, the decoding does not.
    Fresh views: each from SeedSequence([seed, epoch, ann_id]), of the row of variant 0.
    """

    def __init__(
        self, manifest: Manifest, split: str, settings: TrainSettings, rank: int = 0, world: int = 1
    ) -> None:
        if settings.lanes % world:
            raise ValueError(f"{world} workers do not divide {settings.lanes} lanes")
        self.manifest, self.split, self.settings = manifest, split, settings
        self.rank, self.world = rank, world
        self.fresh = settings.views == "device"
        self.columns = FRESH if self.fresh else STORED
        self.variants = 1 if self.fresh else manifest.variants(split)
        groups = manifest.row_groups(split)
        self.groups, self.group_rows = list(groups), tuple(groups.values())

    @property
    def steps(self) -> int:
        """Global batches of an epoch."""
        return self.order(0).steps

    def order(self, epoch: int) -> EpochOrder:
        s = self.settings
        return EpochOrder(
            self.group_rows, s.seed, epoch, self.manifest.digest, s.lanes, s.batch_size, s.shuffle_row_groups
        )

    def batches(self, epoch: int, start: int = 0, ahead: int = 4) -> Iterator[Batch]:
        """Batches `start`, start + 1, ... of an epoch, `ahead` of them read and decoded by a thread."""
        return prefetch(self._batches(epoch, start), ahead)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        order = self.order(epoch)
        per_lane = order.batch_size // order.lanes
        lanes = range(self.rank, order.lanes, self.world)
        windows: dict[int, tuple[int, pa.Table]] = {}
        for step in range(start, order.steps):
            parts = []
            for lane in lanes:
                next_row, stop = step * per_lane, min((step + 1) * per_lane, order.lane_length(lane))
                while next_row < stop:
                    number, offset = divmod(next_row, order.window_rows)
                    if lane not in windows or windows[lane][0] != number:
                        windows[lane] = number, self._read(order.window(lane, number), epoch)
                    parts.append(windows[lane][1].slice(offset, stop - next_row))
                    next_row += parts[-1].num_rows
            rows = sum(part.num_rows for part in parts)
            table = pa.concat_tables(parts) if parts else self._read(np.zeros((1, 2), np.int64), epoch)
            total = order.batch_rows(step)
            yield self._fresh(table, epoch, rows, total) if self.fresh else self._stored(table, rows, total)

    def _read(self, rows: Ints, epoch: int) -> pa.Table:
        """The rows (M, 2) of (row group, row within it), in that order."""
        by_group = np.argsort(rows[:, 0], kind="stable")
        tables = []
        for group in np.unique(rows[:, 0]):
            views = [
                read_row_group(self.manifest, self.split, *self.groups[group], self.columns, variant)
                for variant in range(self.variants)
            ]
            ann_ids = views[0]["ann_id"].to_numpy()
            wanted = rows[rows[:, 0] == group, 1]
            variant = (epoch + ann_ids[wanted]) % self.variants
            tables.append(pa.concat_tables(views).take(pa.array(variant * len(ann_ids) + wanted)))
        return pa.concat_tables(tables).take(pa.array(np.argsort(by_group)))

    def _stored(self, table: pa.Table, rows: int, total: int) -> StoredBatch:
        columns = decode_rows(table, self.manifest, heatmap_dtype=np.float16)
        common = columns["weights"], columns["ann_id"], rows, total
        return StoredBatch(*common, columns["images"], columns["heatmaps"])

    def _fresh(self, table: pa.Table, epoch: int, rows: int, total: int) -> FreshBatch:
        recipe = self.manifest.recipe
        columns = decode_rows(table.drop_columns("image"), self.manifest)
        how = recipe.codec, recipe.skeleton
        draws = draw_fresh(self.settings.seed, epoch, columns["ann_id"].tolist())
        people = columns["center"], columns["scale"], columns["keypoints"], columns["width"]
        view, image_to_crop = place_views(draws, *people, *how, recipe.augmentation)
        heatmap_rows, heatmap_columns, weights = view_targets(
            image_to_crop, view.flipped, columns["keypoints"], *how
        )
        pictures = decode_pictures(table["image"].combine_chunks())
        return FreshBatch(
            weights=weights,
            ann_ids=columns["ann_id"],
            rows=rows,
            total=total,
            pixels=np.concatenate([picture.reshape(-1, 3) for picture in pictures]),
            sizes=np.array([picture.shape[1::-1] for picture in pictures], np.int64),
            picture_to_crop=compose_affine(image_to_crop, invert_affine(columns["image_to_picture"])),
            heatmap_rows=heatmap_rows,
            heatmap_columns=heatmap_columns,
            input_size=recipe.settings.input_size,
        )


def prefetch(items: Iterable[Item], ahead: int) -> Iterator[Item]:
    """The same items, made by a thread at most `ahead` of the consumer; its exception is raised here."""
    source, end = iter(items), object()
    reader = ThreadPoolExecutor(1, "feed")
    try:
        made = deque(reader.submit(next, source, end) for _ in range(ahead))
        while (item := made.popleft().result()) is not end:
            made.append(reader.submit(next, source, end))
            yield item
    finally:
        reader.shutdown(cancel_futures=True)
