"""`hrnet VERB ...`: the one reader of the command line (also `python -m pipelines.cli`).

Each verb is a function below: it calls its stage with its arguments (settings/arguments.py) and returns the
exit code, where that is not 0. 0 done, 2 wrong input or configuration, 3 promote kept the old champion,
130 stopped by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP, 1 anything else. A stage is imported by its verb:
`--help` costs no torch or Ray.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import tyro

from hrnet_core import memory
from hrnet_core.errors import ConfigError, Failure, PoseError, first_line
from hrnet_core.locations import file_to_write, folder_to_write, is_uri, refuse_credentials
from pipelines.process.stop import exit_code, leave_closed_outputs, stoppable
from pipelines.settings import arguments
from pipelines.settings.config import RunConfig
from pipelines.settings.config_file import load_config, refused
from pipelines.settings.section import Section

Given = TypeVar("Given", str, tuple[str, ...])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    memory.collect_seldom()
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name not in VERBS:
        # Of a URI, which may hold credentials, its scheme.
        print(f"hrnet: no verb {name.partition('://')[0]!r}.\n\n{usage()}", file=sys.stderr)
        return 2
    if (encoding := sys.getfilesystemencoding()) != "utf-8":  # PYTHONUTF8=0, or an old locale
        print(
            f"hrnet: names of files are taken for {encoding} here (LC_ALL, LC_CTYPE or LANG), so that those "
            f"in UTF-8 would not be found. Set PYTHONUTF8=1.",
            file=sys.stderr,
        )
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    try:
        with stoppable():
            return VERBS[name][0](parse(name, rest)) or 0
    except PoseError as error:
        print(f"hrnet {name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # hrnet ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as error:
        leave_closed_outputs()
        # Where its import was stopped, torch would say its statistics at the end.
        logging.getLogger("torch").setLevel(logging.CRITICAL)
        print(f"hrnet {name}: {error}{GOES_ON.get(name, '')}", file=sys.stderr)
        return exit_code(error)
    except Failure as error:
        print(f"hrnet {name}: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        print(f"hrnet {name}: {_unexpected(error)}", file=sys.stderr)
        return 1


def _unexpected(error: Exception) -> str:
    """A sentence for what is our defect or an engine's, and the file that has its traceback."""
    with tempfile.NamedTemporaryFile("w", prefix="hrnet-error-", suffix=".log", delete=False) as file:
        file.write("".join(traceback.format_exception(error)))
    return (
        f"{type(error).__name__}: {first_line(error)}. This is not for you to cure: please report it, with "
        f"{file.name}, which has the traceback."
    )


def usage() -> str:
    """The verbs, a line each, in the order of a project's life."""
    head = "hrnet VERB ...    top-down human pose, from a COCO folder to a served model"
    lines = [f"  {name:<15} {run.__doc__}" for name, (run, *_) in VERBS.items()]
    return "\n".join([head, "", *lines, "", "hrnet VERB --help shows its arguments."])


def parse(verb: str, argv: Sequence[str]) -> Any:
    """A verb's arguments as its model. ConfigError where fields contradict each other.

    A RunConfig is `CONFIG [--section.field value ...]`: the YAML's values, then the overrides.
    """
    for flag, given in pairwise(["", *argv]):
        if "--track.uri" not in (flag, given.partition("=")[0]):  # a server's may hold its password
            refuse_credentials(given)
    _, model, about = VERBS[verb]
    prog, default = f"hrnet {verb}", dict[str, Any]()
    if model is RunConfig:
        prog = f"{prog} CONFIG"
        if argv and not argv[0].startswith("-"):
            default, argv = {"default": load_config(argv[0])}, argv[1:]
        elif not {"-h", "--help"} & set(argv):
            raise ConfigError(
                f"name a config first: hrnet {verb} CONFIG ..., a YAML file or a shipped name such as "
                f"w32_256x192 (hrnet {verb} --help lists every setting)."
            )
    how: dict[str, Any] = {"args": list(argv), "prog": prog, "description": about, **default}
    try:
        # tyro shows a value that a model refuses as pydantic's lines in a box; a config file gets a sentence.
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(model, **how)
    except SystemExit as ended:
        if why := refused(ended):
            raise ConfigError(why) from None
        if not ended.code:  # help, on stdout
            raise
    return tyro.cli(model, **how)  # what tyro itself has to say, to a terminal if it is one


