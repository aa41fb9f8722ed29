"""Recipes at equal steps on drawn people: AP on people never seen, mean and spread over seeds.

    python tests/benchmarks/bench_recipes.py FOLDER                        official, udp, modern: 9 runs
    python tests/benchmarks/bench_recipes.py FOLDER --recipes udp+ema udp+photometric modern-ema ...
    python tests/benchmarks/bench_recipes.py FOLDER --images 60 --epochs 120 --batch-size 8
                                                           few people, learnt by heart: 1,920 steps
    python tests/benchmarks/bench_recipes.py FOLDER --coco COCO ...
                                                           photographs, in place of --images drawn ones

The network and the views are `tiny`'s (1.25 M parameters) at 96x64; the steps, the batch and the highest rate
(`tiny`'s, times the root of the batch's ratio) are the same for all. A recipe is official, udp, dark or
modern, or one of them with (+) or without (-) one INGREDIENT of modern.yaml. The AP is the last epoch's
(ground-truth boxes, flip test), not the best one's.
What is done is kept in FOLDER/runs.jsonl: the same command goes on, and the table is of all that is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import torch

from pipelines.cli import main as hrnet
from pipelines.settings.config import RunConfig
from pipelines.settings.config_file import load_config
from pipelines.settings.train import TrainSettings
from pipelines.storage.files import write_whole
from pipelines.training.loop import train_epochs
from pipelines.training.state import Job, set_up

SIZE = (64, 96)
"""Width and height of the crops."""
INGREDIENTS: dict[str, tuple[str, ...]] = {
    "adamw": ("optimizer", "weight_decay", "decay_norms"),
    "flat_cosine": ("schedule",),
    "ema": ("ema_decay", "ema_warmup"),
    "bfloat16": ("precision",),
    "photometric": ("photometric",),
    "coarse_dropout": ("coarse_dropout",),
    "dropping": ("information_dropping", "dropping_from"),
}
"""Of modern.yaml: the settings of each."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["official", "udp", "modern"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=450, help="to learn from")
    parser.add_argument("--coco", type=Path, help="photographs in place of drawn people: a COCO root")
    parser.add_argument("--val-images", type=int, default=225, help="to score")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    kept = args.folder / "runs.jsonl"
    setting = {name: getattr(args, name) for name in ("epochs", "images", "batch_size")}
    if args.coco:
        setting["images"] = str(args.coco.resolve())
    for seed in args.seeds:  # all recipes of a seed, then the next: a table that is cut short is of all
        for recipe in args.recipes:
            how = {"recipe": recipe, "seed": seed, **setting}
            if not any(row.items() >= how.items() for row in rows_of(kept)):
                row = {**how, **train(config_of(recipe, seed, args), args)}
                args.folder.mkdir(parents=True, exist_ok=True)
                with kept.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)
    print(table([row for row in rows_of(kept) if row.items() >= setting.items()]))
    return 0


def rows_of(kept: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []


def config_of(recipe: str, seed: int, args: argparse.Namespace) -> RunConfig:
    """The settings of a run. ValueError for a recipe of another name."""
    sign = "+" if "+" in recipe else "-"
    name, sign, ingredient = recipe.partition(sign)
    if name not in ("official", "udp", "dark", "modern") or (sign and ingredient not in INGREDIENTS):
        raise ValueError(f"no recipe {recipe!r}: see --help, and {', '.join(INGREDIENTS)}")
    tiny, modern = load_config("tiny"), load_config("modern").train
    official = {
        "num_workers": 1,
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "lr": tiny.train.lr * (args.batch_size / tiny.train.batch_size) ** 0.5,
        "schedule": "step",  # the published milestones, as shares of the run
        "milestones": (round(args.epochs * 170 / 210), round(args.epochs * 200 / 210)),
        "validate_every": args.epochs,
        "seed": seed,
    }
    settings = tiny.train.model_dump() | official
    of = {key: [getattr(modern, setting) for setting in names] for key, names in INGREDIENTS.items()}
    wanted = set(INGREDIENTS) if name == "modern" else set()
    wanted = wanted | {ingredient} if sign == "+" else wanted - {ingredient}
    for key in wanted:
        settings |= dict(zip(INGREDIENTS[key], of[key], strict=True))
    codec = "udp" if name == "modern" else name
    data = tiny.data.model_copy(update={"codec": codec, "sigma": None, "input_size": SIZE})
    return tiny.model_copy(update={"data": data, "train": TrainSettings(**settings)})


def train(config: RunConfig, args: argparse.Namespace) -> dict[str, float]:
    """Draws and preprocesses what is not there yet; one run in this process. The loss is of the people to be
    scored, train_loss of the last steps, with noise where there is any."""
    coco, codec = args.coco or args.folder / f"coco-{args.images}", config.data.codec
    shards = args.folder / f"shards-{'photographs' if args.coco else args.images}-{codec}"
    if not (shards / "manifest.json").exists():
        many = ["--images", str(args.images), "--val-images", str(args.val_images), "--seed", "1"]
        places = ["--data.root", str(coco), "--data.shards", str(shards)]
        layer = args.folder / f"{codec}.yaml"
        write_whole(str(layer), f"base: tiny\ndata: {{codec: {codec}, sigma: null, input_size: {[*SIZE]}}}\n")
        if not args.coco and hrnet(["draw", str(coco), *many]):
            sys.exit("the set could not be drawn")
        if hrnet(["preprocess", str(layer), *places]):
            sys.exit("the set could not be made")
    begun = time.perf_counter()
    where = args.folder / "runs" / time.strftime("%Y%m%d-%H%M%S")
    job = Job(config, str(shards), str(where), tracking_uri=None)
    run = set_up(job, 0, 1, torch.device("cpu"), lambda figures, saved: None)
    train_epochs(run)
    assert run.log is not None
    (scored,) = (row for row in run.log.rows if "val_gt/AP" in row)
    figures = {name: scored[f"val_gt/{name}"] for name in ("AP", "AP50", "AP75", "loss")}
    figures["train_loss"] = [row["train/loss"] for row in run.log.rows if "train/loss" in row][-1]
    return {**figures, "steps": run.standing.total_steps, "seconds": round(time.perf_counter() - begun)}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean AP and its least and most over seeds, and mean loss of those who are scored; of both the mean
    difference to udp of the same seeds and the standard error of that."""
    by: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        by.setdefault(row["recipe"], {})[row["seed"]] = row
    heads = "recipe", "seeds", "AP, mean", "least to most", "against udp", "loss x 1000", "against udp"
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for recipe, found in by.items():
        aps = [row["AP"] for row in found.values()]
        loss = 1000 * statistics.mean(row["loss"] for row in found.values())
        against = ["", ""]
        pairs = [(row, by["udp"][seed]) for seed, row in found.items() if seed in by.get("udp", {})]
        if recipe != "udp" and len(pairs) > 1:
            for i, (name, factor, digits) in enumerate((("AP", 1, 3), ("loss", 1000, 4))):
                differences = [factor * (row[name] - udp[name]) for row, udp in pairs]
                error = statistics.stdev(differences) / len(pairs) ** 0.5
                against[i] = f"{statistics.mean(differences):+.{digits}f} ± {error:.{digits}f}"
        lines.append(
            f"| {recipe} | {len(aps)} | {statistics.mean(aps):.3f} | {min(aps):.3f} to {max(aps):.3f} "
            f"| {against[0]} | {loss:.4f} | {against[1]} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
