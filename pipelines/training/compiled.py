"""The blocks of a network in training through torch.compile, and what that made, kept for the next start.

STORAGE/compiled/DEVICE-torchVERSION-DIGEST.bin, written by rank 0 where it is not there yet, is what
torch.compiler.save_cache_artifacts gives: a start with the same network, batch and machine takes it instead
of compiling. It holds code, as a Python file does: who may write there may run programs as the workers.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hrnet_core.errors import first_line
from hrnet_core.modes import blocks_to_compile, compile_failed, keep_compiled
from pipelines.storage.files import is_file, join, read_file, write_whole
from pipelines.training.batch import Sent
from pipelines.training.recording import as_it_was
from pipelines.training.run_folder import storage_of
from pipelines.training.state import Training


def compile_first(run: Training, step: Callable[[Sent], Tensor], sent: Sent) -> None:
    """Compile the blocks of the run's network, forward and backward, by a step that is undone. All ranks
    together. ConfigError where it fails."""
    keep_compiled(run.config.train.compile_cache)
    file = kept_file(run)
    known, begun = is_file(file), time.perf_counter()
    if known:
        _load(file)
    for block in blocks_to_compile(run.model):
        # In place and not seen by deepcopy: the copy that scores an epoch folds BatchNorm, uncompiled.
        block.compile(dynamic=False)
    try:
        with as_it_was(run):
            step(sent)
    except (torch._dynamo.exc.BackendCompilerFailed, torch._inductor.exc.InductorError) as error:
        raise compile_failed("train.compile", error) from error
    if run.rank == 0:
        source = (
            f"from {file}" if known else f"kept in {file}" if _save(file) else "kept on this machine only"
        )
        print(f"train.compile: {time.perf_counter() - begun:.0f} s, {source}", flush=True)


def kept_file(run: Training) -> str:
    """Named by all that decides what is compiled."""
    device = "cpu"
    if run.device.type == "cuda":
        device = torch.cuda.get_device_name(run.device)
    elif name := torch.cpu.get_capabilities().get("cpu_name"):
        device = f"cpu-{name}"
    settings = run.config.train
    rows = settings.batch_size // run.world // settings.accumulate
    what = (
        run.spec.architecture.as_dict(),
        run.spec.input_size,
        rows,
        settings.precision,
        settings.channels_last,
    )
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
    slug = re.sub(r"[^\w.+-]+", "-", f"{device}-torch{torch.__version__}-{digest}")
    return join(storage_of(run.folder), f"compiled/{slug}.bin")


def _load(file: str) -> None:
    """Put what the file holds where torch.compile looks for it. What cannot be read is compiled anew."""
    try:
        if torch.compiler.load_cache_artifacts(read_file(file)) is None:
            raise ValueError("not what torch.compiler.save_cache_artifacts writes")
    except Exception as error:  # whatever another torch or a damaged file makes of it
        print(f"train.compile: {file} is of no use ({first_line(error)}); compiling anew", flush=True)


def _save(file: str) -> bool:
    """Whether it is kept: without it the next start takes longer, and that is all."""
    artifacts = torch.compiler.save_cache_artifacts()
    if artifacts is None:
        return False
    try:
        write_whole(file, artifacts[0])
    except Exception as error:
        print(f"train.compile: not kept in {file} ({first_line(error)})", flush=True)
        return False
    return True