def _need(value: Given | None, flag: str, what: str) -> Given:
    if not value:
        raise ConfigError(f"{flag} is missing: {what}.")
    return value


def _given(args: Section) -> dict[str, Any]:
    """Arguments under the names that stages have for them: mostly the same."""
    names = {"coco": "coco_root", "evaluate": "settings", "predict": "settings", "run": "storage"}
    return {names.get(name, name): value.storage if name == "run" else value for name, value in args}


# --- the verbs ---------------------------------------------------------------------------------


def draw(args: arguments.Draw) -> None:
    """draw a small COCO set of people, deterministic in its seed"""
    from pipelines.draw import draw

    print(draw(**_given(args)))


def validate(args: arguments.Validate) -> int:
    """what is wrong with a COCO folder, and the way out; fails if training or an AP on it would be wrong"""
    if args.data.root not in ("", args.coco):
        raise ConfigError(
            f"--data.root {args.data.root}: the folder to check is the first argument, {args.coco}."
        )
    from pipelines.sources.findings import wrapped
    from pipelines.validate import validate, write_csv

    for place, flag in ((args.out, "--out"), (args.page, "--page")):
        if place:
            file_to_write(place, flag)

    found = validate(
        args.coco,
        args.data,
        decode=args.decode,
        most=args.read,
        checksums=args.checksums,
        workers=args.workers,
    )
    table = found.table(args.examples)
    print(wrapped(table, shutil.get_terminal_size().columns) if sys.stdout.isatty() else table)
    if args.out:
        write_csv(found, args.out)
        print(f"every finding: {args.out}")
    if args.page:
        from hrnet_core.skeleton import load_skeleton
        from pipelines.pages.findings import write_findings

        write_findings(args.page, found, load_skeleton(args.data.skeleton), args.data.max_pixels)
        print(f"page: {args.page}")
    return found.exit_code


def preprocess(config: RunConfig) -> None:
    """COCO keypoints to Parquet crops with heatmaps, on Ray Data"""
    _need(config.data.root, "--data.root COCO", "the folder with annotations/ and the pictures")
    _need(config.data.shards, "--data.shards SHARDS", "the folder to write the dataset into")
    from pipelines.preprocess import preprocess

    preprocess(config)


def inspect(args: arguments.Inspect) -> None:
    """check a dataset's shards, count what is in them, and draw a page of it"""
    from pipelines.inspect_shards import inspect_shards

    print(f"pictures and page: {inspect_shards(**_given(args))}")


def train(config: RunConfig) -> None:
    """train HRNet on shards, DDP on Ray Train, followed in MLflow"""
    _need(config.data.shards, "--data.shards SHARDS", "the folder that hrnet preprocess wrote")
    from pipelines.train import train

    if config.sweep.space:
        print("one run: its section `sweep` is hrnet sweep's", flush=True)
    train(config)


def sweep(config: RunConfig) -> None:
    """trials of a declared space of settings, on Ray Tune (ASHA), each a training run"""
    _need(config.data.shards, "--data.shards SHARDS", "the folder that hrnet preprocess wrote")
    from pipelines.sweep import sweep

    print(sweep(config))


