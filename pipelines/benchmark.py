"""`hrnet benchmark CHECKPOINT`: how fast each mode answers here, without data, as a table to paste.

checkpoint, or random weights of a config -> pipelines/poses/timing.py -> Markdown, JSON
"""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hrnet_core.choices import MODES
from hrnet_core.errors import CheckpointError, ConfigError
from hrnet_core.locations import one_line
from pipelines.poses.timing import LEAST, MOST, NEEDED, SIZES, Timings, processor, time_modes
from pipelines.process.code_version import code_version
from pipelines.process.environment import usable_cpus
from pipelines.settings.config import RunConfig, TrackSettings
from pipelines.settings.config_file import load_config
from pipelines.storage.files import write_json
from pipelines.tracking.checkpoints import is_folder_here, local_checkpoint

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec

EXTENSIONS = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "ncnn": "ncnn"}


@dataclass(frozen=True)
class Benchmark:
    """What was measured, on what. str: Markdown."""

    machine: dict[str, Any]
    checkpoint: dict[str, Any]
    device: str
    threads: int
    load: tuple[float, float]
    """Mean number of running processes in the minute before and in the last minute."""
    timings: Timings = field(default_factory=Timings)

    def as_dict(self) -> dict[str, Any]:
        """JSON types: what --json FILE holds."""
        return {
            "machine": self.machine,
            "checkpoint": self.checkpoint,
            "device": self.device,
            "threads": self.threads,
            "load": list(self.load),
            "modes": {mode: speed.as_dict() for mode, speed in self.timings.modes.items()},
            "left_out": self.timings.left_out,
            "stopped": self.timings.stopped > 0,
        }

    def write(self, file: str | Path) -> None:
        """`as_dict` as JSON (path or URI). ConfigError where it cannot be written."""
        try:
            write_json(file, self.as_dict())
        except OSError as error:
            why = error.strerror or one_line(error)
            reason = f"{file}: cannot be written ({why}). The table above is what was measured."
            raise ConfigError(reason) from None

    def __str__(self) -> str:
        machine, of = self.machine, self.checkpoint
        runs_on = f"{machine['gpu']}, {machine['gpu_memory_gib']} GiB, on " if "gpu" in machine else ""
        what = "random weights of config" if of["random"] else "checkpoint"
        lines = [
            f"- {runs_on}{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; "
            f"{' '.join(machine['instruction_sets']) or 'no vector instructions that torch names'}",
            f"- {', '.join(f'{name} {number}' for name, number in machine['versions'].items())}",
            f"- {what} {of['name']}: {of['network']}, {of['input']}, codec {of['codec']}, "
            f"sha256 {of['weights_sha256'][:12]}",
            f"- device {self.device}, {self.threads} CPU threads; load {self.load[0]:.1f} before, "
            f"{self.load[1]:.1f} at the end",
            f"- from crops in host memory to keypoints there; {MOST} calls of batch 1, {LEAST} to {MOST} of "
            f"others, all modes in turn; p90 of {NEEDED[90]} calls or more, p99 of {NEEDED[99]}",
        ]
        if of["random"]:
            lines.append("- random weights: to compare machines; poses and AP of them mean nothing")
        return "\n".join([*lines, "", str(self.timings)])


