"""The order of training: which rows make which global batch. Pure arithmetic, reads nothing.

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

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


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

    @property
    def windows(self) -> int:
        """Windows of the longest lane. All lanes pass from one to the next at the same row."""
        return -(-self.rows // (self.lanes * self.window_rows))

    @property
    def lane_rows(self) -> int:
        """Rows that each global batch takes of every lane."""
        return self.batch_size // self.lanes

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
