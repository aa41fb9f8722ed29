"""`hrnet VERB ...`: the one reader of the command line (also `python -m pipelines.cli`).

Each verb is a function below: it reads its arguments, calls its stage and returns the exit code.
0 done, 2 wrong input or configuration, 3 promote kept the old champion, 1 anything else.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from pydantic import Field, ValidationError

from hrnet_core.errors import ConfigError, PoseError
from pipelines.config import (
    DataSettings,
    EvaluateSettings,
    PredictSettings,
    RaySettings,
    RunConfig,
    RunSettings,
    Section,
    ServeSettings,
    TrackSettings,
    explain,
    load_config,
)

Arguments = TypeVar("Arguments", bound=Section)


def positional(name: str) -> tuple[Any, Any]:
    """Marks of an argument that has no flag, under the name that the usage line shows."""
    return tyro.conf.Positional, tyro.conf.arg(metavar=name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    verb = VERBS.get(arguments[0])
    if verb is None:
        print(f"hrnet: no verb {arguments[0]!r}.\n\n{usage()}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    try:
        return verb(arguments[1:])
    except PoseError as error:
        print(f"hrnet {arguments[0]}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # hrnet ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"hrnet {arguments[0]}: stopped", file=sys.stderr)
        return 130


def usage() -> str:
    """The verbs, a line each, in the order of a project's life."""
    lines = [f"  {name:<15} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "hrnet VERB ...    top-down human pose, from a COCO folder to a served model\n\n" + "\n".join(
        [*lines, "", "hrnet VERB --help shows its arguments."]
    )


def parse(model: type[Arguments], verb: str, argv: Sequence[str], about: str) -> Arguments:
    """Arguments of a verb as its model; ConfigError where fields contradict each other."""
    try:
        return tyro.cli(model, args=list(argv), prog=f"hrnet {verb}", description=about)
    except ValidationError as error:
        raise ConfigError(explain(error, f"arguments of hrnet {verb}")) from None


def parse_config(verb: str, argv: Sequence[str], about: str) -> RunConfig:
    """`CONFIG [--section.field value ...]` as a RunConfig: the YAML's values, then the overrides."""
    asks_help = any(a in ("-h", "--help") for a in argv)
    if not argv or argv[0].startswith("-"):
        if not asks_help:
            raise ConfigError(
                f"name a config first: hrnet {verb} CONFIG ..., a YAML file or a shipped name such as "
                f"w32_256x192 (hrnet {verb} --help lists every setting)."
            )
        config, overrides = RunConfig(), list(argv)
    else:
        config, overrides = load_config(argv[0]), list(argv[1:])
    try:
        return tyro.cli(
            RunConfig, default=config, args=overrides, prog=f"hrnet {verb} CONFIG", description=about
        )
    except ValidationError as error:
        raise ConfigError(explain(error, f"arguments of hrnet {verb}")) from None


# --- the verbs ---------------------------------------------------------------------------------


class DrawArguments(Section):
    out: Annotated[str, *positional("OUT")]
    """Folder to write the COCO root into."""
    images: int = Field(default=200, ge=1)
    """Training pictures."""
    val_images: int | None = Field(default=None, ge=1)
    """Validation pictures; default: a fifth of `images`, at least 4."""
    seed: int = Field(default=0, ge=0)
    workers: int = Field(default=os.cpu_count() or 1, ge=1)
    """Processes; the pictures do not depend on it."""


def draw(argv: Sequence[str]) -> int:
    """draw a small COCO set of people, deterministic in its seed"""
    args = parse(DrawArguments, "draw", argv, "Draw a COCO root of articulated people.")
    from pipelines.draw import draw as draw_set

    print(draw_set(args.out, args.images, args.seed, args.val_images, args.workers))
    return 0


class ValidateArguments(Section):
    coco: Annotated[str, *positional("COCO")]
    """COCO root."""
    decode: bool = True
    """Decode every picture, as preprocess will. Without: header and end only, several times faster; damage
    in between is not seen."""
    checksums: str | None = None
    """File as sha256sum writes it, with paths relative to COCO: names pictures with other bytes."""
    examples: int = Field(default=3, ge=0)
    """Rows shown of each kind."""
    out: str | None = None
    """Also write every finding into this CSV file."""
    workers: int = Field(default=os.cpu_count() or 1, ge=1)
    """Threads that open pictures."""
    data: DataSettings = DataSettings()


def validate(argv: Sequence[str]) -> int:
    """what is wrong with a COCO folder, and the way out; fails if training on it would be wrong"""
    args = parse(ValidateArguments, "validate", argv, "Check a COCO folder before any work is put into it.")
    if args.data.root not in ("", args.coco):
        raise ConfigError(
            f"--data.root {args.data.root}: the folder to check is the first argument, {args.coco}."
        )
    from pipelines.validate import validate as check
    from pipelines.validate import write_csv

    found = check(args.coco, args.data, decode=args.decode, checksums=args.checksums, workers=args.workers)
    print(found.table(args.examples))
    if args.out:
        write_csv(found, args.out)
        print(f"every finding: {args.out}")
    return found.exit_code


