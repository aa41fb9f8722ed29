"""How much of the network's speed reaches the caller, and how much the modes bring: ratios against limits.

    python tests/benchmarks/bench_inference.py                    # W32 256x192, the CPU, one thread
    python tests/benchmarks/bench_inference.py --device cuda
    python tests/benchmarks/bench_inference.py --table --device cuda

Both sides of a ratio run in turn (A B A B ...) and the median of the pairs counts. On a CPU a side is its CPU
time on one thread, which other work on the machine lengthens less than the clock's. Exit code 1 where a limit
is missed. Weights are random (pipelines.benchmark.save_random): speed does not depend on them. How far a mode
is from float32 does, so the modes have those of tests/reference/forward_w32.json, for which EXACT is stated.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from formula_weights import formula_weights
from ratios import compare, exit_code, judge
from torch import Tensor

from hrnet_core.checkpoint import INT8, load_checkpoint, save_checkpoint
from hrnet_core.choices import CODECS, MODES
from hrnet_core.decoder import Decoder
from hrnet_core.errors import ConfigError, first_line
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.modes import FORMS, build_network
from hrnet_core.openvino_file import export_int8
from hrnet_core.predictor import PosePredictor
from pipelines.benchmark import machine, save_random
from pipelines.poses.timing import time_modes
from pipelines.settings.config_file import load_config

IN_A_ROW = {"cpu": 1, "cuda": 32}
"""Batches of a call: on a GPU the next one is copied there while one is computed; the first one waits."""
EXACT = 1e-5
"""Largest difference of a heatmap cell, of the range, of a mode that computes in float32."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--config", default="w32_256x192")
    parser.add_argument(
        "--mode",
        choices=list(FORMS),
        help="of host to host and decoding; default: float32, on a GPU bfloat16",
    )
    parser.add_argument("--modes", nargs="*", default=list(MODES), help="held against eager float32 on a CPU")
    parser.add_argument("--batches", nargs="*", type=int, help="default: 8 and 32, on a GPU 256 and 64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=["host", "one", "decode", "modes"])
    parser.add_argument("--table", action="store_true", help="W32 and W48, all modes, p50 and p99, no limits")
    args = parser.parse_args()
    cpu = args.device == "cpu"
    facts = machine(args.device)
    runs_on = facts.get("gpu", facts["processor"])
    print(f"{runs_on}; {' '.join(facts['instruction_sets'])}; {facts['versions']}")
    print(f"load {os.getloadavg()[0]:.1f} on {facts['cores']} cores", flush=True)
    if args.table:
        return table(args.device, args.modes)
    if cpu:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
    batches = args.batches or ([8, 32] if cpu else [256, 64])
    mode = args.mode or ("float32" if cpu else "bfloat16")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "random"
        save_random(folder, load_config(args.config))
        predictor = PosePredictor.load(folder, args.device, mode)
        for batch in batches if "host" in args.only else ():
            host_to_host(predictor, folder, args.device, mode, batch, args.rounds)
        if "one" in args.only and not cpu:
            one_by_one(predictor)
        for batch in batches if "decode" in args.only else ():
            decoding(folder, args.device, mode, batch, args.rounds)
        if cpu and "modes" in args.only:
            give_formula_weights(folder)
            modes_alone(folder, args.modes, 2 * args.rounds)
    print(f"load {os.getloadavg()[0]:.1f} at the end")
    return exit_code()


def clock_of(device: str) -> Callable[[], float]:
    """CPU time on a CPU: other work on the machine does not count."""
    return time.process_time if device == "cpu" else time.perf_counter


def bare(folder: Path, device: str, mode: str, batch: int) -> Callable[..., Tensor]:
    """The network alone, so many times in a row, on images that are where it runs, normalised and in its
    layout."""
    model, spec = load_checkpoint(folder)
    network = build_network(model, spec, torch.device(device), mode, {})
    width, height = spec.input_size
    form = FORMS[mode]
    images = torch.randn(batch, 3, height, width).to(device).contiguous(memory_format=form.layout)

    def launch() -> Tensor:
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(enabled=True, benchmark=form.tf32, allow_tf32=form.tf32),
        ):
            return network(images)

    return repeated(launch, device)


def repeated(launch: Callable[[], Tensor], device: str) -> Callable[..., Tensor]:
    """It so many times in a row; returns when that is done. On a GPU recorded as a CUDA graph, as it is in
    PosePredictor: nothing waits for launches."""
    if device == "cpu":
        return lambda times=1: [launch() for _ in range(times)][-1]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            launch()
    with torch.cuda.graph(graph, stream=stream):
        found = launch()

    def replay(times: int = 1) -> Tensor:
        for _ in range(times):
            graph.replay()
        torch.cuda.synchronize()
        return found

    return replay


def host_to_host(
    predictor: PosePredictor, folder: Path, device: str, mode: str, batch: int, rounds: int
) -> None:
    """predict_crops against as many passes of the network alone; a flip test is two."""
    network = bare(folder, device, mode, batch)
    width, height = predictor.spec.input_size
    people = IN_A_ROW[device] * batch
    crops = np.random.default_rng(0).integers(0, 256, (people, height, width, 3), dtype=np.uint8)
    for flip in (False, True):

        def whole(flip: bool = flip) -> None:
            predictor.predict_crops(crops, flip, batch_size=batch)

        def alone(flip: bool = flip) -> None:
            network(IN_A_ROW[device] * (1 + flip))

        ratio, ours, theirs = compare(whole, alone, rounds, clock_of(device))
        what = f"{mode}, batch {batch}{', flip test' if flip else ''}"
        print(
            f"{what}: {people / ours:.1f} people/s host to host, {people / theirs:.1f} by the network alone",
            flush=True,
        )
        judge(f"people/s host to host / network alone, {what}", 1 / ratio, 0.95, at_most=False)


