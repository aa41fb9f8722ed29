"""How a checkpoint is named and found, by every verb and by a replica; and that no secret is printed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bucket_server
import pytest
from bucket_server import Bucket, Fault
from pyarrow import fs

from hrnet_core import locations
from hrnet_core.architecture import HRNetConfig
from hrnet_core.checkpoint import CheckpointSpec, fetch_checkpoint, save_checkpoint
from hrnet_core.errors import CheckpointError, ConfigError, DataError, PoseError
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.locations import fetch, refuse_credentials, without_credentials
from hrnet_core.model import HRNet
from pipelines.cli import main
from pipelines.deploy import deploy
from pipelines.export import export
from pipelines.measure_modes import measure_modes
from pipelines.predict import predict
from pipelines.serving.pinned import published
from pipelines.settings.config import ServeSettings, TrackSettings
from pipelines.tracking.checkpoints import is_folder_here, local_checkpoint
from serve.model import load_model
from serve.samples import load_samples
from serve.settings import ModelChoice, ServeArgs

OTHER = TrackSettings(registered_model="other")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    config = HRNetConfig(width=4, stem_width=8, bottlenecks=1, modules=(1, 1, 1), blocks=1)
    spec = CheckpointSpec(config, HeatmapCodec("official", (64, 96), sigma=1.0))
    save_checkpoint(folder, HRNet(config), spec, trainer_state={"step": 1})
    return folder


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


# --- which one ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["predict", "photo.jpg"], ["deploy"]], ids=lambda argv: argv[0])
def test_without_a_checkpoint_the_named_models_champion_is_meant(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--track.registered-model decides; it was models:/hrnet-pose@champion whatever was said."""
    assert main([*argv, "--track.registered-model", "other", "--run.storage", str(tmp_path)]) == 2
    assert "models:/other@champion: not in the MLflow store" in capsys.readouterr().err


def test_so_it_is_for_who_calls_the_functions(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="models:/other@champion"):
        predict(["photo.jpg"], track=OTHER, storage=tmp_path)
    with (
        pytest.raises(CheckpointError, match="models:/other@champion"),
        local_checkpoint(None, OTHER, tmp_path),
    ):
        pass


def test_a_folder_is_itself_and_a_uri_a_copy_while_the_block_lasts(checkpoint: Path, tmp_path: Path) -> None:
    with local_checkpoint(checkpoint, OTHER, tmp_path) as found:
        assert (found.name, found.folder, found.version) == (str(checkpoint), checkpoint, None)
    with local_checkpoint(checkpoint.as_uri(), OTHER, tmp_path) as found:
        copies = {file.name: file.read_bytes() for file in found.folder.iterdir()}
        assert (found.name, found.version, found.copied) == (checkpoint.as_uri(), None, True)
    assert not found.folder.exists()
    originals = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    assert originals.pop("trainer.pt"), "an optimizer's state is not for who only asks the network"
    assert copies == originals
    assert not (tmp_path / "mlflow.db").exists()


def test_files_of_the_registry_are_not_added_to(tmp_path: Path) -> None:
    name = "models:/other@champion"
    assert is_folder_here("runs/w32/best")
    assert [place for place in (name, "file:///a/best", "s3://bucket/best") if is_folder_here(place)] == []
    with pytest.raises(ConfigError, match=name):
        measure_modes(name, tmp_path, out=tmp_path)
    with pytest.raises(ConfigError, match=name):
        export(name)


# --- fetching -----------------------------------------------------------------------------------------


def test_stages_and_replicas_find_and_refuse_the_same(checkpoint: Path, tmp_path: Path) -> None:
    """Word for word, whoever asks."""

    def staged(uri: str) -> None:
        with local_checkpoint(uri, OTHER, tmp_path):
            pass

    served = load_model(ModelChoice(checkpoint=checkpoint.as_uri()), ServeArgs(checkpoint="", num_cpus=1))
    assert served.info().sha256 == json.loads((checkpoint / "checkpoint.json").read_text())["weights_sha256"]
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "checkpoint.json").write_text("{}")
    for uri, why in (
        ((tmp_path / "absent").as_uri(), r"no checkpoint\.json, model\.safetensors, selftest\.safetensors"),
        ((tmp_path / "half").as_uri(), r"no model\.safetensors, selftest\.safetensors there"),
        ("nonsense://x", "not a folder that can be opened"),
        ("s3://bucket/best?endpoint=x", "unknown endpoint"),
    ):
        said = set()
        for ask in (
            staged,
            lambda uri: load_model(ModelChoice(checkpoint=uri), ServeArgs(checkpoint="")),
            lambda uri: deploy(uri, ServeSettings()),
        ):
            with pytest.raises(CheckpointError, match=why) as caught:
                ask(uri)
            said.add(str(caught.value))
        assert len(said) == 1
        assert uri.partition("?")[0] in said.pop()


