"""Weights of a network: read from a file without running code in it, and held against the network.

No pickle is ever executed: torch files are read with weights_only=True.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from hrnet_core.architecture import HRNetConfig
from hrnet_core.errors import CheckpointError, first_line
from hrnet_core.model import HRNet


def parse_safetensors(content: bytes, file: Path) -> dict[str, Tensor]:
    """Tensors by name; `file` is for the CheckpointError of a damaged one."""
    try:
        return dict(safetensors.torch.load(content))
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file ({error}). Copy it again.") from None


def read_torch(path: Path, stand_ins: tuple[str, ...] = ()) -> Any:
    """What torch.save wrote, on the CPU: tensors, numbers, strings, lists, dicts.

    stand_ins: dotted names of classes in its metadata to be read as empty objects. CheckpointError: damaged,
    or code would have to run.
    """
    inert: list[Any] = [(_StandIn, name) for name in stand_ins]
    try:
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for a damaged file
        refuse_other_kinds(path)
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path}: reading it would run code of its own ({code[1]}), which is never done. Ask "
                f"who made it for the state_dict alone, as safetensors."
            ) from None
        why = first_line(error)
        if why.startswith("Weights only load failed"):  # torch goes on to advise reading it unprotected
            why = "no tensors in torch's format"
        raise CheckpointError(f"{path}: not a whole torch file ({why}). Download or copy it again.") from None


def refuse_other_kinds(path: Path) -> None:
    """CheckpointError where a file that is no torch file can be called by its name."""
    content = path.read_bytes()
    start = content[:512].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: a Git LFS pointer, not the file it stands for: run git lfs pull there."
        )
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointError(
            f"{path}: a web page, as a download leaves that was refused or asked for a click. Open its "
            f"address in a browser and download the file itself."
        )
    if b"StructuredToParameterName@@" in content:
        raise CheckpointError(
            f"{path}: weights of PaddlePaddle, whose layers have other names. Take the PyTorch file of "
            f"the same model."
        )
    if content[8:9] == b"{" and int.from_bytes(content[:8], "little") < len(content):
        raise CheckpointError(f"{path}: a safetensors file: name it .safetensors.")


class _StandIn:
    """Takes the place of an object in a file's metadata: accepts anything, does and keeps nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    __setstate__ = __init__


def untrained(architecture: HRNetConfig) -> HRNet:
    """A network to be filled; torch's random stream, which a training may depend on, does not move."""
    with torch.random.fork_rng(devices=[]):
        return HRNet(architecture)


def what_does_not_fit(state: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """What keeps `state` from being exactly the tensors of `expected`, finite; empty if nothing does."""
    problems = []
    for what, keys in (
        ("missing", [k for k in expected if k not in state]),
        ("unexpected", [k for k in state if k not in expected]),
        ("not finite", [k for k, v in state.items() if not bool(torch.isfinite(v).all())]),
    ):
        if keys:
            problems.append(f"{len(keys)} {what} tensors: {first_names(keys)}")
    for key in state.keys() & expected.keys():
        have, want = state[key], expected[key]
        if (have.shape, have.dtype) != (want.shape, want.dtype):
            problems.append(f"{key} is {have.dtype} {list(have.shape)}, not {want.dtype} {list(want.shape)}")
    return problems[:6]


def first_names(names: list[str]) -> str:
    """The first four of a list, for a message, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