def preprocess(argv: Sequence[str]) -> int:
    """COCO keypoints to Parquet crops with heatmaps, on Ray Data"""
    config = parse_config("preprocess", argv, "Cut people and their heatmaps out of a COCO folder.")
    _need(config.data.root, "--data.root COCO", "the folder with annotations/ and the pictures")
    _need(config.data.shards, "--data.shards SHARDS", "the folder to write the dataset into")
    from pipelines.preprocess import preprocess as build

    build(config)
    return 0


class InspectArguments(Section):
    shards: Annotated[str, *positional("SHARDS")]
    """Folder or URI of a dataset that hrnet preprocess wrote."""
    out: str | None = None
    """Folder for the page, the pictures and card.json; default: SHARDS_inspection beside the dataset."""
    coco: str | None = None
    """The COCO root it was made from: shows the pictures of what was left out."""
    log: bool = False
    """Also record card and pictures in MLflow, as the run of this dataset's digest."""
    run: RunSettings = RunSettings()
    track: TrackSettings = TrackSettings()


def inspect(argv: Sequence[str]) -> int:
    """check a dataset's shards, count what is in them, and draw a page of it"""
    args = parse(InspectArguments, "inspect", argv, "Check, count and show a preprocessed dataset.")
    from pipelines.inspect_shards import inspect_shards

    print(inspect_shards(args.shards, args.out, args.coco, args.log, args.track, args.run.storage))
    return 0


def train(argv: Sequence[str]) -> int:
    """train HRNet on shards, DDP on Ray Train, followed in MLflow"""
    config = parse_config("train", argv, "Train an HRNet on preprocessed shards.")
    _need(config.data.shards, "--data.shards SHARDS", "the folder that hrnet preprocess wrote")
    from pipelines.train import train as fit

    fit(config)
    return 0


class EvaluateArguments(Section):
    checkpoint: Annotated[str | None, *positional("CHECKPOINT")] = None
    """Checkpoint folder, or models:/hrnet-pose@champion."""
    coco: Annotated[str | None, *positional("COCO")] = None
    """COCO root."""
    boxes: str | None = None
    """Person detections as COCO results JSON; default: the ground truth's boxes."""
    split: str = "val2017"
    results: str | None = None
    """Score this COCO results file instead of running a model; needs ground_truth."""
    ground_truth: str | None = None
    """Annotations that `results` is scored against."""
    skeleton: str = "coco17"
    """For `results`: whose OKS constants to use."""
    use_area: bool = True
    """For `results`: OKS by the annotations' area; without it by the box, for sets that have none."""
    measure_modes: bool = False
    """Evaluate in every execution mode and write the differences into checkpoint.json, for mode auto."""
    out: str | None = None
    """Folder for results, report and pictures; default: beside the checkpoint. For `results`: for
    figures.json with all digits."""
    report: str | None = None
    """Also write one HTML file with figures and pictures here."""
    evaluate: EvaluateSettings = EvaluateSettings()
    run: RunSettings = RunSettings()
    track: TrackSettings = TrackSettings()
    ray: RaySettings = RaySettings()


def evaluate(argv: Sequence[str]) -> int:
    """OKS-AP of a checkpoint on COCO, or of anyone's results file"""
    args = parse(EvaluateArguments, "evaluate", argv, "Evaluate by the COCO keypoint protocol.")
    if args.results or args.ground_truth:
        return _score(args)
    _need(
        args.checkpoint,
        "CHECKPOINT",
        "hrnet evaluate CHECKPOINT COCO, or --results R.json --ground-truth GT.json",
    )
    _need(args.coco, "COCO", "the folder with annotations/ and the pictures")
    if args.measure_modes:
        return _measure_modes(args)
    from pipelines.evaluate import evaluate as measure

    result = measure(
        args.checkpoint,
        args.coco,
        out=args.out or _evaluation_folder(args),
        split=args.split,
        boxes=args.boxes,
        settings=args.evaluate,
        ray=args.ray,
        track=args.track,
        storage=args.run.storage,
        report=args.report,
    )
    print(result.table())
    print(
        f"results, figures and pictures: {result.folder}"
        + (f"; report: {args.report}" if args.report else "")
    )
    print(
        f"recorded with {result.version}"
        if result.version
        else "not a registered model: nothing was recorded"
    )
    return 0