def test_a_copy_takes_the_memory_of_a_piece_and_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a b").write_bytes(bytes(range(250)))
    (tmp_path / "there" / "more").write_bytes(b"not asked for")
    sizes: list[int] = []

    class Stream:
        def __init__(self, stream: Any, cut: int | None = None) -> None:
            self.stream, self.left = stream, cut

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *_: Any) -> None:
            self.stream.close()

        def read(self, size: int) -> bytes:
            sizes.append(size)
            piece = self.stream.read(size)
            if self.left is not None:
                piece, self.left = piece[: self.left], max(0, self.left - len(piece))
            return piece

    class Files:
        cut: int | None = None

        def __init__(self) -> None:
            self.local = fs.LocalFileSystem()

        def get_file_info(self, which: Any) -> Any:
            return self.local.get_file_info(which)

        def open_input_stream(self, path: str) -> Stream:
            return Stream(self.local.open_input_stream(path), self.cut)

    monkeypatch.setattr(locations, "open_folder", lambda _: (Files(), str(tmp_path / "there")))
    monkeypatch.setattr(locations, "PIECE", 100)
    folder = fetch("s3://bucket/there", tmp_path / "here", ["a b"], optional=["none"])
    assert sizes == [100] * 4
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {"a b": bytes(range(250))}
    Files.cut = 120
    with pytest.raises(OSError, match="120 of its 250 bytes"):
        fetch("s3://bucket/there", tmp_path / "here", ["a b"])


# --- credentials --------------------------------------------------------------------------------------

SECRET = "wJalrXUtnFEMI"
URIS = [
    f"s3://AKIAIOSF:{SECRET}@bucket/a",
    f"s3://AKIAIOSF:bPx/{SECRET}@bucket/a",  # secrets of S3 have slashes
    f"gs://{SECRET}@bucket/a",
    f"abfs://user:{SECRET}@account/a",
    f"s3://bucket/a?access_key=AKIAIOSF&secret_key={SECRET}",
]


@pytest.mark.parametrize("uri", URIS)
def test_a_uri_with_credentials_is_refused_and_not_repeated(uri: str, tmp_path: Path) -> None:
    def registered() -> None:
        with local_checkpoint(uri, OTHER, tmp_path):
            pass

    for ask in (
        lambda: refuse_credentials(f"--data.root={uri}"),
        lambda: locations.open_folder(uri),
        lambda: fetch_checkpoint(uri, tmp_path),
        lambda: load_model(ModelChoice(checkpoint=uri), ServeArgs(checkpoint=uri)),
        lambda: load_samples(uri),
        lambda: measure_modes(uri, tmp_path, out=tmp_path),
        lambda: export(uri),
        lambda: predict(["photo.jpg"], tmp_path, out=uri),
        registered,
    ):
        with pytest.raises(PoseError, match="credentials do not belong in a URI") as caught:
            ask()
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "place",
    [
        "s3://bucket/a@2x:3/b", "gs://anonymous@bucket/a", "hdfs://user@host:9000/a", "a:b@c", "file:///a@b:c",
        "s3://bucket/a?endpoint_override=127.0.0.1:9000&scheme=http", "abfs://container@account/a",
        "models:/a@champion",
    ],
)  # fmt: skip
def test_what_only_looks_like_credentials_is_taken(place: str) -> None:
    refuse_credentials(place)


def test_a_servers_password_is_not_shown() -> None:
    text = without_credentials(f"postgresql://me:{SECRET}@db:5432/mlflow and http://host/a@b")
    assert text == "postgresql://...@db:5432/mlflow and http://host/a@b"


