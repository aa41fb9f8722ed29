"""An actor's threads: pictures read ahead, passes at a time, and the same bytes however many there are."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from dots import rows_here, write_solved

from hrnet_core.checkpoint import load_checkpoint
from hrnet_core.errors import ConfigError, DataError
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.predictor import PosePredictor
from pipelines.cluster.session import cpus_each, cpus_per_gpu, room_for
from pipelines.evaluate import evaluate
from pipelines.poses import units
from pipelines.poses.actor import READERS_PER_CPU, Actor, Threads
from pipelines.poses.plan import make_plan
from pipelines.poses.worker import Worker
from pipelines.predict import predict
from pipelines.settings.config import EvaluateSettings, PredictSettings, RaySettings
from pipelines.sources.media import Video, list_media

CODEC = HeatmapCodec("official", (96, 128))
SOON = 20  # seconds: what is waited for comes at once, or the test fails


@pytest.fixture(scope="module")
def dots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A COCO root of 10 pictures with 2 people each, and a checkpoint that finds most of them."""
    return write_solved(tmp_path_factory.mktemp("dots"), CODEC, photos=10)


class Counted:
    """How many are inside at once: a block that lasts a little."""

    def __init__(self) -> None:
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    def __call__(self) -> None:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.02)
        with self.lock:
            self.now -= 1


def predictor(run: Callable[..., Any], device: str = "cpu") -> Any:
    def predict_crops(crops: Any, *_: Any) -> tuple[Any, Any]:
        run()
        return crops, crops

    return SimpleNamespace(
        device=torch.device(device), predict_crops=predict_crops, finish=lambda people, *_: people
    )


# --- reading --------------------------------------------------------------------------------------------


def test_several_are_read_at_once_in_order_and_not_far_ahead() -> None:
    threads = Threads(predictor(lambda: None), cpus=1)
    together = threading.Barrier(READERS_PER_CPU)
    begun: list[int] = []

    def read(number: int) -> int:
        begun.append(number)
        if number < READERS_PER_CPU:
            together.wait(SOON)  # breaks unless so many are read at the same time
        time.sleep(0.02 * (number % 3 == 0))  # later ones may be ready first
        return number

    found = []
    for number in threads.read(read, range(30)):
        assert len(begun) <= number + 1 + READERS_PER_CPU
        found.append(number)
    assert found == list(range(30))


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_files_are_fetched_many_at_a_time(
    dots: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """By the one function that reads from disks and buckets, though one CPU decodes."""
    root, checkpoint = dots
    together, asked = threading.Barrier(READERS_PER_CPU), itertools.count()

    def read_file(path: str, size: int | None = None) -> bytes:
        if next(asked) < READERS_PER_CPU:
            together.wait(SOON)
        return Path(path).read_bytes()

    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", rows_here)
    monkeypatch.setattr("pipelines.sources.photos.read_file", read_file)
    if verb == "evaluate":
        assert evaluate(checkpoint, root, out=tmp_path).figures["people"] == 20
    else:
        done = predict([str(root / "val2017")], checkpoint, out=tmp_path)
        assert done.summary["counts"] == {"pictures": 10, "people": 10}


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_no_more_are_decoded_at_once_than_there_are_cpus(cpus: int) -> None:
    threads, inside = Threads(predictor(lambda: None), cpus), Counted()

    def decode(_: int) -> None:
        with threads.decoding:
            inside()

    list(threads.read(decode, range(20)))
    assert inside.most == cpus


def test_an_error_of_a_reader_reaches_who_asked() -> None:
    def read(number: int) -> int:
        if number == 3:
            raise DataError("s3://bucket/3.jpg: the bucket did not give it")
        return number

    found = Threads(predictor(lambda: None)).read(read, range(9))
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"s3://bucket/3\.jpg"):
        next(found)


# --- the network ----------------------------------------------------------------------------------------


