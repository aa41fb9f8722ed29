"""Buckets: the same digest as on disk, nothing half visible, and errors that are tried again, then named.

The server is moto's S3, a process on loopback; the proxy in front of it fails as the test asks.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bucket_server import Bucket, Fault
from pyarrow import fs
from small_coco import edited, write_coco
from test_preprocess import TRAIN, VAL, config, contents, refused, rows, without_ray

from hrnet_core import locations
from hrnet_core.errors import DataError
from hrnet_core.images import encode_png
from hrnet_core.locations import destination, open_folder
from hrnet_core.skeleton import COCO17
from pipelines.inspect_shards import verify
from pipelines.preprocess import preprocess
from pipelines.settings.train import TrainSettings
from pipelines.shards.manifest import Manifest
from pipelines.shards.rows import read_row_group
from pipelines.sources.coco import read_coco
from pipelines.sources.yolo import read_yolo
from pipelines.storage import files
from pipelines.storage.files import (
    absolute,
    file_sizes,
    is_file,
    is_folder,
    join,
    list_files,
    read_file,
    write_whole,
)
from pipelines.training.feed import Feed


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return without_ray(monkeypatch)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 people in 4 pictures, 2 in one; one picture's name has what a URI would misread."""
    root = write_coco(tmp_path_factory.mktemp("coco") / "root", {TRAIN: [2, 1, 2, 1], VAL: [2]})
    with edited(root) as data:
        data["images"][1]["file_name"] = "50% #1?.jpg"
    os.rename(root / TRAIN / f"{TRAIN}-1.jpg", root / TRAIN / "50% #1?.jpg")
    return root


def upload(folder: Path, uri: str) -> str:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        write_whole(join(uri, str(path.relative_to(folder))), path.read_bytes())
    return uri


def objects(uri: str) -> dict[str, bytes]:
    """Every object below a URI, by the server's own listing."""
    source, root = open_folder(uri)
    found = source.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    paths = [info.path for info in found if info.type == fs.FileType.File]
    return {path.removeprefix(f"{root}/"): source.open_input_stream(path).read() for path in paths}


# ---------------------------------------------------------------------------------- there and back


def test_the_same_dataset_as_on_disk(
    bucket: str, coco: Path, tmp_path: Path, plain: list[str], server: Bucket
) -> None:
    """Annotations and pictures from a bucket, shards into it: byte by byte what the disk gets."""
    local = preprocess(config(coco, tmp_path / "s", variants=2))
    source = upload(coco, f"{bucket}/in/coco")
    remote = preprocess(config(source, f"{bucket}/out/s/", variants=2))  # type: ignore[arg-type]
    assert remote.digest == local.digest
    assert objects(f"{bucket}/out/s") == contents(tmp_path / "s")
    assert not list(Path(files._uploads()).glob(f".*.{os.getpid()}@*"))  # what was made here is gone

    loaded = Manifest.load(f"{bucket}/out/s")
    loaded.verify()
    for name, column in rows(loaded).items():
        np.testing.assert_array_equal(column, rows(local)[name], err_msg=name)
    settings = TrainSettings(batch_size=8, lanes=4, num_workers=1)
    here, there = (next(iter(Feed(m, TRAIN, settings).batches(0))) for m in (local, loaded))
    np.testing.assert_array_equal(here.images, there.images)
    np.testing.assert_array_equal(here.ann_ids, there.ann_ids)

    server.asked.clear()
    plain.clear()
    assert preprocess(config(source, f"{bucket}/out/s", variants=2)) == remote  # type: ignore[arg-type]
    assert plain == []  # all found
    sizes = [path for method, path in server.asked if method == "HEAD" and "/in/coco/train2017/" in path]
    assert sizes == []  # the pictures' sizes come from the listing