def one_by_one(predictor: PosePredictor, calls: int = 300) -> None:
    """One crop a call, each waited for: what a caller sees who has no more."""
    width, height = predictor.spec.input_size
    crop = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    for flip in (False, True):
        took = []
        for _ in range(calls):
            begun = time.perf_counter()
            predictor.predict_crops(crop, flip, batch_size=1)
            took.append(time.perf_counter() - begun)
        rate = 1 / statistics.median(took[calls // 10 :])  # the first ones compile and record
        print(
            f"{predictor.mode}, one crop a call{', flip test' if flip else ''}: {rate:.0f} people/s",
            flush=True,
        )


def decoding(folder: Path, device: str, mode: str, batch: int, rounds: int) -> None:
    network = bare(folder, device, mode, batch)
    heatmaps = network().float()
    size = (4 * heatmaps.shape[3], 4 * heatmaps.shape[2])
    for name in CODECS:
        decoder = Decoder(HeatmapCodec(name, size)).to(device)

        def decode(decoder: Decoder = decoder) -> Tensor:
            with torch.inference_mode():
                found: Tensor = decoder(heatmaps)
                return found

        ratio, ours, _ = compare(repeated(decode, device), network, rounds, clock_of(device))
        print(f"decoding {name}: {1e6 * ours / batch:.1f} us a person")
        judge(f"decoding {name} / network alone, {mode}, batch {batch}", ratio, 0.03)


def give_formula_weights(folder: Path) -> None:
    model, spec = load_checkpoint(folder)
    state = formula_weights({name: list(value.shape) for name, value in model.state_dict().items()})
    save_checkpoint(folder, state, spec)


def modes_alone(folder: Path, modes: Sequence[str], rounds: int) -> None:
    """Each mode beside eager float32, one crop, one thread. A mode is one of float32 by the heatmaps that it
    gives, not by its name."""
    eager = PosePredictor.load(folder, "cpu", "float32")
    width, height = eager.spec.input_size
    crop = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    exact = eager.heatmaps(crop, flip_test=False)
    found: dict[str, dict[str, float]] = {"float32": {}, "bfloat16": {}, "int8": {}}
    if "openvino_int8" in modes:
        add_int8(folder)
    for mode in modes:
        if mode == "float32":
            continue
        try:
            predictor = PosePredictor.load(folder, "cpu", mode)
            heatmaps = predictor.heatmaps(crop, flip_test=False)
        except ConfigError as error:
            print(f"{mode:<18} not measured: {first_line(error)}")
            continue
        difference = float(np.abs(heatmaps - exact).max() / np.ptp(exact))
        ratio, ours, theirs = compare(
            lambda p=predictor: p.predict_crops(crop, flip_test=False),
            lambda: eager.predict_crops(crop, flip_test=False),
            rounds,
            clock_of("cpu"),
        )
        times = f"{1000 * ours:.1f} ms of {1000 * theirs:.1f}, {ratio:.3f}"
        print(f"{mode:<18} {times}; largest difference {difference:.1e} of the range", flush=True)
        kind = mode.rpartition("_")[2]
        if difference < EXACT:
            found["float32"][mode] = ratio
        elif kind in found:
            found[kind][mode] = ratio
    judge_modes(found)


def add_int8(folder: Path, people: int = 32) -> None:
    """The quantised file beside the weights, ranges from noise: its time does not depend on them."""
    model, spec = load_checkpoint(folder)
    width, height = spec.input_size
    crops = np.random.default_rng(1).integers(0, 256, (people, height, width, 3), dtype=np.uint8)
    try:
        content = export_int8(model, spec, crops)
    except ConfigError as error:
        print(f"no int8 file: {first_line(error)}")
        return
    for name, part in zip(INT8, content, strict=True):
        (folder / name).write_bytes(part)


def judge_modes(found: dict[str, dict[str, float]]) -> None:
    """The limits of a processor with avx512_bf16; elsewhere the best mode against ONNX Runtime."""
    every = {mode: ratio for of_kind in found.values() for mode, ratio in of_kind.items()}
    if torch.cpu.get_capabilities().get("avx512_bf16"):
        for kind, limit in (("float32", 0.50), ("bfloat16", 0.26), ("int8", 0.16)):
            if not found[kind]:
                print(f"skip  no mode of {kind} was measured (limit at most {limit:g})")
                continue
            best = min(found[kind], key=found[kind].__getitem__)
            judge(f"best mode of {kind} ({best}) / eager float32, batch 1", found[kind][best], limit)
    elif "onnx" not in every:
        print("skip  ONNX Runtime was not measured, which the modes are held against on this processor")
    else:
        best = min(every, key=every.__getitem__)
        speed = every["onnx"] / every[best]
        judge(f"speed of the best mode ({best}) / ONNX Runtime's, batch 1", speed, 1.1, at_most=False)


def table(device: str, modes: Sequence[str]) -> int:
    for config in ("w32_256x192", "w48_384x288"):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "random"
            save_random(folder, load_config(config))
            timings = time_modes(folder, modes, device, torch.get_num_threads(), (1, 16, 64, 256))
        print(f"\n{config}, random weights, {device}\n\n{timings}\n", flush=True)
        if timings.stopped:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