def test_passes_take_turns_on_a_cpu_and_overlap_on_a_gpu() -> None:
    people = [SimpleNamespace(crops=np.zeros((1, 128, 96, 3), np.uint8))]

    def both(threads: Threads) -> None:
        with ThreadPoolExecutor(2) as pool:
            for passed in [pool.submit(threads.predict, people, True, 2) for _ in range(6)]:
                assert passed.result(SOON) == people

    inside = Counted()
    both(Threads(predictor(inside)))
    assert inside.most == 1
    together = threading.Barrier(2)
    both(Threads(predictor(lambda: together.wait(SOON), "cuda")))  # breaks unless two are inside


def test_as_many_batches_are_in_the_network_as_it_has_cpus() -> None:
    """Of one unit, in order; with --evaluate.cpus-per-worker the CPUs are the threads of one pass."""
    together, seen = threading.Barrier(2), []

    def predict_crops(crops: Any, *_: Any) -> tuple[Any, Any]:
        together.wait(SOON)  # breaks unless two are inside
        seen.append((len(crops), torch.get_num_threads()))
        return crops, crops

    spy: Any = SimpleNamespace(
        device=torch.device("cpu"), predict_crops=predict_crops, finish=lambda people, *found: found
    )
    crops = np.arange(10, dtype=np.uint8).reshape(5, 2, 1, 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        threads = Threads(spy, 2, passes=2)
        keypoints, scores = threads.predict([SimpleNamespace(crops=crops)] * 2, True, 3)
    finally:
        torch.set_num_threads(before)
    assert sorted(seen) == [(1, 1), (3, 1), (3, 1), (3, 1)]
    np.testing.assert_array_equal(keypoints, np.concatenate([crops, crops]))
    np.testing.assert_array_equal(scores, keypoints)


@pytest.mark.parametrize(("given", "passes"), [({}, 3), ({"cpus_per_worker": 3}, 1), ({"use_gpu": True}, 3)])
def test_passes_at_once_are_the_cpus_over_the_threads_of_one(
    dots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], passes: int
) -> None:
    made: list[tuple[int, int]] = []
    monkeypatch.setattr("pipelines.poses.actor.Threads", lambda _, *numbers: made.append(numbers))
    monkeypatch.setattr("hrnet_core.predictor.PosePredictor", lambda *_: None)
    before = torch.get_num_threads()
    try:
        Actor(lambda: (None, None, {}), None, EvaluateSettings(**given), cpus=3)
    finally:
        torch.set_num_threads(before)
    assert made == [(3, passes)]


def test_the_network_has_the_threads_that_were_set() -> None:
    """OpenMP keeps their number for each thread: another one would round otherwise."""
    before, seen = torch.get_num_threads(), []
    people: Any = [SimpleNamespace(crops=np.zeros((1, 128, 96, 3), np.uint8))]
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            threads = Threads(predictor(lambda: seen.append(torch.get_num_threads())))
            torch.set_num_threads(2)
            threads.predict(people, True, 2)
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 3]


# --- the same bytes -------------------------------------------------------------------------------------


def units_at_once(count: int) -> Callable[..., Iterator[dict[str, Any]]]:
    """In place of units.rows_on_ray: one actor here, called in so many threads, with so many CPUs to read."""

    def rows(pending: Any, work: Any, checkpoint: Path, settings: Any, *_: Any) -> Iterator[dict[str, Any]]:
        before = torch.get_num_threads()
        try:
            actor = Actor(lambda: (*load_checkpoint(checkpoint), {}), work, settings, cpus=count)

            def call(index: int) -> dict[str, Any]:
                row = actor({"unit": np.array([index]), "work": [pickle.dumps(pending[index])]})
                return {name: values[0] for name, values in row.items()}

            with ThreadPoolExecutor(count) as pool:
                yield from pool.map(call, pending)
        finally:
            torch.set_num_threads(before)

    return rows