def test_the_endpoint_may_stand_in_the_uri(bucket: str, server: Bucket, monkeypatch: Any) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    address = server.address.removeprefix("http://")
    uri = f"{bucket}/a b?endpoint_override={address}&scheme=http"
    _, root = open_folder(uri)
    assert root == f"{bucket.removeprefix('s3://')}/a b"
    write_whole(join(uri, "50% #1?"), b"content")
    assert join(uri, "50% #1?").startswith(f"{bucket}/a b/50%25%20%231%3F?endpoint_override=")
    assert read_file(join(uri, "50% #1?")) == b"content"
    assert read_file(join(uri, "50% #1?"), 4) == b"cont"
    assert list_files(uri) == {"50% #1?": 7}
    assert file_sizes([join(uri, "50% #1?"), join(uri, "no")]) == [7, -1]
    assert (is_folder(uri), is_file(uri), is_file(join(uri, "50% #1?"))) == (True, False, True)
    assert list_files(join(uri, "nothing")) == {}
    assert absolute(f"{bucket}/a/?region=eu-west-1") == f"{bucket}/a?region=eu-west-1"
    with pytest.raises(FileNotFoundError):
        read_file(join(uri, "no"))


def test_uris_that_cannot_be_used_are_named(bucket: str) -> None:
    refused(lambda: open_folder("s3://key:secret@bucket/a"), "credentials", "environment")
    with pytest.raises(DataError) as caught:
        open_folder("s3://key:secret@bucket/a")
    assert "secret@" not in str(caught.value)
    refused(lambda: open_folder("s3://bucket/a?endpoint=x"), "unknown endpoint", "endpoint_override")
    refused(lambda: open_folder("ftp://host/a"), "ftp://host/a")
    refused(lambda: list_files(f"{bucket}/a//b"), f"{bucket}/a//b", "Empty path component")


def test_every_store_names_what_is_missing(any_bucket: str) -> None:
    store = any_bucket.partition("://")[0]
    anonymous = "anonymous@" if "@" in any_bucket else ""
    with pytest.raises(DataError, match=r"--out: .*: no bucket 'nothere'"):
        destination(f"{store}://{anonymous}nothere/a", "--out")
    assert not is_folder(f"{any_bucket}/a")
    with pytest.raises(FileNotFoundError):
        read_file(f"{any_bucket}/a/b")
    write_whole(f"{any_bucket}/a/b c", b"old")
    write_whole(f"{any_bucket}/a/b c", b"newer")
    assert read_file(f"{any_bucket}/a/b c") == b"newer"
    assert list_files(f"{any_bucket}/a") == {"b c": 5}
    files.remove_folder(f"{any_bucket}/a")
    assert objects(any_bucket) == {}, "nothing of the uploads is left either"
    refused(lambda: open_folder(f"{store}://bucket/a?endpoint=x"), "endpoint")


def test_a_storage_account_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT", raising=False)
    refused(lambda: open_folder("az://team/a"), "az://team/a", "AZURE_STORAGE_ACCOUNT")
    refused(lambda: open_folder("az://key:secret@team/a"), "az://...", "credentials")
    _, path = open_folder("az://team/a?account=one")
    assert path == "team/a"


def test_an_object_in_azure_is_never_half_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow's stream empties what it opens (seen on Azurite): the object is replaced by a copy."""
    did: list[tuple[str, ...]] = []

    class Stream(io.BytesIO):
        def close(self) -> None:
            did.append(("wrote", self.getvalue().decode()))
            super().close()

    class Store:
        def open_output_stream(self, path: str) -> Stream:
            did.append(("opened", path))
            return Stream()

        def copy_file(self, source: str, target: str) -> None:
            did.append(("copied", source, target))

        def delete_file(self, path: str) -> None:
            did.append(("deleted", path))

    files._put_in_azure(Store(), b"content", "team/runs/latest.json")
    part = did[0][1]
    assert part.startswith("team/.hrnet-uploads/")
    copied = ("copied", part, "team/runs/latest.json")
    assert did == [("opened", part), ("wrote", "content"), copied, ("deleted", part)]


# ---------------------------------------------------------------------------------- recovery