LINES = [
    "draw URI",
    "validate URI",
    "validate coco --out URI",
    "preprocess tiny --data.root URI --data.shards shards",
    "preprocess tiny --data.root coco --data.shards URI",
    "preprocess tiny --data.root=URI --data.shards shards",
    "preprocess URI",
    "inspect URI",
    "inspect shards --out URI",
    "train tiny --data.shards URI",
    "train tiny --data.shards shards --run.storage URI",
    "train tiny --data.shardz URI",
    "evaluate URI coco",
    "evaluate URI coco --measure-modes",
    "evaluate best URI",
    "evaluate best coco --boxes URI",
    "evaluate --results URI --ground-truth gt.json",
    "predict URI",
    "predict photo.jpg --checkpoint URI",
    "predict photo.jpg --checkpoint best --out URI",
    "promote URI",
    "promote --run.storage URI",
    "deploy URI",
    "deploy best --serve.samples URI",
    "import URI out",
    "export URI",
    "benchmark URI",
    "benchmark tiny --json URI",
    "estimate-sigmas URI b.json",
    "reproduce URI --weights-dir weights --boxes boxes.json",
]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("uri", URIS[:2], ids=["plain", "slash"])
def test_no_verb_prints_a_secret(
    line: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main([word.replace("URI", uri) for word in line.split()])
    except SystemExit as ended:
        code = int(ended.code or 0)
    out, err = capfd.readouterr()
    assert code == 2
    assert SECRET not in out + err
    assert "credentials do not belong in a URI" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("uri", URIS)
def test_nor_does_one_that_stands_where_the_verb_belongs(uri: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([uri, "out"]) == 2
    out, err = capfd.readouterr()
    assert "hrnet: no verb" in err
    assert SECRET not in out + err


@pytest.mark.parametrize("field", ["root", "shards"])
def test_a_config_files_secret_is_not_printed(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"root": "coco", "shards": "shards", field: URIS[0]}
    Path("mine.yaml").write_text(json.dumps({"data": data}))
    assert main(["train" if field == "shards" else "preprocess", "mine.yaml"]) == 2
    out, err = capfd.readouterr()
    assert SECRET not in out + err
    assert "credentials do not belong in a URI" in err


def test_a_tracking_servers_password_may_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Named, yes; shown, no."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    argv = ["promote", "--run.storage", str(tmp_path), "--track.uri"]
    assert main([*argv, f"http://me:{SECRET}@127.0.0.1:9"]) == 2
    out, err = capfd.readouterr()
    assert "http://...@127.0.0.1:9 does not answer" in err
    assert SECRET not in out + err


def test_an_error_says_which_kind_of_place_it_was() -> None:
    with pytest.raises(DataError, match=r"^s3://\.\.\.: credentials"):
        refuse_credentials(f"--data.root={URIS[0]}")


# --- a bucket -----------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Bucket]]:
    with bucket_server.running() as server:
        for name, value in bucket_server.environment(server).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        locations._s3.cache_clear()
        fs.S3FileSystem(endpoint_override=server.address, allow_bucket_creation=True).create_dir("models")
        yield "s3://models", server
    locations._s3.cache_clear()


def test_a_checkpoint_and_the_pages_pictures_lie_in_a_bucket(
    bucket: tuple[str, Bucket], checkpoint: Path, tmp_path: Path
) -> None:
    """Put there by deploy, taken from there by stages and replicas; what fails for good is named."""
    uri, server = bucket
    assert published(checkpoint, f"{uri}/runs/w32") == f"{uri}/runs/w32"
    originals = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    server.asked.clear()
    with local_checkpoint(f"{uri}/runs/w32", OTHER, tmp_path) as found:
        copies = {file.name: file.read_bytes() for file in found.folder.iterdir()}
    assert copies == {name: content for name, content in originals.items() if name != "trainer.pt"}
    assert not [path for _, path in server.asked if "trainer.pt" in path]

    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "a #1.jpg").write_bytes(b"picture")
    (tmp_path / "samples" / "boxes.json").write_text(json.dumps({"a #1.jpg": [[1, 2, 30, 40]]}))
    samples = load_samples(published(tmp_path / "samples", f"{uri}/samples"))
    assert {name: sample.data for name, sample in samples.items()} == {"a #1.jpg": b"picture"}
    with pytest.raises(ConfigError, match=rf"{uri}/nothing/boxes\.json: no boxes\.json there"):
        load_samples(f"{uri}/nothing")

    for fault in (
        Fault("GET", "model.safetensors", 500, "InternalError"),
        Fault("GET", "list-type", 403, "AccessDenied"),
    ):
        server.faults[:] = [fault]
        with (
            pytest.raises(CheckpointError, match=rf"{uri}/runs/w32: cannot be read as a checkpoint"),
            local_checkpoint(f"{uri}/runs/w32", OTHER, tmp_path),
        ):
            pass
    server.faults[:] = [Fault("PUT", "w48", 403, "AccessDenied")]
    with pytest.raises(ConfigError, match=r"s3://models/runs/w48: .*--run\.storage"):
        published(checkpoint, f"{uri}/runs/w48")
