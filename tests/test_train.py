"""Training: the step, the schedule, DDP against one process, and one run end to end through Ray Train."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import shutil
import threading
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_feed import AREA, dotted_shards
from torch import multiprocessing
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from hrnet_core import memory
from hrnet_core.architecture import HRNetConfig
from hrnet_core.errors import CheckpointError, ConfigError, DataError
from hrnet_core.model import HRNet
from hrnet_core.predictor import PosePredictor
from hrnet_core.skeleton import COCO17
from pipelines import train as driver
from pipelines.settings.config import EvaluateSettings, RunConfig, TrackSettings
from pipelines.settings.config_file import load_config
from pipelines.settings.train import TrainSettings
from pipelines.shards.manifest import Manifest
from pipelines.storage.files import write_json
from pipelines.tracking.checkpoints import local_checkpoint
from pipelines.training import loop
from pipelines.training.ddp import wrap
from pipelines.training.epoch_ap import Predictions, ValSplit
from pipelines.training.loop import Diverged, average_decay, learning_rate, train_epochs, train_worker
from pipelines.training.pictures import people_sheet
from pipelines.training.run_folder import check_same_run, move_aside, only_one, where_it_stands, write_run
from pipelines.training.state import (
    Job,
    Standing,
    Training,
    make_optimizer,
    make_spec,
    report_to_ray,
    save,
    set_up,
)
from pipelines.training.step import Part, train_step

SMALL = HRNetConfig(width=8, stem_width=8, bottlenecks=1, modules=(1, 1, 1), blocks=1)
STEPS = 20


# --- the step -----------------------------------------------------------------------------------------


def made_up_part(step: int, rows: slice, share: float) -> Part:
    """Rows of a made-up global batch of 8, the same wherever it is made."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(8, 3, 64, 64, generator=generator)
    heatmaps = torch.rand(8, 17, 16, 16, generator=generator)
    weights = (torch.rand(8, 17, generator=generator) > 0.3).float()
    return Part(images[rows], heatmaps[rows], weights[rows], share)


def made_up_parts(step: int, rows: slice, factor: float, accumulate: int) -> list[Part]:
    """The same rows in `accumulate` parts, with shares that sum to `factor` x their part of the batch."""
    edges = np.linspace(rows.start, rows.stop, accumulate + 1).astype(int).tolist()
    return [made_up_part(step, slice(a, b), factor * (b - a) / 8) for a, b in pairwise(edges)]


def new_model() -> HRNet:
    torch.manual_seed(1)
    return HRNet(SMALL, "kaiming").train()


WORKERS_CASES: list[tuple[int, dict[str, Any], float]] = [
    (4, {}, 1e-6),
    (5, {}, 1e-6),
    # Four gradients are summed in another order, and Adam carries the rounding on for 20 steps: 1.5e-5.
    (4, {"accumulate": 2, "clip_norm": 0.01}, 5e-5),
]
"""Rows of worker 0 of 8, settings, and how much of themselves the losses may differ."""


def counted(exchanges: list[int], bucket):
    """DDP's own exchange of gradients, counted; it wants its types as such or not at all."""
    exchanges.append(1)
    return allreduce_hook(None, bucket)


