"""The training step: its parts, clipping, 16 bits, the average, and what is tried and undone before it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_feed import dotted_shards
from test_train import losses, made_up_part, new_model, one_worker, small_config

from hrnet_core.checkpoint import load_checkpoint
from hrnet_core.errors import ConfigError
from pipelines.settings.config import RunConfig
from pipelines.settings.train import TrainSettings
from pipelines.shards.manifest import Manifest
from pipelines.training import compiled, recording, state
from pipelines.training import step as step_module
from pipelines.training.average import Average
from pipelines.training.loop import train_epochs
from pipelines.training.state import Training, make_average, make_optimizer, make_scaler, set_rate
from pipelines.training.step import Part, halves, launch, train_step

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """37 people: batches of 16, 16 and 5."""
    return dotted_shards(tmp_path_factory.mktemp("shards"), {"train2017": 37, "val2017": 12})


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def moved(settings: TrainSettings, parts: list[Part], train: bool) -> tuple[float, torch.Tensor]:
    """Loss of one step, and what plain SGD of rate 1 subtracts: the gradient as it is at the end."""
    model = new_model().train(train)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    loss = train_step(model, torch.optim.SGD(model.parameters(), lr=1.0, fused=True), parts, settings)
    return float(loss), before - torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_gradient_of_two_parts_is_that_of_one_batch() -> None:
    """With BatchNorm on its running statistics; on each part's own it is another one, as said."""
    whole = [made_up_part(0, slice(0, 8), 1.0)]
    halves = [made_up_part(0, slice(0, 4), 0.5), made_up_part(0, slice(4, 8), 0.5)]
    loss, gradient = moved(TrainSettings(), whole, train=False)
    in_parts, accumulated = moved(TrainSettings(), halves, train=False)
    assert in_parts == pytest.approx(loss, rel=1e-6)
    # A difference of weights has their rounding, 1e-7 of some tenths.
    torch.testing.assert_close(accumulated, gradient, rtol=1e-4, atol=1e-7)
    alone, apart = (moved(TrainSettings(), parts, train=True)[1] for parts in (whole, halves))
    assert (apart - alone).norm() > 1e-3 * alone.norm()


def test_clipping_shortens_a_long_gradient_and_leaves_a_short_one() -> None:
    parts = [made_up_part(0, slice(0, 8), 1.0)]
    _, free = moved(TrainSettings(), parts, train=True)
    norm = float(free.norm())
    _, clipped = moved(TrainSettings(clip_norm=norm / 10), parts, train=True)
    _, left = moved(TrainSettings(clip_norm=norm * 10), parts, train=True)
    torch.testing.assert_close(clipped, free / 10, rtol=1e-3, atol=1e-7)
    assert torch.equal(left, free)


def test_norms_and_biases_may_go_without_decay() -> None:
    """AdamW by hand: without a gradient a decayed weight is multiplied by 1 - rate x decay."""
    model = new_model()
    settings = TrainSettings(optimizer="adamw", lr=0.1, weight_decay=0.5, decay_norms=False)
    optimizer = make_optimizer(model, settings)
    before = weights_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.dim() == 4 else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])
    assert len(make_optimizer(model, TrainSettings()).param_groups) == 1


def test_the_average_is_its_formula() -> None:
    """Weights and BatchNorm's statistics of three steps, by hand."""
    model, settings = new_model(), TrainSettings(lr=0.01)
    optimizer, average = make_optimizer(model, settings), Average(model, 0.75)
    expected = weights_of(model)
    for step in range(3):
        train_step(model, optimizer, [made_up_part(step, slice(0, 8), 1.0)], settings, average=average)
        for key, value in model.state_dict().items():
            expected[key] = (
                0.75 * expected[key] + 0.25 * value if value.is_floating_point() else value.clone()
            )
    for key, value in average.network.state_dict().items():
        torch.testing.assert_close(value, expected[key], msg=key)
    assert not torch.equal(average.network.bn1.running_mean, model.bn1.running_mean)
    assert int(average.network.bn1.num_batches_tracked) == 3