def _score(args: EvaluateArguments) -> int:
    """The ten figures of a results file that anyone made."""
    _need(args.results, "--results R.json", "the COCO results to score")
    _need(args.ground_truth, "--ground-truth GT.json", "the annotations to score them against")
    from hrnet_core.skeleton import load_skeleton
    from pipelines.poses.oks_ap import evaluate_results

    if args.report or args.boxes or args.measure_modes or args.checkpoint:
        raise ConfigError(
            "--results scores a file: CHECKPOINT, --boxes, --report and --measure-modes belong to running a "
            "model on photographs. Leave them out, or leave out --results."
        )
    stats = evaluate_results(
        args.results, args.ground_truth, skeleton=load_skeleton(args.skeleton), use_area=args.use_area
    )
    print("  ".join(f"{name:>9}" for name in stats))
    print("  ".join(f"{value:9.4f}" for value in stats.values()))
    if args.out:
        target = Path(args.out) / "figures.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(stats, indent=1) + "\n")
        print(f"all digits: {target}")
    return 0


def _measure_modes(args: EvaluateArguments) -> int:
    """A table of all modes; what auto takes from now on."""
    if args.report:
        raise ConfigError("--measure-modes writes no report: evaluate once more without it, with --report.")
    from pipelines.measure_modes import measure_modes

    measured = measure_modes(
        args.checkpoint,
        args.coco,
        out=args.out or Path(f"{_evaluation_folder(args)}_modes"),
        split=args.split,
        boxes=args.boxes,
        settings=args.evaluate,
        ray=args.ray,
    )
    print(measured)
    print(f"written into {Path(args.checkpoint) / 'checkpoint.json'}")
    return 0


def _evaluation_folder(args: EvaluateArguments) -> Path:
    """Beside a local checkpoint; in the storage folder for one that comes from elsewhere."""
    kind = "evaluation_det" if args.boxes else "evaluation_gt"
    if ":/" in args.checkpoint:
        return Path(args.run.storage) / "evaluations" / re.sub(r"[^\w.-]+", "_", args.checkpoint) / kind
    return Path(args.checkpoint).parent / kind


class PredictArguments(Section):
    sources: Annotated[tuple[str, ...], *positional("SOURCE...")] = ()
    """Pictures, videos, folders, globs, URIs of buckets."""
    checkpoint: str = "models:/hrnet-pose@champion"
    """Checkpoint folder, URI or registered model."""
    boxes: str | None = None
    """JSON with people's boxes: COCO annotations or detections, or {"picture.jpg": [[x, y, w, h], ...]}."""
    detector: str | None = None
    """ONNX person detector, its declaration MODEL.json beside it. Neither: each picture is one person."""
    out: str | None = None
    """Folder for the results; default: STORAGE/predictions/NAME-DIGEST."""
    predict: PredictSettings = PredictSettings()
    run: RunSettings = RunSettings()
    track: TrackSettings = TrackSettings()
    ray: RaySettings = RaySettings()


def predict(argv: Sequence[str]) -> int:
    """poses of pictures and videos, as COCO, Parquet, OpenPose, overlays"""
    args = parse(PredictArguments, "predict", argv, "Predict poses of pictures and videos.")
    _need(args.sources, "SOURCE", "a picture, a video, a folder, a glob or a URI")
    from pipelines.predict import predict as answer

    print(
        answer(
            args.sources,
            args.checkpoint,
            out=args.out,
            boxes=args.boxes,
            detector=args.detector,
            settings=args.predict,
            ray=args.ray,
            track=args.track,
            storage=args.run.storage,
        )
    )
    return 0


class PromoteArguments(Section):
    candidate: Annotated[str | None, *positional("CANDIDATE")] = None
    """Version of the registered model; default: the newest."""
    run: RunSettings = RunSettings()
    track: TrackSettings = TrackSettings()


def promote(argv: Sequence[str]) -> int:
    """make a model version champion if its AP is not worse on the same data"""
    args = parse(PromoteArguments, "promote", argv, "Move the champion alias, if the AP allows it.")
    from pipelines.promote import promote as decide

    decision = decide(args.candidate, track=args.track, storage=args.run.storage)
    print(decision)
    return decision.exit_code


class DeployArguments(Section):
    checkpoint: Annotated[str, *positional("CHECKPOINT")] = "models:/hrnet-pose@champion"
    """Checkpoint folder, URI or registered model."""
    serve: ServeSettings = ServeSettings()
    run: RunSettings = RunSettings()
    track: TrackSettings = TrackSettings()
    ray: RaySettings = RaySettings()


def deploy(argv: Sequence[str]) -> int:
    """serve a checkpoint over HTTP on Ray Serve"""
    args = parse(DeployArguments, "deploy", argv, "Serve a checkpoint over HTTP.")
    from pipelines.deploy import deploy as serve

    serve(args.checkpoint, args.serve, run=args.run, track=args.track, ray_settings=args.ray)
    return 0