@contextlib.contextmanager
def workers(rank: int, folder: str, world: int = 2) -> Iterator[None]:
    """This process as one of several workers, over gloo, while the block lasts."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    yield
    torch.distributed.barrier()  # who ends first cuts the other off
    torch.distributed.destroy_process_group()


def ddp_rank(rank: int, folder: str) -> None:
    """One of two DDP processes: the real wrap and train_step over its part of each batch."""
    with workers(rank, folder):
        for case, (rows, changed, _) in enumerate(WORKERS_CASES):
            settings, exchanges = TrainSettings(**changed), []
            own = (slice(0, rows), slice(rows, 8))[rank]
            model = wrap(new_model(), torch.device("cpu"), 2)
            model.register_comm_hook(exchanges, counted)
            optimizer = make_optimizer(model, settings)
            losses = [
                train_step(model, optimizer, made_up_parts(step, own, 2, settings.accumulate), settings)
                for step in range(STEPS)
            ]
            torch.save((torch.stack(losses), len(exchanges)), f"{folder}/{case}-{rank}.pt")


def test_two_ddp_ranks_equal_one_process_with_both_parts(tmp_path: Path) -> None:
    """One process runs the same parts one after the other: BatchNorm sees each part by itself in both.
    Halves of 4 rows, 5 rows beside 3, and halves in two parts each, their gradients exchanged once and
    clipped."""
    multiprocessing.spawn(ddp_rank, (str(tmp_path),), nprocs=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found, exchanges = [], []
    for case, (rows, changed, tolerance) in enumerate(WORKERS_CASES):
        settings = TrainSettings(**changed)
        (one, count), (other, _) = (torch.load(tmp_path / f"{case}-{rank}.pt") for rank in range(2))
        together = (one + other) / 2
        exchanges.append(count)
        model = new_model()
        optimizer = make_optimizer(model, settings)
        alone = []
        for step in range(STEPS):
            parts = made_up_parts(step, slice(0, rows), 1, settings.accumulate)
            parts += made_up_parts(step, slice(rows, 8), 1, settings.accumulate)
            alone.append(train_step(model, optimizer, parts, settings))
        assert alone[-1] < 0.9 * alone[0]  # it does learn
        torch.testing.assert_close(together, torch.stack(alone), rtol=tolerance, atol=0)
        found.append(float(alone[-1]))
    assert len(set(found)) == len(WORKERS_CASES), "each case is another computation"
    assert exchanges[0] >= STEPS
    assert len(set(exchanges)) == 1, "once a step, whatever the number of parts"
    torch.set_num_threads(threads)


def test_the_loss_of_a_short_batch_is_the_mean_over_its_rows() -> None:
    """Workers with 3, 1 and no rows of a global batch of 4: by hand, sum over rows / 4."""
    model = new_model().eval()  # BatchNorm of single rows would differ
    settings = TrainSettings()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    whole = made_up_part(0, slice(0, 4), 1.0)
    expected = train_step(model, optimizer, [whole], settings)
    shares = [train_step(model, optimizer, [made_up_part(0, slice(0, 3), 3 * 3 / 4)], settings)]
    shares += [train_step(model, optimizer, [made_up_part(0, slice(3, 4), 1 * 3 / 4)], settings)]
    shares += [train_step(model, optimizer, [made_up_part(0, slice(7, 8), 0.0)], settings)]
    assert shares[2] == 0
    torch.testing.assert_close(torch.stack(shares).mean(), expected)


def test_adam_gets_no_weight_decay_and_the_published_rate() -> None:
    """Trap 1: the published yaml names 1e-4, the published Adam never received it."""
    optimizer = make_optimizer(new_model(), TrainSettings())
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["weight_decay"] == 0
    assert optimizer.defaults["lr"] == 1e-3
    assert optimizer.defaults["betas"] == (0.9, 0.999)


def test_the_rate_falls_with_the_first_batch_of_epoch_170_and_200() -> None:
    """Trap 2: epochs counted from 0, as on the torch the published code was written for."""
    settings = TrainSettings()
    steps = 7
    rates = {
        epoch: {learning_rate(settings, epoch * steps + s, steps) for s in range(steps)}
        for epoch in (0, 169, 170, 199, 200, 209)
    }
    expected = {0: 1e-3, 169: 1e-3, 170: 1e-4, 199: 1e-4, 200: 1e-5, 209: 1e-5}
    for epoch, values in rates.items():
        assert sorted(values) == [pytest.approx(expected[epoch])]


def test_cosine_and_warm_up() -> None:
    settings = TrainSettings(schedule="cosine", lr=1.0, epochs=10, warmup_steps=4)
    rates = [learning_rate(settings, step, 10) for step in range(100)]
    assert rates[:3] == [
        pytest.approx((i + 1) / 4 * 0.5 * (1 + math.cos(math.pi * i / 100))) for i in range(3)
    ]
    assert rates[50] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))


def test_flat_cosine_is_flat_for_half_of_the_run_and_ends_at_a_twentieth() -> None:
    settings = TrainSettings(schedule="flat_cosine", lr=2.0, epochs=10, warmup_steps=4)
    rates = [learning_rate(settings, step, 10) for step in range(101)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert set(rates[4:51]) == {2.0}
    assert rates[75] == pytest.approx(0.5 * (2.0 + 0.1))
    assert rates[60] == pytest.approx(0.1 + 1.9 * 0.5 * (1 + math.cos(math.pi * 0.2)))
    assert rates[100] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in pairwise(rates[50:]))


def test_a_young_average_is_of_its_last_steps() -> None:
    """(1 + n) / (10 + n) until the decay is reached; without the warm-up the decay from the first step on."""
    settings = TrainSettings(ema_decay=0.99, ema_warmup=True)
    decays = [average_decay(settings, step) for step in range(1000)]
    assert decays[:2] == [0.1, pytest.approx(2 / 11)]
    assert decays[889] == pytest.approx(890 / 899)
    assert set(decays[890:]) == {0.99}
    assert average_decay(TrainSettings(ema_decay=0.99), 0) == 0.99
    # How much of the weights at the beginning is left after 100 steps: the same with 0.9998 would be .98.
    assert (
        math.prod(average_decay(TrainSettings(ema_decay=0.9998, ema_warmup=True), n) for n in range(100))
        < 1e-9
    )


# --- the loop, in this process ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return dotted_shards(tmp_path_factory.mktemp("shards"), {"train2017": 37, "val2017": 12})


def small_config(manifest: Manifest, storage: Path, **train: Any) -> RunConfig:
    network = {key: value for key, value in SMALL.as_dict().items() if key != "num_keypoints"}
    return RunConfig(
        run={"name": "r", "storage": str(storage)},
        data={"shards": manifest.folder, "input_size": (64, 64), "row_group_people": 8},
        model={**network, "initialization": "kaiming"},
        train={"epochs": 2, "batch_size": 16, "log_every": 1, "max_failures": 0, **train},
        track={"onnx": False},
    )


def one_worker(
    config: RunConfig, folder: Path, checkpoint: Path | None = None
) -> tuple[Training, list[dict[str, Any]]]:
    """Worker 0 of 1 without Ray; the list fills with what it reports, its folders kept as "folder"."""
    reports: list[dict[str, Any]] = []

    def report(figures: dict[str, Any], saved: str | None) -> None:
        kept = f"{folder}-saved-{len(reports)}"
        reports.append({**figures, "folder": shutil.move(saved, kept) if saved else None})

    job = Job(config, config.data.shards, str(folder), tracking_uri=None)
    return set_up(job, 0, 1, torch.device("cpu"), report, checkpoint), reports


def losses(run: Training) -> dict[int, float]:
    assert run.log is not None
    return {row["step"]: row["train/loss"] for row in run.log.rows if "train/loss" in row}


@pytest.fixture(scope="module")
def whole(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """A run of 2 epochs of 3 batches that saves after every batch: run, reports, config."""
    folder = tmp_path_factory.mktemp("whole")
    config = small_config(manifest, folder, checkpoint_minutes=1e-9, schedule="cosine")
    run, reports = one_worker(config, folder / "r")
    train_epochs(run)
    return run, reports, config


def test_going_on_in_the_middle_of_an_epoch_is_exact(whole: tuple[Any, ...], tmp_path: Path) -> None:
    """Weights and losses bit for bit: 37 people, 3 batches an epoch, going on after batch 4 of 6."""
    run, reports, config = whole
    assert [r["step"] for r in reports] == [1, 2, 3, 4, 5, 6]
    assert (run.standing.epoch, run.standing.total_steps, run.standing.samples) == (2, 6, 74)
    again, _ = one_worker(config, tmp_path / "again", Path(reports[3]["folder"]))
    assert (again.standing.epoch, again.standing.step) == (1, 1)
    train_epochs(again)
    assert losses(again) == {step: loss for step, loss in losses(run).items() if step > 4}
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


@pytest.mark.parametrize(
    "changed",
    [
        {"accumulate": 2},
        {"clip_norm": 1e-4},
        {"ema_decay": 0.5},
        {"precision": "float16"},
        {"optimizer": "adamw", "weight_decay": 0.1, "decay_norms": False},
        {"ema_decay": 0.9998, "ema_warmup": True},
        {"schedule": "flat_cosine"},
        {"photometric": 0.5},
        {"coarse_dropout": 0.5},
        {"information_dropping": 0.5, "dropping_from": 0.5},
    ],
    ids=[
        *("accumulate", "clip", "ema", "float16", "decay"),
        *("ema warm-up", "flat cosine", "photometric", "coarse dropout", "dropping"),
    ],
)
def test_going_on_is_exact_with_each_means(
    whole: tuple[Any, ...], manifest: Manifest, tmp_path: Path, changed: dict[str, Any]
) -> None:
    """After batch 4 of 6, in the middle of an epoch: weights, average, optimizer and scaler bit for bit."""
    how = {"checkpoint_minutes": 1e-9, "schedule": "cosine", "validate_every": 2, **changed}
    config = small_config(manifest, tmp_path, **how)
    run, reports = one_worker(config, tmp_path / "r")
    train_epochs(run)
    again, _ = one_worker(config, tmp_path / "again", Path(reports[3]["folder"]))
    train_epochs(again)
    assert losses(again) == {step: loss for step, loss in losses(run).items() if step > 4}
    for network, other in ((run.model, again.model), (run.scored, again.scored)):
        for key, value in network.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key
    states = zip(run.optimizer.state.values(), again.optimizer.state.values(), strict=True)
    assert all(torch.equal(one[key], other[key]) for one, other in states for key in one)
    assert run.scaler.state_dict() == again.scaler.state_dict()
    # And it is another training than the plain one, or the same one scored by other weights.
    plain = whole[0].model.state_dict()
    same = all(torch.equal(plain[key], value) for key, value in run.scored.state_dict().items())
    assert not same


def test_fresh_views_train_and_go_on_exactly(tmp_path: Path) -> None:
    """On cuts, with views made on the device and noise on them: neither depends on where a run began."""
    manifest = dotted_shards(tmp_path / "shards", {"train2017": 21, "val2017": 12}, context=2.0)
    noise = {"photometric": 0.5, "coarse_dropout": 0.5, "information_dropping": 0.5}
    config = small_config(manifest, tmp_path, checkpoint_minutes=1e-9, views="device", **noise)
    config = config.model_copy(update={"data": config.data.model_copy(update={"context": 2.0})})
    driver.check_settings(config, manifest)
    run, reports = one_worker(config, tmp_path / "r")
    train_epochs(run)
    assert (run.standing.epoch, run.standing.total_steps) == (2, 4)
    again, _ = one_worker(config, tmp_path / "again", Path(reports[2]["folder"]))
    assert (again.standing.epoch, again.standing.step) == (1, 1)
    train_epochs(again)
    assert losses(again) == {4: losses(run)[4]}


def test_a_run_that_is_stopped_leaves_no_thread(manifest: Manifest, tmp_path: Path) -> None:
    """Ctrl-C while batches of this epoch and of the next are being made."""
    run, _ = one_worker(small_config(manifest, tmp_path, checkpoint_minutes=1e-9), tmp_path / "r")
    seen = []

    def stop(*_: Any) -> None:
        seen.extend(thread.name for thread in threading.enumerate())
        raise KeyboardInterrupt

    run.report = stop
    with pytest.raises(KeyboardInterrupt):
        train_epochs(run)
    assert any(name.startswith("feed") for name in seen)
    assert not any(thread.name.startswith("feed") for thread in threading.enumerate())


def test_fresh_views_need_cuts(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--data\.context 2\.0.*--train\.views stored"):
        driver.check_settings(small_config(manifest, tmp_path, views="device"), manifest)


def test_no_more_keypoints_are_kept_than_there_are(manifest: Manifest, tmp_path: Path) -> None:
    driver.check_settings(small_config(manifest, tmp_path, ohkm=17), manifest)
    with pytest.raises(ConfigError, match=r"train\.ohkm 18 .* skeleton 'coco17' has: at most 17"):
        driver.check_settings(small_config(manifest, tmp_path, ohkm=18), manifest)


def test_the_best_epoch_is_a_checkpoint_that_gives_its_ap(whole: tuple[Any, ...], manifest: Manifest) -> None:
    """best/ through PosePredictor and pycocotools, without the loop: the same AP as the run said."""
    run, _, config = whole
    best = run.standing.best_ap
    predictor = PosePredictor.load(Path(run.folder) / "best", mode="channels_last")
    provenance = predictor.spec.provenance
    assert 0 < best < 1
    assert provenance["val_gt/AP"] == best
    assert provenance["epoch"] == run.standing.best_epoch
    assert provenance["dataset_digest"] == manifest.digest
    assert provenance["config"]["train"]["schedule"] == "cosine"
    stats, results = run.val.score(run.val.predict(predictor, True, 32), run.spec, config.evaluate)
    assert stats["AP"] == pytest.approx(best, abs=1e-9)
    assert json.loads(Path(run.folder, "predictions.json").read_text()) == results
    validated = {row["step"]: row["val_gt/AP"] for row in run.log.rows if "val_gt/AP" in row}
    assert list(validated) == [3, 6]
    assert max(validated.values()) == best
    pictures = {p.name for p in Path(run.folder, "pictures").glob("*.png")}
    assert pictures == {"curves.png", "people-epoch-0001.png", "people-epoch-0002.png"}


def test_one_predictor_scores_all_epochs_as_a_new_one_would(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Poses of each epoch, bit for bit, with the average of the weights, which is what is scored."""
    made: list[PosePredictor] = []
    epochs: list[tuple[Predictions, Predictions]] = []
    original = ValSplit.predict

    def predict(val: ValSplit, predictor: PosePredictor, *how: Any) -> Predictions:
        made.append(predictor)
        new = PosePredictor(run.scored, run.spec, "cpu", predictor.mode)  # type: ignore[arg-type]
        epochs.append((original(val, predictor, *how), original(val, new, *how)))
        return epochs[-1][0]

    monkeypatch.setattr(ValSplit, "predict", predict)
    run, _ = one_worker(small_config(manifest, tmp_path, epochs=3, ema_decay=0.5), tmp_path / "r")
    train_epochs(run)
    assert len(made) == 3
    assert len({id(predictor) for predictor in made}) == 1
    for found, expected in epochs:
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
    losses = [found.loss for found, _ in epochs]
    assert len(set(losses)) == 3, "the weights moved"