def benchmark(
    checkpoint: str | Path,
    *,
    modes: Sequence[str] = (),
    batch_sizes: Sequence[int] = (),
    threads: int | None = None,
    device: str = "auto",
    track: TrackSettings = TrackSettings(),
    storage: str | Path = "runs",
) -> Benchmark:
    """Time a checkpoint's modes here, or those of a config's network with random weights.

    modes, batch_sizes: none named means all of MODES, and SIZES. threads: of the CPU; None: as many as torch
    takes. device: "cpu", "cuda" or "auto". Ctrl-C ends it with what is measured by then.

    CheckpointError: no such checkpoint, nor config. ConfigError: a mode or device there is not, a batch size
    below 1, no mode that runs here.
    """
    import torch

    from hrnet_core.checkpoint import load_checkpoint

    if small := [size for size in batch_sizes if size < 1]:
        raise ConfigError(f"batch size {small[0]}: there is at least 1 crop in a batch.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: torch finds no GPU here. Use cpu or auto.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = threads or torch.get_num_threads()
    with _named(checkpoint, track, storage) as (folder, random):
        spec = load_checkpoint(folder)[1]  # strict, once: not in each mode's process
        before = os.getloadavg()[0]
        timings = time_modes(folder, modes or MODES, device, threads, batch_sizes or SIZES)
    facts = _checkpoint_facts(str(checkpoint), spec, random)
    return Benchmark(machine(device), facts, device, threads, (before, os.getloadavg()[0]), timings)


@contextlib.contextmanager
def _named(checkpoint: str | Path, track: TrackSettings, storage: str | Path) -> Iterator[tuple[Path, bool]]:
    """The folder of a checkpoint while the block lasts, False; or of random weights of a config, True."""
    name = str(checkpoint)
    yaml = Path(name).suffix in (".yaml", ".yml")
    if is_folder_here(name) and (yaml or (not Path(name).exists() and Path(name).name == name)):
        try:
            config = load_config(name)
        except ConfigError as error:
            if yaml:
                raise
            raise CheckpointError(f"{name}: no such checkpoint folder, and {error}") from None
        with tempfile.TemporaryDirectory(prefix="hrnet-random-") as folder:
            save_random(Path(folder) / "checkpoint", config)
            yield Path(folder) / "checkpoint", True
    else:
        with local_checkpoint(checkpoint, track, storage) as found:
            yield found.folder, False


def save_random(folder: Path, config: RunConfig) -> CheckpointSpec:
    """A checkpoint folder with a config's network, untrained, the same weights each time.

    BatchNorm's statistics are those of noise, so that activations have the size of a trained network's: with
    the published initialization they vanish, with kaiming's they grow beyond float16.
    """
    import torch
    from torch.optim.swa_utils import update_bn

    from hrnet_core.checkpoint import CheckpointSpec, save_checkpoint
    from hrnet_core.heatmaps import HeatmapCodec
    from hrnet_core.model import HRNet
    from hrnet_core.skeleton import load_skeleton

    skeleton, data = load_skeleton(config.data.skeleton), config.data
    width, height = data.input_size
    architecture = config.model.architecture(skeleton.num_keypoints)
    codec = HeatmapCodec(data.codec, data.input_size, data.sigma_cells)
    spec = CheckpointSpec(architecture, codec, skeleton, padding=data.padding)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = HRNet(architecture, "kaiming")
        update_bn([torch.randn(4, 3, height, width)], model)
    return save_checkpoint(folder, model.eval(), spec)


def machine(device: str) -> dict[str, Any]:
    """What figures depend on beside the network: processor or card, memory, instruction sets, versions."""
    import psutil
    import torch

    has = torch.cpu.get_capabilities()
    versions: dict[str, str | None] = {"hrnet": code_version(), "Python": platform.python_version()}
    versions["torch"] = torch.__version__
    for package, name in RUNTIMES.items():
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(package)
    facts = {
        "processor": processor("cpu"),
        "cores": usable_cpus(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "instruction_sets": [name for name in EXTENSIONS if has.get(name)],
        "versions": versions,
    }
    if device == "cuda":
        memory = torch.cuda.get_device_properties().total_memory
        facts |= {"gpu": processor("cuda"), "gpu_memory_gib": round(memory / 2**30)}
        versions["CUDA"] = torch.version.cuda
    return facts


def _checkpoint_facts(name: str, spec: CheckpointSpec, random: bool) -> dict[str, Any]:
    shape = spec.architecture
    modules = "-".join(map(str, shape.modules))
    return {
        "name": name,
        "random": random,
        "network": f"HRNet-W{shape.width}, modules {modules} of {shape.blocks} blocks",
        "input": "{1}x{0}".format(*spec.input_size),
        "codec": spec.codec.name,
        "weights_sha256": spec.weights_sha256,
    }