def test_a_decay_in_a_tensor_averages_as_a_number_does() -> None:
    """As a recording needs it: three steps with another decay each, by numbers, by a tensor and by hand."""
    model, settings = new_model(), TrainSettings(lr=0.01)
    optimizer = make_optimizer(model, settings)
    averages = [Average(model, 0.9), Average(model, 0.9, recorded=True)]
    expected = weights_of(model)
    for step, decay in enumerate((0.1, 0.5, 0.75)):
        train_step(model, optimizer, [made_up_part(step, slice(0, 8), 1.0)], settings)
        for average in averages:
            average.set_decay(decay)
            average.update()
        for key, value in model.state_dict().items():
            moved = value.is_floating_point()
            expected[key] = decay * expected[key] + (1 - decay) * value if moved else value.clone()
    for average in averages:
        for key, value in average.network.state_dict().items():
            torch.testing.assert_close(value, expected[key], msg=key)
    for settings, kind in (
        (TrainSettings(ema_decay=0.9, ema_warmup=True, graph=True, use_gpu=True), torch.Tensor),
        (TrainSettings(ema_decay=0.9, ema_warmup=True), float),
    ):
        made = make_average(model, settings)
        assert made is not None
        assert isinstance(made._share, kind)


def test_the_average_is_what_is_scored_and_saved(manifest: Manifest, tmp_path: Path) -> None:
    run, _ = one_worker(small_config(manifest, tmp_path, epochs=1, ema_decay=0.5, lr=0.01), tmp_path / "r")
    train_epochs(run)
    assert run.average is not None
    model, spec = load_checkpoint(tmp_path / "r" / "best")
    assert spec.weights == "ema"
    for key, value in run.average.network.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert not torch.equal(run.model.conv1.weight, model.conv1.weight)
    predicted = run.val.predict(_predictor(run), True, 32)
    assert run.val.score(predicted, run.spec, run.config.evaluate)[0]["AP"] == run.standing.best_ap


def _predictor(run: Training) -> Any:
    from hrnet_core.predictor import PosePredictor

    return PosePredictor.load(Path(run.folder) / "best", mode="channels_last")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_the_gradient_in_16_bits_is_that_in_32(precision: Any) -> None:
    """Up to the bits that are not there; float16's scale is out of it again. BatchNorm on its running
    statistics, which do not amplify rounding."""
    parts, gradients = [made_up_part(0, slice(0, 8), 1.0)], []
    for settings in (TrainSettings(), TrainSettings(precision=precision)):
        model = new_model().eval()
        optimizer, scaler = make_optimizer(model, settings), make_scaler(settings, CPU)
        train_step(model, optimizer, parts, settings, scaler)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    exact, short = gradients
    difference = float((short - exact).norm() / exact.norm())
    assert 0 < difference < {"bfloat16": 3e-2, "float16": 5e-3}[precision]


def test_float16_leaves_out_a_step_that_is_not_finite_and_halves_the_scale() -> None:
    model, settings = new_model(), TrainSettings(precision="float16")
    optimizer, scaler = make_optimizer(model, settings), make_scaler(settings, CPU)
    good = made_up_part(0, slice(0, 8), 1.0)
    train_step(model, optimizer, [good], settings, scaler)
    before, scale = [p.detach().clone() for p in model.parameters()], scaler.get_scale()
    steps = [float(one["step"]) for one in optimizer.state.values()]
    bad = Part(good.images, good.heatmaps * torch.inf, good.weights, 1.0)
    train_step(model, optimizer, [bad], settings, scaler)
    assert all(torch.equal(one, p) for one, p in zip(before, model.parameters(), strict=True))
    assert [float(one["step"]) for one in optimizer.state.values()] == steps
    assert scaler.get_scale() == scale / 2
    train_step(model, optimizer, [good], settings, scaler)
    assert not torch.equal(before[0], next(iter(model.parameters())))


# --- full and short batches -----------------------------------------------------------------------------


