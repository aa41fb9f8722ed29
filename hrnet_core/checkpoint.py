"""The checkpoint folder, and weights that others published.

    model.safetensors      the weights under the published names, float32
    checkpoint.json        everything needed to use them: CheckpointSpec, and the weights' sha256
    selftest.safetensors   a recorded input and the heatmaps that belong to it
    model.onnx             the network for ONNX Runtime, only where `hrnet export` wrote it
    trainer.pt             optimizer and counters, only where training may go on from here

A folder explains itself or is refused, and loading is strict: nothing is ever missing in silence.
Bare published files enter through read_weights and fit_weights, which say what matched and what did
not. No pickle is ever executed: torch files are read with weights_only=True.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from hrnet_core.architecture import HRNetConfig
from hrnet_core.errors import CheckpointError, DataError
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.model import HRNet, normalize
from hrnet_core.skeleton import COCO17, Skeleton, skeleton_from_dict

T = TypeVar("T")
SCHEMA_VERSION = 1
WEIGHTS, DESCRIPTION, SELFTEST, ONNX, TRAINER = (
    "model.safetensors",
    "checkpoint.json",
    "selftest.safetensors",
    "model.onnx",
    "trainer.pt",
)
FIELDS = (
    "schema_version", "architecture", "input_size", "mean", "std", "channels", "codec", "padding",
    "skeleton", "flip_test", "weights", "modes", "provenance", "weights_sha256",
)  # fmt: skip
PROVENANCE = ("run_id", "dataset_digest", "config", "code_version")
# Heatmaps of other machines and torch versions differ by about 1e-6 of their range in float32; other
# weights by the whole range.
SELFTEST_TOLERANCE = 1e-3


@dataclass(frozen=True)
class CheckpointSpec:
    """How weights are to be used. CheckpointError where its fields contradict each other."""

    architecture: HRNetConfig
    codec: HeatmapCodec
    """Also says the input size and sigma."""
    skeleton: Skeleton = COCO17
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """RGB, on the 0 to 1 scale; ImageNet's, as in every published configuration."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    padding: float = 1.25
    """Scale of the crop relative to the aspect-fixed box."""
    flip_test: bool = True
    """Whether the mirror image takes part unless a caller says otherwise."""
    weights: Literal["raw", "ema"] = "raw"
    """Whether these are the trained weights or their moving average."""
    modes: dict[str, Any] = field(default_factory=dict)
    """ "cpu" or "cuda" -> mode -> figures measured on these weights (`record_modes`): {"ap_difference": AP
    less that of float32, "ms_per_crop": float, ...}. Empty where nothing was measured."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """run_id, dataset_digest, config, code_version (None where there is none), and more if wanted."""
    weights_sha256: str | None = None
    """Of model.safetensors: filled in by save and load, never given."""

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
        problems = []
        if self.architecture.num_keypoints != self.skeleton.num_keypoints:
            problems.append(
                f"architecture.num_keypoints is {self.architecture.num_keypoints}, but skeleton "
                f"{self.skeleton.name!r} has {self.skeleton.num_keypoints} keypoints"
            )
        if any(side % 32 for side in self.input_size):
            problems.append(f"input_size (width, height) must be multiples of 32, got {self.input_size}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(math.isfinite(v) for v in values):
                problems.append(f"{name} must be 3 finite numbers, got {values}")
        if not all(v > 0 for v in self.std):
            problems.append(f"std must be positive, got {self.std}")
        if not (isinstance(self.padding, int | float) and 0 < self.padding < math.inf):
            problems.append(f"padding must be a positive number, got {self.padding!r}")
        if self.flip_test not in (True, False):
            problems.append(f"flip_test must be true or false, got {self.flip_test!r}")
        if self.weights not in ("raw", "ema"):
            problems.append(f"weights must be 'raw' or 'ema', got {self.weights!r}")
        if problems:
            raise CheckpointError(f"{'; '.join(problems)}.")

    @property
    def input_size(self) -> tuple[int, int]:
        """(width, height) of a crop in px."""
        return self.codec.input_size

    def as_dict(self) -> dict[str, Any]:
        """The content of checkpoint.json, JSON types."""
        return {
            "schema_version": SCHEMA_VERSION,
            "architecture": self.architecture.as_dict(),
            "input_size": list(self.input_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "channels": "RGB",
            "codec": self.codec.as_dict(),
            "padding": self.padding,
            "skeleton": self.skeleton.as_dict(),
            "flip_test": self.flip_test,
            "weights": self.weights,
            "modes": self.modes,
            "provenance": {**dict.fromkeys(PROVENANCE), **self.provenance},
            "weights_sha256": self.weights_sha256,
        }


# --- The folder -----------------------------------------------------------------------------------


def save_checkpoint(
    folder: str | Path,
    model: nn.Module | Mapping[str, Tensor],
    spec: CheckpointSpec,
    trainer_state: dict[str, Any] | None = None,
) -> CheckpointSpec:
    """Write a checkpoint folder; returns the spec with the weights' sha256.

    model: an HRNet (never changed, on any device), or its state_dict (an EMA's, say), not wrapped by DDP
        or compile. Runs one crop through a copy on the CPU to record the self-test.
    trainer_state: what training needs to go on: tensors, numbers, strings, lists and dicts only.

    Written beside the folder and renamed into place, so a reader sees the old checkpoint or the new one.
    CheckpointError: weights that do not fit the spec or are not finite; `folder` holds other files.
    """
    folder = Path(folder)
    state = dict(model.state_dict() if isinstance(model, nn.Module) else model)
    state = {key: value.detach().to("cpu").contiguous() for key, value in state.items()}
    network = _build(spec.architecture, state, "the weights to save")
    crops = _selftest_crops(spec.input_size)
    heatmaps = _run(network, crops, spec)
    if not bool(torch.isfinite(heatmaps).all()):
        raise CheckpointError("the weights to save give heatmaps that are not finite: training has diverged.")
    content = safetensors.torch.save(state)
    spec = replace(spec, weights_sha256=hashlib.sha256(content).hexdigest())
    with _replacing(folder) as temporary:
        _write(temporary / WEIGHTS, content)
        _write(
            temporary / SELFTEST,
            safetensors.torch.save({"crops": crops, "heatmaps": heatmaps}),
        )
        if trainer_state is not None:
            torch.save(trainer_state, temporary / TRAINER)
            read_trainer_state(temporary)
        _write(temporary / DESCRIPTION, json.dumps(spec.as_dict(), indent=2, allow_nan=False).encode())
    return spec


def load_checkpoint(folder: str | Path) -> tuple[HRNet, CheckpointSpec]:
    """A checkpoint folder -> (HRNet on the CPU in eval mode, its spec). Strict.

    CheckpointError names the file and the field where anything is missing, unknown, damaged, not finite,
    or of another network or skeleton. The self-test is verify_checkpoint's.
    """
    folder = Path(folder)
    spec = read_spec(folder)
    file = folder / WEIGHTS
    content = _read(file)
    digest = hashlib.sha256(content).hexdigest()
    if digest != spec.weights_sha256:
        raise CheckpointError(
            f"{file}: its sha256 is {digest}, but weights_sha256 in {DESCRIPTION} is {spec.weights_sha256}: "
            f"these are not the weights that were saved. Copy the whole folder again."
        )
    return _build(spec.architecture, _parse_safetensors(content, file), str(file)), spec


def read_spec(folder: str | Path) -> CheckpointSpec:
    """checkpoint.json alone, checked; the weights are not opened."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such checkpoint folder. Name the folder that holds {DESCRIPTION}; a bare weights "
            f"file enters through `hrnet import FILE --codec C --input-size W H OUT`."
        )
    file = folder / DESCRIPTION
    try:
        fields = json.loads(_read(file))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}). Copy the folder again.") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file}: holds {type(fields).__name__}, not one JSON object.")
    if fields.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{file}: schema_version is {fields.get('schema_version')!r}, this program reads "
            f"{SCHEMA_VERSION}. Use the version of hrnet-ray that wrote it, or export it anew."
        )
    missing, unknown = sorted(set(FIELDS) - set(fields)), sorted(set(fields) - set(FIELDS))
    if missing or unknown:
        raise CheckpointError(
            f"{file}: missing fields {missing}, unknown fields {unknown}. A checkpoint states every field; "
            f"none is guessed, because a wrong codec or mean gives wrong poses without an error."
        )
    return _spec_from(fields, file)


