"""Evaluation on two actors equals evaluation on one, to the byte: drawn and real people, a dead actor."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import psutil
import pytest
from dots import SMALL, fitted_network, write_coco

from hrnet_core.checkpoint import CheckpointSpec, save_checkpoint
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.model import HRNet
from pipelines.draw import draw
from pipelines.evaluate import evaluate
from pipelines.poses.protocol import Evaluation
from pipelines.settings.config import EvaluateSettings

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
CODEC = HeatmapCodec("udp", (96, 128))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fitted to coloured dots: on other photographs it answers anything, which is as good for comparing."""
    folder = tmp_path_factory.mktemp("checkpoint")
    network: HRNet = fitted_network(write_coco(folder / "coco"), CODEC)
    save_checkpoint(folder / "best", network, CheckpointSpec(SMALL, CODEC))
    return folder / "best"


def run(checkpoint: Path, root: Path, out: Path, actors: int, batch_size: int = 4) -> Evaluation:
    settings = EvaluateSettings(num_workers=actors, batch_size=batch_size)
    return evaluate(checkpoint, root, out=out, settings=settings)


def test_drawn_people(checkpoint: Path, tmp_path: Path) -> None:
    draw(tmp_path / "coco", 4, 3, 16, 2)
    one, two = (run(checkpoint, tmp_path / "coco", tmp_path / str(n), n) for n in (1, 2))
    assert Path(one.results_file).read_bytes() == Path(two.results_file).read_bytes()
    assert one.stats == two.stats
    assert one.figures["people"] == two.figures["people"] > 20


def test_real_people_with_both_kinds_of_boxes(checkpoint: Path, real_data: Path, tmp_path: Path) -> None:
    boxes = real_data / "evaluator" / "tinypose_dev" / "detections_picodet320.json"
    for name, given, people in (("gt", None, 99), ("det", boxes, None)):
        found = [
            evaluate(
                checkpoint,
                real_data / "coco",
                out=tmp_path / name / str(actors),
                boxes=given,
                settings=EvaluateSettings(
                    num_workers=actors, batch_size=8, flip_test=False, score_threshold=0.3
                ),
            )
            for actors in (1, 2)
        ]
        assert Path(found[0].results_file).read_bytes() == Path(found[1].results_file).read_bytes()
        assert found[0].stats == found[1].stats
        assert people in (None, found[1].figures["people"])


def test_a_killed_actor_loses_and_doubles_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """SIGKILL while it works: Ray starts it again, its unit is answered once, the file is the same."""
    root = write_coco(tmp_path / "coco", photos=80)
    whole = run(checkpoint, root, tmp_path / "whole", 2, batch_size=1)
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not list((tmp_path / "hurt").glob("unfinished/*/*")):
            time.sleep(0.01)
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # one of the run before, or of Ray's own
                if "MapWorker" in " ".join(child.cmdline()):
                    child.kill()
                    killed.append(child.pid)
                    return

    thread = threading.Thread(target=kill_one)
    thread.start()
    hurt = run(checkpoint, root, tmp_path / "hurt", 2, batch_size=1)
    thread.join()
    assert killed
    assert hurt.figures["people"] == 160
    assert Path(hurt.results_file).read_bytes() == Path(whole.results_file).read_bytes()