def test_a_short_batch_is_its_own_rows_and_starts_no_search(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def noted(model: Any, optimizer: Any, parts: list[Part], *rest: Any) -> torch.Tensor:
        sizes = [len(part.images) for part in parts]
        share = sum(part.share for part in parts)
        seen.append((sizes, share, torch.backends.cudnn.benchmark))
        return train_step(model, optimizer, parts, *rest)

    monkeypatch.setattr(step_module, "train_step", noted)
    run, _ = one_worker(small_config(manifest, tmp_path, epochs=1, accumulate=4), tmp_path / "r")
    train_epochs(run)
    full = ([4, 4, 4, 4], pytest.approx(1.0), True)
    assert seen == [full, full, ([2, 2, 1], pytest.approx(1.0), False)]


def test_what_is_tried_before_a_run_leaves_it_as_it_was(manifest: Manifest, tmp_path: Path) -> None:
    """Steps undone before the first batch, and in the middle: weights and losses bit for bit as without."""
    config = small_config(manifest, tmp_path, precision="float16", ema_decay=0.5)
    plain, _ = one_worker(config, tmp_path / "plain")
    tried, _ = one_worker(config, tmp_path / "tried")
    for step, batch in enumerate(plain.feed.batches(0, 0, 1)):
        sent = batch.on_device(CPU)
        if step < 2:
            with recording.as_it_was(tried):
                for _ in range(2):
                    launch(tried, 1.0, sent)
        loss, other = (launch(run, 1.0, sent) for run in (plain, tried))
        assert torch.equal(loss, other)
    for one, other in ((plain.model, tried.model), (plain.scored, tried.scored)):
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key
    assert plain.scaler.state_dict() == tried.scaler.state_dict()


class PretendedGraph:
    """Stands for CUDAGraph on a CPU: a replay runs its half of the step again, on what it recorded."""

    recording = False

    def pool(self) -> None: ...

    def replay(self) -> None:
        self.found.copy_(self.half())


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, spoilt: float = 1.0) -> list[PretendedGraph]:
    """What recording.py asks of torch.cuda, on the CPU; the graphs that were made. A recording runs nothing.
    spoilt: factor of the losses of replays."""
    graphs: list[PretendedGraph] = []

    class Stream:
        def __init__(self, *_: Any) -> None: ...
        def wait_stream(self, _: Any) -> None: ...

    @contextlib.contextmanager
    def graph(made: PretendedGraph, **_: Any) -> Iterator[None]:
        made.recording = True
        graphs.append(made)
        yield
        made.recording = False

    def recorded(half: Any, factor: float = 1.0) -> Any:
        def run(given: Any) -> torch.Tensor:
            assert graphs[-1].recording, "halves are only for recordings"
            graphs[-1].half, graphs[-1].found = lambda: factor * half(given), torch.zeros(())
            return graphs[-1].found

        return run

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendedGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)

    def prepare(run: Training, sent: Any) -> Any:
        first, second = halves(run)
        pretended = recording.Halves(recorded(first), recorded(second, spoilt))
        return recording.record(run, functools.partial(launch, run, 1.0), pretended, sent)

    monkeypatch.setattr(step_module, "prepare", prepare)
    return graphs


@pytest.mark.parametrize(
    ("precision", "spoilt"),
    [
        ("float32", 1.0),
        ("float32", 1.01),
        pytest.param("float16", 1.0, marks=pytest.mark.slow),  # of which a CPU makes hard work
    ],
)
def test_a_recorded_run_begins_where_a_launched_one_does(
    manifest: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    precision: str,
    spoilt: float,
) -> None:
    """Bit for bit where replaying is computing it again; test_cuda_training.py has a real GPU. A recording
    with other losses is not used, and the run is the launched one all the same."""
    how = {"precision": precision, "ema_decay": 0.5, "schedule": "cosine", "epochs": 1}
    config = small_config(manifest, tmp_path, **how)
    plain, _ = one_worker(config, tmp_path / "plain")
    train_epochs(plain)
    graphs = pretend_cuda(monkeypatch, spoilt)
    run, _ = one_worker(config, tmp_path / "recorded")
    train_epochs(run)
    assert len(graphs) == 2, "the halves, once a start"
    assert ("its losses" in capsys.readouterr().out) == (spoilt != 1)
    assert losses(run) == losses(plain)
    for one, other in ((plain.model, run.model), (plain.scored, run.scored)):
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key
    assert plain.scaler.state_dict() == run.scaler.state_dict()