def test_resume_keeps_finished_shards(any_bucket: str, coco: Path, plain: list[str]) -> None:
    target = f"{any_bucket}/s"
    whole = preprocess(config(coco, target))  # type: ignore[arg-type]
    before = objects(target)
    shards = [shard.path for shard in whole.shards(TRAIN)]
    files_, root = open_folder(target)
    files_.delete_file(f"{root}/manifest.json")
    files_.delete_file(f"{root}/{shards[0]}")
    write_whole(join(target, shards[1]), before[shards[1]][:-100])  # as a cut upload would look
    refused(lambda: Manifest.load(target), "no manifest.json", "hrnet preprocess", "already is used")
    plain.clear()
    assert preprocess(config(coco, target)).digest == whole.digest  # type: ignore[arg-type]
    assert plain == shards[:2]
    assert objects(target) == before
    refused(lambda: preprocess(config(coco, target, seed=1)), "another dataset", "seed")  # type: ignore[arg-type]
    assert objects(target) == before
    write_whole(join(target, shards[0]), before[shards[0]][:-1] + b"x")
    refused(lambda: Manifest.load(target).verify(), shards[0], "sha256")


UPLOAD = """
import sys
from pipelines.storage.files import join, write_whole
write_whole(join(sys.argv[1], "big.bin"), bytes(12_000_000))
"""


def test_a_killed_upload_is_not_visible(bucket: str, server: Bucket) -> None:
    """12 MB go up in parts; the process dies when one is there and the last is still on its way."""
    server.faults.append(Fault("PUT", "partNumber=2", delay=60))
    process = subprocess.Popen([sys.executable, "-c", UPLOAD, f"{bucket}/s"])
    deadline = time.monotonic() + 60
    while not any("partNumber=2" in path for _, path in server.asked):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert objects(bucket) == {}
    leftovers = list(Path(files._uploads()).glob(f".big.bin.*.{process.pid}@*"))
    assert len(leftovers) == 1
    files.remove_leftovers(bucket)  # as the next run does
    assert not leftovers[0].exists()


