"""`make demo`: from a drawn COCO folder to a served pose, by the commands a user would type.

Every stage is the real `hrnet` verb in a process of its own; this file only draws the set, calls the verbs
in order, times them, sends HTTP requests and says where everything lies. `--keep` leaves the endpoint up.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
DEMO = HERE / "demo"
COCO, SHARDS, RUNS, SAMPLES = DEMO / "coco", DEMO / "shards", DEMO / "runs", DEMO / "samples"
IMAGES = 1200  # about 2,800 people to learn from
NAME = "demo"


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--keep", action="store_true", help="leave the endpoint serving")
    keep = arguments.parse_args().keep
    DEMO.mkdir(exist_ok=True)
    made = {
        "draw": COCO / "drawn.json",
        "preprocess": SHARDS / "manifest.json",
        "train": RUNS / NAME / "result.json",
    }
    said = dict.fromkeys((stage for stage, file in made.items() if file.exists()), "there already")
    start = time.monotonic()
    common = ["--run.storage", str(RUNS)]
    data = ["--data.shards", str(SHARDS)]
    times = {
        "draw": stage("draw", str(COCO), "--images", str(IMAGES), "--seed", "1"),
        "preprocess": stage(
            "preprocess", "tiny", "--data.root", str(COCO), *data, "--data.people-per-shard", "256"
        ),
        "train": stage("train", "tiny", *data, "--run.name", NAME, "--train.num-workers", "2", *common),
        "evaluate": stage(
            "evaluate", str(RUNS / NAME / "best"), str(COCO), "--report", str(DEMO / "report.html"), *common
        ),
        "promote": stage("promote", *common),
    }
    photos = crowded_photos(20)
    offer_samples(dict(list(photos.items())[:6]))
    server, times["deploy"] = deploy(common)
    try:
        times["requests"], said["requests"] = ask(server.port, photos)
    except BaseException:
        server.stop()
        raise
    summary(times, time.monotonic() - start, said)
    if keep:
        print(
            f"  the endpoint stays up: http://127.0.0.1:{server.port}/   end it with: kill -INT {server.pid}"
        )
    else:
        server.stop()
        print("  nothing is left running; make demo KEEP=1 leaves the endpoint and its page up")
    return 0


def stage(verb: str, *arguments: str) -> float:
    """Run one verb to its end, its output on ours; returns seconds. Ends the demo where the verb fails."""
    print(f"\n$ hrnet {verb} {' '.join(short(a) for a in arguments)}", flush=True)
    start = time.monotonic()
    code = subprocess.call([*HRNET, verb, *arguments], cwd=HERE, env=environment())
    if code not in (0, 3) or (code == 3 and verb != "promote"):
        sys.exit(f"hrnet {verb} ended with exit code {code}")
    return time.monotonic() - start


class Server:
    """The deployed endpoint: a `hrnet deploy` process in a session of its own."""

    def __init__(self, common: list[str]) -> None:
        self.port = free_port()
        arguments = ["--serve.port", str(self.port), "--serve.samples", str(SAMPLES), *common]
        print(f"\n$ hrnet deploy {' '.join(short(a) for a in arguments)}", flush=True)
        self.log = DEMO / "serve.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*HRNET, "deploy", *arguments],
                cwd=HERE,
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C of the demo must not tear it down half way
            )
        self.pid = self.process.pid

    def wait_ready(self, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                sys.exit(f"hrnet deploy ended with {self.process.returncode}:\n{self.log.read_text()}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        self.stop()
        sys.exit(f"the endpoint was not ready after {seconds:g} s:\n{self.log.read_text()}")

    def stop(self) -> None:
        """As Ctrl-C does; the verb ends Serve and its Ray itself."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            raise SystemExit(f"hrnet deploy did not end within 60 s of Ctrl-C; log: {self.log}") from None


def deploy(common: list[str]) -> tuple[Server, float]:
    start = time.monotonic()
    server = Server(common)
    server.wait_ready()
    return server, time.monotonic() - start


def crowded_photos(count: int) -> dict[Path, list[list[float]]]:
    """Drawn validation photos with the most people, and their boxes: nobody trained on them."""
    ground_truth = json.loads((COCO / "annotations" / "person_keypoints_val2017.json").read_text())
    people: dict[int, list[list[float]]] = {}
    for annotation in ground_truth["annotations"]:
        if annotation["num_keypoints"] >= 10 and not annotation["iscrowd"]:
            people.setdefault(annotation["image_id"], []).append(annotation["bbox"])
    names = {image["id"]: image["file_name"] for image in ground_truth["images"]}
    chosen = sorted(people, key=lambda image_id: (-len(people[image_id]), image_id))[:count]
    return {COCO / "val2017" / names[image_id]: people[image_id] for image_id in chosen}


def offer_samples(photos: dict[Path, list[list[float]]]) -> None:
    """The folder behind the samples of the endpoint's page."""
    SAMPLES.mkdir(exist_ok=True)
    for photo in photos:
        shutil.copyfile(photo, SAMPLES / photo.name)
    (SAMPLES / "boxes.json").write_text(json.dumps({photo.name: boxes for photo, boxes in photos.items()}))


def ask(port: int, photos: dict[Path, list[list[float]]]) -> tuple[float, str]:
    """Real requests, one after the other; prints what came back. Seconds, and people/s in words."""
    from serve.client import overlay, poses

    url = f"http://127.0.0.1:{port}"
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


def speeds(times: dict[str, float]) -> dict[str, str]:
    """What each stage did in a second, from what it wrote; start-up is in the seconds, not in these."""
    manifest = json.loads((SHARDS / "manifest.json").read_text())
    people = sum(split["people"] for split in manifest["splits"].values())
    trained = json.loads((RUNS / NAME / "result.json").read_text())
    evaluated = json.loads((RUNS / NAME / "evaluation_gt" / "evaluation.json").read_text())["figures"]
    return {
        "draw": f"{IMAGES * 1.2 / times['draw']:.0f} pictures/s",
        "preprocess": f"{people / times['preprocess']:.0f} people/s with Ray's start",
        "train": f"{trained['samples'] / trained['seconds']:.0f} images/s, validation included",
        "evaluate": f"{evaluated['people_per_second']:.0f} people/s"
        if evaluated["people_per_second"]
        else "",
    }


def summary(times: dict[str, float], total: float, said: dict[str, str]) -> None:
    """The AP, where the time went, and where to look."""
    found = json.loads((RUNS / NAME / "evaluation_gt" / "evaluation.json").read_text())["stats"]
    print("\n  on people it never saw, ground-truth boxes:")
    print("  " + "".join(f"{name:>7}" for name in found))
    print("  " + "".join(f"{value:7.3f}" for value in found.values()))
    done = {**speeds(times), **said}
    print("\n  stage         seconds")
    for name, seconds in times.items():
        print(f"  {name:<12} {seconds:8.1f}   {done.get(name, '')}".rstrip())
    print(f"  {'all':<12} {total:8.1f}\n")
    for what, where in {
        "a served photo": DEMO / "served.png",
        "evaluation report": DEMO / "report.html",
        "training pictures": RUNS / NAME,
        "drawn set": COCO,
    }.items():
        print(f"  {what:<18} {short(str(where))}")
    print(f"  MLflow             {VENV}/mlflow ui --backend-store-uri sqlite:///{short(str(RUNS))}/mlflow.db")


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
