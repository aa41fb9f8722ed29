"""The network in ncnn on the CPU (mode ncnn), and as its files.

ncnn computes 3x3 convolutions by Winograd's method, in float32 with less than half of the multiplications.
pnnx makes its files from the ONNX file.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from hrnet_core.checkpoint import NCNN
from hrnet_core.errors import CheckpointError, ConfigError
from hrnet_core.onnx_file import ONNX_PACKAGES, export_onnx, missing_packages, refuse_other_weights, told_of

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec

NCNN_PACKAGES = ("ncnn", "pnnx", *ONNX_PACKAGES)
"""What writes the files; the first alone opens them."""
PARAM_SHA256, BIN_SHA256 = "param_sha256", "bin_sha256"
"""Entries of model.ncnn.json: which .param and .bin belong to it."""
AGAIN = "Write it again: hrnet export CHECKPOINT --format ncnn."
INSTALL = "Install the versions of constraints.txt, or take mode onnx."
NOT_FLOAT32 = (
    "use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed", "use_bf16_storage",
    "use_vulkan_compute",
)  # fmt: skip
"""ncnn's options that would round, or leave the CPU; the first three are on unless said otherwise."""


def open_ncnn(files: Mapping[str, bytes], spec: CheckpointSpec) -> Callable[[Tensor], Tensor]:
    """The files of checkpoint.NCNN, name -> content, in ncnn, on as many threads as torch has now.

    Images float32 (N, 3, h, w) are computed one by one -> heatmaps float32 (N, K, h/4, w/4).

    CheckpointError: one is missing or damaged, they do not belong together, or are of other weights.
    What it returns: ConfigError in a process that was forked since, where there were several threads.
    """
    import ncnn

    _refuse_damaged(files, spec)
    net, threads, process = ncnn.Net(), torch.get_num_threads(), os.getpid()
    net.opt.num_threads = threads
    for option in NOT_FLOAT32:
        setattr(net.opt, option, False)
    with tempfile.TemporaryDirectory(prefix="hrnet-ncnn-") as folder:
        # Not by load_model_mem: the weights would stay where Python frees them when it returns.
        param, weights = (Path(folder) / name for name in NCNN[:2])
        for file in (param, weights):
            file.write_bytes(files[file.name])
        if net.load_param(str(param)) or net.load_model(str(weights)):
            raise CheckpointError(f"{param.name}: this version of ncnn cannot open it. {AGAIN}")
    keypoints, (width, height) = spec.skeleton.num_keypoints, spec.codec.heatmap_size

    def run(images: Tensor) -> Tensor:
        if threads > 1 and os.getpid() != process:  # ncnn would wait for them, and cannot do with fewer
            raise ConfigError(
                f"mode ncnn was loaded on {threads} threads in the process that this one was forked from, "
                f"and they stayed there. Load the checkpoint again in this process, or before on one thread."
            )
        answer = torch.empty(len(images), keypoints, height, width)
        for image, heatmaps in zip(images.contiguous().numpy(), answer.numpy(), strict=True):
            extractor = net.create_extractor()  # holds what lies between the layers: threads do not meet
            extractor.input("in0", ncnn.Mat(image))
            status, found = extractor.extract("out0")
            if status:
                raise RuntimeError(f"ncnn could not compute an image (its code {status}): is memory left?")
            heatmaps[:] = np.array(found)
        return answer

    return run


def export_ncnn(model: nn.Module, spec: CheckpointSpec) -> tuple[bytes, bytes, bytes]:
    """The network as ncnn's .param and .bin, float32, and a .json that says what they are.

    Blob "in0" is one image float32 (3, h, w), normalised as the .json says -> "out0", heatmaps (K, h/4, w/4).
    The .json is checkpoint.json without measurements, and the sha256 of the two others.

    ConfigError: packages are missing, or pnnx fails.
    """
    if why := missing_packages(NCNN_PACKAGES, "ncnn"):
        raise ConfigError(f"ncnn's files cannot be made here: {why}.")
    param, weights = _convert(export_onnx(model, spec), spec.input_size)
    about = json.loads(told_of(spec)) | {PARAM_SHA256: _sha256(param), BIN_SHA256: _sha256(weights)}
    return param, weights, json.dumps(about, indent=2).encode()


def _convert(content: bytes, input_size: tuple[int, int]) -> tuple[bytes, bytes]:
    """An ONNX file of images (N, 3, h, w) -> .param and .bin, by pnnx, a program of its own."""
    import pnnx

    width, height = input_size
    with tempfile.TemporaryDirectory(prefix="hrnet-pnnx-") as folder:
        file = Path(folder) / "model.onnx"  # what pnnx makes is named by it: model.ncnn.param, ...
        file.write_bytes(content)
        command = [pnnx.EXEC_PATH, file.name, f"inputshape=[1,3,{height},{width}]", "fp16=0"]
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            raise ConfigError(f"pnnx cannot be run here ({error.strerror}). {INSTALL}") from None
        param, weights = (file.with_name(name) for name in NCNN[:2])
        if done.returncode or not (param.is_file() and weights.is_file()):
            said = done.stdout.decode(errors="replace").strip() or "it says nothing"
            reason = f"exit code {done.returncode}; {said.splitlines()[-1]}"
            raise ConfigError(f"pnnx did not convert the network ({reason}). {INSTALL}")
        return param.read_bytes(), weights.read_bytes()


def _refuse_damaged(files: Mapping[str, bytes], spec: CheckpointSpec) -> None:
    """CheckpointError for a file that is missing, of other weights, or not the one that was written: ncnn
    itself sees none of it in a .bin of the right length."""
    if missing := [name for name in NCNN if name not in files]:
        raise CheckpointError(f"{' and '.join(missing)}: not there, beside {' and '.join(files)}. {AGAIN}")
    param, weights, about = NCNN
    told = refuse_other_weights(files[about], spec, about, AGAIN)
    for name, entry in ((param, PARAM_SHA256), (weights, BIN_SHA256)):
        if _sha256(files[name]) != told.get(entry):
            raise CheckpointError(
                f"{name}: damaged, or not the one that was written with {about}: its sha256 differs. {AGAIN}"
            )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
