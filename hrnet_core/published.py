"""Weights that others published, under our names, with a report of every key."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrnet_core.architecture import HRNetConfig
from hrnet_core.checkpoint import DESCRIPTION, fetch_checkpoint, load_checkpoint, read_file
from hrnet_core.errors import CheckpointError, DataError
from hrnet_core.locations import BUCKETS, fetch_file, is_folder_at, is_uri, one_line, without_credentials
from hrnet_core.model import HRNet
from hrnet_core.weights import (
    first_names,
    parse_safetensors,
    read_torch,
    refuse_other_kinds,
    untrained,
    what_does_not_fit,
)

CONTAINERS = ("state_dict", "model", "model_state_dict", "best_state_dict")
OTHER_HEAD = re.compile(r"(keypoint_)?head\.")
"""Tensors of mmpose's heads beside the one layer that is ours (`_our_name`)."""
NOT_OURS = {
    r"data_preprocessor\.": "mmpose's preprocessor",
    r"(fc|classifier)\.": "ImageNet classifier",
    r"(incre_modules|downsamp_modules)\.": "classification head",
    r"final_layer\.\d+\.": "classification head (not the keypoint head of the same name)",
}
WRAPPERS = re.compile(r"(?:(?:_orig_mod|module|model|net|network)\.)+")
"""What torch.compile, DataParallel, Lightning and the like put before every name."""
TAKEN = (
    "Name a weights file (.pth, .pt, .safetensors) or a checkpoint folder, a path or a URI (s3://, gs://, "
    "az://, file://)."
)
# Metadata in mmpose's files names these; they are read as empty stand-ins, and none of their code runs.
HARMLESS_METADATA = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *("numpy.ndarray", "numpy.dtype", "_codecs.encode"),
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

        def count(prefix: str) -> int:
            pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
            return 1 + max((int(m[1]) for key in self.state if (m := pattern.match(key))), default=-1)

        first = "stage2.0.branches.0.0.conv1.weight"
        if first not in self.state or "conv1.weight" not in self.state:
            raise CheckpointError(
                f"{self.file}: no HRNet in it: {first} is missing. Its first tensors are "
                f"{first_names(sorted(self.state))}."
            )
        if "final_layer.weight" not in self.state:
            raise CheckpointError(
                f"{self.file} ({self.scheme} key names): has no keypoint head (final_layer), so it cannot "
                f"answer poses. It is a start for training: hrnet train CONFIG --model.init {self.file}"
            )
        try:
            return HRNetConfig(
                width=self.state[first].shape[0],
                num_keypoints=self.state["final_layer.weight"].shape[0],
                stem_width=self.state["conv1.weight"].shape[0],
                bottlenecks=count("layer1"),
                modules=(count("stage2"), count("stage3"), count("stage4")),
                blocks=count("stage2.0.branches.0"),
            )
        except ValueError:
            raise CheckpointError(f"{self.file}: parts of the HRNet in it are missing altogether.") from None


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
                lines.append(f"  {title}  {len(keys)}: {reason} ({first_names(keys)})")
        return "\n".join([*lines, *(f"  note     {note}" for note in self.notes)])


def read_weights(file: str | Path) -> PublishedWeights:
    """Weights in any published layout, or a checkpoint folder of ours, under our key names; a path or a URI.

    Reads torch files (weights_only=True) and safetensors: official, mmpose 0.x and 1.x, timm, the ImageNet
    file of the HRNet authors, WZM's container, simple-HRNet. Names may have a prefix of WRAPPERS, which is
    taken off. Half precision becomes float32. CheckpointError: unreadable, or needs code to be run.
    """
    if str(file).startswith("models:/"):
        raise CheckpointError(
            f"{file}: a version of the registry is not taken here, as it is by evaluate, predict, export and "
            f"deploy. {TAKEN} The version's own is STORAGE/RUN/best of the run that made it."
        )
    if is_uri(str(file)):
        return _read_from_afar(str(file))
    path = Path(file)
    if path.is_dir():
        model, _ = load_checkpoint(path)
        return PublishedWeights(str(path), "hrnet checkpoint", model.state_dict(), {})
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file. Name a weights file (.pth, .pt, .safetensors) or a checkpoint folder."
        )
    if path.name == DESCRIPTION:
        raise CheckpointError(f"{path}: describes weights and holds none. Name the folder that it lies in.")
    safe = path.suffix == ".safetensors"
    whole = parse_safetensors(read_file(path), path) if safe else read_torch(path, HARMLESS_METADATA)
    content, container = _unwrap(whole, path)
    names = {key: _our_name(key) for key in content}
    scheme = _scheme(set(content), container)
    dropped = {key: why for key, name in names.items() if (why := _not_ours(name, names.values(), scheme))}
    state: dict[str, Tensor] = {}
    for key, name in names.items():
        if key in dropped:
            continue
        if name in state:
            raise CheckpointError(f"{path}: two tensors claim the name {name!r}; take one network out of it.")
        state[name] = content[key]
    notes: tuple[str, ...] = (f"taken from its {container!r} entry",) if container else ()
    if container == "state_dict" and isinstance(whole, dict) and "ema_state_dict" in whole:
        notes += ("its 'ema_state_dict' is not read: mmengine exchanges the two, the average is the other",)
    if halves := sorted({str(v.dtype) for v in state.values() if v.is_floating_point()} - {"torch.float32"}):
        notes += (f"{', '.join(halves)} widened to float32",)
        state = {key: v.float() if v.is_floating_point() else v for key, v in state.items()}
    return PublishedWeights(str(path), scheme, state, dropped, notes)


