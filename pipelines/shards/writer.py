"""Writing one shard, and looking at one that is there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipelines.shards.schema import COLUMNS, REJECTED, canonical_json
from pipelines.storage import publish, read_file, sha256_of, temporary_name, write_whole


class ShardWriter:
    """One shard under a temporary name; `finish` puts it under its own, `discard` removes what there is."""

    def __init__(self, files: fs.FileSystem, path: str, schema: pa.Schema) -> None:
        self._files, self._path, self._schema = files, path, schema
        self._temporary = temporary_name(files, path)
        scalars = [
            n for n, kind in COLUMNS.items() if not pa.types.is_nested(kind) and not pa.types.is_binary(kind)
        ]
        # Opened here: a ParquetWriter that fails, at its first bytes or its last, leaves its file open.
        self._stream = pa.OSFile(self._temporary, "wb")
        try:
            self._writer = pq.ParquetWriter(
                self._stream,
                schema,
                compression="zstd",
                use_dictionary=False,
                write_statistics=scalars,
                write_page_checksum=True,
            )
        except BaseException:
            self._remove()
            raise
        self.row_groups: list[int] = []

    def write(self, columns: Mapping[str, Any]) -> None:
        """One row group. Numeric columns are arrays with the rows first; image and image_sha256 lists of
        bytes (images with `image_path`, a list of names); heatmaps float16 (N, K, H, W)."""
        arrays = [_arrow_column(name, kind, columns) for name, kind in COLUMNS.items()]
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self.row_groups.append(table.num_rows)

    def finish(self, figures: Mapping[str, Any]) -> tuple[int, str]:
        """Close with `figures` (JSON) in the footer and publish. Returns (bytes, sha256)."""
        self._writer.add_key_value_metadata({"hrnet_figures": canonical_json(figures)})
        self._writer.close()
        self._stream.close()
        size = os.path.getsize(self._temporary)
        digest = sha256_of(fs.LocalFileSystem(), self._temporary)
        publish(self._files, self._temporary, self._path)
        self.discard()
        return size, digest

    def discard(self) -> None:
        """Remove the temporary file if it is still there."""
        with contextlib.suppress(OSError):  # a full disk is so again on closing; the first error is told
            self._writer.close()
        self._remove()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.close()
        Path(self._temporary).unlink(missing_ok=True)


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


def shard_entry(path: str, variant: int, size: int, sha256: str, row_groups: Sequence[int]) -> dict[str, Any]:
    """A shard as the manifest lists it."""
    rows = sum(row_groups)
    return {
        "path": path,
        "variant": variant,
        "rows": rows,
        "people": rows,
        "bytes": size,
        "sha256": sha256,
        "row_groups": list(row_groups),
    }


def inspect_shard(path: str) -> tuple[str, dict[str, Any], tuple[int, str, list[int]]] | None:
    """What lies there: its plan's hash ("" for a Parquet file that is none of ours), its footer's figures,
    and (bytes, sha256, row_groups). None where the file or one of its pages is damaged.

    DataError for a bucket that does not answer: that says nothing about the shard.
    """
    try:
        content = read_file(path)  # once, for the pages and for the hash
        with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as shard:
            metadata = shard.metadata.metadata or {}
            own, figures = (json.loads(metadata.get(key, b"{}")) for key in (b"hrnet", b"hrnet_figures"))
            row_groups = [shard.metadata.row_group(i).num_rows for i in range(shard.num_row_groups)]
            for index in range(shard.num_row_groups):
                shard.read_row_group(index)
        return own.get("plan", ""), figures, (len(content), hashlib.sha256(content).hexdigest(), row_groups)
    except (OSError, pa.ArrowException, ValueError):
        return None


def plan_of_shard(files: fs.FileSystem, path: str) -> str | None:
    """The hash of the plan in a shard's footer, "" in a Parquet file that is none of ours; None where no
    footer can be read."""
    try:
        metadata = pq.read_schema(path, filesystem=files).metadata or {}
        return str(json.loads(metadata.get(b"hrnet", b"{}")).get("plan", ""))
    except (OSError, pa.ArrowException, ValueError):
        return None


def write_rejected(file: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """rejected.parquet from rows with the fields of REJECTED. Returns its sha256."""
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=REJECTED), buffer, compression="zstd")
    content = buffer.getvalue().to_pybytes()
    write_whole(file, content)
    return hashlib.sha256(content).hexdigest()
