"""The recorded training step on a GPU against the launched one; skipped where there is none. Several workers
on the CPU: test_ddp.py."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from test_feed import dotted_shards
from test_train import losses, small_config
from torch import multiprocessing

from hrnet_core.modes import cannot_compile
from pipelines.shards.manifest import Manifest
from pipelines.training import recording
from pipelines.training import step as step_module
from pipelines.training.ddp import SharedGradients
from pipelines.training.loop import train_epochs
from pipelines.training.state import Job, Training, set_rate, set_up
from pipelines.training.step import halves, launch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
# A recording's kernels are those of the launches; how sums in gradients are ordered is a GPU's own matter.
SAME = 1e-3


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """37 people: batches of 16, 16 and 5."""
    return dotted_shards(tmp_path_factory.mktemp("shards"), {"train2017": 37, "val2017": 12})


def on_gpu(
    manifest: Manifest, folder: Path, checkpoint: str | None = None, **train: Any
) -> tuple[Training, list[str]]:
    """Worker 0 of 1 on the GPU, and the checkpoints that it saves after each batch."""
    folders: list[str] = []

    def report(_: dict[str, Any], saved: str | None) -> None:
        assert saved is not None
        folders.append(saved)

    how = {"use_gpu": True, "checkpoint_minutes": 1e-9, "schedule": "cosine", "validate_every": 2}
    config = small_config(manifest, folder, **{**how, "graph": False, **train})
    job = Job(config, manifest.folder, str(folder), tracking_uri=None)
    return set_up(job, 0, 1, torch.device("cuda", 0), report, checkpoint), folders


def trained(*args: Any, **train: Any) -> tuple[Training, list[str]]:
    run, folders = on_gpu(*args, **train)
    train_epochs(run)
    return run, folders


def recorded(run: Training) -> bool:
    """Whether full batches were replayed: their step is then a function of recording.py."""
    return getattr(run.full_step, "__module__", None) == recording.__name__


MEANS: list[dict[str, Any]] = [
    {},
    {"precision": "bfloat16"},
    {"precision": "float16"},
    {"accumulate": 2, "clip_norm": 1e-3, "ema_decay": 0.5},
    {
        **{"optimizer": "adamw", "weight_decay": 0.1, "decay_norms": False, "ohkm": 8},
        **{"ema_decay": 0.9, "ema_warmup": True},
    },
]


@pytest.mark.parametrize(
    "means", MEANS, ids=["float32", "bfloat16", "float16", "accumulate-clip-ema", "adamw"]
)
def test_a_recorded_run_is_the_launched_one(
    manifest: Manifest, tmp_path: Path, means: dict[str, Any]
) -> None:
    """Losses of two epochs, whose short batches are launched; the rate changes with each of them."""
    launched, _ = trained(manifest, tmp_path / "launched", **means)
    replayed, _ = trained(manifest, tmp_path / "replayed", graph=True, **means)
    assert (recorded(launched), recorded(replayed)) == (False, True)
    assert list(losses(replayed)) == [1, 2, 3, 4, 5, 6]
    assert losses(replayed) == pytest.approx(losses(launched), rel=SAME)
    steps = {float(one["step"]) for one in replayed.optimizer.state.values()}
    assert steps == {float(one["step"]) for one in launched.optimizer.state.values()}
    assert int(replayed.model.bn1.num_batches_tracked) == 6 * means.get("accumulate", 1)
    assert replayed.scaler.state_dict() == launched.scaler.state_dict()
    begun, _ = on_gpu(manifest, tmp_path / "begun", **means)
    start, there, here = (
        torch.cat([p.detach().flatten() for p in run.scored.parameters()])
        for run in (begun, launched, replayed)
    )
    # Adam's first steps are as long as the rate whatever the gradient: where that is nearly zero, its sign is
    # the order of a sum.
    assert (here - there).norm() < 0.2 * (there - start).norm()


@pytest.mark.parametrize("after", [1, 3, 4])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_recorded_run_goes_on_where_it_stood(
    manifest: Manifest, tmp_path: Path, after: int, precision: str
) -> None:
    """After a full batch, after the short one, and within the second epoch; recorded anew each time."""
    run, folders = trained(manifest, tmp_path / "r", graph=True, precision=precision)
    again, _ = trained(manifest, tmp_path / "again", folders[after - 1], graph=True, precision=precision)
    assert recorded(again)
    expected = {step: loss for step, loss in losses(run).items() if step > after}
    assert losses(again) == pytest.approx(expected, rel=SAME)


def test_a_run_goes_on_with_and_without_a_recording(manifest: Manifest, tmp_path: Path) -> None:
    launched, folders = trained(manifest, tmp_path / "launched")
    replayed, others = trained(manifest, tmp_path / "replayed", graph=True)
    for run, checkpoint, graph in ((launched, folders[1], True), (replayed, others[1], False)):
        again, _ = trained(manifest, tmp_path / f"again-{graph}", checkpoint, graph=graph)
        assert recorded(again) is graph
        assert losses(again) == pytest.approx(
            {step: loss for step, loss in losses(run).items() if step > 2}, rel=SAME
        )


def test_what_a_recorded_run_logs_is_what_a_launched_one_does(manifest: Manifest, tmp_path: Path) -> None:
    """The norm of each step's gradient, written by the replay; a share of time; the GPU's memory."""
    rows = []
    for graph in (False, True):
        run, _ = trained(manifest, tmp_path / str(graph), graph=graph)
        assert recorded(run) is graph
        assert run.log is not None
        rows.append([row for row in run.log.rows if "train/loss" in row])
    norms = [[row["train/grad_norm"] for row in run] for run in rows]
    assert norms[1] == pytest.approx(norms[0], rel=SAME)
    assert len(set(norms[1])) == len(norms[1]), "each replay wrote its own"
    assert all(0 < row["train/device_busy"] <= 1 for run in rows for row in run)
    assert rows[1][0]["system/worker0/gpu_peak_memory_megabytes"] > 0
    assert rows[1][0]["system/node0/gpu_0_memory_usage_megabytes"] > 0


def test_recording_leaves_a_run_as_it_was(manifest: Manifest, tmp_path: Path) -> None:
    run, _ = on_gpu(manifest, tmp_path / "r", graph=True, precision="float16", ema_decay=0.5)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    sent = next(iter(run.feed.batches(0))).on_device(run.device)
    step = recording.record(run, functools.partial(launch, run, 1.0), halves(run), sent)
    assert step.__module__ == recording.__name__
    for network in (run.model, run.scored):
        for key, value in network.state_dict().items():
            assert torch.equal(value, before[key]), key
    for one in run.optimizer.state.values():
        assert all(not bool(value.any()) for value in one.values())
    assert run.scaler.state_dict()["_growth_tracker"] == 0


@pytest.mark.parametrize("spoilt", ["loss", "rate"])
def test_a_recording_that_computes_something_else_is_not_used(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoilt: str
) -> None:
    """Another loss, or no way for the weights: the second loss tells."""
    run, _ = on_gpu(manifest, tmp_path / "r", graph=True)
    set_rate(run.optimizer, 0.01)
    sent = next(iter(run.feed.batches(0))).on_device(run.device)

    first, second = halves(run)

    def update(loss: torch.Tensor) -> torch.Tensor:
        if spoilt == "rate":
            set_rate(run.optimizer, 0.0)
        return 1.1 * second(loss) if spoilt == "loss" else second(loss)

    step = functools.partial(launch, run, 1.0)
    assert recording.record(run, step, recording.Halves(first, update), sent) is step
    assert "its losses" in capsys.readouterr().out


def test_a_step_that_waits_for_the_gpu_is_launched(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """CUDA refuses to record it; what the capture left half done is gone, and the run is the launched one."""
    launched, _ = trained(manifest, tmp_path / "launched", precision="float16")
    original = step_module.joints_mse

    def waits(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(*args, **kwargs)
        assert loss.item() >= 0
        return loss

    monkeypatch.setattr(step_module, "joints_mse", waits)
    run, _ = trained(manifest, tmp_path / "r", graph=True, precision="float16")
    assert not recorded(run)
    assert "train.graph: not recorded" in capsys.readouterr().out
    assert losses(run) == pytest.approx(losses(launched), rel=SAME)


# --- several workers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("means", MEANS[1:4], ids=["bfloat16", "float16", "accumulate-clip-ema"])
def test_gradients_in_one_buffer_over_nccl(manifest: Manifest, tmp_path: Path, means: dict[str, Any]) -> None:
    """A world of one, which averages nothing: the recorded run with the buffer is the one without it."""
    alone, _ = trained(manifest, tmp_path / "alone", graph=True, **means)
    torch.distributed.init_process_group("nccl", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        run, _ = on_gpu(manifest, tmp_path / "buffer", graph=True, **means)
        run.shared = SharedGradients(run.model, 1)
        train_epochs(run)
    finally:
        torch.distributed.destroy_process_group()
    assert recorded(run)
    assert losses(run) == pytest.approx(losses(alone), rel=SAME)


def gpu_of_two(rank: int, folder: str, manifest: Manifest) -> None:
    """Launched under DDP, and recorded: losses of rank 0, weights of both."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl", f"file://{folder}/store", rank=rank, world_size=2)
    found = []
    for graph in (False, True):
        how = {"use_gpu": True, "num_workers": 2, "graph": graph, "ema_decay": 0.5, "clip_norm": 1e-3}
        config = small_config(manifest, Path(folder), precision="bfloat16", schedule="cosine", **how)
        job = Job(config, manifest.folder, f"{folder}/{graph}", tracking_uri=None)
        run = set_up(job, rank, 2, device, lambda figures, saved: None)
        train_epochs(run)
        assert recorded(run) is graph
        weights = torch.cat([p.detach().flatten() for p in run.model.parameters()]).cpu()
        found.append((losses(run) if run.log else {}, weights))
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()  # who ends first cuts the other off
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_two_gpus_that_record_train_as_under_ddp(manifest: Manifest, tmp_path: Path) -> None:
    """Losses of two epochs, whose short batches are launched; weights of both workers to the bit."""
    multiprocessing.spawn(gpu_of_two, (str(tmp_path), manifest), nprocs=2)
    (launched, replayed), (_, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert list(replayed[0]) == [1, 2, 3, 4, 5, 6]
    assert replayed[0] == pytest.approx(launched[0], rel=SAME)
    assert torch.equal(replayed[1], other[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch and Triton, when they compile
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_and_recorded(manifest: Manifest, tmp_path: Path, precision: str) -> None:
    if why := cannot_compile("cuda"):
        pytest.skip(why)
    launched, _ = trained(manifest, tmp_path / "launched", precision=precision)
    both, _ = trained(manifest, tmp_path / "both", precision=precision, compile=True, graph=True)
    assert recorded(both)
    assert losses(both) == pytest.approx(losses(launched), rel=5e-3)
    assert list((tmp_path / "compiled").glob("*.bin"))