@pytest.mark.parametrize(
    "sent",
    [b"Content-Length: 9\r\n\r\nhalf", *(b"Transfer-Encoding: chunked\r\n\r\n" + cut for cut in (
        b"", b"9", b"9\r\nhalf", b"4\r\nhalf", b"4\r\nhalf\r\n", b"4\r\nhalf\r\n0\r\n",
    ))],
)  # fmt: skip
def test_of_a_client_that_is_cut_the_proxy_hands_nothing_on_and_says_nothing(
    bucket: str, server: Bucket, sent: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    """The tests that kill an upload stand on it."""
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        head = f"PUT /{bucket.removeprefix('s3://')}/cut HTTP/1.1\r\nHost: {host}\r\n"
        client.sendall(head.encode() + sent)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b"", "an answer to half a request"
    assert objects(bucket) == {}
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("code", ["InternalError", "AccessDenied"])
def test_a_failed_upload_is_an_error_and_not_visible(bucket: str, server: Bucket, code: str) -> None:
    """Arrow's own copy_files returned as if all were well."""
    status = {"InternalError": 500, "AccessDenied": 403}[code]
    for path in ("small.bin", "partNumber=2"):
        server.faults.append(Fault("PUT", path, status, code))
    with pytest.raises(OSError, match=r"s/small\.bin"):
        write_whole(f"{bucket}/s/small.bin", b"x")
    with pytest.raises(OSError, match=r"s/big\.bin"):
        write_whole(f"{bucket}/s/big.bin", bytes(12_000_000))
    assert objects(bucket) == {}


# ---------------------------------------------------------------------------------- errors


def test_throttling_errors_and_slow_answers_are_outlived(
    bucket: str, server: Bucket, coco: Path, tmp_path: Path, plain: list[str], monkeypatch: Any
) -> None:
    """One failure of each kind of request, of reading and of writing; the same digest."""
    monkeypatch.setattr(locations, "STALL_SECONDS", 1)
    local = preprocess(config(coco, tmp_path / "s"))
    source = upload(coco, f"{bucket}/coco")
    locations._s3.cache_clear()
    faults = [
        Fault("GET", "list-type", 503, "SlowDown", times=1),
        Fault("HEAD", "person_keypoints", 503, "SlowDown", times=1),
        Fault("GET", "train2017-0.jpg", 500, "InternalError", times=1),
        Fault("GET", "val2017-0.jpg", delay=3, times=1),
        Fault("PUT", "parquet", 503, "SlowDown", times=1),
        Fault("PUT", "manifest.json", 500, "InternalError", times=1),
        Fault("GET", "manifest.json", 503, "SlowDown", times=1),
    ]
    server.faults += faults
    assert preprocess(config(source, f"{bucket}/s")).digest == local.digest  # type: ignore[arg-type]
    assert [fault.times for fault in faults] == [0] * len(faults)


def test_what_goes_on_failing_is_named(bucket: str, server: Bucket, coco: Path, plain: list[str]) -> None:
    """The tries are bounded, the key is in the message, nothing is taken for a bad picture."""
    source, target = upload(coco, f"{bucket}/coco"), f"{bucket}/s"

    def run() -> Manifest:
        return preprocess(config(source, target))  # type: ignore[arg-type]

    def failing(method: str, path: str, status: int, code: str, *words: str) -> None:
        server.faults[:] = [Fault(method, path, status, code)]
        server.asked.clear()
        refused(run, *words)
        fitting = [asked for asked in server.asked if asked[0] == method and path in asked[1]]
        assert len(fitting) == (1 if status == 403 else 2)
        server.faults.clear()

    failing(
        "GET", "val2017.json", 503, "SlowDown", "annotations/person_keypoints_val2017.json", "credentials"
    )
    failing("GET", "train2017-2.jpg", 500, "InternalError", "coco/train2017/train2017-2.jpg", "again")
    failing("GET", "train2017-2.jpg", 403, "AccessDenied", "coco/train2017/train2017-2.jpg", "ACCESS_DENIED")
    failing("PUT", "train2017-00001", 503, "SlowDown", "s/data/train2017-00001-of-00002.parquet", "kept")
    manifest = run()
    shard = manifest.shards(TRAIN)[0].path
    server.faults.append(Fault("GET", shard, 503, "SlowDown"))
    refused(lambda: read_row_group(manifest, TRAIN, 0, 0), shard, "bucket")
    refused(run, shard, "bucket")  # not made again: it may well be whole
    server.faults[:] = [Fault("GET", "rejected.parquet", 503, "SlowDown")]
    refused(lambda: verify(manifest), "rejected.parquet: the bucket did not give it")  # nor called missing
    assert is_file(f"{target}/{shard}")


def test_a_missing_bucket_and_a_missing_root(bucket: str, coco: Path, plain: list[str]) -> None:
    missing = "s3://no-such-bucket-anywhere"
    refused(lambda: preprocess(config(coco, f"{missing}/s")), missing, "no bucket")  # type: ignore[arg-type]
    refused(lambda: read_coco(f"{missing}/coco", TRAIN, COCO17), f"{missing}/coco", "no bucket")
    refused(lambda: Manifest.load(f"{missing}/s"), f"{missing}/s", "no bucket")
    refused(lambda: Manifest.load(f"{bucket}/s"), f"{bucket}/s", "no manifest.json", "no such folder")
    upload(coco, f"{bucket}/coco")
    refused(lambda: Manifest.load(f"{bucket}/coco"), f"{bucket}/coco", "no manifest.json", "no shards")
    picture = f"{bucket}/coco/{TRAIN}/{TRAIN}-0.jpg"
    refused(lambda: Manifest.load(picture), picture, "is a file")
    refused(
        lambda: read_coco(f"{bucket}/coco", "test2017", COCO17),
        "test2017.json",
        "Splits with annotations here: train2017",
    )
    assert plain == []


def test_weights_to_start_from_may_lie_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    """A published file and a checkpoint folder give what they give on disk; what is wrong is named by its
    URI."""
    import torch

    from hrnet_core.architecture import HRNetConfig
    from hrnet_core.checkpoint import CheckpointSpec, save_checkpoint
    from hrnet_core.errors import CheckpointError
    from hrnet_core.heatmaps import HeatmapCodec
    from hrnet_core.model import HRNet
    from hrnet_core.published import read_weights

    model = HRNet(HRNetConfig(width=8, stem_width=8, bottlenecks=1, modules=(1, 1, 1), blocks=1))
    torch.save(model.state_dict(), tmp_path / "pose #1.pth")
    save_checkpoint(
        tmp_path / "best", model, CheckpointSpec(model.config, HeatmapCodec("official", (64, 64)))
    )
    upload(tmp_path, f"{bucket}/w")
    for uri in (join(f"{bucket}/w", "pose #1.pth"), f"{bucket}/w/best"):
        there = read_weights(uri)
        assert there.file == uri
        assert there.architecture == model.config
        for name, value in model.state_dict().items():
            assert torch.equal(there.state[name], value), name

    content = (tmp_path / "best" / "model.safetensors").read_bytes()
    write_whole(f"{bucket}/w/best/model.safetensors", content[:-4] + b"abcd")
    write_whole(f"{bucket}/w/cut.pth", (tmp_path / "pose #1.pth").read_bytes()[:-100])
    for uri, words in (
        (f"{bucket}/w/gone.pth", [f"{bucket}/w/gone.pth", "nothing there"]),
        ("s3://no-such-bucket-anywhere/a.pth", ["s3://no-such-bucket-anywhere/a.pth", "no bucket"]),
        (f"{bucket}/w/cut.pth", [f"{bucket}/w/cut.pth: not a whole torch file"]),
        (f"{bucket}/w/best", [f"{bucket}/w/best/model.safetensors: its sha256 is"]),
        (f"{bucket}/w", ["no checkpoint.json, model.safetensors, selftest.safetensors there"]),
    ):
        with pytest.raises((CheckpointError, DataError)) as caught:
            read_weights(uri)
        told = str(caught.value)
        assert [word for word in words if word not in told] == [], told
        assert "/tmp" not in told


def test_a_picture_that_is_gone_costs_a_row(bucket: str, coco: Path, plain: list[str]) -> None:
    source = upload(coco, f"{bucket}/coco")
    target, root = open_folder(source)
    target.delete_file(f"{root}/{TRAIN}/{TRAIN}-0.jpg")
    split = read_coco(source, TRAIN, COCO17)
    assert [(r.reason, r.file, r.people) for r in split.rejected] == [("missing_image", f"{TRAIN}-0.jpg", 2)]
    with pytest.raises(FileNotFoundError):
        read_file(join(source, f"{TRAIN}/{TRAIN}-0.jpg"))


def test_yolo_labels_from_a_bucket(bucket: str, tmp_path: Path) -> None:
    """The same people, under the same sha256, as from the disk."""
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for index in range(3):
        (tmp_path / "images" / f"a #{index}.png").write_bytes(encode_png(np.zeros((40, 60, 3), np.uint8)))
        (tmp_path / "labels" / f"a #{index}.txt").write_text("0 .5 .5 .8 .8" + " .5 .5 2" * 17)
    local, remote = (read_yolo(root, "all", COCO17) for root in (tmp_path, upload(tmp_path, f"{bucket}/y")))
    assert (len(remote.people), remote.rejected, remote.repaired) == (3, (), local.repaired)
    assert remote.annotation_sha256 == local.annotation_sha256
    assert [p.file_name for p in remote.photos] == [p.file_name for p in local.photos]
    for here, there in zip(local.photos, remote.photos, strict=True):
        assert read_file(there.path) == read_file(here.path)
    np.testing.assert_array_equal(remote.people.keypoints, local.people.keypoints)


# ---------------------------------------------------------------------------------- the whole way


@pytest.mark.slow
def test_on_ray_by_the_command_line(bucket: str, server: Bucket, coco: Path, tmp_path: Path) -> None:
    """Ray's workers find the credentials in the environment that the command was given."""
    source = upload(coco, f"{bucket}/coco")
    command = [sys.executable, "-m", "pipelines.cli", "preprocess", "tiny", "--data.people-per-shard", "2"]
    command += ["--ray.num-cpus", "2", "--data.image-format", "png"]
    digests = []
    for root, shards in ((source, f"{bucket}/s"), (str(coco), str(tmp_path / "s"))):
        made = subprocess.run(
            [*command, "--data.root", root, "--data.shards", shards],
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stderr
        digests.append(Manifest.load(shards).digest)
    assert digests[0] == digests[1]
    server.faults.append(Fault("GET", "train2017-2.jpg", 403, "AccessDenied"))
    failed = subprocess.run(
        [*command, "--data.root", source, "--data.shards", f"{bucket}/t"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert failed.returncode == 2
    assert "coco/train2017/train2017-2.jpg" in failed.stderr
    assert "Traceback" not in failed.stderr
