"""`make demo`: from a drawn COCO folder to a served pose, by the commands a user would type.

Every stage is the real `hrnet` verb in a process of its own; this file only draws the set, calls the verbs
in order, times them, sends HTTP requests and says where everything lies. `--keep` leaves the endpoint up.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
DEMO = HERE / "demo"
COCO, SHARDS, RUNS, LOG = DEMO / "coco", DEMO / "shards", DEMO / "runs", DEMO / "serve.log"
RUN = RUNS / "demo"
IMAGES = 1200  # about 2,800 people to learn from


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--keep", action="store_true", help="leave the endpoint serving")
    keep = arguments.parse_args().keep
    DEMO.mkdir(exist_ok=True)
    made = {"draw": COCO / "drawn.json", "preprocess": SHARDS / "manifest.json", "train": RUN / "result.json"}
    said = {name: "there already" for name, file in made.items() if file.exists()}
    start = time.monotonic()
    common = ["--run.storage", str(RUNS)]
    data = ["--data.shards", str(SHARDS)]
    times = {
        "draw": stage("draw", str(COCO), "--images", str(IMAGES), "--seed", "1"),
        "preprocess": stage(
            "preprocess", "tiny", "--data.root", str(COCO), *data, "--data.people-per-shard", "256"
        ),
        "train": stage(
            *("train", "tiny", *data, "--run.name", RUN.name, "--train.num-workers", "2", "--track.no-onnx"),
            *("--train.precision", fast_precision()),
            *common,
        ),
        "evaluate": stage(
            "evaluate", str(RUN / "best"), str(COCO), "--report", str(DEMO / "report.html"), *common
        ),
        "promote": stage("promote", *common),
    }
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    samples = ["--serve.samples", str(COCO / "val2017")]
    server, times["deploy"] = deploy(url, "--serve.port", str(port), *samples, *common)
    try:
        times["requests"], said["requests"] = ask(url)
    except BaseException:
        stop(server)
        raise
    summary(times, time.monotonic() - start, said)
    if keep:
        print(f"  the endpoint stays up: {url}/   end it with: kill -INT {server.pid}")
    else:
        stop(server)
        print("  nothing is left running; make demo KEEP=1 leaves the endpoint and its page up")
    return 0


def fast_precision() -> str:
    """bfloat16 where the processor has AMX: a step takes .6 of float32's time, to the same AP. With AVX-512's
    bfloat16 alone it takes longer than float32's (docs/benchmarks/train.md)."""
    import torch

    return "bfloat16" if torch.cpu.get_capabilities().get("amx_bf16") else "float32"


def stage(verb: str, *arguments: str) -> float:
    """Run one verb to its end, its output on ours; returns seconds. Ends the demo where the verb fails."""
    print(f"\n$ hrnet {verb} {' '.join(map(short, arguments))}", flush=True)
    start = time.monotonic()
    code = subprocess.call([*HRNET, verb, *arguments], cwd=HERE, env=environment())
    if code not in (0, 3) or (code == 3 and verb != "promote"):
        sys.exit(f"hrnet {verb} ended with exit code {code}")
    return time.monotonic() - start