class ImportArguments(Section):
    file: Annotated[Path, *positional("FILE")]
    """Published weights: official, MMPose 0.x or 1.x, or any file with the published names."""
    out: Annotated[Path, *positional("OUT")]
    """Checkpoint folder to write."""
    codec: str = "official"
    """official, dark or udp: what the weights were trained for."""
    input_size: tuple[int, int] = (192, 256)
    """(width, height) of the crops the weights were trained for."""
    sigma: float | None = None
    skeleton: str = "coco17"


def import_(argv: Sequence[str]) -> int:
    """published weights into a checkpoint folder, with a match report"""
    args = parse(ImportArguments, "import", argv, "Turn a published weights file into a checkpoint folder.")
    from pipelines.import_weights import import_weights

    import_weights(args.file, args.out, args.codec, args.input_size, args.skeleton, args.sigma)
    return 0


class ExportArguments(Section):
    checkpoint: Annotated[str, *positional("CHECKPOINT")]
    """Checkpoint folder, or models:/hrnet-pose@champion."""
    out: Annotated[str | None, *positional("OUT")] = None
    """ONNX file to write; default: model.onnx in the checkpoint folder, where mode onnx finds it."""
    coco: str | None = None
    """COCO root: compare keypoints and AP on some of its people too."""
    split: str = "val2017"
    boxes: str | None = None
    """Person detections as COCO results JSON; default: the ground truth's boxes."""
    people: int = Field(default=200, ge=1)
    """How many people to compare on, in whole photographs from the first."""
    evaluate: EvaluateSettings = EvaluateSettings()
    run: RunSettings = RunSettings()
    track: TrackSettings = TrackSettings()


def export(argv: Sequence[str]) -> int:
    """a checkpoint as an ONNX file, with a report of how equal it is"""
    args = parse(ExportArguments, "export", argv, "Write the network as ONNX and compare it with torch.")
    from pipelines.export import export as write

    parity = write(
        args.checkpoint,
        args.out,
        coco_root=args.coco,
        split=args.split,
        boxes=args.boxes,
        people=args.people,
        settings=args.evaluate,
        track=args.track,
        storage=args.run.storage,
    )
    print(parity)
    return 0


class EstimateSigmasArguments(Section):
    files: Annotated[tuple[str, ...], *positional("ANNOTATIONS.json")] = ()
    """Two or more COCO keypoint files of the same people, one an annotator."""
    out: str = "skeleton.json"
    """Skeleton file to write."""
    skeleton: str | None = None
    """Skeleton whose other fields are kept; default: names and limbs of the annotations."""
    use_area: bool = True
    """Distances by the annotations' area; without it by the box, for sets that have none."""


def estimate_sigmas(argv: Sequence[str]) -> int:
    """OKS constants of a skeleton from people whom several annotators labelled"""
    args = parse(EstimateSigmasArguments, "estimate-sigmas", argv, "Estimate OKS constants.")
    from pipelines.estimate_sigmas import estimate_sigmas as estimate

    print(estimate(args.files, args.out, skeleton=args.skeleton, use_area=args.use_area))
    print(f"wrote {args.out}")
    return 0


class ReproduceArguments(Section):
    coco: Annotated[str, *positional("COCO")]
    """COCO root with val2017."""
    weights_dir: str
    """Folder of the published pose_hrnet_*.pth files."""
    boxes: str
    """COCO_val2017_detections_AP_H_56_person.json, the published detector's boxes."""
    models: tuple[str, ...] = ()
    """Which of w32_256x192 w32_384x288 w48_256x192 w48_384x288; default: all."""
    out: str = "runs/reproduce"
    evaluate: EvaluateSettings = EvaluateSettings()
    ray: RaySettings = RaySettings()


def reproduce(argv: Sequence[str]) -> int:
    """AP of the published weights beside the published AP; fails beyond .002"""
    args = parse(ReproduceArguments, "reproduce", argv, "Evaluate the published weights on COCO val2017.")
    from pipelines.reproduce import reproduce as compare

    outcome = compare(
        args.coco,
        args.weights_dir,
        args.boxes,
        models=args.models,
        out=args.out,
        settings=args.evaluate,
        ray=args.ray,
    )
    return 0 if outcome.passed else 1


def _need(value: str | tuple[str, ...] | None, flag: str, what: str) -> None:
    if not value:
        raise ConfigError(f"{flag} is missing: {what}.")


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "draw": draw,
    "validate": validate,
    "preprocess": preprocess,
    "inspect": inspect,
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "promote": promote,
    "deploy": deploy,
    "import": import_,
    "export": export,
    "estimate-sigmas": estimate_sigmas,
    "reproduce": reproduce,
}

if __name__ == "__main__":
    sys.exit(main())