def test_results_are_the_same_bytes_at_1_2_and_4_threads(
    dots: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, checkpoint = dots
    settings = EvaluateSettings(batch_size=2)  # five units
    found = {}
    for count in (1, 2, 4):
        monkeypatch.setattr("pipelines.poses.units.rows_on_ray", units_at_once(count))
        out = tmp_path / str(count)
        done = evaluate(checkpoint, root, out=out, settings=settings)
        found[count] = Path(done.results_file).read_bytes()
    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", rows_here)
    one = evaluate(checkpoint, root, out=tmp_path / "one", settings=settings)
    assert len(json.loads(Path(one.results_file).read_text())) == 20
    assert set(found.values()) == {Path(one.results_file).read_bytes()}


def test_the_threads_of_the_network_change_rounding_only(
    dots: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, checkpoint = dots
    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", rows_here)
    found = []
    for cpus in (1, 2):
        settings = EvaluateSettings(batch_size=4, cpus_per_worker=cpus)
        done = evaluate(checkpoint, root, out=tmp_path / str(cpus), settings=settings)
        found.append([r["keypoints"] for r in json.loads(Path(done.results_file).read_text())])
    np.testing.assert_allclose(*found, atol=1e-3)


def test_photographs_that_fail_in_a_thread_are_told_by_file(
    dots: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, whichever unit and thread met them, in order."""
    root, checkpoint = dots
    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", units_at_once(4))
    opened = []

    def read_file(path: str, size: int | None = None) -> bytes:
        opened.append(path)
        content = Path(path).read_bytes()
        return content[: len(content) // 2] if path.endswith(("-1.png", "-7.png")) else content

    monkeypatch.setattr("pipelines.sources.photos.read_file", read_file)
    with pytest.raises(DataError, match=r"2 photographs.*picture-1\.png: truncated.*picture-7\.png: trunc"):
        evaluate(checkpoint, root, out=tmp_path, settings=EvaluateSettings(batch_size=2))
    assert len(opened) == 10


def test_a_video_gives_the_same_table_at_1_2_and_4_threads(
    dots: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two videos of stretches of 4 frames, one of them cut off; read by one thread, each was opened once."""
    root, checkpoint = dots
    image = cv2.imread(str(root / "val2017" / "picture-0.png"))
    sources = tmp_path / "videos"
    sources.mkdir()
    for name in ("a.avi", "b.avi"):
        code = cv2.VideoWriter.fourcc(*"MJPG")
        writer = cv2.VideoWriter(str(sources / name), cv2.CAP_FFMPEG, code, 12.0, image.shape[1::-1])
        for n in range(30):
            writer.write(np.roll(image, 3 * n, axis=1))
        writer.release()
    whole = (sources / "b.avi").read_bytes()
    (sources / "b.avi").write_bytes(whole[: len(whole) // 2])
    opened: list[str] = []

    class Told(Video):
        def __init__(self, uri: str, max_pixels: int) -> None:
            opened.append(Path(uri).name)
            super().__init__(uri, max_pixels)

    monkeypatch.setattr("pipelines.poses.worker.Video", Told)
    settings = PredictSettings(batch_size=2)
    for count in (1, 2, 4):
        monkeypatch.setattr("pipelines.poses.units.rows_on_ray", units_at_once(count))
        predict([str(sources)], checkpoint, out=tmp_path / str(count), settings=settings)
        if count == 1:
            assert opened == ["a.avi", "b.avi"]
    for name in ("poses.json", "poses.parquet", "images.json", "rejected.json"):
        assert len({(tmp_path / str(count) / name).read_bytes() for count in (1, 2, 4)}) == 1
    frames = pq.read_table(tmp_path / "4" / "poses.parquet").column("frame").to_pylist()
    assert frames[:30] == list(range(30))
    (cut_off,) = json.loads((tmp_path / "4" / "rejected.json").read_text())
    assert (cut_off["name"], cut_off["reason"]) == ("b.avi", "video_cut_off")
    assert len(frames) == 30 + cut_off["frame"]


@pytest.mark.parametrize("kind", ["pictures", "video"])
def test_the_next_unit_is_read_while_the_network_is_at_one(
    dots: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The first pass ends once a file or frame of the second unit was decoded, or the test fails."""
    root, checkpoint = dots
    source = root / "val2017"
    if kind == "video":
        image = cv2.imread(str(root / "val2017" / "picture-0.png"))
        source = tmp_path / "clip.avi"
        code = cv2.VideoWriter.fourcc(*"MJPG")
        writer = cv2.VideoWriter(str(source), cv2.CAP_FFMPEG, code, 12.0, image.shape[1::-1])
        for _ in range(10):
            writer.write(image)
        writer.release()
    settings = PredictSettings(batch_size=2)  # units of four
    plan = make_plan(list_media([str(source)])[0], None, None, settings, load_checkpoint(checkpoint)[1])
    actor = Actor(lambda: (*load_checkpoint(checkpoint), {}), Worker(settings), settings)
    fifth, prepare = threading.Event(), actor.threads.predictor.prepare
    predict_crops, prepared = actor.threads.predictor.predict_crops, itertools.count(1)

    def counted(*arguments: Any) -> Any:
        found = prepare(*arguments)
        if next(prepared) == 5:
            fifth.set()
        return found

    def after_the_fifth(*arguments: Any) -> Any:
        assert fifth.wait(SOON), "nothing of the second unit was read"
        return predict_crops(*arguments)

    monkeypatch.setattr(actor.threads.predictor, "prepare", counted)
    monkeypatch.setattr(actor.threads.predictor, "predict_crops", after_the_fifth)
    rows = [{"unit": np.array([n]), "work": [pickle.dumps(unit)]} for n, unit in enumerate(plan.units)]
    with ThreadPoolExecutor(2) as pool:
        assert sum(row["people"][0] for row in pool.map(actor, rows)) == 10


def test_pixels_are_kept_only_to_be_drawn_on(dots: tuple[Path, Path]) -> None:
    root, checkpoint = dots
    model, spec = load_checkpoint(checkpoint)
    threads = Threads(PosePredictor(model, spec, "cpu", "float32"))
    image = cv2.imread(str(root / "val2017" / "picture-0.png"))
    for formats, kept in ((("coco",), False), (("overlays",), True)):
        worker = Worker(PredictSettings(formats=formats))
        for row, drawn in (({}, kept), ({"frame": 3}, False)):
            seen = worker._seen(row, image, None, threads)
            assert (seen.image is not None) == drawn
            assert len(seen.people.crops) == 1


# --- how many actors ------------------------------------------------------------------------------------


def nodes(*resources: dict[str, float]) -> Callable[[], list[dict[str, Any]]]:
    return lambda: [{"Alive": True, "Resources": r, "Labels": {}} for r in resources]


def test_room_is_counted_node_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    there = nodes({"CPU": 3.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 12.0, "GPU": 4.0})()
    monkeypatch.setattr("ray.nodes", lambda: [gone, *there])
    assert room_for(1, 0) == 31
    assert room_for(2, 0) == 1 + 8 + 6
    assert room_for(1, 1) == 2 + 4
    assert room_for(8, 1) == 2 + 1
    assert cpus_per_gpu() == 3  # of the node with 12 and 4
    for number, node in enumerate(there):
        node["Labels"] = {
            "ray.io/node-id": str(number),
            "pool": "gpu" if "GPU" in node["Resources"] else "cpu",
        }
    assert room_for(1, 0, {"pool": "cpu"}) == 3
    assert room_for(1, 0, {"pool": "gpu", "ray.io/node-id": "1"}) == 16
    assert room_for(1, 0, {"pool": "spot"}) == 0
    monkeypatch.setattr("ray.nodes", nodes({"CPU": 3.0}))
    assert cpus_per_gpu() == 1


def idle(monkeypatch: pytest.MonkeyPatch, *cpus: float) -> None:
    """Nodes with so many CPUs, and nobody at work on them."""
    monkeypatch.setattr("ray.nodes", nodes(*({"CPU": each} if each else {} for each in cpus)))
    for asked in ("ray.available_resources", "ray.cluster_resources"):
        monkeypatch.setattr(asked, lambda: {"CPU": sum(cpus)})


@pytest.mark.parametrize(
    ("nodes_of", "sizes", "cpus"),
    [
        ([2], [2000, 10], 2),  # COCO folders of one large and one tiny shard
        ([2], [2000] * 8, 1),
        ([2], [200, 100], 1),  # shorter than what Ray takes for the second
        ([16], [2000], 6),
        ([16], [2000] * 3, 5),
        ([16], [2000] * 2 + [100], 5),
        ([16], [2000] * 16, 1),
        ([16], [2000] * 74, 1),
        ([16], [2000] * 9, 5),  # three rounds of three end sooner than nine of one CPU
        ([4], [2000] * 3, 1),  # three after each other would be no sooner
        ([16, 16, 4, 0], [2000] * 2, 4),  # the head has none
        ([16, 1], [2000], 1),
        ([8, 8], [2000] * 3, 4),
        ([0.5], [2000], 1),
    ],
)
def test_few_tasks_get_several_cpus(
    monkeypatch: pytest.MonkeyPatch, nodes_of: list[float], sizes: list[int], cpus: int
) -> None:
    """No more than the smallest node has, and only where the last task ends sooner."""
    idle(monkeypatch, *nodes_of)
    assert cpus_each(sizes, 6, {}, 150) == cpus
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": sum(nodes_of) - 1})
    assert cpus_each(sizes, 6, {}, 150) == 1  # others are at work
    assert cpus_each(sizes, 6, {"pool": "none"}, 150) == 1


@pytest.mark.parametrize(
    ("given", "units_asked", "actors"),
    [
        ({}, 12, 6),
        ({}, 4, 4),
        ({}, 9, 3),  # of two CPUs: three units each are sooner done than two of one CPU
        ({}, 2, 2),
        ({"num_workers": 2}, 9, 2),
        ({"cpus_per_worker": 3}, 9, 2),
    ],
)
def test_the_default_fills_the_machine(
    dots: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, int],
    units_asked: int,
    actors: int,
) -> None:
    """6 CPUs: as many actors, but no more than units, and fewer of two CPUs where these end sooner; what is
    said explicitly is obeyed."""

    class Asked(Exception):
        pass

    def strategy(size: int, **_: Any) -> None:
        raise Asked(size)

    monkeypatch.setattr("pipelines.poses.units.ray_session", lambda _, quiet: threading.Lock())
    idle(monkeypatch, 6)
    monkeypatch.setattr("ray.data.ActorPoolStrategy", strategy)
    pending = dict.fromkeys(range(units_asked))
    arguments = pending, None, dots[1], EvaluateSettings(**given), RaySettings(), "evaluate"
    with pytest.raises(Asked) as asked:
        next(units.rows_on_ray(*arguments))
    assert asked.value.args == (actors,)
    with pytest.raises(ConfigError, match="wants 7 workers of 1 CPU"):
        next(units.rows_on_ray(*arguments[:3], EvaluateSettings(num_workers=7), *arguments[4:]))


def test_an_error_among_the_answers_ends_rays_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which redirects stderr: told while it lasts, the error would be seen by nobody."""
    answer = {"unit": 0, "content": b"", "people": 1, "problems": "[]", "mode": "float32"}
    shown = sys.stderr

    def rows(*_: Any) -> Iterator[dict[str, Any]]:
        with contextlib.redirect_stderr(io.StringIO()):
            yield answer | {"actor": "here", "start": 0.0, "end": 1.0}

    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", rows)
    (tmp_path / "file").touch()
    store, settings = f"{tmp_path}/file/unfinished", EvaluateSettings()
    with pytest.raises(DataError, match="cannot be written: it, or a part of its path, is a file") as caught:
        units.run_units(["unit"], len, tmp_path, settings, RaySettings(), store, "evaluate")
    assert caught.tb is not None  # holds the frames, as whoever prints the error does
    assert sys.stderr is shown