def fit_weights(
    published: PublishedWeights, architecture: HRNetConfig, *, new_head: bool = False
) -> tuple[dict[str, Tensor], MatchReport]:
    """Hold published weights against a network: (state_dict, report).

    Missing BatchNorm counters are filled with 0 and reported. With `new_head`, for training only, a
    missing or differently sized final_layer is left out of the state_dict and reported, and so is a head of
    another kind (HRNetV2). Everything else that is missing, unknown, of another shape or not finite is a
    CheckpointError.
    """
    expected = untrained(architecture).state_dict()
    state, dropped, missing = dict(published.state), dict(published.dropped), {}
    counters = [k for k in expected if k.endswith(".num_batches_tracked") and k not in state]
    for key in counters:
        state[key] = torch.zeros((), dtype=torch.int64)
        missing[key] = "BatchNorm counters, set to 0 (only training without momentum reads them)"
    head = ("final_layer.weight", "final_layer.bias")
    other_head = [key for key in state if "mmpose" in published.scheme and OTHER_HEAD.match(key)]
    if other_head and not new_head:
        raise CheckpointError(
            f"{published.file} ({published.scheme} key names): its head is another than HRNet's one layer "
            f"({first_names(other_head)}), as that of HRNetV2 over all resolutions, which mmpose has for "
            f"hands and faces. It cannot be imported. Its backbone is a start for training: "
            f"hrnet train CONFIG --model.init {published.file}"
        )
    no_use = "another head than HRNet's one layer"
    for key in other_head:
        state.pop(key)
        dropped[key] = no_use
    if new_head and any(key not in state or state[key].shape != expected[key].shape for key in head):
        for key in head:
            if key in state:
                count = len(state.pop(key))
                sizes = f"a head of {count} keypoints, this network has {architecture.num_keypoints}"
                dropped[key] = no_use if other_head else sizes
            missing[key] = "the head starts untrained"
            expected.pop(key)
    if problems := what_does_not_fit(state, expected):
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


def _read_from_afar(uri: str) -> PublishedWeights:
    """read_weights of a copy that goes again; its errors name the URI."""
    shown = uri.partition("?")[0]
    with tempfile.TemporaryDirectory(prefix="hrnet-weights-") as copy:
        try:
            fetch_it = fetch_checkpoint if is_folder_at(uri) else fetch_file
            at_hand = fetch_it(uri, Path(copy))
        except DataError:
            if uri.startswith((*BUCKETS, "file://")):
                raise
            raise CheckpointError(
                f"{without_credentials(shown)}: nothing is read from addresses of this kind. {TAKEN} What "
                f"lies on the web is downloaded first."
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"{shown}: cannot be read ({one_line(error)}). Name a weights file or a checkpoint folder, "
                f"with the bucket's credentials in the environment."
            ) from None
        try:
            return replace(read_weights(at_hand), file=shown)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(at_hand), shown)) from None


def _unwrap(content: Any, path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, and the name of the entry they came from ("" if it is bare)."""
    holds = str(type(content))
    if isinstance(content, dict):
        holds = f"a dict with {first_names([str(k) for k in content])}"
        for name in (*CONTAINERS, ""):
            entry = content.get(name) if name else content
            entries = entry.items() if isinstance(entry, dict) else ()
            if tensors := {str(k): v.detach() for k, v in entries if isinstance(v, Tensor)}:
                return tensors, name
    refuse_other_kinds(path)
    raise CheckpointError(f"{path}: no weights in it: neither tensors nor one of {CONTAINERS}, but {holds}.")


def _our_name(key: str) -> str:
    name = _bare(_bare(key).removeprefix("backbone."))
    return re.sub(r"^(keypoint_head|head)\.final_layer\.(?=weight$|bias$)", "final_layer.", name)


def _bare(key: str) -> str:
    wrapper = WRAPPERS.match(key)
    return key[wrapper.end() :] if wrapper else key


def _scheme(keys: set[str], container: str) -> str:
    prefixes = sorted({found[0] for key in keys if (found := WRAPPERS.match(key))})
    wrapped = "".join(f"{prefix} prefixed " for prefix in prefixes)
    keys = set(map(_bare, keys))
    if "backbone.conv1.weight" in keys:
        old = any(key.startswith("keypoint_head.") for key in keys)
        return wrapped + ("mmpose 0.x" if old else "mmpose 1.x")
    if "incre_modules.0.0.conv1.weight" in keys:
        return wrapped + "timm"
    if {"head.0.0.0.conv1.weight", "fc.weight"} <= keys:
        return wrapped + "ImageNet"
    return wrapped + ("WZM" if container == "model" else "official")


def _not_ours(name: str, names: Collection[str], scheme: str) -> str:
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
