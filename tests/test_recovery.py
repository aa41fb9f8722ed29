"""Preprocess is stopped, has no room, or has company: what was whole stays, and the same command goes on."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_coco import write_coco
from test_preprocess import without_ray

from hrnet_core.errors import DataError
from hrnet_core.locations import open_folder
from hrnet_core.skeleton import COCO17
from pipelines import preprocess as preprocess_module
from pipelines.cli import parse
from pipelines.preprocess import Task, TaskLog, preprocess
from pipelines.settings.config import RunConfig
from pipelines.shards import plan as plan_module
from pipelines.shards.build import build_shard
from pipelines.shards.manifest import Manifest
from pipelines.shards.plan import BuiltShard, plan_shards
from pipelines.shards.writer import inspect_shard
from pipelines.sources.coco import read_coco
from pipelines.storage.files import temporary_name

TRAIN, VAL = "train2017", "val2017"
SMALL = "--data.people-per-shard 4 --data.row-group-people 2 --data.image-format png --data.input-size 64 96"
LARGER = "--data.people-per-shard 6 --data.image-format png --data.input-size 192 256 --data.variants 4"


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 people in 7 pictures, 3 in 2: with SMALL five shards."""
    return write_coco(tmp_path_factory.mktemp("coco") / "root", {TRAIN: [2, 3, 1, 2, 1, 3, 1], VAL: [2, 1]})


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 people in 40 pictures, 6 in 2: with LARGER 21 shards of 4 files, some seconds of work."""
    return write_coco(
        tmp_path_factory.mktemp("larger") / "root", {TRAIN: [3] * 40, VAL: [3, 3]}, (640, 480), spread=True
    )


def arguments(coco: Path, target: Path, settings: str = SMALL) -> list[str]:
    return ["tiny", "--data.root", str(coco), "--data.shards", str(target), *settings.split()]


def config(coco: Path, target: Path, settings: str = SMALL) -> RunConfig:
    return parse("preprocess", arguments(coco, target, settings))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Shards are built one after the other in this process; gives the names of those that were."""
    return without_ray(monkeypatch)


