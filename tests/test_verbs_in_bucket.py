"""Every verb reads from a bucket and writes into one what it reads and writes on a disk, and goes on there.

The server is moto's S3 on loopback (tests/bucket_server.py), the actors' work is done in this process.
"""

from __future__ import annotations

import contextlib
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from bucket_server import Bucket, Fault
from dots import cut_short, rows_here, write_detections, write_solved
from pyarrow import fs
from small_coco import edited
from small_coco import write_coco as small_coco
from test_buckets import objects, upload
from test_preprocess import TRAIN, VAL, config, contents, without_ray

from hrnet_core.checkpoint import load_checkpoint, read_spec, verify_checkpoint
from hrnet_core.errors import CheckpointError, ConfigError, DataError
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.locations import destination, open_folder
from pipelines import measure_modes as measure_module
from pipelines.cli import main
from pipelines.draw import draw
from pipelines.evaluate import evaluate
from pipelines.export import _targets, export
from pipelines.measure_modes import measure_modes
from pipelines.poses.timing import AtSize, Speed, Timings
from pipelines.predict import predict
from pipelines.preprocess import preprocess
from pipelines.settings.config import EvaluateSettings, PredictSettings, TrackSettings
from pipelines.sources.media import list_media
from pipelines.storage.files import file_stamps, read_file, read_json, write_whole, writing_many
from pipelines.tracking.checkpoints import local_checkpoint, put_checkpoint

ONE = EvaluateSettings(batch_size=1)
"""Six units of two people."""
FORMATS = PredictSettings(batch_size=1, formats=("coco", "parquet", "openpose", "overlays"))


@pytest.fixture(scope="module")
def dots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """coco/, checkpoint/ that finds most of its people, boxes.json."""
    folder = tmp_path_factory.mktemp("dots")
    root, _ = write_solved(folder, HeatmapCodec("official", (96, 128)))
    write_detections(root, folder / "boxes.json")
    return folder


@pytest.fixture
def away(bucket: str, dots: Path) -> str:
    """The same in a bucket."""
    return upload(dots, f"{bucket}/in")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", rows_here)


# --- evaluate -----------------------------------------------------------------------------------------


