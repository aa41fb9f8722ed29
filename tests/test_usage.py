"""What a run says of its machines, and of its steps: memory, CPUs, the device's time, gradients."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from test_feed import dotted_shards
from test_train import made_up_part, new_model, one_worker, small_config

from hrnet_core.loss import joints_mse
from pipelines.process.progress import Every
from pipelines.settings.train import TrainSettings
from pipelines.shards.manifest import Manifest
from pipelines.training import loop
from pipelines.training.loop import train_epochs
from pipelines.training.state import make_optimizer
from pipelines.training.step import train_step
from pipelines.training.usage import SECONDS, DeviceClock, Usage, named

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return dotted_shards(tmp_path_factory.mktemp("shards"), {"train2017": 37, "val2017": 12})


def test_the_norm_is_that_of_the_plain_gradient_before_clipping() -> None:
    """Two parts and clipping to a tenth, against torch.autograd on one loss and numpy."""
    parts = [made_up_part(0, slice(0, 4), 0.5), made_up_part(0, slice(4, 8), 0.5)]
    twin, norm = new_model(), torch.zeros(())
    loss = sum(p.share * joints_mse(twin(p.images), p.heatmaps, p.weights) for p in parts)
    gradient = torch.autograd.grad(loss, list(twin.parameters()))
    expected = np.linalg.norm(np.concatenate([g.numpy().ravel() for g in gradient]).astype(np.float64))
    for settings in (TrainSettings(), TrainSettings(clip_norm=expected / 10)):
        model = new_model()
        train_step(model, make_optimizer(model, settings), parts, settings, norm=norm)
        assert float(norm) == pytest.approx(expected, rel=1e-5)


def test_a_run_logs_what_its_steps_and_its_machine_did(manifest: Manifest, tmp_path: Path) -> None:
    run, _ = one_worker(small_config(manifest, tmp_path, epochs=1, log_every=2), tmp_path / "r")
    run.usage._due = Every(SECONDS, clock=lambda: 0.0, at_once=True)  # however slow the machine is
    train_epochs(run)
    assert run.log is not None
    first, second, scored = run.log.rows
    for row in (first, second):
        assert 0 < row["train/grad_norm"] <= row["train/grad_norm_max"]
        assert 0 < row["train/device_busy"] <= 1
        assert row["train/device_busy"] + row["train/data_wait"] <= 1
    assert first["train/grad_norm"] < first["train/grad_norm_max"]
    assert second["train/grad_norm"] == second["train/grad_norm_max"] == float(run.grad_norm)  # of one step
    memory = psutil.Process(os.getpid()).memory_info().rss / 1e6
    assert first["system/worker0/memory_usage_megabytes"] == pytest.approx(memory, rel=0.5)
    assert 0 < first["system/node0/system_memory_usage_percentage"] < 100
    assert not [name for name in second if name.startswith("system/")], "not again within ten seconds"
    assert not [name for name in first if "gpu" in name], "there is none"
    joints = {name: value for name, value in scored.items() if name.startswith("val_pck/")}
    assert len(joints) == 17
    assert scored["val_gt/PCK"] == pytest.approx(sum(joints.values()) / 17)


def test_images_a_second_are_those_of_the_clock(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing a row takes 100 s here, be it of a server that is slow: it is part of the time of the run, and
    a server is asked once in ten seconds and at the end of an epoch, not with each row."""
    run, _ = one_worker(small_config(manifest, tmp_path, epochs=1, log_every=1), tmp_path / "r")
    assert run.log is not None
    write, flush = run.log.write, run.log.flush
    written: list[int] = []
    sent: list[int] = []

    def slow(step: int, values: Mapping[str, float]) -> None:
        write(step, values)
        written.append(step)

    def counted() -> bool:
        sent.append(len(written))
        return flush()

    def clock() -> float:
        return time.perf_counter() + 100 * len(written)

    monkeypatch.setattr(run.log, "write", slow)
    monkeypatch.setattr(run.log, "flush", counted)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=clock, monotonic=time.monotonic))
    run.send_due = Every(10, clock=lambda: 0.0, at_once=True)
    train_epochs(run)
    first, *later, _ = run.log.rows
    assert len(later) == 2
    assert first["train/samples_per_s"] > 0.16, "16 people, before anything was written"
    for row in later:
        assert row["train/samples_per_s"] < 0.16
    assert run.standing.seconds > 300, "the row of the epoch's AP is the third that counts"
    assert sent == [1, 4, 4], "the first row; after the AP of the epoch, and after the last epoch"


def test_a_step_that_was_left_out_is_in_no_norm(manifest: Manifest, tmp_path: Path) -> None:
    run, _ = one_worker(small_config(manifest, tmp_path, epochs=1, log_every=3, lr=1e-4), tmp_path / "r")
    original, seen = run.feed.batches, []

    def poisoned(*which: int):
        for number, batch in enumerate(original(*which)):
            if number == 1:
                batch.heatmaps[0, 0, 0, 0] = np.inf
            yield batch
            seen.append(float(run.grad_norm))

    run.feed.batches = poisoned  # type: ignore[method-assign]
    train_epochs(run)
    assert run.log is not None
    row = run.log.rows[0]
    assert row["train/skipped_steps"] == 1
    assert not math.isfinite(seen[1])
    assert row["train/grad_norm_max"] == max(seen[0], float(run.grad_norm))


def test_the_workers_of_two_machines_have_names_of_their_own() -> None:
    """Three workers: two with GPUs on machine 0, one on machine 1, which are one sum."""
    total = np.zeros(30)
    for rank, (node, local) in enumerate([(0, 0), (0, 1), (1, 0)]):
        usage = Usage(rank, CPU, node, local)
        assert usage.look()
        assert not usage.look()
        usage._latest[2:] = [10 * rank + place for place in range(8)]
        total += usage.row(3)
    figures = named(total.tolist(), 3)
    assert figures["system/node0/cpu_utilization_percentage"] == 0
    assert figures["system/node1/cpu_utilization_percentage"] == 20
    memory = {name: value for name, value in figures.items() if name.endswith("memory_usage_megabytes")}
    assert memory == {
        "system/node0/system_memory_usage_megabytes": 2,
        "system/node1/system_memory_usage_megabytes": 22,
        "system/worker0/memory_usage_megabytes": 3,
        "system/worker1/memory_usage_megabytes": 13,
        "system/worker2/memory_usage_megabytes": 23,
        "system/node0/gpu_0_memory_usage_megabytes": 6,
        "system/node0/gpu_1_memory_usage_megabytes": 16,
        "system/node1/gpu_0_memory_usage_megabytes": 26,
    }
    assert len(figures) == 2 * 3 + 3 * 5


def test_the_clock_of_the_device_counts_steps_alone() -> None:
    clock, around = DeviceClock(CPU), 0.0
    for _ in range(2):
        started = time.perf_counter()
        with clock:
            time.sleep(0.02)
        around += time.perf_counter() - started
        time.sleep(0.05)
    assert 0.04 <= clock.read() <= around
