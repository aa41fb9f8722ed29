"""Gradients that several workers average between two recordings, against DDP's: gloo on the CPU."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_feed import dotted_shards
from test_step import pretend_cuda
from test_teacher import teacher_in
from test_train import losses, made_up_part, made_up_parts, new_model, small_config, workers
from torch import Tensor, multiprocessing

from pipelines.settings.train import TrainSettings
from pipelines.shards.manifest import Manifest
from pipelines.training import recording
from pipelines.training import step as step_module
from pipelines.training.ddp import SharedGradients, wrap
from pipelines.training.loop import train_epochs
from pipelines.training.state import Job, Training, make_average, make_optimizer, make_scaler, set_up
from pipelines.training.step import Part, launch, train_step

CPU = torch.device("cpu")


# --- the step -------------------------------------------------------------------------------------------

STEPS: dict[str, dict[str, Any]] = {
    "float32": {},
    "parts": {"accumulate": 2, "clip_norm": 0.01, "ema_decay": 0.5},
    "float16": {"precision": "float16", "clip_norm": 0.01},
    "bfloat16": {"precision": "bfloat16", "ema_decay": 0.5},
    "hardest": {"ohkm": 8, "optimizer": "adamw", "weight_decay": 0.1, "decay_norms": False},
}


def parts_of_step(step: int, rank: int, world: int, accumulate: int) -> list[Part]:
    """Full batches of 8 rows; the third is not finite at the last worker; of the fifth that has one row that
    does not count, as who only keeps company."""
    edges = {2: (0, 4, 8), 3: (0, 3, 6, 8)}[world]
    if step == 4 and rank == world - 1:
        return [made_up_part(step, slice(7, 8), 0.0)]
    own = slice(edges[rank], edges[rank + 1])
    parts = made_up_parts(step, own, world, accumulate)
    if step == 2 and rank == world - 1:
        parts[0] = replace(parts[0], heatmaps=parts[0].heatmaps * torch.inf)
    return parts


def after_steps(rank: int, world: int, settings: TrainSettings, shares: bool) -> dict[str, Tensor]:
    """Six steps under DDP, or with gradients in one buffer; all that is left. Each worker begins with other
    weights, and with rank 0's once they are wrapped."""
    model = new_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(rank)
    network = model if shares else wrap(model, CPU, world)
    shared = SharedGradients(model, world) if shares else None
    begun = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer, scaler = make_optimizer(model, settings), make_scaler(settings, CPU)
    average, norm = make_average(model, settings), torch.zeros(())
    found, norms = [], []
    first = torch.zeros(0)
    for step in range(6):
        parts = parts_of_step(step, rank, world, settings.accumulate)
        found.append(train_step(network, optimizer, parts, settings, scaler, average, norm, shared))
        norms.append(norm.clone())
        if step == 0:
            first = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    scored = average.network if average else model
    moments = [value for one in optimizer.state.values() for value in one.values()]
    return {
        "begun": begun,
        "first": first,
        "losses": torch.stack(found),
        "norms": torch.stack(norms),
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "average": torch.cat([value.double().flatten() for value in scored.state_dict().values()]),
        "moments": torch.cat([value.flatten() for value in moments]),
        "scale": torch.tensor(scaler.get_scale()),
    }


def steps_rank(rank: int, folder: str, world: int) -> None:
    with workers(rank, folder, world):
        for name, changed in STEPS.items():
            settings = TrainSettings(lr=0.01, **changed)
            both = [after_steps(rank, world, settings, shares) for shares in (False, True)]
            torch.save(both, f"{folder}/{name}-{rank}.pt")


def test_gradients_in_one_buffer_are_ddps_to_the_bit(tmp_path: Path) -> None:
    """Two workers: a sum of two is the same in either order. Losses, norms, weights, BatchNorm, average,
    moments and scale after steps that are full, not finite at one worker, and without rows at one."""
    multiprocessing.spawn(steps_rank, (str(tmp_path), 2), nprocs=2)
    ends = []
    for name in STEPS:
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1)]
        for ddp, own in ranks:
            for what, expected in ddp.items():
                torch.testing.assert_close(
                    own[what], expected, rtol=0, atol=0, equal_nan=True, msg=f"{name} {what}"
                )
        (_, one), (_, other) = ranks
        for what in ("begun", "weights", "moments", "scale"):
            assert torch.equal(one[what], other[what]), (name, what)
        left_out = [False, False, True, False, False, False]
        assert (~one["norms"].isfinite()).tolist() == left_out
        if name != "float16":  # there the scaler decides, and the loss is the loss
            assert one["losses"].isnan().tolist() == other["losses"].isnan().tolist() == left_out
        else:
            assert float(one["scale"]) == 2.0**15
        assert other["losses"][4] == 0
        ends.append(one["weights"])
    assert len({float(end.double().sum()) for end in ends}) == len(STEPS), "each is another training"


@pytest.mark.slow
def test_three_workers_in_one_buffer_are_ddps_up_to_the_order_of_sums(tmp_path: Path) -> None:
    """Gradients of three are summed in the order of a ring, which depends on where in a buffer they lie:
    those of the first step differ by what that rounds. Later ones say nothing, as Adam divides what is
    nothing but rounding by itself. Between the workers all is the same to the bit, to the end."""
    multiprocessing.spawn(steps_rank, (str(tmp_path), 3), nprocs=3)
    for name in STEPS:
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(3)]
        for ddp, own in ranks:
            assert own["losses"][0] == ddp["losses"][0], name
            rounding = 1e-6 * float(ddp["first"].abs().max())
            torch.testing.assert_close(own["first"], ddp["first"], rtol=0, atol=rounding, msg=name)
        for _, own in ranks[1:]:
            for what in ("begun", "weights", "moments", "scale"):
                assert torch.equal(own[what], ranks[0][1][what]), (name, what)


