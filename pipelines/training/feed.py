"""The training feed: threads that read rows, decode them and make batches, in the order of order.py.

    row group -> its rows, as Arrow (one thread a group) -> batch: its rows gathered and decoded (one a batch)

Reading runs a window of the order ahead of the batches, row for row, and the batches run some ahead of the
network, both across the end of an epoch. What a batch is does not depend on who makes it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hrnet_core.augment import draw_fresh, place_views, view_targets
from hrnet_core.choices import Noise
from hrnet_core.geometry import Float64, compose_affine, invert_affine
from hrnet_core.noise import PlacedNoise, draw_noise, place_noise
from hrnet_core.views import invert_views, pack_reaches, view_reaches
from pipelines.process.in_order import results
from pipelines.settings.train import TrainSettings
from pipelines.shards.manifest import Manifest
from pipelines.shards.rows import decode_pictures, decode_rows, read_row_group
from pipelines.shards.schema import CROP_COLUMNS
from pipelines.training.batch import Batch, FreshBatch, StoredBatch, pinned
from pipelines.training.order import EpochOrder, Ints

STORED = (*CROP_COLUMNS, "heatmaps", "weights", "ann_id")
FRESH = ("image", "image_to_picture", "keypoints", "center", "scale", "width", "ann_id")
NOISE = ("image_to_crop", "keypoints", "bbox_xywh", "ann_id")
READY = 4
"""Batches that may wait for the network, beside one that each thread is at."""
READY_BYTES = 2**30
"""What all of those may take."""
WINDOWS = 3
"""The one at hand, the next, and the next epoch's first where that is a short one; a small dataset is not
read many epochs ahead."""
Rows = dict[int, pa.RecordBatch]
"""Each row of a row group by itself; they share its memory."""


@dataclass(frozen=True)
class _Window:
    """A window of an epoch's order in all lanes of this worker."""

    epoch: int
    first: int
    """Row of each lane that it begins with."""
    begin: int
    """The same row, counted over all epochs; `end`: the first row after it."""
    end: int
    lanes: list[Ints]
    """Of each lane (M, 2): row group, row within it; in reading order."""
    groups: list[int]
    """The row groups that these are of."""


