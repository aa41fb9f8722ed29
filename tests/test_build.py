"""One shard by several threads: the same bytes and rejections, no more pictures kept, errors as of one."""

from __future__ import annotations

import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_coco import write_coco
from test_preprocess import SPOIL, TRAIN, VAL, config, contents

from hrnet_core.errors import DataError
from hrnet_core.skeleton import COCO17
from pipelines import preprocess as preprocess_module
from pipelines.preprocess import run_preprocess
from pipelines.shards import build
from pipelines.shards.build import READ_AHEAD, build_shard
from pipelines.shards.plan import ShardWork, plan_shards
from pipelines.shards.writer import ShardWriter
from pipelines.sources.coco import read_coco


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """61 people in 31 pictures, five of them broken, each in its own way."""
    people = [1, 3, 2, 1, 4, 2, 1, 2, 3, 1] * 3 + [1]
    coco = write_coco(tmp_path_factory.mktemp("coco") / "root", {TRAIN: people, VAL: [2]})
    for index, spoil in enumerate(SPOIL.values()):
        spoil(coco / TRAIN / f"{TRAIN}-{6 * index}.jpg")
    return coco


def work_of(coco: Path, target: Path, **data: Any) -> ShardWork:
    settings = config(coco, target, people_per_shard=1000, row_group_people=7, **data).data
    (work,) = plan_shards(read_coco(coco, TRAIN, COCO17), settings)
    return work


@pytest.mark.parametrize("data", [{"variants": 3}, {"variants": 2, "context": 2.0}, {"image_format": "jpeg"}])
def test_threads_change_no_byte(damaged: Path, tmp_path: Path, data: dict[str, Any]) -> None:
    coco = Path(shutil.copytree(damaged, tmp_path / "coco"))
    work = work_of(coco, tmp_path / "1", **data)
    os.remove(coco / TRAIN / f"{TRAIN}-29.jpg")
    alone = build_shard(work)
    assert [r.reason for r in alone.rejected] == [*SPOIL, "missing_image"]
    assert set(alone.shards[0].row_groups[:-1]) == {7}
    for threads in (2, 3, 8):
        assert build_shard(replace(work, folder=f"{tmp_path}/{threads}"), threads) == alone
        assert contents(tmp_path / str(threads)) == contents(tmp_path / "1")


def test_several_photos_are_worked_on_at_a_time_and_no_more_than_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco = write_coco(tmp_path / "coco", {TRAIN: [1] * 40, VAL: [1]})
    work = work_of(coco, tmp_path / "s")
    lock, together, inside, most, begun = threading.Lock(), threading.Barrier(3), 0, 0, 0
    decode = build.decode_photo

    def counted(*arguments: Any) -> Any:
        nonlocal inside, most, begun
        with lock:
            inside, begun = inside + 1, begun + 1
            most, early = max(most, inside), begun <= 3
        if early:
            together.wait(20)  # breaks unless three are there
        time.sleep(0.002)
        image = decode(*arguments)
        with lock:
            inside -= 1
        return image

    monkeypatch.setattr(build, "decode_photo", counted)
    assert build_shard(work, 3).shards[0].people == 40
    assert most == 3


@pytest.mark.parametrize("threads", [2, 3])
def test_the_pictures_that_are_kept_are_those_of_two_row_groups_and_the_photos_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """With a writer that is far behind: one row group is written, one waits."""
    coco = write_coco(tmp_path / "coco", {TRAIN: [1] * 120, VAL: [1]})
    work, made, written, kept = work_of(coco, tmp_path / "s"), [], [], []
    of_photo, write = build._of_photo, ShardWriter.write

    def counted(*arguments: Any) -> Any:
        made.append(1)
        return of_photo(*arguments)

    def slow(writer: ShardWriter, columns: dict[str, Any]) -> None:
        if not written:  # the next one is filled meanwhile
            deadline = time.monotonic() + 20
            while len(made) < 2 * 7 + READ_AHEAD * threads and time.monotonic() < deadline:
                time.sleep(0.01)
        time.sleep(0.05)
        kept.append(len(made) - len(written))
        write(writer, columns)
        written.extend(columns["ann_id"])

    monkeypatch.setattr(build, "_of_photo", counted)
    monkeypatch.setattr(ShardWriter, "write", slow)
    build_shard(work, threads)
    assert len(written) == 120
    assert 2 * 7 + READ_AHEAD * threads <= max(kept) <= 2 * 7 + READ_AHEAD * threads + 1


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_a_disk_that_is_full_ends_all_threads_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    coco = write_coco(tmp_path / "coco", {TRAIN: [1] * 40, VAL: [1]})
    work, write, calls = work_of(coco, tmp_path / "s"), ShardWriter.write, []

    def full(writer: ShardWriter, columns: dict[str, Any]) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(writer, columns)

    monkeypatch.setattr(ShardWriter, "write", full)
    before = set(threading.enumerate())
    with pytest.raises(DataError, match="No space left on device"):
        build_shard(work, threads)
    assert len(calls) in ((2,) if threads == 1 else (2, 3))  # one may have waited behind it
    assert contents(tmp_path / "s") == {}
    assert set(threading.enumerate()) <= before


def test_tasks_of_several_cpus_on_ray(
    damaged: Path, tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Where people are many enough for it, here as if Ray took no time between tasks: 60 and 2 people on two
    CPUs, one task after the other."""
    import ray

    one, _ = run_preprocess(config(damaged, tmp_path / "one", people_per_shard=100))
    assert "2 shards to make\n" in capsys.readouterr().out
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.1)  # Ray hears late of what is free again
    monkeypatch.setattr(preprocess_module, "BETWEEN_TASKS", 0)
    two, log = run_preprocess(config(damaged, tmp_path / "two", people_per_shard=100))
    assert "2 shards to make, 2 CPUs each\n" in capsys.readouterr().out
    assert log.at_once == 1
    assert two.digest == one.digest
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
