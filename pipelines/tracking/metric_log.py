"""Metrics of one run, written by one process: a JSONL file first, then MLflow in batches."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hrnet_core.locations import is_uri, without_credentials
from pipelines.storage.files import read_file, write_whole
from pipelines.tracking.store import quiet_mlflow, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient


class MetricLog:
    """A row is {"step", "time_ms", name: value, ...}. Opening it drops rows after `step`, where training
    goes on: they are computed again, to the same values. MLflow gets each (name, step) once.

    file: path or URI. A file grows by each row; an object of a bucket cannot, and is written by `keep`."""

    RETRY_S = 60.0

    def __init__(
        self, file: str | Path, step: int = -1, uri: str | None = None, run_id: str | None = None
    ) -> None:
        self.file, self.uri, self.run_id = str(file), uri, run_id
        self.rows = [row for row in read_rows(file) if row["step"] <= step]
        self._write_all()
        self._pending = list(self.rows)
        self._told = False
        self._client: MlflowClient | None = None
        self._last: dict[str, int] = {}
        self._away_until = 0.0

    def _write_all(self) -> None:
        write_whole(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))

    def keep(self) -> None:
        """Have every row where the file is: before a checkpoint, from which training goes on."""
        if is_uri(self.file):
            self._write_all()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row, on disk at once."""
        row = {"step": step, "time_ms": int(time.time() * 1000), **values}
        self.rows.append(row)
        self._pending.append(row)
        if not is_uri(self.file):
            with open(self.file, "a") as out:
                out.write(json.dumps(row) + "\n")

    def flush(self, force: bool = False) -> bool:
        """Send what is pending; False if MLflow did not take it (tried again after a minute)."""
        if self.run_id is None or not self._pending:
            return True
        if time.monotonic() < self._away_until and not force:
            return False
        try:
            with quiet_mlflow():
                self._send(self.run_id)
        except Exception as error:
            return self._away(error)
        if self._told:
            print(f"MLflow {self._shown} is back and has all figures", flush=True)
            self._told = False
        return True

    def log_file(self, file: Path, folder: str) -> None:
        """A picture for the run, if MLflow takes it now; the driver sends the last ones again."""
        if self._client is None or time.monotonic() < self._away_until:
            return
        try:
            self._client.log_artifact(self.run_id, str(file), folder)
        except Exception as error:
            self._away(error)

    def _away(self, error: Exception) -> bool:
        """Said once, until it is back."""
        if not self._told:
            print(
                f"MLflow {self._shown} does not answer ({reason(error)}). Training "
                f"goes on: figures are kept in {self.file}, and sent when it is back or by the same command.",
                flush=True,
            )
        self._told = True
        self._away_until = time.monotonic() + self.RETRY_S
        return False

    @property
    def _shown(self) -> str:
        return without_credentials(str(self.uri))

    def _send(self, run_id: str) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        if self._client is None:
            # One that gives up fast: training waits for it.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
            client = MlflowClient(self.uri, self.uri)
            for name in client.get_run(run_id).data.metrics:
                self._last[name] = max(m.step for m in client.get_metric_history(run_id, name))
            self._client = client
        metrics = [
            Metric(name, float(value), row["time_ms"], row["step"])
            for row in self._pending
            for name, value in row.items()
            if name not in ("step", "time_ms") and row["step"] > self._last.get(name, -1)
        ]
        for start in range(0, len(metrics), 900):
            part = metrics[start : start + 900]
            self._client.log_batch(run_id, metrics=part)
            self._last.update({m.key: m.step for m in part})
        self._pending.clear()


def read_rows(file: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics file (path or URI); a last line that a crash cut short is left out."""
    rows: list[dict[str, Any]] = []
    try:
        lines = read_file(str(file)).splitlines()
    except FileNotFoundError:
        return rows
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows
