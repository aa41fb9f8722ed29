"""`hrnet benchmark` and the timing that it shares with --measure-modes: fakes whose times are known, then
real processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hrnet_core.checkpoint import load_checkpoint, read_spec, verify_checkpoint
from hrnet_core.errors import CheckpointError, ConfigError
from pipelines.benchmark import Benchmark, benchmark, save_random
from pipelines.cli import main
from pipelines.poses import mode_process, timing
from pipelines.poses.mode_process import ModeProcess
from pipelines.poses.timing import AtSize, Speed, Timings, take_turns, time_modes
from pipelines.settings.config_file import load_config

TINY = load_config("tiny")


class Fake:
    """A ModeProcess that answers at once: `crop` seconds a crop, a turn's first call ten times slower."""

    def __init__(self, mode: str, asked: list[str], crop: float = 0.001, largest: int = 10**6) -> None:
        self.mode, self.asked, self.crop, self.largest = mode, asked, crop, largest
        self.closed = False

    def start(self) -> float:
        if self.crop == 0:
            raise ConfigError("no such instruction")
        return 1.5

    def turn(self, size: int, flip: bool, calls: int) -> tuple[list[float], dict[str, int]]:
        self.asked.append(f"{self.mode} {size}{' flip' * flip} x{calls}")
        if size > self.largest:
            raise ConfigError("OutOfMemoryError: 80 GiB")
        seconds = [self.crop * size * (1 + flip)] * calls
        if not flip:
            seconds[0] *= 10
        return seconds, {"memory_mib": 100 + size}

    def close(self) -> None:
        self.closed = True


def taken(fakes: dict[str, Fake], sizes: list[int], always: int = 1) -> Timings:
    timings = Timings()
    take_turns(fakes.__getitem__, list(fakes), sizes, always, timings)  # type: ignore[arg-type]
    assert all(fake.closed for fake in fakes.values())
    return timings


# --- who is asked what, and when ------------------------------------------------------------------------


def test_every_mode_has_its_turn_in_every_round() -> None:
    asked: list[str] = []
    taken({"a": Fake("a", asked), "b": Fake("b", asked, crop=0.5)}, [1, 2])
    look = ["a 1 x2", "a 1 flip x1", "b 1 x2", "b 1 flip x1"]
    rounds = ["a 1 x21", "a 1 flip x5", "b 1 x21", "b 1 flip x5"] * timing.ROUNDS
    assert asked[: len(look) + len(rounds)] == look + rounds
    # 100 calls of a fit into 5 s, of b ten: two a round, and one that is not counted.
    assert asked[-4:] == ["a 2 x21", "a 2 flip x5", "b 2 x3", "b 2 flip x1"]


def test_the_first_call_of_a_turn_is_not_counted() -> None:
    speed = taken({"a": Fake("a", [])}, [1, 8]).modes["a"]
    assert speed.sizes[8].plain == [0.008] * 100
    assert speed.sizes[8].flip == [0.016] * 25
    assert speed.as_dict() == {
        "start_seconds": 1.5,
        "batch_size": [1, 8],
        "calls": [100, 100],
        "ms_per_crop_p50": [1.0, 1.0],
        "ms_per_crop_p90": [1.0, 1.0],
        "ms_per_crop_p99": [1.0, 1.0],
        "people_per_second": [1000.0, 1000.0],
        "people_per_second_flip": [500.0, 500.0],
        "memory_mib": [101, 108],
        "left_out": "",
    }


def test_what_takes_too_long_is_left_out_and_said() -> None:
    asked: list[str] = []
    found = taken({"slow": Fake("slow", asked, crop=0.3), "fast": Fake("fast", asked)}, [1, 4, 8, 16])
    assert list(found.modes["slow"].sizes) == [1, 4]
    assert found.modes["slow"].left_out == "batch 8 and larger: a pass takes 2.4 s, longer than 2 s"
    assert "slow 16 x2" not in asked
    assert list(found.modes["fast"].sizes) == [1, 4, 8, 16]
    assert "- `slow`, batch 8 and larger: a pass takes 2.4 s" in str(found)


def test_batches_that_auto_needs_are_measured_however_long_they_take() -> None:
    found = taken({"slow": Fake("slow", [], crop=0.3)}, [1, 8, 16, 32], always=16)
    assert list(found.modes["slow"].sizes) == [1, 8, 16]
    assert found.modes["slow"].left_out == "batch 32: a pass takes 9.6 s, longer than 2 s"
    assert len(found.modes["slow"].sizes[16].plain) == timing.LEAST


def test_what_cannot_run_is_left_out_and_said() -> None:
    found = taken({"never": Fake("never", [], crop=0), "small": Fake("small", [], largest=4)}, [4, 64, 128])
    assert found.left_out == {"never": "no such instruction"}
    assert found.modes["small"].left_out == "batch 64 and larger: OutOfMemoryError: 80 GiB"
    assert "- `never` not measured: no such instruction" in str(found)


def test_a_mode_that_fails_in_the_middle_keeps_what_it_has() -> None:
    class Dies(Fake):
        def turn(self, size: int, flip: bool, calls: int) -> tuple[list[float], dict[str, int]]:
            if len(self.asked) == 6:
                raise ConfigError("its process ended with code -9")
            return super().turn(size, flip, calls)

    asked: list[str] = []
    found = taken({"dies": Dies("dies", asked)}, [1, 2])
    assert len(found.modes["dies"].sizes[1].plain) == 40, "two turns of 20"
    assert found.modes["dies"].left_out == "batch 1 and larger: its process ended with code -9"
    assert not [one for one in asked if one.startswith("dies 2")]


# --- figures --------------------------------------------------------------------------------------------


def test_percentiles_are_those_of_enough_calls() -> None:
    """1 ... 100 ms in batches of 2; by numpy's linear rule the 90th percentile of them is 90.1."""
    hundred = AtSize([n / 1000 for n in range(100, 0, -1)])
    speed = Speed(0.0, {2: hundred, 4: AtSize(hundred.plain[:10]), 8: AtSize([0.8] * 9)})
    assert speed.percentile(2, 50) == pytest.approx(50.5 / 2)
    assert speed.percentile(2, 90) == pytest.approx(90.1 / 2)
    assert speed.percentile(2, 99) == pytest.approx(99.01 / 2)
    assert speed.percentile(4, 90) == pytest.approx((99 + 0.1) / 4), "of 91 ... 100"
    assert speed.percentile(4, 99) is None
    assert speed.percentile(8, 90) is None
    assert speed.percentile(8, 50) == pytest.approx(100)
    assert speed.fastest(2) == pytest.approx(0.5)
    assert speed.as_dict()["people_per_second_flip"] == [None, None, None], "no call with flip test yet"


def test_the_table_can_be_pasted() -> None:
    timings = Timings({"float32": Speed(12.34, {1: AtSize([0.0123] * 10, [0.025], {"memory_mib": 512})})})
    timings.left_out = {"onnx": "install onnxruntime"}
    timings.stopped = 130
    machine = {
        "processor": "Some CPU", "cores": 4, "memory_gib": 8, "instruction_sets": ["avx2"],
        "versions": {"hrnet": "0.1.0", "torch": "2.13.0"},
    }  # fmt: skip
    checkpoint = {
        "name": "tiny", "random": True, "network": "HRNet-W16", "input": "128x96", "codec": "udp",
        "weights_sha256": "0123456789abcdef",
    }  # fmt: skip
    shown = str(Benchmark(machine, checkpoint, "cpu", 2, (0.5, 1.5), timings)).splitlines()
    assert shown[:4] == [
        "- Some CPU, 4 cores, 8 GiB; avx2",
        "- hrnet 0.1.0, torch 2.13.0",
        "- random weights of config tiny: HRNet-W16, 128x96, codec udp, sha256 0123456789ab",
        "- device cpu, 2 CPU threads; load 0.5 before, 1.5 at the end",
    ]
    assert "poses and AP of them mean nothing" in shown[5]
    assert shown[7:] == [
        "| mode | first answer, s | batch | calls | ms/crop p50 | p90 | p99 | people/s | with flip test "
        "| peak memory, MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| `float32` | 12.3 | 1 | 10 | 12.3 | 12.3 | - | 81.3 | 40 | 512 |",
        "",
        "- `onnx` not measured: install onnxruntime",
        "- stopped before the end: there are fewer calls, or sizes and modes are missing",
    ]


