"""The checkpoint folder: how weights are stored with all that is needed to use them.

    model.safetensors      the weights under the published names, float32
    checkpoint.json        everything needed to use them: CheckpointSpec, and the weights' sha256
    selftest.safetensors   a recorded input and the heatmaps that belong to it
    model.onnx             the network for ONNX Runtime and OpenVINO, only where `hrnet export` wrote it
    openvino_int8.xml      the network in int8 for OpenVINO, with openvino_int8.bin, only where `hrnet export`
                           wrote it
    model.ncnn.param       the network for ncnn, with model.ncnn.bin and model.ncnn.json, only where `hrnet
                           export` wrote it
    trainer.pt             optimizer and counters, only where training may go on from here

A folder explains itself or is refused, and loading is strict: nothing is ever missing in silence. Bare
files that others published enter through hrnet_core/published.py.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from hrnet_core.architecture import HRNetConfig
from hrnet_core.choices import PADDING
from hrnet_core.errors import CheckpointError, DataError
from hrnet_core.files import from_json, read_object, replacing, write_whole
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.locations import fetch, one_line
from hrnet_core.model import HRNet, normalize
from hrnet_core.skeleton import COCO17, Skeleton
from hrnet_core.weights import first_names, parse_safetensors, read_torch, untrained, what_does_not_fit

SCHEMA_VERSION = 1
WEIGHTS, DESCRIPTION, SELFTEST = "model.safetensors", "checkpoint.json", "selftest.safetensors"
ONNX, TRAINER = "model.onnx", "trainer.pt"
INT8 = ("openvino_int8.xml", "openvino_int8.bin")
NCNN = ("model.ncnn.param", "model.ncnn.bin", "model.ncnn.json")
"""The last says whose they are: the two others have no place for it."""
EXPORTED = (ONNX, *INT8, *NCNN)
"""What `hrnet export` adds, for the modes that run from files; saving other weights removes it."""
PROVENANCE = ("run_id", "dataset_digest", "config", "code_version")
COPY_IT = f"A checkpoint folder holds {WEIGHTS}, {DESCRIPTION} and {SELFTEST}; copy the whole folder."
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
    padding: float = PADDING
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
        problems = []
        if self.architecture.num_keypoints != self.skeleton.num_keypoints:
            problems.append(
                f"architecture.num_keypoints is {self.architecture.num_keypoints}, but skeleton "
                f"{self.skeleton.name!r} has {self.skeleton.num_keypoints} keypoints"
            )
        if any(side % 32 for side in self.input_size):
            problems.append(f"input_size (width, height) must be multiples of 32, got {self.input_size}")
        for name in ("mean", "std"):
            try:
                values = tuple(float(v) for v in getattr(self, name))
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"{name}: {error}") from None
            object.__setattr__(self, name, values)
            if len(values) != 3 or not all(map(math.isfinite, values)):
                problems.append(f"{name} must be 3 finite numbers, got {values}")
        if not all(v > 0 for v in self.std):
            problems.append(f"std must be positive, got {self.std}")
        if not (isinstance(self.padding, int | float) and 0 < self.padding < math.inf):
            problems.append(f"padding must be a positive number, got {self.padding!r}")
        if self.flip_test not in (True, False):
            problems.append(f"flip_test must be true or false, got {self.flip_test!r}")
        if self.weights not in ("raw", "ema"):
            problems.append(f"weights must be 'raw' or 'ema', got {self.weights!r}")
        for name in ("modes", "provenance"):
            if not isinstance(getattr(self, name), dict):
                problems.append(f"{name} must be an object, got {getattr(self, name)!r}")
        if problems:
            raise CheckpointError("; ".join(problems))

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
    _refuse_other_files(folder)
    with replacing(folder) as temporary:
        write_whole(temporary / WEIGHTS, content)
        write_whole(temporary / SELFTEST, safetensors.torch.save({"crops": crops, "heatmaps": heatmaps}))
        if trainer_state is not None:
            torch.save(trainer_state, temporary / TRAINER)
            read_trainer_state(temporary)
        _describe(temporary, spec)
    return spec


def fetch_checkpoint(place: str, into: Path) -> Path:
    """The folder of this machine that a path or URI names; what lies elsewhere is copied into `into`.

    CheckpointError names what cannot be read. A path is taken as it is: loading it will tell.
    """
    try:
        return fetch(place, into, (DESCRIPTION, WEIGHTS, SELFTEST), optional=EXPORTED)
    except DataError as error:
        raise CheckpointError(f"checkpoint {error}") from None
    except OSError as error:
        raise CheckpointError(
            f"{place}: cannot be read as a checkpoint ({one_line(error)}). Name a checkpoint folder, or the "
            f"URI of one (s3://, gs://, az://, file://) with its credentials in the environment."
        ) from None


def load_checkpoint(folder: str | Path) -> tuple[HRNet, CheckpointSpec]:
    """A checkpoint folder -> (HRNet on the CPU in eval mode, its spec). Strict.

    CheckpointError names the file and the field where anything is missing, unknown, damaged, not finite,
    or of another network or skeleton. The self-test is verify_checkpoint's.
    """
    folder = Path(folder)
    spec = read_spec(folder)
    file = folder / WEIGHTS
    content = read_file(file)
    digest = hashlib.sha256(content).hexdigest()
    if digest != spec.weights_sha256:
        raise CheckpointError(
            f"{file}: its sha256 is {digest}, but weights_sha256 in {DESCRIPTION} is {spec.weights_sha256}: "
            f"these are not the weights that were saved. Copy the whole folder again."
        )
    state = parse_safetensors(content, file)
    _refuse_other_sizes(spec.architecture, state, str(file))
    return _build(spec.architecture, state, str(file)), spec


def read_spec(folder: str | Path) -> CheckpointSpec:
    """checkpoint.json alone, checked; the weights are not opened."""
    folder = Path(folder)
    if not folder.is_dir():
        if ":/" in str(folder):  # Path makes one slash of two
            raise CheckpointError(
                f"{folder}: a checkpoint is loaded from a folder of this machine. hrnet_core.checkpoint."
                f"fetch_checkpoint copies one from a bucket, pipelines.tracking.checkpoints."
                f"local_checkpoint also a registered version (models:/NAME@ALIAS)."
            )
        raise CheckpointError(
            f"{folder}: no such checkpoint folder. Name the folder that holds {DESCRIPTION}; a bare weights "
            f"file enters through `hrnet import FILE --codec C --input-size W H OUT`."
        )
    file = folder / DESCRIPTION
    if not file.exists() and (below := sorted(folder.glob(f"*/{DESCRIPTION}"))):
        named = first_names([str(one.parent) for one in below])
        raise CheckpointError(f"{folder}: no checkpoint itself, but it holds some. Name {named}.")
    fields = read_object(file, CheckpointError, COPY_IT)
    if fields.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{file}: schema_version is {fields.get('schema_version')!r}, this program reads "
            f"{SCHEMA_VERSION}. Use the version of hrnet-ray that wrote it, or export it anew."
        )
    # Every field is stated and none is guessed: a wrong codec or mean gives wrong poses without an error.
    checked_here = ("schema_version", "input_size", "channels")
    given = {name: value for name, value in fields.items() if name not in checked_here}
    for name, kind in (("architecture", HRNetConfig), ("codec", HeatmapCodec), ("skeleton", Skeleton)):
        given[name] = from_json(
            kind, given.get(name), f"{file}: {name}", CheckpointError, COPY_IT, whole=True
        )
    spec = from_json(CheckpointSpec, given, str(file), CheckpointError, COPY_IT, whole=True)
    problems = []
    if fields["codec"]["sigma"] is None:
        problems.append("codec must state its sigma")
    if (size := fields.get("input_size")) != list(spec.input_size):
        problems.append(f"input_size {size} is not codec.input_size {list(spec.input_size)}")
    if fields.get("channels") != "RGB":
        problems.append(f"channels must be 'RGB', got {fields.get('channels')!r}")
    if absent := sorted(set(PROVENANCE) - set(spec.provenance)):
        problems.append(f"provenance leaves out {absent}")
    if problems:
        raise CheckpointError(f"{file}: {'; '.join(problems)}. {COPY_IT}")
    return spec


def read_exported(folder: str | Path, names: Collection[str] = EXPORTED) -> dict[str, bytes]:
    """Of the exported files of these names those that are there: name -> content."""
    return {name: read_file(Path(folder) / name) for name in exported_names(folder) if name in names}


def exported_names(folder: str | Path) -> list[str]:
    """Which of the exported files are there."""
    return [name for name in EXPORTED if (Path(folder) / name).is_file()]


def verify_checkpoint(folder: str | Path, device: str = "cpu") -> float:
    """Run the recorded input through the loaded weights in float32.

    Returns the largest difference to the recorded heatmaps, as a fraction of their range (about 1e-6 on
    another machine). CheckpointError above 1e-3, which also finds weights that were exchanged together
    with their sha256, and wrong mean, std or channel order in checkpoint.json.
    """
    folder = Path(folder)
    model, spec = load_checkpoint(folder)
    file = folder / SELFTEST
    recorded = parse_safetensors(read_file(file), file)
    if set(recorded) != {"crops", "heatmaps"}:
        raise CheckpointError(f"{file}: holds {sorted(recorded)}, not crops and heatmaps.")
    crops, expected = recorded["crops"], recorded["heatmaps"]
    pixels = (1, *spec.input_size[::-1], 3)
    cells = (1, spec.skeleton.num_keypoints, *spec.codec.heatmap_size[::-1])
    if crops.shape != pixels or crops.dtype != torch.uint8 or expected.shape != cells:
        raise CheckpointError(
            f"{file}: crops {tuple(crops.shape)} and heatmaps {tuple(expected.shape)} are not of this "
            f"checkpoint, whose are {pixels} and {cells}."
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
    try:
        _describe(folder, spec)
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
    state = read_torch(file)
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: holds {type(state).__name__}, not a dict.")
    return state


def _build(architecture: HRNetConfig, state: dict[str, Tensor], source: str) -> HRNet:
    """The network with exactly these weights, in eval mode; CheckpointError names what does not fit."""
    model = untrained(architecture)
    if problems := what_does_not_fit(state, model.state_dict()):
        raise CheckpointError(f"{source}: {'; '.join(problems)}.")
    model.load_state_dict(state)
    return model.eval()


def _refuse_other_sizes(architecture: HRNetConfig, state: dict[str, Tensor], source: str) -> None:
    """CheckpointError where a network of this architecture would be much larger than its weights: what
    checkpoint.json says may want all memory that there is. The two tensors grow as the whole does."""
    depths = (*architecture.modules, architecture.blocks, architecture.bottlenecks)
    if max(depths) > len(state):
        raise CheckpointError(
            f"{source}: holds {len(state)} tensors, the architecture has {max(depths):,} blocks."
        )
    stem, widest = architecture.stem_width, 8 * architecture.width
    for key, side in (("conv2.weight", stem), ("stage4.0.branches.3.0.conv1.weight", widest)):
        if key in state and list(state[key].shape) == [side, side, 3, 3]:
            continue
        have = f"is {list(state[key].shape)}" if key in state else "is missing"
        raise CheckpointError(f"{source}: {key} {have}, not [{side}, {side}, 3, 3].")


def _selftest_crops(input_size: tuple[int, int]) -> Tensor:
    """uint8 (1, h, w, 3): soft coloured patches under fine noise, the same for every checkpoint."""
    rng = np.random.default_rng(0)
    patches = cv2.resize(rng.uniform(0, 255, (8, 6, 3)), input_size, interpolation=cv2.INTER_LINEAR)
    crop = np.clip(patches + rng.normal(0, 8, patches.shape), 0, 255).astype(np.uint8)
    return torch.from_numpy(crop[None])


def _run(model: HRNet, crops: Tensor, spec: CheckpointSpec) -> Tensor:
    with torch.inference_mode():
        heatmaps: Tensor = model(normalize(crops, spec.mean, spec.std))
    return heatmaps


def _describe(folder: Path, spec: CheckpointSpec) -> None:
    """Write checkpoint.json."""
    content = json.dumps(spec.as_dict(), indent=2, allow_nan=False)
    write_whole(folder / DESCRIPTION, content.encode())


def _refuse_other_files(folder: Path) -> None:
    """Overwriting replaces the whole folder: it must be a checkpoint and nothing else."""
    if folder.is_dir():
        ours = {WEIGHTS, DESCRIPTION, SELFTEST, *EXPORTED, TRAINER}
        if others := sorted({entry.name for entry in folder.iterdir()} - ours):
            raise CheckpointError(
                f"{folder}: holds other files ({first_names(others)}), which saving a checkpoint there would "
                f"delete. Name a new folder."
            )
    elif folder.exists():
        raise CheckpointError(f"{folder}: is a file; a checkpoint is a folder. Name another.")


def read_file(file: Path) -> bytes:
    """Content of a file of a checkpoint folder."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}). {COPY_IT}") from None