def command(coco: Path, target: Path, settings: str = SMALL, cpus: int = 2) -> subprocess.Popen[str]:
    """`hrnet preprocess`, started; what it says goes to one pipe."""
    argv = [sys.executable, "-m", "pipelines.cli", "preprocess", *arguments(coco, target, settings)]
    return subprocess.Popen(
        [*argv, "--ray.num-cpus", str(cpus)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
    )


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    """Its output, once it has ended with `code`."""
    told, _ = process.communicate(timeout=300)
    assert process.returncode == code, told
    return told


def kill(process: subprocess.Popen[str], whole_tree: bool = True) -> str:
    """SIGKILL to the command, and to the Ray that it started; without the tree Ray is left to notice.
    Returns what it had said."""
    tree = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            if whole_tree:
                child.kill()
    told, _ = process.communicate()
    _, alive = psutil.wait_procs(tree, timeout=120)
    assert alive == [], "a Ray whose driver is gone ends by itself"
    return told


def shards(target: Path) -> list[Path]:
    return sorted((target / "data").glob("*.parquet"))


def hidden(target: Path) -> list[str]:
    return [path.name for path in target.rglob(".*.tmp")]


def check_whole(target: Path) -> None:
    """Whatever stands under a final name can be read to its last page."""
    for path in shards(target):
        assert inspect_shard(str(path.parent), path.name, 0) is not None, path.name


def wait_for_shard(process: subprocess.Popen[str], target: Path, more_than: int = 0) -> None:
    deadline = time.monotonic() + 300
    while len(shards(target)) <= more_than and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def wait_for_writing(process: subprocess.Popen[str], target: Path) -> None:
    deadline = time.monotonic() + 300
    while not hidden(target) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------------------------- kill -9


@pytest.mark.slow
def test_kill_9_of_the_command_and_again(coco: Path, tmp_path: Path, plain: list[str]) -> None:
    """The real command on Ray, killed with all its processes as its first shard, of one file, appears."""
    one = SMALL + " --data.variants 1"
    whole = preprocess(config(coco, tmp_path / "whole", one))
    process = command(coco, tmp_path / "s", one)
    wait_for_shard(process, tmp_path / "s")
    told = kill(process)
    there = [f"data/{path.name}" for path in shards(tmp_path / "s")]
    assert there, told
    check_whole(tmp_path / "s")
    before = {name: os.stat(tmp_path / "s" / name).st_mtime_ns for name in there}
    plain.clear()
    assert preprocess(config(coco, tmp_path / "s", one)).digest == whole.digest
    assert set(plain) & set(there) == set(), "finished shards are used as they are"
    assert {name: os.stat(tmp_path / "s" / name).st_mtime_ns for name in there} == before
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_kill_9_at_any_moment(larger: Path, tmp_path: Path, plain: list[str]) -> None:
    """Five times: with all its tasks while a file is being written; every second time at a random moment and
    the driver alone, whose tasks may then still write for a moment."""
    whole = preprocess(config(larger, tmp_path / "whole", LARGER))
    rng = random.Random(0)
    target, left_behind = tmp_path / "s", 0
    for attempt in range(5):
        process = command(larger, target, LARGER)
        wait_for_shard(process, target, more_than=len(shards(target)))
        if attempt % 2:
            time.sleep(rng.uniform(0, 0.4))
        else:
            wait_for_writing(process, target)
        if process.poll() is None:
            kill(process, whole_tree=attempt % 2 == 0)
        left_behind += len(hidden(target))
        check_whole(target)
        print(f"attempt {attempt}: {len(shards(target))} files, {len(hidden(target))} temporary ones")
    assert left_behind > 0, "never killed while something was written"
    assert not (target / "manifest.json").exists(), "it was finished before the last kill"
    before = {path.name: path.stat().st_mtime_ns for path in shards(target)}
    told = finished(command(larger, target, LARGER))
    assert "shards are there already" in told
    same = [
        name for name, time_ns in before.items() if (target / "data" / name).stat().st_mtime_ns == time_ns
    ]
    # A shard of which a kill left only some of its four files is made again as a whole.
    assert len(before) - len(same) <= 3 * 2 * 5
    assert len(same) >= len(before) // 2
    assert Manifest.load(target).digest == whole.digest
    assert contents(target) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_one_digest_for_one_two_and_four_tasks(coco: Path, tmp_path: Path, plain: list[str]) -> None:
    expected = preprocess(config(coco, tmp_path / "plain")).digest
    for cpus in (1, 2, 4):
        told = finished(command(coco, tmp_path / f"s{cpus}", cpus=cpus))
        assert f"digest {expected}" in told
        assert contents(tmp_path / f"s{cpus}") == contents(tmp_path / "plain")


def test_what_writers_left_in_both_folders_is_removed_and_nothing_else(
    coco: Path, tmp_path: Path, plain: list[str]
) -> None:
    target = tmp_path / "s"
    preprocess(config(coco, target))
    files, root = open_folder(str(target))
    dead = [
        temporary_name(files, f"{root}/{name}").replace(f".{os.getpid()}@", ".999999999@")
        for name in ("manifest.json", "README.md", "data/train2017-00000-of-00004.parquet")
    ]
    alive = temporary_name(files, f"{root}/data/train2017-00001-of-00004.parquet")
    users = [f"{root}/.notes.tmp", f"{root}/data/.a.b.tmp"]
    for name in (*dead, alive, *users):
        Path(name).touch()
        os.utime(name, (0, 0))
    preprocess(config(coco, target))
    assert [name for name in dead if Path(name).exists()] == []
    assert [name for name in (alive, *users) if not Path(name).exists()] == []


# ---------------------------------------------------------------------------------- two at once

WRITER = """
import json, sys
from pathlib import Path
from hrnet_core.skeleton import COCO17
from pipelines.sources.coco import read_coco
from pipelines.settings.config import DataSettings
from pipelines.shards.plan import finished_shards, plan_shards
from pipelines.preprocess import finish
from pipelines.shards.build import build_shard

data = DataSettings.model_validate_json(sys.argv[1])
splits = [read_coco(data.root, name, COCO17) for name in (data.train_split, data.val_split)]
works = [work for split in splits for work in plan_shards(split, data)]
print("ready", flush=True)
sys.stdin.readline()
finished_shards(works, data.shards)
figures = {work.key: build_shard(work) for work in works}
print(finish(splits, works, figures, data).digest)
"""


def test_two_processes_write_one_plan(coco: Path, tmp_path: Path, plain: list[str]) -> None:
    """Both build every shard, at the same moment; each finds its dataset whole at the end."""
    whole = preprocess(config(coco, tmp_path / "whole"))
    data = config(coco, tmp_path / "s").data.model_dump_json()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, data], **pipes) for _ in range(2)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    told = [writer.communicate(timeout=120)[0].strip() for writer in writers]
    assert told == [whole.digest] * 2
    assert hidden(tmp_path / "s") == []
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_commands_at_once(larger: Path, tmp_path: Path, plain: list[str]) -> None:
    whole = preprocess(config(larger, tmp_path / "whole", LARGER))
    both = [command(larger, tmp_path / "s", LARGER, cpus=1) for _ in range(2)]
    for process in both:
        assert f"digest {whole.digest}" in finished(process)
    assert hidden(tmp_path / "s") == []
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_a_run_of_another_plan_in_the_same_moment(
    coco: Path, tmp_path: Path, plain: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found the folder empty. A whole shard of the other one is not written over, and no manifest
    calls a mixture a dataset."""
    other = config(coco, tmp_path / "s", SMALL + " --data.seed 1 --data.variants 2").data
    theirs = plan_shards(read_coco(coco, TRAIN, COCO17), other)

    def look_then_others_come(works: Any, folder: str) -> dict[Any, Any]:
        found = plan_module.finished_shards(works, folder)
        build_shard(theirs[2])
        return found

    monkeypatch.setattr(preprocess_module, "finished_shards", look_then_others_come)
    with pytest.raises(DataError, match=r"another dataset \(data/train2017-00002-of-00004\.parquet\)"):
        preprocess(config(coco, tmp_path / "s"))
    found = [inspect_shard(str(tmp_path / "s"), name, v) for v, name in enumerate(theirs[2].names)]
    assert [one[0] for one in found if one] == [theirs[2].plan] * 2
    assert len(plain) == 3, "two were made, the third stood in the way"
    assert not (tmp_path / "s" / "manifest.json").exists()
    assert hidden(tmp_path / "s") == []


def test_another_plans_manifest_at_the_end(
    coco: Path, tmp_path: Path, plain: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess(config(coco, tmp_path / "other", SMALL + " --data.seed 1"))
    manifest = (tmp_path / "other" / "manifest.json").read_bytes()

    def look_then_theirs_is_done(works: Any, folder: str) -> dict[Any, Any]:
        found = plan_module.finished_shards(works, folder)
        (Path(folder) / "manifest.json").write_bytes(manifest)
        return found

    monkeypatch.setattr(preprocess_module, "finished_shards", look_then_theirs_is_done)
    with pytest.raises(DataError, match=r"its manifest\.json\): other settings seed"):
        preprocess(config(coco, tmp_path / "s"))
    assert (tmp_path / "s" / "manifest.json").read_bytes() == manifest


# ---------------------------------------------------------------------------------- no room, no rights


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB of its own; only root may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small file system to fill: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def refused(coco: Path, target: Path, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        preprocess(config(coco, target))
    message = str(caught.value)
    assert "\n" not in message
    assert [w for w in (str(target), "run the same command again", *words) if w not in message] == [], message


def test_a_full_disk_and_room_again(coco: Path, tmp_path: Path, plain: list[str], small_disk: Path) -> None:
    whole = preprocess(config(coco, tmp_path / "whole"))
    target = small_disk / "s"
    refused(coco, target, "No space left on device")
    check_whole(target)
    assert shards(target), "the disk holds one shard"
    assert hidden(target) == [], "what was begun is gone, and with it the room it took"
    assert not (target / "manifest.json").exists()
    there = {f"data/{path.name}" for path in shards(target)}
    remount(small_disk, "size=16m")
    plain.clear()
    assert preprocess(config(coco, target)).digest == whole.digest
    assert there & set(plain) == set()


def test_a_disk_that_is_full_from_the_start(coco: Path, plain: list[str], small_disk: Path) -> None:
    """Not even a first page, or a folder, has room."""
    with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    refused(coco, small_disk / "s", "No space left on device")
    assert hidden(small_disk) == []


def test_a_target_that_became_read_only(coco: Path, plain: list[str], small_disk: Path) -> None:
    """A finished dataset stays one that can be read; a new one beside it cannot be made."""
    remount(small_disk, "size=16m")
    manifest = preprocess(config(coco, small_disk / "s"))
    before = contents(small_disk)
    remount(small_disk, "ro")
    refused(coco, small_disk / "new", "Read-only file system")
    os.remove(shutil.copytree(small_disk / "s", small_disk.parent / "copy") / "manifest.json")
    refused(coco, small_disk / "s", "Read-only file system")
    Manifest.load(small_disk / "s").verify()
    assert Manifest.load(small_disk / "s") == manifest
    assert contents(small_disk) == before


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does: writing beyond the limit is an error
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
exec(sys.argv[2])
"""


@pytest.mark.parametrize("limit", [0, 30_000])
def test_a_file_that_may_not_grow_is_a_paragraph(coco: Path, tmp_path: Path, limit: int) -> None:
    """Wherever the writing fails (the first bytes, a row group, the footer): one reason, nothing left."""
    data = config(coco, tmp_path / "s").data.model_dump_json()
    script = WRITER.replace("sys.stdin.readline()", "").replace("sys.argv[1]", "sys.argv[3]")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), script, data], capture_output=True, text=True
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("hrnet_core.errors.DataError: data.shards: "), done.stderr
    assert "cannot be written" in last
    assert "File too large" in last
    assert hidden(tmp_path / "s") == []
    assert shards(tmp_path / "s") == []