class Feed:
    """The batches of one split for worker `rank` of `world`.

    Stored views: epoch e reads variant (e + ann_id) mod variants of each person. A row group is read
    in all its variants for that, so the reading grows with their number, the decoding does not.
    Fresh views: each from SeedSequence([seed, epoch, ann_id]), of the row of variant 0. Noise on the crops of
    either: as fresh views, from the epoch, not from the variant.
    """

    def __init__(
        self, manifest: Manifest, split: str, settings: TrainSettings, rank: int = 0, world: int = 1
    ) -> None:
        if settings.lanes % world:
            raise ValueError(f"{world} workers do not divide {settings.lanes} lanes")
        self.manifest, self.split, self.settings = manifest, split, settings
        self.lanes = range(rank, settings.lanes, world)
        self.fresh = settings.views == "device"
        self.columns = FRESH if self.fresh else STORED
        if settings.noise(settings.epochs) != Noise():
            self.columns = tuple(dict.fromkeys((*self.columns, *NOISE)))
        self.variants = 1 if self.fresh else manifest.variants(split)
        groups = manifest.row_groups(split)
        self.groups, self.group_rows = list(groups), tuple(groups.values())
        self.steps = self.order(0).steps
        """Global batches of an epoch."""
        self.threads = max(1, int(settings.cpus_per_worker))
        self.ahead = max(1, min(self.threads + READY, READY_BYTES // self._batch_bytes()))
        self.empty = pinned if settings.use_gpu else np.empty

    def order(self, epoch: int) -> EpochOrder:
        s = self.settings
        return EpochOrder(
            self.group_rows, s.seed, epoch, self.manifest.digest, s.lanes, s.batch_size, s.shuffle_row_groups
        )

    def batches(self, epoch: int, start: int = 0, stop: int | None = None) -> Generator[Batch, None, None]:
        """Batches `start`, start + 1, ... of an epoch, then all of the following epochs before `stop` (by
        default of none), made by threads at most `ahead` of the consumer.

        DataError for a damaged shard, at the batch that needs it. No thread is left when the iterator has
        ended or is closed.
        """
        pool = ThreadPoolExecutor(self.threads, "feed")
        try:
            begun = self._submit(pool, epoch, start, epoch + 1 if stop is None else stop)
            yield from results(begun, self.ahead)
        finally:
            pool.shutdown(cancel_futures=True)

    # --- what is made when ----------------------------------------------------------------------------

    def _submit(self, pool: ThreadPoolExecutor, epoch: int, start: int, stop: int) -> Iterator[Future[Batch]]:
        """Gives the pool one batch after the other, and before each the row groups that are to be read by
        then. A batch waits only for what was given, and so begun, before it: the pool cannot stand still."""
        plan = self._plan(epoch, start, stop)
        windows: deque[_Window] = deque()
        reads: dict[tuple[int, int], Future[Rows]] = {}
        for number in range(epoch * self.steps + start, stop * self.steps):
            epoch, step = divmod(number, self.steps)
            order = self.order(epoch)
            last = (number + 1) * order.lane_rows  # of the batch's rows of a lane, over all epochs
            until = last + order.window_rows
            while windows and windows[0].end <= last - order.lane_rows:
                windows.popleft()
            while not windows or windows[-1].end < (until if len(windows) < WINDOWS else last):
                if (window := next(plan, None)) is None:
                    break
                windows.append(window)
            rows = self._rows(windows, order, step)
            count = len(rows)
            wanted = [(window.epoch, group) for window in windows for group in _due(window, until)]
            if not count:  # one for company
                rows = [(0, 0)]
                wanted.append((epoch, 0))
            reads = {key: reads.get(key) or pool.submit(self._read, *key) for key in wanted}
            futures = [(reads[epoch, group], row) for group, row in rows]
            yield pool.submit(self._make, epoch, futures, count, order.batch_rows(step))

    def _plan(self, epoch: int, start: int, stop: int) -> Iterator[_Window]:
        """The windows of the batches, in order."""
        for order in map(self.order, range(epoch, stop)):
            rows, length = order.window_rows, order.steps * order.lane_rows
            skipped = start * order.lane_rows // rows if order.epoch == epoch else 0
            for number in range(skipped, order.windows):
                lanes = [order.window(lane, number) for lane in self.lanes]
                groups = np.unique(np.concatenate(lanes)[:, 0]).tolist()
                first, end = number * rows, min((number + 1) * rows, length)
                before = order.epoch * length
                yield _Window(order.epoch, first, before + first, before + end, lanes, groups)

    def _rows(self, windows: Iterable[_Window], order: EpochOrder, step: int) -> list[tuple[int, int]]:
        """(row group, row within it) of this worker's part of a batch, one lane after the other."""
        first, last = step * order.lane_rows, (step + 1) * order.lane_rows
        parts = [
            window.lanes[lane][max(0, first - window.first) : max(0, last - window.first)]
            for lane in range(len(self.lanes))
            for window in windows
            if window.epoch == order.epoch
        ]
        return [(group, row) for part in parts for group, row in part.tolist()]

    # --- what the threads do --------------------------------------------------------------------------

    def _read(self, epoch: int, group: int) -> Rows:
        """The rows of a row group, each in the variant of the epoch."""
        rows: Rows = {}
        for variant in range(self.variants):
            table = read_row_group(self.manifest, self.split, *self.groups[group], self.columns, variant)
            (view,) = table.combine_chunks().to_batches()
            chosen = np.flatnonzero((epoch + view["ann_id"].to_numpy()) % self.variants == variant)
            if self.variants > 1:
                view = view.take(pa.array(chosen))  # of the others nothing stays in memory
            rows |= {row: view.slice(i, 1) for i, row in enumerate(chosen.tolist())}
        return rows

    def _make(self, epoch: int, rows: Sequence[tuple[Future[Rows], int]], count: int, total: int) -> Batch:
        """count: rows that count, of `total` in the global batch."""
        table = pa.Table.from_batches([group.result()[row] for group, row in rows])
        make = self._fresh if self.fresh else self._stored
        batch = make(table, epoch, count, total)
        return batch.pinned() if self.settings.use_gpu else batch

    def _stored(self, table: pa.Table, epoch: int, rows: int, total: int) -> StoredBatch:
        columns = decode_rows(table, self.manifest, np.float16, self.empty)
        return StoredBatch(
            weights=np.array(columns["weights"]),  # a tensor's memory can be written to, Arrow's cannot
            ann_ids=columns["ann_id"],
            rows=rows,
            total=total,
            images=columns["images"],
            heatmaps=columns["heatmaps"],
            noise=self._noise(epoch, columns, columns["image_to_crop"]),
        )

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
        picture_to_crop = compose_affine(image_to_crop, invert_affine(columns["image_to_picture"]))
        crop_to_picture = invert_views(picture_to_crop)
        reaches = view_reaches(crop_to_picture, recipe.settings.input_size)
        room = self.empty((int((reaches[:, 2:] - reaches[:, :2]).prod(axis=1).sum()), 3), np.uint8)
        pixels, sizes, reaches = pack_reaches(decode_pictures(table["image"]), reaches, room)
        return FreshBatch(
            weights=weights,
            ann_ids=columns["ann_id"],
            rows=rows,
            total=total,
            pixels=pixels,
            sizes=sizes,
            reaches=reaches,
            picture_to_crop=picture_to_crop,
            crop_to_picture=crop_to_picture,
            heatmap_rows=heatmap_rows,
            heatmap_columns=heatmap_columns,
            input_size=recipe.settings.input_size,
            noise=self._noise(epoch, columns, image_to_crop),
        )

    def _noise(self, epoch: int, columns: dict[str, NDArray[Any]], image_to_crop: Float64) -> PlacedNoise:
        """From SeedSequence([seed, epoch, ann_id]) too. columns: those of NOISE, where there is any."""
        noise = self.settings.noise(epoch)
        if noise == Noise():
            return PlacedNoise(None, None, None)
        numbers = draw_noise(self.settings.seed, epoch, columns["ann_id"].tolist())
        people = columns["keypoints"], columns["bbox_xywh"]
        return place_noise(numbers, noise, image_to_crop, *people, self.manifest.recipe.settings.input_size)

    def _batch_bytes(self) -> int:
        """Of this worker's part of a batch, about: what a fresh view reaches of its cut is much like a crop
        and its heatmaps."""
        recipe = self.manifest.recipe
        width, height = recipe.settings.input_size
        row = 3 * width * height + 2 * recipe.skeleton.num_keypoints * math.prod(recipe.codec.heatmap_size)
        return len(self.lanes) * self.order(0).lane_rows * row


def _due(window: _Window, until: int) -> list[int]:
    """Its row groups that are to be read when reading has come to row `until` of the lanes: as large a part
    of them as of its rows."""
    share = (until - window.begin) / (window.end - window.begin)
    return window.groups[: max(0, math.ceil(share * len(window.groups)))]