def test_a_mode_that_only_started_has_a_row() -> None:
    shown = str(Timings({"compiled": Speed(61.2, {}, "batch 1: killed")})).splitlines()
    assert shown[2] == "| `compiled` | 61.2 | - | - | - | - | - | - | - |"
    assert shown[4] == "- `compiled`, batch 1: killed"


def test_a_card_stands_before_its_processor() -> None:
    machine = {
        "processor": "Some CPU", "cores": 4, "memory_gib": 8, "instruction_sets": [], "versions": {},
        "gpu": "Some GPU", "gpu_memory_gib": 80,
    }  # fmt: skip
    checkpoint = dict.fromkeys(("name", "network", "input", "codec", "weights_sha256"), "x") | {
        "random": False
    }
    memory = {"gpu_allocated_mib": 100, "gpu_reserved_mib": 200}
    timings = Timings({"float32": Speed(1.0, {1: AtSize([0.01], [0.02], memory)})})
    shown = str(Benchmark(machine, checkpoint, "cuda", 2, (0.5, 1.5), timings))
    assert shown.startswith("- Some GPU, 80 GiB, on Some CPU, 4 cores")
    assert "| peak gpu allocated, MiB | peak gpu reserved, MiB |" in shown
    assert "| 100 | 200 |" in shown


# --- the command line, with real processes --------------------------------------------------------------


def test_a_config_is_measured_without_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "MOST", 10)
    argv = ["benchmark", "tiny", "--modes", "channels_last", "--batch-sizes", "2", "1", "--threads", "1"]
    assert main([*argv, "--json", str(tmp_path / "deep" / "figures.json")]) == 0
    out = capsys.readouterr().out
    assert "random weights of config tiny: HRNet-W16, modules 1-1-1 of 2 blocks, 128x96, codec udp" in out
    assert "channels_last: first answer after" in out
    figures = json.loads((tmp_path / "deep" / "figures.json").read_text())
    assert (figures["device"], figures["threads"], figures["stopped"]) == ("cpu", 1, False)
    assert set(figures["machine"]["versions"]) >= {"hrnet", "Python", "torch", "ONNX Runtime"}
    assert figures["left_out"] == {}
    speed = figures["modes"]["channels_last"]
    assert speed["batch_size"] == [1, 2]
    assert speed["calls"] == [10, 10]
    for index, size in enumerate(speed["batch_size"]):
        p50, p90 = speed["ms_per_crop_p50"][index], speed["ms_per_crop_p90"][index]
        assert 0 < p50 <= p90
        assert speed["people_per_second"][index] == pytest.approx(1000 / p50, rel=1e-3)
        assert f"| {size} | 10 |" in out
    assert speed["ms_per_crop_p99"] == [None, None]
    # A process with torch in it, and not this one: that has the tests' memory too.
    assert 100 < speed["memory_mib"][0] <= speed["memory_mib"][1] < 2000
    assert 0 < speed["start_seconds"] < 300


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "tiny"
    save_random(folder, TINY)
    return folder


def test_random_weights_are_a_checkpoint_like_any(checkpoint: Path, tmp_path: Path) -> None:
    assert verify_checkpoint(checkpoint) < 1e-5
    spec = read_spec(checkpoint)
    assert (spec.codec.name, spec.input_size, spec.codec.sigma) == ("udp", (96, 128), 0.75)
    assert save_random(tmp_path / "again", TINY).weights_sha256 == spec.weights_sha256


def test_random_activations_neither_vanish_nor_grow(tmp_path: Path) -> None:
    """Denormal numbers are slow, and what is beyond 65504 is infinite in float16."""
    w32 = load_config("w32_256x192")
    small = w32.model_copy(update={"data": w32.data.model_copy(update={"input_size": (64, 96)})})
    save_random(tmp_path / "w32", small)
    model, _ = load_checkpoint(tmp_path / "w32")
    largest = []

    def look(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            largest.append(float(output.abs().max()))

    for module in model.modules():
        module.register_forward_hook(look)
    with torch.no_grad():
        model(torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(1)))
    assert len(largest) > 500
    assert min(largest) > 1e-4
    assert max(largest) < 1000


def test_why_a_mode_or_a_size_failed_comes_out_of_its_process(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in checkpoint.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match=r"no mode could be measured on cpu: float32: .*its sha256 is"):
        time_modes(damaged, ["float32"], "cpu", 1, [1])
    with pytest.raises(CheckpointError, match="its sha256 is"):  # the verb looks before it starts processes
        benchmark(damaged)