# --- runs -----------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "float32": {"optimizer": "adamw", "weight_decay": 0.1, "ema_decay": 0.9, "ema_warmup": True},
    "float16": {"precision": "float16", "accumulate": 2, "clip_norm": 0.01, "ema_decay": 0.5, "ohkm": 8},
}
"""Two epochs of 33 people in batches of 16, 16 and 1: of the last, one of two workers has no row."""


def worker(
    manifest: Manifest, folder: Path, rank: int, checkpoint: str | None = None, **train: Any
) -> tuple[Training, list[str | None]]:
    """Worker of two whose optimizer is that of a recorded run; what rank 0 saves after each batch."""
    saved: list[str | None] = []
    how = {"num_workers": 2, "checkpoint_minutes": 1e-9, "schedule": "cosine", "validate_every": 2}
    config = small_config(manifest, folder.parent, **how, **train)
    config = config.model_copy(update={"train": config.train.model_copy(update={"graph": True})})
    job = Job(config, manifest.folder, str(folder), tracking_uri=None)
    return set_up(job, rank, 2, CPU, lambda _, place: saved.append(place), checkpoint), saved


def state(run: Training) -> dict[str, Any]:
    """All that a run has come to."""
    return {
        "losses": losses(run) if run.log else {},
        "model": run.model.state_dict(),
        "scored": run.scored.state_dict(),
        "optimizer": [dict(one) for one in run.optimizer.state.values()],
        "scaler": run.scaler.state_dict(),
        "standing": replace(run.standing, seconds=0.0),
    }


def runs_rank(rank: int, folder: str, manifest: Manifest) -> None:
    """Each run under DDP; with its halves in pretended recordings; that one gone on with after batch 4 of 6;
    and where worker 1 could not record."""
    with workers(rank, folder, 2):
        for name, changed in RUNS.items():
            place = Path(folder) / name
            changed = {**changed, "teacher": f"{folder}/heavier"}
            launched, _ = worker(manifest, place / "launched", rank, **changed)
            launched.parallel, launched.shared = wrap(launched.model, CPU, 2), None
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(step_module, "prepare", lambda run, _: functools.partial(launch, run, 1.0))
                train_epochs(launched)
            found = {"launched": state(launched)}
            with pytest.MonkeyPatch.context() as patch:
                graphs = pretend_cuda(patch)
                run, saved = worker(manifest, place / "recorded", rank, **changed)
                train_epochs(run)
                assert len(graphs) == 2
                found["recorded"] = state(run)
                checkpoints = [saved[3]]  # rank 0's
                torch.distributed.broadcast_object_list(checkpoints)
                again, _ = worker(manifest, place / "again", rank, checkpoints[0], **changed)
                train_epochs(again)
                found["again"] = state(again)
                if rank == 1:
                    patch.setattr(recording, "_record", cannot)
                failed, _ = worker(manifest, place / "failed", rank, **changed)
                train_epochs(failed)
                found["failed"] = state(failed)
            torch.save(found, place / f"{rank}.pt")


def cannot(*_: Any) -> None:
    raise RuntimeError("CUDA error: out of memory")


@pytest.mark.slow
def test_two_workers_that_record_train_as_under_ddp(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """To the bit, where a replay is the same computation: losses, weights, each worker's BatchNorm, average,
    optimizer and scale. A run goes on from within an epoch to the same end, but for BatchNorm's statistics of
    worker 1, which nobody reads: they go on from rank 0's. If one worker cannot record, all launch, to the
    same end too."""
    manifest = dotted_shards(tmp_path / "shards", {"train2017": 33, "val2017": 12})
    teacher_in(tmp_path / "heavier")
    multiprocessing.spawn(runs_rank, (str(tmp_path), manifest), nprocs=2)
    said = capfd.readouterr().out.count("train.graph: not recorded")
    assert said == len(RUNS), "by the one that could not"
    for name in RUNS:
        for rank in (0, 1):
            found = torch.load(tmp_path / name / f"{rank}.pt", weights_only=False)
            expected = found.pop("launched")
            assert list(expected["losses"]) == ([1, 2, 3, 4, 5, 6] if rank == 0 else [])
            for way, run in found.items():
                where = f"{name}, {way}, worker {rank}"
                wanted = expected
                if way == "again":
                    later = {step: loss for step, loss in expected["losses"].items() if step > 4}
                    wanted = {**expected, "losses": later}
                    if rank == 1:
                        run["model"], wanted["model"] = weights(run["model"]), weights(expected["model"])
                same(run, wanted, where)


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if "running" not in key}


def same(one: Any, other: Any, where: str) -> None:
    """Both to the bit."""
    if isinstance(one, Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            same(one[key], other[key], f"{where} {key}")
    elif isinstance(one, list):
        for number, pair in enumerate(zip(one, other, strict=True)):
            same(*pair, f"{where} {number}")
    else:
        assert one == other, where