def verify_checkpoint(folder: str | Path, device: str = "cpu") -> float:
    """Run the recorded input through the loaded weights in float32.

    Returns the largest difference to the recorded heatmaps, as a fraction of their range (about 1e-6 on
    another machine). CheckpointError above 1e-3, which also finds weights that were exchanged together
    with their sha256, and wrong mean, std or channel order in checkpoint.json.
    """
    folder = Path(folder)
    model, spec = load_checkpoint(folder)
    file = folder / SELFTEST
    recorded = _parse_safetensors(_read(file), file)
    width, height = spec.input_size
    cells = (1, spec.skeleton.num_keypoints, height // 4, width // 4)
    crops, expected = recorded.get("crops"), recorded.get("heatmaps")
    if crops is None or expected is None or set(recorded) != {"crops", "heatmaps"}:
        raise CheckpointError(f"{file}: holds {sorted(recorded)}, not crops and heatmaps.")
    if crops.shape != (1, height, width, 3) or crops.dtype != torch.uint8 or expected.shape != cells:
        raise CheckpointError(
            f"{file}: crops {tuple(crops.shape)} and heatmaps {tuple(expected.shape)} are not of this "
            f"checkpoint, whose are {(1, height, width, 3)} and {cells}."
        )
    heatmaps = _run(model.to(device), crops.to(device), spec).cpu()
    spread = float(expected.max() - expected.min())
    difference = float((heatmaps - expected).abs().max()) / max(spread, 1e-30)
    if not difference <= SELFTEST_TOLERANCE:  # NaN fails too
        raise CheckpointError(
            f"{folder}: the self-test differs by {difference:.3g} of the recorded range (allowed "
            f"{SELFTEST_TOLERANCE:g}): {WEIGHTS} or {DESCRIPTION} is not what was saved. Copy it again."
        )
    return difference


def record_modes(folder: str | Path, device_type: str, figures: dict[str, Any]) -> CheckpointSpec:
    """Write what was measured on "cpu" or "cuda" into checkpoint.json: mode -> {"ap_difference",
    "ms_per_crop", ...}. Earlier figures of that device are replaced, weights and self-test stay as they are.

    CheckpointError: no checkpoint there, or a folder that cannot be written.
    """
    folder = Path(folder)
    spec = read_spec(folder)
    spec = replace(spec, modes={**spec.modes, device_type: figures})
    part = folder / f".{DESCRIPTION}.part"
    try:
        _write(part, json.dumps(spec.as_dict(), indent=2, allow_nan=False).encode())
        part.replace(folder / DESCRIPTION)
    except OSError as error:
        raise CheckpointError(
            f"{folder / DESCRIPTION}: cannot be written ({error.strerror}). Measure on a copy of the folder "
            f"that is yours."
        ) from None
    return spec


def read_trainer_state(folder: str | Path) -> dict[str, Any]:
    """trainer.pt of a checkpoint, on the CPU; read with weights_only=True."""
    file = Path(folder) / TRAINER
    if not file.is_file():
        raise CheckpointError(
            f"{file}: not there: this checkpoint was saved for use, not for training on. Start from its "
            f"weights with --model.init instead."
        )
    state = _read_torch(file)
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: holds {type(state).__name__}, not a dict.")
    return state


def _spec_from(fields: dict[str, Any], file: Path) -> CheckpointSpec:
    """Fields of checkpoint.json -> spec; the error names the file and the field."""
    try:
        for name in ("architecture", "codec", "skeleton", "modes", "provenance"):
            if not isinstance(fields[name], dict):
                raise CheckpointError(f"{name} must be an object, got {fields[name]!r}.")
        architecture = _named("architecture", lambda: HRNetConfig(**fields["architecture"]))
        codec = _named("codec", lambda: HeatmapCodec(**fields["codec"]))
        if not {"name", "input_size", "sigma"} <= set(fields["codec"]) or fields["codec"]["sigma"] is None:
            raise CheckpointError("codec must state name, input_size and sigma.")
        if fields["input_size"] != list(codec.input_size):
            raise CheckpointError(
                f"input_size {fields['input_size']} is not codec.input_size {list(codec.input_size)}."
            )
        if fields["channels"] != "RGB":
            raise CheckpointError(f"channels must be 'RGB', got {fields['channels']!r}.")
        absent = sorted(set(PROVENANCE) - set(fields["provenance"]))
        if absent:
            raise CheckpointError(f"provenance leaves out {absent}.")
        direct = ("mean", "std", "padding", "flip_test", "weights", "modes", "provenance", "weights_sha256")
        skeleton = skeleton_from_dict(fields["skeleton"], "skeleton")
        return _named(
            "mean and std",
            lambda: CheckpointSpec(architecture, codec, skeleton, **{name: fields[name] for name in direct}),
        )
    except (CheckpointError, DataError) as error:
        raise CheckpointError(f"{file}: {error}") from None


def _named(name: str, build: Callable[[], T]) -> T:
    try:
        return build()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: {error}.") from None


def _build(architecture: HRNetConfig, state: dict[str, Tensor], source: str) -> HRNet:
    """The network with exactly these weights, in eval mode; CheckpointError names what does not fit."""
    model = _untrained(architecture)
    problems = _misfits(state, model.state_dict())
    if problems:
        raise CheckpointError(f"{source}: {'; '.join(problems)}.")
    model.load_state_dict(state)
    return model.eval()


def _untrained(architecture: HRNetConfig) -> HRNet:
    """A network to be filled; torch's random stream, which a training may depend on, does not move."""
    with torch.random.fork_rng(devices=[]):
        return HRNet(architecture)


def _misfits(state: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """What keeps `state` from being exactly the tensors of `expected`, finite; empty if nothing does."""
    problems = []
    for what, keys in (
        ("missing", [k for k in expected if k not in state]),
        ("unexpected", [k for k in state if k not in expected]),
        ("not finite", [k for k, v in state.items() if not bool(torch.isfinite(v).all())]),
    ):
        if keys:
            problems.append(f"{len(keys)} {what} tensors: {_some(keys)}")
    for key in state.keys() & expected.keys():
        have, want = state[key], expected[key]
        if (have.shape, have.dtype) != (want.shape, want.dtype):
            problems.append(
                f"{key} is {have.dtype} {tuple(have.shape)}, not {want.dtype} {tuple(want.shape)}"
            )
    return problems[:6]


def _selftest_crops(input_size: tuple[int, int]) -> Tensor:
    """uint8 (1, h, w, 3): soft coloured patches under fine noise, the same for every checkpoint."""
    import cv2

    width, height = input_size
    rng = np.random.default_rng(0)
    patches = cv2.resize(rng.uniform(0, 255, (8, 6, 3)), (width, height), interpolation=cv2.INTER_LINEAR)
    crop = np.clip(patches + rng.normal(0, 8, patches.shape), 0, 255).astype(np.uint8)
    return torch.from_numpy(crop[None])


def _run(model: HRNet, crops: Tensor, spec: CheckpointSpec) -> Tensor:
    with torch.inference_mode():
        heatmaps: Tensor = model(normalize(crops, spec.mean, spec.std))
    return heatmaps


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends without an error."""
    _refuse_other_files(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's 0700 would keep other users of a shared disk out
        yield temporary
        old = temporary.with_name(temporary.name.replace(".new-", ".old-"))
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _refuse_other_files(folder: Path) -> None:
    """Overwriting replaces the whole folder: it must be a checkpoint and nothing else."""
    if folder.is_dir():
        others = sorted(
            {entry.name for entry in folder.iterdir()} - {WEIGHTS, DESCRIPTION, SELFTEST, ONNX, TRAINER}
        )
        if others:
            raise CheckpointError(
                f"{folder}: holds other files ({_some(others)}), which saving a checkpoint there would "
                f"delete. Name a new folder."
            )
    elif folder.exists():
        raise CheckpointError(f"{folder}: is a file; a checkpoint is a folder. Name another.")


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror}). A checkpoint folder holds {WEIGHTS}, "
            f"{DESCRIPTION} and {SELFTEST}; copy the whole folder."
        ) from None


def _parse_safetensors(content: bytes, file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file ({error}). Copy it again.") from None
    return tensors


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# --- Published weights ----------------------------------------------------------------------------

CONTAINERS = ("state_dict", "model", "model_state_dict", "best_state_dict")
NOT_OURS = {
    r"data_preprocessor\.": "mmpose's preprocessor",
    r"fc\.": "ImageNet classifier",
    r"incre_modules\.": "classification head",
    r"downsamp_modules\.": "classification head",
    r"classifier\.": "ImageNet classifier",
    r"final_layer\.\d+\.": "classification head (not the keypoint head of the same name)",
}
# Metadata in mmpose's files names these; they are read as empty stand-ins, and none of their code runs.
HARMLESS_METADATA = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
)


@dataclass(frozen=True)
class PublishedWeights:
    """A weights file under our names, before it is held against a network."""

    file: str
    scheme: str
    """Who names keys like this: official, mmpose 1.x, mmpose 0.x, timm, ImageNet, WZM, hrnet checkpoint."""
    state: dict[str, Tensor]
    dropped: dict[str, str]
    """Key in the file -> why it is not used."""
    notes: tuple[str, ...] = ()

    @property
    def architecture(self) -> HRNetConfig:
        """What the shapes say. CheckpointError where there is no HRNet in the file, or no keypoint head."""
        return _infer_architecture(self.state, self.file, self.scheme)


@dataclass(frozen=True)
class MatchReport:
    """What became of a weights file; str() is what `hrnet import` prints."""

    file: str
    scheme: str
    matched: tuple[str, ...]
    dropped: dict[str, str]
    """Key -> why."""
    missing: dict[str, str]
    """Key the network wants -> what it has instead."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.file}: {self.scheme} key names", f"  matched  {len(self.matched)} tensors"]
        for title, entries in (("dropped", self.dropped), ("missing", self.missing)):
            if not entries:
                lines.append(f"  {title}  none")
            for reason in dict.fromkeys(entries.values()):
                keys = [key for key, why in entries.items() if why == reason]
                lines.append(f"  {title}  {len(keys)}: {reason} ({_some(keys)})")
        return "\n".join([*lines, *(f"  note     {note}" for note in self.notes)])


def read_weights(file: str | Path) -> PublishedWeights:
    """Weights in any published layout, or a checkpoint folder of ours, under our key names.

    Reads torch files (weights_only=True) and safetensors: official, `module.` prefixes, mmpose 0.x and 1.x,
    timm, the ImageNet file of the HRNet authors, WZM's container, simple-HRNet. Half precision becomes
    float32. CheckpointError: unreadable, or needs code to be run.
    """
    path = Path(file)
    if path.is_dir():
        model, _ = load_checkpoint(path)
        return PublishedWeights(str(path), "hrnet checkpoint", model.state_dict(), {})
    content, container = _unwrap(_read_file(path), path)
    names = {key: _our_name(key) for key in content}
    scheme = _scheme(set(content), container)
    dropped = {
        key: why for key, name in names.items() if (why := _not_ours(name, set(names.values()), scheme))
    }
    state: dict[str, Tensor] = {}
    for key, name in names.items():
        if key in dropped:
            continue
        if name in state:
            raise CheckpointError(f"{path}: two tensors claim the name {name!r}; take one network out of it.")
        state[name] = content[key]
    notes: tuple[str, ...] = (f"taken from its {container!r} entry",) if container else ()
    halves = sorted(
        {str(v.dtype) for v in state.values() if v.is_floating_point() and v.dtype != torch.float32}
    )
    if halves:
        notes += (f"{', '.join(halves)} widened to float32",)
        state = {key: v.float() if v.is_floating_point() else v for key, v in state.items()}
    return PublishedWeights(str(path), scheme, state, dropped, notes)


def fit_weights(
    published: PublishedWeights, architecture: HRNetConfig, *, new_head: bool = False
) -> tuple[dict[str, Tensor], MatchReport]:
    """Hold published weights against a network: (state_dict, report).

    Missing BatchNorm counters are filled with 0 and reported. With `new_head`, for training only, a
    missing or differently sized final_layer is left out of the state_dict and reported. Everything else
    that is missing, unknown, of another shape or not finite is a CheckpointError.
    """
    expected = _untrained(architecture).state_dict()
    state, dropped, missing = dict(published.state), dict(published.dropped), {}
    counters = [k for k in expected if k.endswith(".num_batches_tracked") and k not in state]
    for key in counters:
        state[key] = torch.zeros((), dtype=torch.int64)
        missing[key] = "BatchNorm counters, set to 0 (only training without momentum reads them)"
    head = ("final_layer.weight", "final_layer.bias")
    if new_head and any(key not in state or state[key].shape != expected[key].shape for key in head):
        for key in head:
            if key in state:
                count = len(state.pop(key))
                dropped[key] = f"a head of {count} keypoints, this network has {architecture.num_keypoints}"
            missing[key] = "the head starts untrained"
            expected.pop(key)
    problems = _misfits(state, expected)
    if problems:
        raise CheckpointError(
            f"{published.file} ({published.scheme} key names) does not fit width {architecture.width} with "
            f"{architecture.num_keypoints} keypoints: {'; '.join(problems)}. Nothing was loaded."
        )
    matched = tuple(key for key in expected if key not in missing)
    report = MatchReport(published.file, published.scheme, matched, dropped, missing, published.notes)
    return {key: state[key] for key in expected}, report


def start_from(model: HRNet, source: str | Path) -> MatchReport:
    """Fill `model` for training from a published file or a checkpoint folder (`model.init`).

    Only the head may stay as it is: where the file has none (ImageNet, timm) or one of another number of
    keypoints. The report says so; print it.
    """
    state, report = fit_weights(read_weights(source), model.config, new_head=True)
    model.load_state_dict({**model.state_dict(), **state})
    return report


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Name a weights file (.pth, .pt, .safetensors).")
    if path.suffix == ".safetensors":
        return _parse_safetensors(_read(path), path)
    return _read_torch(path, stand_ins=HARMLESS_METADATA)


def _read_torch(path: Path, stand_ins: tuple[str, ...] = ()) -> Any:
    inert: list[Any] = [(_StandIn, name) for name in stand_ins]
    try:
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for a damaged file
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise CheckpointError(
                f"{path}: reading it would run code of its own ({code[1]}), which is never done. If you "
                f"trust the file, open it where it was made and save its state_dict alone, as safetensors."
            ) from None
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise CheckpointError(
            f"{path}: not a whole torch file ({reason}). Download or copy it again."
        ) from None


class _StandIn:
    """Takes the place of an object in a file's metadata: accepts anything, does and keeps nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _unwrap(content: Any, path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, and the name of the entry they came from ("" if it is bare)."""

    def tensors_of(value: Any) -> dict[str, Tensor]:
        found = {k: v for k, v in value.items() if isinstance(v, Tensor)} if isinstance(value, dict) else {}
        return {str(k): v.detach() for k, v in found.items()}

    for name in CONTAINERS:
        if isinstance(content, dict) and (found := tensors_of(content.get(name))):
            return found, name
    bare = tensors_of(content)
    if not bare:
        has = (
            f"a dict with {_some([str(k) for k in content])}" if isinstance(content, dict) else type(content)
        )
        raise CheckpointError(
            f"{path}: no weights in it: it holds {has}, but neither tensors nor one of {list(CONTAINERS)}."
        )
    return bare, ""


def _our_name(key: str) -> str:
    name = key.removeprefix("module.").removeprefix("backbone.")
    return re.sub(r"^(keypoint_head|head)\.final_layer\.(?=weight$|bias$)", "final_layer.", name)


def _scheme(keys: set[str], container: str) -> str:
    wrapped = "module. prefixed " if any(key.startswith("module.") for key in keys) else ""
    keys = {key.removeprefix("module.") for key in keys}
    if "backbone.conv1.weight" in keys:
        old = any(key.startswith("keypoint_head.") for key in keys)
        return wrapped + ("mmpose 0.x" if old else "mmpose 1.x")
    if "incre_modules.0.0.conv1.weight" in keys:
        return wrapped + "timm"
    if {"head.0.0.0.conv1.weight", "fc.weight"} <= keys:
        return wrapped + "ImageNet"
    return wrapped + ("WZM" if container == "model" else "official")


def _not_ours(name: str, names: set[str], scheme: str) -> str:
    """Why a tensor belongs to no pose network, or "" if it may."""
    for pattern, why in NOT_OURS.items():
        if re.match(pattern, name):
            return why
    # Only in the ImageNet file: a head.* that mmpose saved would be part of the pose network.
    if scheme.endswith("ImageNet") and name.startswith("head."):
        return "classification head"
    fusion = re.match(r"stage4\.(\d+)\.fuse_layers\.[1-9]\d*\.", name)
    if fusion and not any(n.startswith(f"stage4.{int(fusion[1]) + 1}.") for n in names):
        return "lower resolutions of the last module, which heatmaps do not use"
    return ""


def _infer_architecture(state: dict[str, Tensor], file: str, scheme: str) -> HRNetConfig:
    def count(prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        return 1 + max((int(m[1]) for key in state if (m := pattern.match(key))), default=-1)

    first = "stage2.0.branches.0.0.conv1.weight"
    if first not in state or "conv1.weight" not in state:
        raise CheckpointError(
            f"{file}: no HRNet in it: {first} is missing. Its first tensors are {_some(sorted(state))}."
        )
    if "final_layer.weight" not in state:
        raise CheckpointError(
            f"{file} ({scheme} key names): has no keypoint head (final_layer), so it cannot answer poses. It "
            f"is a start for training: hrnet train CONFIG --model.init {file}"
        )
    try:
        return HRNetConfig(
            width=state[first].shape[0],
            num_keypoints=state["final_layer.weight"].shape[0],
            stem_width=state["conv1.weight"].shape[0],
            bottlenecks=count("layer1"),
            modules=(count("stage2"), count("stage3"), count("stage4")),
            blocks=count("stage2.0.branches.0"),
        )
    except ValueError:
        raise CheckpointError(f"{file}: parts of the HRNet in it are missing altogether.") from None