def evaluate(args: arguments.Evaluate) -> None:
    """OKS-AP of a checkpoint on COCO, or of anyone's results file"""
    if args.results or args.ground_truth:
        return _score(args)
    both = "hrnet evaluate CHECKPOINT COCO, or --results R.json --ground-truth GT.json"
    checkpoint = _need(args.checkpoint, "CHECKPOINT", both)
    coco = _need(args.coco, "COCO", "the folder with annotations/ and the pictures")
    from pipelines.tracking.checkpoints import evaluation_folder

    out = args.out or evaluation_folder(checkpoint, "det" if args.boxes else "gt", args.run.storage)
    what: dict[str, Any] = {"split": args.split, "boxes": args.boxes}
    what |= {"settings": args.evaluate, "ray": args.ray}
    if args.measure_modes:
        if args.report:
            raise ConfigError("--measure-modes writes no report: evaluate again with --report alone.")
        from pipelines.measure_modes import measure_modes
        from pipelines.storage.files import join

        print(measure_modes(checkpoint, coco, out=args.out or _beside(out, "_modes"), **what))
        print(f"written into {join(checkpoint, 'checkpoint.json')}")
        return
    from pipelines.evaluate import evaluate

    result = evaluate(
        checkpoint, coco, out=out, report=args.report, track=args.track, storage=args.run.storage, **what
    )
    print(result.table())
    report = f"; report: {args.report}" if args.report else ""
    print(f"results, figures and pictures: {result.folder}{report}")
    recorded = f"recorded with {result.version}"
    print(recorded if result.version else "not a registered model: nothing was recorded")


def _score(args: arguments.Evaluate) -> None:
    """The ten figures of a results file that anyone made."""
    results = _need(args.results, "--results R.json", "the COCO results to score")
    ground_truth = _need(args.ground_truth, "--ground-truth GT.json", "the annotations to score them against")
    from hrnet_core.skeleton import load_skeleton
    from pipelines.poses.oks_ap import evaluate_results
    from pipelines.storage.files import join, writable, write_json

    folder = folder_to_write(args.out, "--out") if args.out else None
    if args.report or args.boxes or args.measure_modes or args.checkpoint:
        raise ConfigError(
            "--results scores a file: CHECKPOINT, --boxes, --report and --measure-modes belong to running a "
            "model on photographs. Leave them out, or leave out --results."
        )
    stats = evaluate_results(
        results,
        ground_truth,
        skeleton=load_skeleton(args.skeleton),
        use_area=args.use_area,
        category=args.evaluate.category,
        coordinates_checked=args.evaluate.coordinates_checked,
    )
    print("  ".join(f"{name:>9}" for name in stats))
    print("  ".join(f"{value:9.4f}" for value in stats.values()))
    if folder:
        with writable(folder):
            write_json(join(folder, "figures.json"), stats)
        print(f"all digits: {join(folder, 'figures.json')}")


def _beside(folder: str, ending: str) -> str:
    """A path or URI with something at the end of its name."""
    address, mark, query = folder.partition("?") if is_uri(folder) else (folder, "", "")
    return f"{address}{ending}{mark}{query}"


def benchmark(args: arguments.Benchmark) -> int:
    """how fast each execution mode answers here, as a table to paste; needs no data"""
    from pipelines.benchmark import benchmark

    if args.json_file:
        file_to_write(args.json_file, "--json")
    measured = benchmark(
        args.checkpoint,
        modes=args.modes,
        batch_sizes=args.batch_sizes,
        threads=args.threads,
        device=args.device,
        track=args.track,
        storage=args.run.storage,
    )
    print(f"\n{measured}")
    if args.json_file:
        measured.write(args.json_file)
        print(f"\nall figures: {args.json_file}")
    return measured.timings.stopped


def predict(args: arguments.Predict) -> None:
    """poses of pictures and videos, as COCO, Parquet, OpenPose, overlays"""
    _need(args.sources, "SOURCE", "a picture, a video, a folder, a glob or a URI")
    from pipelines.predict import predict

    print(predict(**_given(args)))


def promote(args: arguments.Promote) -> int:
    """make a model version champion if its AP is not worse on the same data"""
    from pipelines.promote import promote

    decision = promote(**_given(args))
    print(decision)
    return decision.exit_code