def deploy(url: str, *arguments: str) -> tuple[subprocess.Popen[bytes], float]:
    """The endpoint, a `hrnet deploy` process in a session of its own, and the seconds until it was ready."""
    print(f"\n$ hrnet deploy {' '.join(map(short, arguments))}", flush=True)
    start = time.monotonic()
    with LOG.open("w") as log:
        server = subprocess.Popen(
            [*HRNET, "deploy", *arguments],
            cwd=HERE,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C of the demo must not tear it down half way
        )
    while (seconds := time.monotonic() - start) < 120:
        if server.poll() is not None:
            sys.exit(f"hrnet deploy ended with {server.returncode}:\n{LOG.read_text()}")
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return server, seconds
        except OSError:
            time.sleep(0.3)
    stop(server)
    sys.exit(f"the endpoint was not ready after {seconds:g} s:\n{LOG.read_text()}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does; the verb ends Serve and its Ray itself."""
    server.send_signal(signal.SIGINT)
    try:
        server.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        raise SystemExit(f"hrnet deploy did not end within 60 s of Ctrl-C; log: {LOG}") from None


def crowded_photos(count: int) -> dict[Path, list[list[float]]]:
    """Drawn validation photos with the most people, and their boxes: nobody trained on them."""
    from hrnet_core.skeleton import COCO17
    from pipelines.sources.coco import read_coco

    split = read_coco(COCO, "val2017", COCO17)
    seen = (split.people.keypoints[..., 2] > 0).sum(axis=1) >= 10
    boxes = {photo: split.people.bbox_xywh[rows][seen[rows]].tolist() for photo, rows in split.by_photo()}
    most = sorted(boxes, key=lambda photo: (-len(boxes[photo]), photo.image_id))[:count]
    return {Path(photo.path): boxes[photo] for photo in most}


def ask(url: str) -> tuple[float, str]:
    """Real requests, one after the other; prints what came back. Seconds, and people/s in words."""
    from serve.client import overlay, poses

    photos = crowded_photos(20)
    print(f"\n$ POST {url}/v1/poses, {len(photos)} photos", flush=True)
    start = time.monotonic()
    for photo, boxes in photos.items():
        persons = poses(url, photo, boxes)["results"][0]["persons"]
        if len(persons) != len(boxes):
            sys.exit(f"{photo}: asked for {len(boxes)} people, got {len(persons)}")
    seconds = time.monotonic() - start
    total = sum(map(len, photos.values()))
    speed = f"{total / seconds:.0f} people/s, {len(photos)} requests one after the other"
    print(f"{total} people: {speed}")
    photo, boxes = next(iter(photos.items()))
    (DEMO / "served.png").write_bytes(overlay(url, photo, boxes))
    print("the first of them:", json.dumps(persons[0])[:160], "...")
    return seconds, speed


def summary(times: dict[str, float], total: float, said: dict[str, str]) -> None:
    """The AP, where the time went, and where to look."""
    evaluated = json.loads((RUN / "evaluation_gt" / "evaluation.json").read_text())
    found = evaluated["stats"]
    print("\n  on people it never saw, ground-truth boxes:")
    print("  " + "".join(f"{name:>7}" for name in found))
    print("  " + "".join(f"{value:7.3f}" for value in found.values()))
    done = {**speeds(times, evaluated["figures"]["people_per_second"]), **said}
    print("\n  stage         seconds")
    for name, seconds in times.items():
        print(f"  {name:<12} {seconds:8.1f}   {done.get(name, '')}".rstrip())
    print(f"  {'all':<12} {total:8.1f}\n")
    for what, where in {
        "a served photo": DEMO / "served.png",
        "evaluation report": DEMO / "report.html",
        "training pictures": RUN,
        "drawn set": COCO,
    }.items():
        print(f"  {what:<18} {short(str(where))}")
    print(f"  MLflow             {VENV}/mlflow ui --backend-store-uri sqlite:///{short(str(RUNS))}/mlflow.db")


def speeds(times: dict[str, float], evaluated: float) -> dict[str, str]:
    """What each stage did in a second, from what it wrote; start-up is in the seconds, not in these."""
    manifest = json.loads((SHARDS / "manifest.json").read_text())
    people = sum(split["people"] for split in manifest["splits"].values())
    trained = json.loads((RUN / "result.json").read_text())
    return {
        "draw": f"{IMAGES * 1.2 / times['draw']:.0f} pictures/s",
        "preprocess": f"{people / times['preprocess']:.0f} people/s with Ray's start",
        "train": f"{trained['samples'] / trained['seconds']:.0f} images/s, validation included",
        "evaluate": f"{evaluated:.0f} people/s" if evaluated else "",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """Embedded defaults: whatever Ray or tracking server the shell names is not the demo's."""
    hidden = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")
    return {**{k: v for k, v in os.environ.items() if k not in hidden}, "PYTHONUNBUFFERED": "1"}


def short(text: str) -> str:
    return text.replace(f"{HERE}/", "")


VENV = short(str(Path(sys.executable).parent))
HRNET = [sys.executable, "-m", "pipelines.cli"]

if __name__ == "__main__":
    sys.exit(main())