def test_a_loss_that_is_not_finite_stops_with_the_rows_of_its_batch(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(manifest, tmp_path, log_every=2, max_skipped_steps=1)
    run, reports = one_worker(config, tmp_path / "run")
    batches = list(run.feed.batches(1))
    original = run.feed.batches

    def poisoned(epoch: int, start: int, stop: int) -> Any:
        for number, batch in enumerate(original(epoch, start, stop)):
            broken = batch.heatmaps.copy()
            broken[0, 0, 0, 0] = np.nan if number == run.feed.steps + 2 else 0
            yield replace(batch, heatmaps=broken)

    monkeypatch.setattr(run.feed, "batches", poisoned)
    rows = ", ".join(map(str, batches[2].ann_ids.tolist()))
    # Batch 3 is the second of its interval of two.
    with pytest.raises(Diverged, match=rf"epoch 2, batch 3 \(1 in a row\)\. .*: ann_id {rows}\."):
        train_epochs(run)
    assert [r["epoch"] for r in reports] == [1]  # nothing was saved after it
    assert (tmp_path / "run" / "best" / "checkpoint.json").exists()
    assert all(math.isfinite(loss) for loss in losses(run).values())


# --- the AP of an epoch ---------------------------------------------------------------------------------


def perfect(val: ValSplit, shift: float = 0.0) -> Predictions:
    people = val.truth.people
    keypoints = people.keypoints[..., :2].astype(np.float32) + np.float32(shift)
    return Predictions(people.ann_id, keypoints, np.ones(keypoints.shape[:2], np.float32), 0.0)


def test_an_epoch_is_scored_with_pycocotools(manifest: Manifest, tmp_path: Path) -> None:
    val, spec = ValSplit(manifest, "val2017"), make_spec(small_config(manifest, tmp_path), manifest)
    settings = RunConfig().evaluate
    stats, results = val.score(perfect(val), spec, settings)
    assert stats["AP"] == pytest.approx(1.0)
    assert len(results) == 12
    # A shift of (d, d) px gives each keypoint exp(-2 d² / (2 area (2 sigma)²)); COCO's OKS is their mean.
    d = 8.0
    similarity = np.exp(-(2 * d**2) / (2 * AREA * (2 * np.array(COCO17.oks_sigmas)) ** 2)).mean()
    thresholds = np.linspace(0.5, 0.95, 10)
    stats, _ = val.score(perfect(val, d), spec, settings)
    assert stats["AP"] == pytest.approx(float((similarity >= thresholds).mean()))


def test_the_ap_of_an_epoch_follows_the_settings_of_the_protocol(tmp_path: Path) -> None:
    """Both people of each picture predicted on one place: OKS-NMS leaves the better one, soft NMS both."""
    manifest = dotted_shards(tmp_path / "shards", {"train2017": 4, "val2017": 6}, per_image=2)
    val, spec = ValSplit(manifest, "val2017"), make_spec(small_config(manifest, tmp_path), manifest)
    found = perfect(val)
    found.keypoints[1::2] = found.keypoints[::2]
    kept = {soft: len(val.score(found, spec, EvaluateSettings(soft_nms=soft))[1]) for soft in (False, True)}
    assert kept == {False: 3, True: 6}


def test_truth_and_prediction_are_drawn_in_one_place(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the truth as the prediction, both halves of each picture are the same."""
    monkeypatch.setattr("pipelines.training.pictures.tile", lambda *sheet: sheet)
    pairs, _, labels, heading = people_sheet(manifest, "val2017", perfect(ValSplit(manifest, "val2017")))
    assert labels == [f"OKS 1.00, annotation {ann_id}" for ann_id in range(1000, 1012)]
    assert "annotated on the left, predicted on the right" in heading
    for left, right in ((pair[:, :256], pair[:, 260:]) for pair in pairs):
        assert left.shape == (256, 256, 3)
        np.testing.assert_array_equal(left, right)


def test_several_workers_predict_everyone_once(manifest: Manifest, tmp_path: Path) -> None:
    class Constant:
        def heatmaps(self, crops: np.ndarray, flip_test: bool, batch_size: int) -> np.ndarray:
            return np.tile(crops[:, None, :16, :16, 0] / 255.0, (1, 17, 1, 1)).astype(np.float32)

    alone = ValSplit(manifest, "val2017").predict(Constant(), True, 4)  # type: ignore[arg-type]
    parts = [ValSplit(manifest, "val2017", r, 4).predict(Constant(), True, 4) for r in range(4)]  # type: ignore[arg-type]
    joined = Predictions.join(parts)
    assert alone.ann_ids.tolist() == joined.ann_ids.tolist() == sorted(range(1000, 1012))
    np.testing.assert_array_equal(alone.keypoints, joined.keypoints)
    assert joined.loss == pytest.approx(alone.loss)
    spec = make_spec(small_config(manifest, tmp_path), manifest)
    with pytest.raises(RuntimeError, match="12 people"):
        ValSplit(manifest, "val2017").score(parts[0], spec, RunConfig().evaluate)


# --- the driver ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"input_size": (96, 128)}, r"data\.input_size is \[96, 128\], the shards have \[64, 64\]"),
        ({"codec": "udp"}, "data.codec is udp, the shards have official"),
        ({"sigma": 3.0}, r"data\.sigma is 3\.0, the shards have 0\.5"),
        ({"variants": 4}, "data.variants is 4, the shards have 1"),
    ],
)
def test_shards_of_other_settings_are_refused_by_name(
    manifest: Manifest, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    config = small_config(manifest, tmp_path)
    config = config.model_copy(update={"data": config.data.model_copy(update=change)})
    with pytest.raises(ConfigError, match=named):
        driver.train(config)
    assert not (tmp_path / "mlflow.db").exists()


def test_a_damaged_shard_is_refused_before_training(tmp_path: Path) -> None:
    manifest = dotted_shards(tmp_path / "shards", {"train2017": 9, "val2017": 4})
    shard = tmp_path / "shards" / manifest.shards("train2017")[1].path
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"train2017-00001-of-00002\.parquet"):
        driver.train(small_config(manifest, tmp_path / "runs"))


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ("gone.pth", ["gone.pth: no such file"]),
        ("page.pth", ["page.pth: a web page"]),
        ("other.safetensors", ["other.safetensors (official key names) does not fit width 8"]),
        ("folder", ["folder/checkpoint.json: no readable JSON"]),
    ],
)
def test_wrong_weights_to_start_from_are_told_before_ray_starts(
    manifest: Manifest,
    tmp_path: Path,
    init: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from safetensors.torch import save_file

    (tmp_path / "page.pth").write_text("<!doctype html><html></html>")
    (tmp_path / "folder").mkdir()
    save_file(HRNet(replace(SMALL, width=16)).state_dict(), tmp_path / "other.safetensors")
    monkeypatch.setattr(driver, "ray_session", None)  # would fail if it were called
    config = small_config(manifest, tmp_path / "runs")
    model = config.model.model_copy(update={"init": str(tmp_path / init)})
    with pytest.raises(CheckpointError) as caught:
        driver.train(config.model_copy(update={"model": model}))
    told = str(caught.value)
    assert told.startswith(f"model.init: {tmp_path}")
    assert [word for word in (*words, "--model.init") if word not in told] == []


def test_a_run_that_goes_on_needs_its_first_weights_no_more(
    whole: tuple[Any, ...], manifest: Manifest, tmp_path: Path
) -> None:
    _, reports, config = whole
    config = config.model_copy(update={"model": config.model.model_copy(update={"init": "gone.pth"})})
    again, _ = one_worker(config, tmp_path / "again", Path(reports[3]["folder"]))
    assert again.standing.total_steps == 4
    with pytest.raises(CheckpointError, match=r"gone\.pth"):
        one_worker(config, tmp_path / "anew")


def test_a_name_goes_on_only_with_the_same_settings(manifest: Manifest, tmp_path: Path) -> None:
    folder = str(tmp_path / "r")
    config = small_config(manifest, tmp_path)
    write_run(folder, config, manifest.digest, "0" * 32)
    check_same_run(folder, config, manifest.digest)
    more = small_config(manifest, tmp_path, num_workers=2, log_every=50, max_skipped_steps=1)
    check_same_run(folder, more, manifest.digest)
    with pytest.raises(ConfigError, match=r"train\.lr was 0\.001, now 0\.5.*--run\.fresh"):
        driver.train(small_config(manifest, tmp_path, lr=0.5))
    # A run of a version that did not have a setting yet had its default.
    known = json.loads(Path(folder, "run.json").read_text())
    del known["decides"]["train.photometric"]
    Path(folder, "run.json").write_text(json.dumps(known))
    check_same_run(folder, config, manifest.digest)
    with pytest.raises(ConfigError, match=r"train\.photometric was 0\.0, now 0\.5"):
        check_same_run(folder, small_config(manifest, tmp_path, photometric=0.5), manifest.digest)
    move_aside(folder)
    assert not Path(folder, "run.json").exists()
    assert (tmp_path / "r.1" / "run.json").exists()


def run_settings(config: RunConfig, **run: Any) -> RunConfig:
    return config.model_copy(update={"run": config.run.model_copy(update=run)})


def test_config_yaml_goes_on_where_the_run_was_begun_anew_and_holds_no_password(
    manifest: Manifest, tmp_path: Path
) -> None:
    config = run_settings(small_config(manifest, tmp_path), fresh=True)
    track = config.track.model_copy(update={"uri": "http://user:secret@127.0.0.1:9"})
    write_run(str(tmp_path / "r"), config.model_copy(update={"track": track}), manifest.digest, None)
    written = load_config(str(tmp_path / "r" / "config.yaml"))
    assert not written.run.fresh
    assert written.track.uri == "http://...@127.0.0.1:9"
    assert "secret" not in (tmp_path / "r" / "config.yaml").read_text()


def test_a_fresh_start_moves_nothing_for_a_command_that_is_refused(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_train", None)  # would fail if it were called
    config = run_settings(small_config(manifest, tmp_path), fresh=True)
    write_run(str(tmp_path / "r"), config, manifest.digest, None)
    gone = config.model_copy(update={"model": config.model.model_copy(update={"init": "gone.pth"})})
    with pytest.raises(CheckpointError, match=r"gone\.pth"):
        driver.train(gone)
    own = config.model.model_copy(update={"init": str(tmp_path / "r" / "best")})
    monkeypatch.setattr(driver, "check_start", lambda *_: None)
    with pytest.raises(ConfigError, match=r"--model\.init .*lies in the run that --run\.fresh moves aside"):
        driver.train(config.model_copy(update={"model": own}))
    assert (tmp_path / "r" / "run.json").exists()
    assert not (tmp_path / "r.1").exists()


def test_a_fresh_start_moves_the_earlier_run_once_there_is_room_for_the_new_one(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise ConfigError("no room")

    config = run_settings(small_config(manifest, tmp_path), fresh=True)
    write_run(str(tmp_path / "r"), config, manifest.digest, None)
    monkeypatch.setattr(driver, "ray_session", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(driver, "fit", no_room)
    monkeypatch.setattr(driver, "require", no_room)
    with pytest.raises(ConfigError, match="no room"):
        driver.train(config)
    assert not (tmp_path / "r.1").exists()
    monkeypatch.setattr(driver, "require", lambda *_: None)
    with pytest.raises(ConfigError, match="no room"):
        driver.train(config)
    assert (tmp_path / "r.1" / "run.json").exists()


def test_where_a_fresh_start_stands_is_told_without_another(tmp_path: Path) -> None:
    snapshot = {"latest_checkpoint_result": {"metrics": {"step": 3}}}
    write_json(str(tmp_path / "ray" / "checkpoint_manager_snapshot.json"), snapshot)
    assert "the same command goes on from" in where_it_stands(str(tmp_path), 13)
    assert "the same command without --run.fresh goes on from" in where_it_stands(str(tmp_path), 13, True)


def test_the_folder_of_a_sweep_is_no_runs(manifest: Manifest, tmp_path: Path) -> None:
    write_json(str(tmp_path / "r" / "sweep.json"), {"run_id": None, "decides": {}})
    for fresh in (False, True):
        with pytest.raises(ConfigError, match="is a sweep"):
            driver.train(run_settings(small_config(manifest, tmp_path), fresh=fresh))


def test_a_storage_that_cannot_be_one_is_the_users_to_cure(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = small_config(manifest, tmp_path)
    with pytest.raises(DataError, match=r"file.*cannot be written"):
        driver.train(run_settings(config, storage=str(tmp_path / "file")))
    with pytest.raises(DataError, match=r"File name too long"):
        driver.train(run_settings(config, name="r" * 300))
    with pytest.raises(ConfigError, match=r"--run\.storage s3:/typo: a URI has two slashes, s3://typo"):
        driver.train(run_settings(config, storage="s3:/typo"))
    assert not Path("s3:").exists()


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden"])
def test_a_run_name_is_no_path(manifest: Manifest, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no path"):
        driver.train(run_settings(small_config(manifest, tmp_path), name=name))


def test_a_run_that_another_process_trains_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    with (
        only_one(str(tmp_path / "r")),
        pytest.raises(ConfigError, match="another process"),
    ):
        driver.train(small_config(manifest, tmp_path))


def test_a_run_that_is_refused_leaves_nothing_that_was_not_there(manifest: Manifest, tmp_path: Path) -> None:
    config = small_config(manifest, tmp_path)
    gone = config.model_copy(update={"model": config.model.model_copy(update={"init": "gone.pth"})})
    (tmp_path / "before").mkdir()
    for storage in (tmp_path / "new" / "runs", tmp_path / "before"):
        with pytest.raises(CheckpointError, match=r"gone\.pth"):
            driver.train(run_settings(gone, storage=str(storage)))
    assert [str(left.relative_to(tmp_path)) for left in tmp_path.rglob("*")] == ["before"]
    with only_one(str(tmp_path / "r")):
        (tmp_path / "r" / "run.json").touch()
    assert {left.name for left in tmp_path.iterdir()} == {"before", "r", ".r.lock"}


def test_a_lock_that_is_being_taken_away_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its file being opened and locked."""
    usual = fcntl.flock

    def late(handle: Any, how: int) -> None:
        (tmp_path / ".r.lock").unlink()
        usual(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ConfigError, match="another process"), only_one(str(tmp_path / "r")):
        pytest.fail("two could have it")


def test_a_state_that_could_not_be_saved_does_not_stay_in_the_temporary_folder(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt would leave the state of a whole network there."""
    run, _ = one_worker(small_config(manifest, tmp_path), tmp_path / "r")
    temporary = tmp_path / "temporary"
    temporary.mkdir()

    def half(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with monkeypatch.context() as full:
        full.setattr(torch, "save", half)
        with pytest.raises(OSError, match="No space left"):
            save(run)
    assert not list(temporary.iterdir())

    asked: dict[str, Any] = {}
    monkeypatch.setattr("ray.train.report", lambda figures, saved, **how: asked.update(how, saved=saved))
    run.report = partial(report_to_ray, str(tmp_path / "no" / "folder"))
    save(run)
    (folder,) = temporary.iterdir()
    (tmp_path / "no").write_text("a file, in which no folder can be")
    with pytest.raises(OSError, match="no"):
        asked["checkpoint_upload_fn"](asked["saved"], "checkpoint_0")
    assert not folder.exists()


def test_workers_keep_freed_memory(manifest: Manifest, tmp_path: Path) -> None:
    trainer = driver._trainer(small_config(manifest, tmp_path), manifest, str(tmp_path / "r"), [])
    assert trainer.run_config.worker_runtime_env == {"env_vars": memory.KEPT}


@pytest.mark.ray
def test_a_run_end_to_end(
    ray_local: None, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers through Ray Train and MLflow, which stop together an epoch early; the same command again
    returns at once."""
    from mlflow import MlflowClient

    from hrnet_core.checkpoint import load_checkpoint

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    stop = {"epochs": 3, "early_stop": 1, "early_stop_min_delta": 0.9}
    config = small_config(manifest, tmp_path, num_workers=2, cpus_per_worker=0.5, **stop)
    with pytest.raises(ConfigError, match="wants 8 workers of 2 CPU"):
        driver.train(small_config(manifest, tmp_path, num_workers=8, cpus_per_worker=2))
    assert not (tmp_path / "mlflow.db").exists()
    result = driver.train(config.model_copy(update={"track": TrackSettings()}))
    assert (result.epochs, result.samples, result.run_name) == (2, 74, "r")
    model, spec = load_checkpoint(result.best_checkpoint)
    assert model.config == SMALL
    assert spec.provenance["run_id"] == result.run_id

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.batch_size"] == "16"
    assert run.data.tags["dataset_digest"] == manifest.digest
    assert run.data.tags["stopped_early"] == "after epoch 2 of 3"
    assert run.data.metrics["val_gt/AP"] == pytest.approx(result.best_ap, abs=1)
    assert {"train/loss", "train/lr", "train/samples_per_s", "train/data_wait"} <= set(run.data.metrics)
    used = {f"system/worker{rank}/memory_usage_megabytes" for rank in range(2)}
    assert {*used, "system/node0/cpu_utilization_percentage"} <= set(run.data.metrics)
    assert "system/node1/cpu_utilization_percentage" not in run.data.metrics
    steps = [m.step for m in client.get_metric_history(result.run_id, "train/loss")]
    assert steps == [1, 2, 3, 4, 5, 6]
    names = {a.path for a in client.list_artifacts(result.run_id)}
    assert {"config.yaml", "metrics.jsonl", "pictures", "validation"} <= names
    version = client.get_model_version("hrnet-pose", str(result.version))
    assert version.run_id == result.run_id
    with local_checkpoint("models:/hrnet-pose/1", config.track, tmp_path) as found:
        assert (found.folder / "model.onnx").exists()
    assert not Path(result.best_checkpoint, "model.onnx").exists()

    monkeypatch.setattr(driver, "_trainer", None)  # would fail if it were called
    assert driver.train(config) == result
    assert list(json.loads(Path(result.folder, "result.json").read_text())) == [
        f.name for f in fields(result)
    ]
    replace(result, version=None).write()  # as if MLflow had been away at the end
    assert driver.train(config) == replace(result, version=result.version + 1)


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_that_diverges_ends_the_command_at_once(
    ray_local: None, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after three more tries: the message comes back as what the workers return."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(Diverged, match=r"epoch 1, batch [23] .*The rows of that batch: ann_id 1"):
        driver.train(
            small_config(manifest, tmp_path, num_workers=2, cpus_per_worker=0.5, lr=1e30, max_failures=3)
        )
    assert not (tmp_path / "r" / "result.json").exists()
    assert not (tmp_path / "r" / "best").exists()


def dying_worker(job: Job) -> Standing | Diverged:
    """The real worker, but its process ends in the second epoch of the first attempt."""
    import os

    import ray.train

    marker = Path(job.folder) / "died"
    original = loop.train_epoch

    def train_epoch(run: Training, batches: Any) -> None:
        if run.standing.epoch == 1 and not marker.exists():
            committed = ray.train.CheckpointConsistencyMode.COMMITTED
            ray.train.get_all_reported_checkpoints(committed)
            marker.touch()
            os._exit(1)
        original(run, batches)

    loop.train_epoch = train_epoch
    return train_worker(job)


@pytest.mark.slow
@pytest.mark.ray
def test_a_worker_that_dies_is_replaced_and_nothing_is_lost_or_counted_twice(
    ray_local: None, whole: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of the run that was never interrupted, each step once in one MLflow run."""
    import sys

    from mlflow import MlflowClient
    from ray import cloudpickle

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(loop, "train_worker", dying_worker)
    run, _, config = whole
    config = config.model_copy(
        update={
            "run": config.run.model_copy(update={"storage": str(tmp_path)}),
            "train": config.train.model_copy(update={"max_failures": 1, "checkpoint_minutes": 10.0}),
        }
    )
    result = driver.train(config)
    assert (tmp_path / "r" / "died").exists()
    assert result.epochs == 2
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    history = client.get_metric_history(result.run_id, "train/loss")
    assert {m.step: m.value for m in history} == losses(run)
    assert len(history) == 6
    assert len(client.search_runs([client.get_run(result.run_id).info.experiment_id])) == 1