def test_a_process_that_is_killed_is_a_reason(checkpoint: Path, tmp_path: Path) -> None:
    """As the kernel does where memory is short; a turn before it is answered."""
    process = ModeProcess(str(checkpoint), "float32", "cpu", 1, str(tmp_path))
    with contextlib.closing(process):
        assert process.start() > 0
        seconds, memory = process.turn(2, True, 3)
        assert len(seconds) == 3
        assert min(seconds) > 0
        assert list(memory) == ["memory_mib"]
        process._process.kill()
        with pytest.raises(ConfigError, match=r"ended with code -9 \(killed: was there enough memory\?\)"):
            process.turn(2, False, 1)


def test_an_asker_that_goes_with_an_answer_unread(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at Ctrl-C between a mode's answer and its reading: the process then reads a reset, not an end."""
    monkeypatch.setattr(mode_process, "PATIENCE", 60.0)  # a busy machine needs more than 3 s to end it
    process = ModeProcess(str(checkpoint), "float32", "cpu", 1, str(tmp_path))
    with contextlib.closing(process):
        process.start()
        process._pipe.send((1, False, 1))
        assert process._pipe.poll(60)
    assert process._process.exitcode == 0
    assert capfd.readouterr().err == ""


def test_ctrl_c_is_not_for_a_process_that_has_just_begun(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It imports torch for seconds, in which it would end with a traceback; at its start by the signal."""
    for _ in range(2):  # the first process of all is started in another way
        process = ModeProcess(str(checkpoint), "float32", "cpu", 1, str(tmp_path))
        os.kill(process._process.pid, signal.SIGINT)
        with contextlib.closing(process):
            assert process.start() > 0
            assert process._process.is_alive()
    assert capfd.readouterr().err == ""
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set(), "the asker hears it"


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_prints_what_there_is(which: signal.Signals) -> None:
    """In a process group of its own, as a terminal does it: the modes' processes get the signal too."""
    command = [sys.executable, "-u", "-m", "pipelines.cli", "benchmark", "tiny", "--modes", "float32"]
    sizes = ["--batch-sizes", "1", "2", "--threads", "1"]
    with subprocess.Popen(
        [*command, *sizes], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("batch 1, ms/crop"):
                break
        os.killpg(run.pid, which)
        out, error = run.communicate(timeout=60)
    assert run.returncode == 128 + which
    assert "| `float32` |" in out
    assert "- stopped before the end" in out
    assert "Traceback" not in error
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # nothing of the group is left
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, 0)
            time.sleep(0.1)
            continue
        break
    else:
        pytest.fail("a process went on")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["w32"], "w32: no such checkpoint folder, and no config 'w32'"),
        (["runs/none"], "runs/none: no such checkpoint folder"),
        (["none.yaml"], "no config 'none.yaml'"),
        (["models:/hrnet-pose@champion"], "not in the MLflow store"),
        (["tiny", "--batch-sizes", "4", "0"], "--batch-sizes"),
        (["tiny", "--threads", "0"], "threads"),
        (["tiny", "--modes", "float64"], "float64"),
        (["tiny", "--json", "."], "--json .: is a folder"),
        (["tiny", "--json", "file/figures.json"], "file is a file, not a folder. Name another --json"),
        (["tiny", "--device", "cuda"], "device cuda: torch finds no GPU here"),
    ],
)
def test_what_is_refused(
    argv: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("pipelines.benchmark.time_modes", lambda *_: pytest.fail("it was measured"))
    try:
        code = main(["benchmark", *argv])
    except SystemExit as ended:  # tyro's
        code = int(ended.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    assert said in " ".join(error.replace("\u2502", " ").split())
    assert "Traceback" not in error


def test_who_calls_the_functions_is_refused_too(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="mode 'float64' is unknown: choose of float32"):
        time_modes(checkpoint, ["float64"], "cpu", 1)
    with pytest.raises(ConfigError, match="batch size 0"):
        benchmark(checkpoint, batch_sizes=[1, 0])


def test_figures_that_cannot_be_written_are_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    empty = Benchmark({}, {}, "cpu", 1, (0, 0))
    with pytest.raises(ConfigError, match="cannot be written"):
        empty.write(tmp_path / "file" / "figures.json")