@pytest.mark.slow
def test_a_full_disk_under_the_command(
    larger: Path, tmp_path: Path, plain: list[str], small_disk: Path
) -> None:
    """In a task of another process: exit code 2 and one paragraph, no traceback of Ray's."""
    whole = preprocess(config(larger, tmp_path / "whole", LARGER))
    remount(small_disk, "size=6m")
    told = finished(command(larger, small_disk / "s", LARGER), code=2)
    assert "hrnet preprocess: data.shards: " in told
    assert "No space left on device" in told
    assert "Traceback" not in told
    check_whole(small_disk / "s")
    assert shards(small_disk / "s")
    remount(small_disk, "size=64m")
    told = finished(command(larger, small_disk / "s", LARGER))
    assert "shards are there already" in told
    assert f"digest {whole.digest}" in told
    assert hidden(small_disk / "s") == [], "those of tasks that Ray ended are removed by the next run"


# ---------------------------------------------------------------------------------- the time that is left


def simulated(sizes: list[int], slots: int) -> list[tuple[float, float]]:
    """(seconds left as told, as it comes) after each shard, for tasks of 100 people a second each."""
    from types import SimpleNamespace

    works = [SimpleNamespace(key=("x", i), people=range(people)) for i, people in enumerate(sizes)]
    free, spans = [1000.0] * slots, []
    for work in works:
        start = min(free)
        free[free.index(start)] = start + len(work.people) / 100
        spans.append((start + len(work.people) / 100, start, work))
    now = 1000.0
    progress = TaskLog(works, clock=lambda: now)
    progress.begin(slots)
    told = []
    for now, start, work in sorted(spans, key=lambda span: span[0]):
        progress.done(Task(work.key, len(work.people), BuiltShard((), ()), start, now, "w", 0))
        told.append((progress.seconds_left(), max(free) - now))
    return told


@pytest.mark.parametrize("slots", [1, 2, 4, 16])
@pytest.mark.parametrize("sizes", [[2000] * 64, [2000] * 63 + [300], [700, 2000, 1500, 2000] * 8])
def test_the_time_left_is_right_within_one_shard(
    sizes: list[int], slots: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the first line on: without the tasks at once it would be 16 times too long there."""
    for told, comes in simulated(sizes, slots):
        assert told == pytest.approx(comes, rel=0.05, abs=max(sizes) / 100)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("preprocess: ")
    assert len(lines) > len(sizes) // slots
    assert all(", about " in line for line in lines[1:-1])
    assert f"{len(sizes)} of {len(sizes)} shards, {sum(sizes):,} people, " in lines[-1]
    assert "left" not in lines[-1]
