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
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path}: reading it would run code of its own ({code[1]}), which is never done. If you "
                f"trust the file, open it where it was made and save its state_dict alone, as safetensors."
            ) from None
        why = first_line(error)
        raise CheckpointError(f"{path}: not a whole torch file ({why}). Download or copy it again.") from None


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