def test_what_cannot_be_recorded_is_launched_and_said(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(run: Training, halves: recording.Halves, sent: Any, _: Any) -> Any:
        halves.update(halves.gradients(sent))
        halves.gradients(sent)
        run.scaler.unscale_(run.optimizer)  # as where a capture breaks off
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    pretend_cuda(monkeypatch)
    monkeypatch.setattr(recording, "_record", fails)
    run, _ = one_worker(small_config(manifest, tmp_path, precision="float16"), tmp_path / "r")
    batch = next(iter(run.feed.batches(0)))
    sent = batch.on_device(CPU)
    step = recording.record(run, functools.partial(launch, run, 1.0), halves(run), sent)
    assert torch.isfinite(step(sent))
    said = capsys.readouterr().out
    assert "train.graph: not recorded" in said
    assert "not permitted when stream is capturing" in said
    assert "more" not in said.partition("train.graph")[2].removesuffix("\n").splitlines()


def test_a_rate_in_a_tensor_trains_as_a_number_does() -> None:
    """As a recording needs it; on the CPU too. Of one in a checkpoint only what this start wants is taken."""
    found = []
    for settings in (TrainSettings(), TrainSettings(graph=True, use_gpu=True)):
        model = new_model()
        optimizer = make_optimizer(model, settings)
        for step in range(4):
            set_rate(optimizer, 1e-2 / (step + 1))
            loss = train_step(model, optimizer, [made_up_part(step, slice(0, 8), 1.0)], settings)
        found.append(loss)
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=0)


def test_a_run_may_be_recorded_from_one_start_to_the_next(manifest: Manifest, tmp_path: Path) -> None:
    """The optimizer's state goes on; whether its rate is a tensor is this start's own."""
    config = small_config(manifest, tmp_path, checkpoint_minutes=1e-9)
    run, reports = one_worker(config, tmp_path / "r")
    run.optimizer = make_optimizer(run.model, config.train.model_copy(update={"graph": True}))
    train_epochs(run)
    again, _ = one_worker(config, tmp_path / "again", Path(reports[0]["folder"]))
    (group,) = again.optimizer.param_groups
    assert (group["lr"], group["capturable"]) == (1e-3, False)
    assert {float(one["step"]) for one in again.optimizer.state.values()} == {1.0}


@pytest.mark.parametrize(
    ("train", "named"),
    [
        ({"graph": True}, "needs train.use_gpu"),
        ({"graph": True, "num_workers": 2}, "needs train.use_gpu"),
        ({"accumulate": 3}, "train.accumulate 3 must divide the 128 rows"),
        ({"accumulate": 32, "num_workers": 8}, "train.accumulate 32 must divide the 16 rows"),
        ({"ema_decay": 1.0}, "less than 1"),
    ],
)
def test_settings_that_contradict_are_refused(train: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RunConfig(train=train)


@pytest.mark.parametrize(
    ("train", "recorded"),
    [
        ({}, False),
        ({"use_gpu": True}, True),
        ({"use_gpu": True, "graph": False}, False),
        ({"use_gpu": True, "num_workers": 2}, True),
        ({"use_gpu": True, "num_workers": 2, "graph": False}, False),
    ],
)
def test_workers_with_a_gpu_record_their_step(train: dict[str, Any], recorded: bool) -> None:
    assert TrainSettings(**train).recorded is recorded


# --- torch.compile --------------------------------------------------------------------------------------


def test_without_a_compiler_compiling_is_refused_before_training(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"train\.compile cannot be followed here: .*install g\+\+"):
        one_worker(small_config(manifest, tmp_path, compile=True), tmp_path / "r")


def test_what_was_kept_and_is_damaged_is_said_and_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kept.bin"
    file.write_bytes(b"no artifacts")
    compiled._load(str(file))
    assert f"train.compile: {file} is of no use" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")  # torch's own, when it compiles
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_compiled_blocks_train_as_the_others_and_are_kept(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four batches on the CPU, and a second start, in an empty cache, from what the first one kept."""
    if state.cannot_compile("cpu"):
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # set by the run for its process: undone at the end
    plain, _ = one_worker(small_config(manifest, tmp_path), tmp_path / "runs" / "plain")
    train_epochs(plain)
    for start in ("first", "second"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        config = small_config(manifest, tmp_path, compile=True, compile_cache=str(tmp_path / start))
        run, _ = one_worker(config, tmp_path / "runs" / start)
        train_epochs(run)
        assert losses(run) == pytest.approx(losses(plain), rel=1e-3)
        assert run.standing.best_ap == pytest.approx(plain.standing.best_ap, abs=0.05)
        found = torch._dynamo.utils.counters["inductor"]
        said = capsys.readouterr().out
        if start == "first":
            assert found["fxgraph_cache_miss"] > 0
            assert ", kept in " in said
    assert ", from " in said
    assert (found["fxgraph_cache_miss"], found["fxgraph_cache_hit"] > 0) == (0, True)
    assert len(list((tmp_path / "runs" / "compiled").iterdir())) == 1