def test_an_evaluation_in_a_bucket_goes_on_there_and_is_the_one_on_disk(
    away: str, dots: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoint, annotations, pictures, boxes, results, pictures of them and page: nothing lies here."""
    asked = cut_short(monkeypatch)
    recorded: dict[str, bytes] = {}

    def record(ref: str, stats: Any, protocol: Any, files: list[Path], **_: Any) -> str:
        recorded.update({file.name: file.read_bytes() for file in files})
        return "hrnet-pose/3"

    monkeypatch.setattr("pipelines.tracking.registry.record_evaluation", record)
    monkeypatch.chdir(tmp_path)

    def run(root: str, out: str, **more: Any) -> Any:
        given = {"settings": ONE, "boxes": f"{root}/boxes.json", **more}
        return evaluate(f"{root}/checkpoint", f"{root}/coco", out=out, **given)

    with pytest.raises(KeyboardInterrupt):
        run(away, f"{bucket}/out/a")
    assert all(name.startswith("unfinished/") for name in objects(f"{bucket}/out/a"))
    there = run(away, f"{bucket}/out/a", report=f"{bucket}/pages/a.html", track=TrackSettings(uri="http://x"))
    assert asked[1] == asked[0][2:]
    assert list(tmp_path.iterdir()) == []
    on_disk = run(str(dots), str(tmp_path / "a"))
    assert there.stats == on_disk.stats
    assert there.version == "hrnet-pose/3"
    assert there.results_file == f"{bucket}/out/a/results.json"
    ours, theirs = contents(tmp_path / "a"), objects(f"{bucket}/out/a")
    assert set(theirs) == set(ours), "the unfinished folder is gone"
    for name in set(ours) - {"evaluation.json"}:
        assert theirs[name] == ours[name], name
    said, says = (json.loads(c["evaluation.json"]) for c in (ours, theirs))
    assert (says["protocol"], says["stats"]) == (said["protocol"], said["stats"])
    page = read_file(f"{bucket}/pages/a.html")
    assert b"<html" in page
    assert page.count(b"data:image/jpeg;base64,") == 3
    assert recorded == {"a.html": page, **{Path(name).name: content for name, content in theirs.items()}}
    truth = f"{away}/coco/annotations/person_keypoints_val2017.json"
    argv = ["evaluate", "--results", there.results_file, "--ground-truth", truth, "--out", f"{bucket}/out/b"]
    assert main(argv) == 0
    assert read_json(f"{bucket}/out/b/figures.json") == there.stats


def test_a_picture_that_the_bucket_does_not_give_is_told_and_what_is_done_is_kept(
    away: str, bucket: str, server: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = cut_short(monkeypatch)
    asked.append([])  # no call is cut short
    server.faults.append(Fault("GET", "picture-3.png", 503, "SlowDown"))
    arguments = (f"{away}/checkpoint", f"{away}/coco")
    with pytest.raises(DataError, match=r"picture-3\.png.*the bucket did not give it") as caught:
        evaluate(*arguments, out=f"{bucket}/out", settings=ONE)
    assert "\n" not in str(caught.value)
    server.faults.clear()
    assert evaluate(*arguments, out=f"{bucket}/out", settings=ONE).figures["people"] == 12
    assert asked[1:] == [[0, 1, 2, 3, 4, 5], [3]]


def test_a_bucket_that_takes_no_results_is_told(away: str, bucket: str, server: Bucket, here: None) -> None:
    server.faults.append(Fault("PUT", "unfinished", 403, "AccessDenied"))
    with pytest.raises(DataError, match=rf"{bucket}/out/unfinished/.*cannot be written.*ACCESS_DENIED"):
        evaluate(f"{away}/checkpoint", f"{away}/coco", out=f"{bucket}/out", settings=ONE)
    server.faults[:] = [Fault("PUT", "out/results.json", 403, "AccessDenied")]
    with pytest.raises(DataError, match=rf"{bucket}/out: cannot be written.*kept"):
        evaluate(f"{away}/checkpoint", f"{away}/coco", out=f"{bucket}/out", settings=ONE)
    assert len([name for name in objects(f"{bucket}/out") if name.startswith("unfinished/")]) == 6


def test_a_picture_that_was_replaced_is_another(bucket: str) -> None:
    """By size or time, so that an interrupted evaluation does not mix both."""
    files = [f"{bucket}/p/{name}" for name in ("a.jpg", "b.jpg", "gone.jpg")]
    with writing_many() as put:
        for file in files[:2]:
            put(file, b"1")
    before = file_stamps(files)
    assert [stamp and stamp[0] for stamp in before] == [1, 1, None]
    write_whole(files[1], b"22")
    after = file_stamps(files)
    assert after[0] == before[0]
    assert after[1] != before[1]


# --- predict ------------------------------------------------------------------------------------------


def test_a_prediction_in_a_bucket_goes_on_there_and_is_the_one_on_disk(
    away: str, dots: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked = cut_short(monkeypatch)
    boxes = "coco/annotations/person_keypoints_val2017.json"

    def run(root: str, out: str) -> Any:
        sources = [f"{root}/coco/val2017"]
        return predict(sources, f"{root}/checkpoint", out=out, boxes=f"{root}/{boxes}", settings=FORMATS)

    with pytest.raises(KeyboardInterrupt):
        run(away, f"{bucket}/poses")
    there = run(away, f"{bucket}/poses")
    assert asked[1] == asked[0][2:]
    assert there.folder == f"{bucket}/poses"
    run(str(dots), str(tmp_path / "poses"))
    ours, theirs = contents(tmp_path / "poses"), objects(f"{bucket}/poses")
    assert set(theirs) == set(ours)
    assert (
        len(ours) == 5 + 6 + 6
    )  # poses.json, .parquet, images, rejected, prediction; an openpose, an overlay
    for name in set(ours) - {"prediction.json"}:
        assert theirs[name] == ours[name], name
    sources = [media.name for media in list_media([bucket], exclude=f"{bucket}/poses")[0]]
    assert {name.partition("/")[0] for name in sources} == {"in"}, "what is written is no source"
    capsys.readouterr()
    assert run(away, f"{bucket}/poses").summary == there.summary
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=f"{bucket}/poses: holds a prediction of other sources"):
        predict([f"{away}/coco/val2017"], f"{away}/checkpoint", out=f"{bucket}/poses", settings=FORMATS)


# --- checkpoints that are added to --------------------------------------------------------------------


def test_measured_modes_are_written_where_the_checkpoint_lies(
    away: str, bucket: str, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings = Timings({"float32": Speed(1.0, {1: AtSize([0.01], [0.02]), 16: AtSize([0.1], [0.2])})})
    monkeypatch.setattr(measure_module, "_timed_on_ray", lambda *_: (timings, "Some CPU"))
    monkeypatch.setattr(measure_module, "ray_session", lambda _, quiet: contextlib.nullcontext())
    place, before = f"{away}/checkpoint", objects(f"{away}/checkpoint")
    found = measure_modes(place, f"{away}/coco", modes=[], out=f"{bucket}/modes")
    after = objects(place)
    assert json.loads(after["checkpoint.json"])["modes"] == {"cpu": found.figures}
    assert found.figures["float32"]["people"] == 12
    assert {name for name in after if after[name] != before.get(name)} == {"checkpoint.json"}
    assert "float32/evaluation.json" in objects(f"{bucket}/modes")

    with local_checkpoint(place, TrackSettings(), "runs") as copy:
        measured = read_spec(copy.folder)
    other = json.dumps(json.loads(after["checkpoint.json"]) | {"weights_sha256": "0" * 64})
    write_whole(f"{place}/checkpoint.json", other)
    with pytest.raises(CheckpointError, match=r"other weights lie there now.*nothing was written"):
        measure_module._record(place, measured, "cpu", {})
    assert read_file(f"{place}/checkpoint.json").decode() == other


def test_an_export_lies_beside_the_weights_or_where_it_is_told_to(
    away: str, bucket: str, server: Bucket, dots: Path
) -> None:
    made = export(f"{away}/checkpoint", coco_root=f"{away}/coco", settings=ONE)
    assert made.people == 12
    assert made.file == f"{away}/checkpoint/model.onnx"
    assert len(read_file(made.file)) == made.megabytes * 2**20
    assert _targets("runs/w32/best", f"{bucket}/a b.onnx", "onnx") == [f"{bucket}/a b.onnx"]
    pair = [f"{bucket}/a.xml?region=x", f"{bucket}/a.bin?region=x"]
    assert _targets("runs/w32/best", pair[0], "openvino") == pair
    with pytest.raises(ConfigError, match=r"ends in \.onnx"):
        export(f"{away}/checkpoint", f"{bucket}/onnx/a.xml")
    server.faults.append(Fault("PUT", "model.onnx", 403, "AccessDenied"))
    with pytest.raises(CheckpointError, match=r"/model\.onnx: cannot be written.*ACCESS_DENIED"):
        export(f"{away}/checkpoint", settings=ONE)


def test_published_weights_become_a_checkpoint_in_a_bucket(
    away: str, bucket: str, dots: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    model, _ = load_checkpoint(dots / "checkpoint")
    save_file(model.state_dict(), tmp_path / "pose.safetensors")
    write_whole(f"{bucket}/w/pose.safetensors", (tmp_path / "pose.safetensors").read_bytes())
    argv = ["import", f"{bucket}/w/pose.safetensors", f"{bucket}/imported", "--codec", "official"]
    argv += ["--input-size", "96", "128"]
    write_whole(f"{bucket}/imported/model.onnx", b"of other weights")
    assert main(argv) == 0
    for name, content in objects(f"{bucket}/imported").items():
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert verify_checkpoint(tmp_path / "copy") == 0
    spec = read_spec(tmp_path / "copy")
    assert not (tmp_path / "copy" / "model.onnx").exists()
    assert spec.provenance["imported_from"] == "pose.safetensors"
    assert spec.provenance["file_sha256"] is not None
    write_whole(f"{bucket}/imported/thesis.txt", b"mine")
    with pytest.raises(CheckpointError, match=r"imported: holds other files \(thesis\.txt\)"):
        put_checkpoint(f"{bucket}/imported", model.state_dict(), spec)


# --- sets and their pages -----------------------------------------------------------------------------


def test_a_drawn_set_is_the_one_on_disk(bucket: str, tmp_path: Path) -> None:
    there = draw(f"{bucket}/drawn", 2, seed=3, val_images=1)
    here = draw(tmp_path / "drawn", 2, seed=3, val_images=1)
    assert objects(f"{bucket}/drawn") == contents(tmp_path / "drawn")
    assert draw(f"{bucket}/drawn", 2, seed=3, val_images=1) == there
    assert there.people == here.people
    with pytest.raises(DataError, match=f"{bucket}/drawn: holds a drawn set of other parameters"):
        draw(f"{bucket}/drawn", 3, seed=3, val_images=1)
    write_whole(f"{bucket}/mine/deep/thesis.txt", b"mine")
    with pytest.raises(DataError, match=f"{bucket}/mine: is not empty"):
        draw(f"{bucket}/mine", 2)
    with pytest.raises(DataError, match=r"thesis\.txt: is a file"):
        draw(f"{bucket}/mine/deep/thesis.txt", 2)


def test_the_page_of_a_dataset_and_of_what_is_wrong_with_a_set(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte by byte the page of a disk; what was left out is shown from the set in the bucket."""
    without_ray(monkeypatch)
    with edited(small_coco(tmp_path / "coco", {TRAIN: [1, 1], VAL: [1]})) as data:
        data["annotations"][1]["bbox"] = [0, 0, -1, 5]
    upload(tmp_path / "coco", f"{bucket}/coco")
    preprocess(config(tmp_path / "coco", tmp_path / "shards"))
    upload(tmp_path / "shards", f"{bucket}/shards")
    for root in (bucket, tmp_path):
        argv = ["inspect", f"{root}/shards", "--coco", f"{root}/coco", "--out", f"{root}/page"]
        assert main(argv) == 0
    assert objects(f"{bucket}/page") == contents(tmp_path / "page")
    assert "rejected.jpg" in objects(f"{bucket}/page")
    assert main(["inspect", f"{bucket}/shards", "--out", f"{bucket}/shards/page"]) == 2
    assert "lies inside the dataset" in capsys.readouterr().err
    sums = sha256(read_file(f"{bucket}/coco/{VAL}/{VAL}-0.jpg")).hexdigest()
    write_whole(f"{bucket}/sums.txt", f"{sums}  {VAL}/{VAL}-0.jpg\n")
    argv = ["validate", f"{bucket}/coco", "--checksums", f"{bucket}/sums.txt", "--out", f"{bucket}/found.csv"]
    assert main([*argv, "--page", f"{bucket}/found.html"]) == 0
    assert b"bbox_invalid" in read_file(f"{bucket}/found.csv")
    assert b"bbox_invalid" in read_file(f"{bucket}/found.html")


# --- refused in a sentence ----------------------------------------------------------------------------

NOWHERE = "s3://no-such-bucket-anywhere"


@pytest.mark.parametrize(
    "command",
    [
        "draw {uri}",
        "inspect {root} --out {uri}",
        "validate {root} --out {uri}/a.csv",
        "evaluate runs/w32/best {root} --out {uri}",
        "evaluate runs/w32/best {root} --out here --report {uri}/page.html",
        "evaluate runs/w32/best {root} --measure-modes --out {uri}",
        "evaluate runs/w32/best {uri} --out here",
        "evaluate s3://bucket/w32/best {root} --run.storage {uri} --track.uri http://127.0.0.1:9",
        "evaluate --results r.json --ground-truth g.json --out {uri}",
        "predict {root} --out {uri} --checkpoint runs/w32/best",
        "predict {root} --run.storage {uri} --checkpoint runs/w32/best",
        "predict {uri} --out here --checkpoint {checkpoint}",
        "benchmark w32_256x192 --json {uri}/figures.json",
        "import weights.pth {uri} --codec official --input-size 192 256",
        "export runs/w32/best {uri}/model.onnx",
        "estimate-sigmas a.json b.json --out {uri}/skeleton.json",
        "reproduce {root} --weights-dir w --boxes b --out {uri}",
    ],
)
def test_a_missing_bucket_is_told_before_any_work(
    command: str,
    bucket: str,
    dots: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = dots / "coco"
    if command.startswith("inspect"):
        from test_feed import dotted_shards

        root = Path(dotted_shards(tmp_path / "shards", {"train2017": 2, "val2017": 2}).folder)
    if command.startswith("evaluate runs/w32/best {uri}"):
        command = command.replace("runs/w32/best", "{checkpoint}")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    given = {"uri": f"{NOWHERE}/folder", "root": root, "checkpoint": dots / "checkpoint"}
    assert main(command.format(**given).split()) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{NOWHERE}/folder" in told
    assert "no bucket 'no-such-bucket-anywhere'" in told
    assert not list(Path().rglob("s3:*"))


def test_a_path_that_lost_a_slash_is_still_a_uri(bucket: str) -> None:
    """As pathlib leaves it."""
    with pytest.raises(ConfigError, match="--out s3:/bucket/x: a URI has two slashes, s3://bucket/x"):
        destination(Path("s3://bucket/x"), "--out")
    with pytest.raises(DataError, match="credentials do not belong") as caught:
        destination(Path("s3://AKIA:very/secret@bucket/x"), "--out")
    assert "secret" not in str(caught.value)
    for path in ("a/b", "/a:/b", "./s3:/x"):
        assert destination(path, "--out") == str(Path(path))
    assert destination(f"{bucket}/x", "--out") == f"{bucket}/x"
    files, _ = open_folder(bucket)
    assert isinstance(files, fs.S3FileSystem)