def deploy(args: arguments.Deploy) -> None:
    """serve a checkpoint over HTTP on Ray Serve"""
    from pipelines.deploy import deploy

    deploy(
        args.checkpoint,
        args.serve,
        run=args.run,
        track=args.track,
        ray_settings=args.ray,
        rollback=args.rollback,
    )


def load(args: arguments.LoadTest) -> None:
    """how an endpoint answers requests that come at given rates: latencies, statuses, share of 429"""
    _need(args.sources, "SOURCE", "the pictures to ask with, as files, folders or globs")
    if args.json_file:
        file_to_write(args.json_file, "--json")
    from pipelines.load import load
    from pipelines.storage.files import writable, write_json

    measured = load(**{name: value for name, value in _given(args).items() if name != "json_file"})
    print(f"\n{measured}")
    if args.json_file:
        with writable(args.json_file):
            write_json(args.json_file, measured.as_dict())
        print(f"\nall figures: {args.json_file}")


def import_(args: arguments.Import) -> None:
    """published weights into a checkpoint folder, with a match report"""
    from pipelines.import_weights import import_weights

    import_weights(**_given(args))


def export(args: arguments.Export) -> None:
    """a checkpoint as a file of another runtime, with a report of how equal it is"""
    from pipelines.export import export

    print(export(**_given(args)))


def estimate_sigmas(args: arguments.EstimateSigmas) -> None:
    """OKS constants of a skeleton from people whom several annotators labelled"""
    from pipelines.estimate_sigmas import estimate_sigmas

    print(estimate_sigmas(**_given(args)))
    print(f"wrote {args.out}")


def reproduce(args: arguments.Reproduce) -> int:
    """AP of the published weights beside the published AP; fails beyond .002"""
    from pipelines.reproduce import reproduce

    return 0 if reproduce(**_given(args)).passed else 1


# What is said of a verb that was stopped; train says where its run stands.
GOES_ON = {
    "preprocess": " Finished shards are kept: the same command goes on.",
    "sweep": " The same command goes on.",
    "evaluate": " Finished work units are kept: the same command goes on.",
    "predict": " Finished work units are kept: the same command goes on.",
}

# Verb: its function, its arguments, the first line of its --help.
VERBS: dict[str, tuple[Callable[[Any], int | None], type[Section], str]] = {
    "draw": (draw, arguments.Draw, "Draw a COCO root of articulated people."),
    "validate": (validate, arguments.Validate, "Check a COCO folder before any work is put into it."),
    "preprocess": (preprocess, RunConfig, "Cut people and their heatmaps out of a COCO folder."),
    "inspect": (inspect, arguments.Inspect, "Check, count and show a preprocessed dataset."),
    "train": (train, RunConfig, "Train an HRNet on preprocessed shards."),
    "sweep": (sweep, RunConfig, "Try settings of a declared space, and keep the best."),
    "evaluate": (evaluate, arguments.Evaluate, "Evaluate by the COCO keypoint protocol."),
    "benchmark": (benchmark, arguments.Benchmark, "Time the execution modes on this machine."),
    "predict": (predict, arguments.Predict, "Predict poses of pictures and videos."),
    "promote": (promote, arguments.Promote, "Move the champion alias, if the AP allows it."),
    "deploy": (deploy, arguments.Deploy, "Serve a checkpoint over HTTP."),
    "load": (load, arguments.LoadTest, "Ask an endpoint at given rates, and time its answers."),
    "import": (import_, arguments.Import, "Turn a published weights file into a checkpoint folder."),
    "export": (export, arguments.Export, "Write the network for other runtimes and compare it with torch."),
    "estimate-sigmas": (estimate_sigmas, arguments.EstimateSigmas, "Estimate OKS constants."),
    "reproduce": (reproduce, arguments.Reproduce, "Evaluate the published weights on COCO val2017."),
}

if __name__ == "__main__":
    sys.exit(main())
