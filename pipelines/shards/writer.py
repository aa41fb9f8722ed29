"""Writing one shard, and looking at one that is there."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.shards.schema import COLUMNS, REJECTED, Shard, canonical_json
from pipelines.sources.records import Rejection
from pipelines.storage.files import join, read_file, sha256_of, writing


@contextlib.contextmanager
def writing_shard(file: str, schema: pa.Schema) -> Iterator[ShardWriter]:
    """A shard that becomes `file` (path or URI) when the block ends well; else nothing is left of it."""
    scalars = [n for n, t in COLUMNS.items() if not pa.types.is_nested(t) and not pa.types.is_binary(t)]
    # Opened here: a ParquetWriter that fails, at its first bytes or its last, leaves its file open.
    with writing(file) as part, pa.OSFile(str(part), "wb") as stream:
        parquet = pq.ParquetWriter(
            stream,
            schema,
            compression="zstd",
            use_dictionary=False,
            write_statistics=scalars,
            write_page_checksum=True,
        )
        try:
            yield ShardWriter(part, stream, parquet)
        finally:
            with contextlib.suppress(OSError):  # a full disk is so again on closing; the first error is told
                parquet.close()


class ShardWriter:
    """What `writing_shard` gives: row groups one after the other, then `finish`."""

    def __init__(self, part: Path, stream: pa.NativeFile, parquet: pq.ParquetWriter) -> None:
        self._part, self._stream, self._parquet = part, stream, parquet
        self._row_groups: list[int] = []

    def write(self, columns: Mapping[str, Any]) -> None:
        """One row group. Numeric columns are arrays with the rows first; image and image_sha256 lists of
        bytes (images with `image_path`, a list of names); heatmaps float16 (N, K, H, W)."""
        arrays = [_arrow_column(name, kind, columns) for name, kind in COLUMNS.items()]
        table = pa.Table.from_arrays(arrays, schema=self._parquet.schema)
        self._parquet.write_table(table, row_group_size=max(1, table.num_rows))
        self._row_groups.append(table.num_rows)

    def finish(self, path: str, variant: int, rejected: Sequence[Rejection]) -> Shard:
        """The last bytes, `rejected` in the footer; the shard as the manifest lists it under `path`."""
        figures = {"rejected": [asdict(rejection) for rejection in rejected]}
        self._parquet.add_key_value_metadata({"hrnet_figures": canonical_json(figures)})
        self._parquet.close()
        self._stream.close()
        digest, rows = sha256_of(self._part), sum(self._row_groups)
        return Shard(path, variant, rows, rows, self._part.stat().st_size, digest, tuple(self._row_groups))


def _arrow_column(name: str, kind: pa.DataType, columns: Mapping[str, Any]) -> pa.Array:
    values = columns[name]
    if name == "image":
        parts = [pa.array(values, pa.binary()), pa.array(columns["image_path"], pa.string())]
        return pa.StructArray.from_arrays(parts, fields=list(kind))
    if name == "heatmaps":  # one copy-free buffer; pa.array would make a Python bytes of each row
        data = np.ascontiguousarray(values, np.float16)
        offsets = np.arange(len(data) + 1, dtype=np.int32) * np.int32(data[0].nbytes)
        return pa.Array.from_buffers(kind, len(data), [None, pa.py_buffer(offsets), pa.py_buffer(data)])
    if pa.types.is_list(kind):
        data = np.asarray(values, kind.value_type.to_pandas_dtype()).reshape(len(values), -1)
        offsets = np.arange(len(data) + 1, dtype=np.int32) * np.int32(data.shape[1])
        return pa.ListArray.from_arrays(offsets, data.reshape(-1), type=kind)
    return pa.array(values, kind)


def inspect_shard(folder: str, path: str, variant: int) -> tuple[str, tuple[Rejection, ...], Shard] | None:
    """What lies at FOLDER/path: its plan's hash ("" for a Parquet file that is none of ours), what its footer
    says was rejected, and the shard itself. None where there is none, or it or one of its pages is damaged.

    DataError for a bucket that does not answer: that says nothing about the shard.
    """
    try:
        content = read_file(join(folder, path))  # once, for the pages and for the hash
        with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as parquet:
            metadata = parquet.metadata.metadata or {}
            own, figures = (json.loads(metadata.get(key, b"{}")) for key in (b"hrnet", b"hrnet_figures"))
            row_groups = tuple(parquet.read_row_group(i).num_rows for i in range(parquet.num_row_groups))
        rejected = tuple(Rejection(**row) for row in figures.get("rejected", ()))
    except (OSError, pa.ArrowException, ValueError, TypeError):
        return None
    digest, rows = hashlib.sha256(content).hexdigest(), sum(row_groups)
    shard = Shard(path, variant, rows, rows, len(content), digest, row_groups)
    return own.get("plan", ""), rejected, shard


def write_rejected(file: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """rejected.parquet from rows with the fields of REJECTED. Returns its sha256."""
    with writing(file) as part:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=REJECTED), part, compression="zstd")
        return hashlib.sha256(part.read_bytes()).hexdigest()
