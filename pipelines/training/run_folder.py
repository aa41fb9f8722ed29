"""The folder of a training run, STORAGE/NAME, on this machine or in a bucket: what it is, who may write into
it, and where the run stands.

    run.json  config.yaml      what the run is: written when it begins
    metrics.jsonl              a row of figures each `train.log_every` batches (metric_log.py)
    ray/                       Ray Train's: checkpoints to go on from, and which is the latest
    best/  predictions.json    the best network so far (a checkpoint folder), and its poses of the val split
    pictures/                  curves, people as annotated and as predicted
    errors.log                 what engines said of workers that were lost, newest last
    result.json                written last: the run is finished
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from hrnet_core.errors import ConfigError, DataError, Failure
from hrnet_core.locations import destination, is_uri, without_credentials
from pipelines.settings.config import RunConfig
from pipelines.storage.files import (
    absolute,
    base_name,
    join,
    read_file,
    read_json,
    writable,
    write_json,
    write_whole,
)
from pipelines.storage.lease import leased

ERRORS = "errors.log"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True)
class TrainResult:
    """A finished run; the same stands in `folder`/result.json."""

    run_name: str
    run_id: str | None
    """MLflow's; None where it was away all the time."""
    folder: str
    """STORAGE/NAME, path or URI."""
    best_ap: float
    """val_gt/AP: ground-truth boxes, from the shards."""
    best_epoch: int
    epochs: int
    step: int
    """Batches in all."""
    samples: int
    seconds: float
    """Time in the training loop, start-up not included."""
    dataset_digest: str
    codec: str
    input_size: str
    """WIDTHxHEIGHT."""
    best_checkpoint: str
    version: int | None
    """Of the registered model; None where MLflow could not take it."""

    @classmethod
    def read(cls, folder: str) -> TrainResult | None:
        """Of a run whose training is through; None where it is not."""
        fields = read_record(folder, "result.json")
        if not fields:
            return None
        return cls(**{**fields, "folder": folder, "best_checkpoint": join(folder, "best")})

    def write(self) -> None:
        write_json(join(self.folder, "result.json"), asdict(self))


def run_folder(config: RunConfig, dataset_digest: str) -> str:
    """STORAGE/NAME, absolute. ConfigError for a name that is a path, otherwise as `whole_storage`."""
    name = config.run.name or config.identity(dataset_digest)
    if Path(name).name != name or name.startswith("."):
        raise ConfigError(f"--run.name {name!r}: a run's name is a folder's name in --run.storage, no path.")
    return join(whole_storage(config), name)


def whole_storage(config: RunConfig) -> str:
    """--run.storage as it is found from any folder; errors of `destination`."""
    return absolute(destination(config.run.storage, "--run.storage"))


def with_whole_weights(config: RunConfig) -> RunConfig:
    """`model.init` and `train.teacher` as they are found from any folder: workers and trials stand in folders
    of their own."""
    init, teacher = (value and absolute(value) for value in (config.model.init, config.train.teacher))
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"init": init}),
            "train": config.train.model_copy(update={"teacher": teacher}),
        }
    )


@contextlib.contextmanager
def only_one(folder: str) -> Iterator[None]:
    """Two drivers of one run would overwrite each other's state: ConfigError for the second. DataError where
    no folder can be made there. What is made for it goes again where the block leaves it empty."""
    storage = storage_of(folder)
    lock = f".{base_name(folder)}.lock"
    if is_uri(folder):
        with leased(storage, lock, folder):
            yield
        return
    file, here = Path(storage) / lock, Path(folder)
    with writable(folder):
        made = [place for place in (here, *here.parents) if not place.exists()]
        here.mkdir(parents=True, exist_ok=True)
        handle = file.open("w")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(handle.fileno()), file.stat()):
                raise FileNotFoundError(file)  # who had the lock has just taken the file away
        except OSError:
            raise ConfigError(
                f"{folder}: another process is training this run. Wait for it, or give another --run.name."
            ) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # something is in it
                for place in made:
                    place.rmdir()
                    if place == here:
                        file.unlink()


def read_record(folder: str, name: str) -> dict[str, Any] | None:
    """A JSON object of the run's folder; None where it is not there."""
    return read_json(join(folder, name))


def check_same_run(folder: str, config: RunConfig, dataset_digest: str) -> None:
    """A name goes on only as what it was: ConfigError names what differs."""
    known = read_record(folder, "run.json")
    if known is None:
        return
    now = _decides(config, dataset_digest)
    # A setting that an earlier version did not have was what it is by default.
    before = {**_decides(RunConfig(), dataset_digest), **known["decides"]}
    differ = [f"{k} was {v}, now {now.get(k)}" for k, v in before.items() if now.get(k) != v]
    if differ:
        raise ConfigError(
            f"{folder}: this run was started with other settings: {'; '.join(differ)}. Choose another "
            f"--run.name (its weights can be the start: --model.init {join(folder, 'best')}), or --run.fresh "
            f"to move it aside."
        )


def refuse_sweep(folder: str) -> None:
    """ConfigError where the folder is a sweep's."""
    if read_record(folder, "sweep.json"):
        raise ConfigError(f"{folder} is a sweep, whose trials are runs. Choose another --run.name.")


def begin_run(folder: str, config: RunConfig, dataset_digest: str) -> None:
    """run.json of a run that is being opened in MLflow, with the id that it has there from before: until
    `write_run` or `give_up`, who asks for it waits (`tracked_as`)."""
    _write_record(folder, config, dataset_digest, run_id_of(folder), opening=True)


def give_up(folder: str) -> None:
    """Of a run that was begun: its workers are to end, if there are any."""
    if (known := read_record(folder, "run.json")) and known.get("opening"):
        write_json(join(folder, "run.json"), {**known, "opening": None})


def tracked_as(folder: str) -> str | None:
    """MLflow's id of the run, as soon as the driver has it, None where MLflow is away. Failure where the
    driver has given up."""
    while (known := read_record(folder, "run.json") or {}).get("opening"):
        time.sleep(0.2)
    if "opening" in known:
        raise Failure(f"{folder}: the command that began this run has given up.")
    return known.get("run_id")


def run_id_of(folder: str) -> str | None:
    """MLflow's id of the run as run.json has it; None where MLflow has never heard of it."""
    return (read_record(folder, "run.json") or {}).get("run_id")


def write_run(folder: str, config: RunConfig, dataset_digest: str, run_id: str | None) -> None:
    """run.json and config.yaml, with which `hrnet train` goes on: it asks for no fresh start, and holds no
    password. run_id: MLflow's, None as long as it has none."""
    _write_record(folder, config, dataset_digest, run_id)
    fields = settings_shown(config, {"config_name", "sweep"})
    fields["run"]["fresh"] = False
    head = f"# hrnet train {base_name(folder)}: all settings, as they were"
    write_whole(join(folder, "config.yaml"), f"{head}\n{yaml.safe_dump(fields, sort_keys=False)}")


def settings_shown(config: RunConfig, exclude: set[str]) -> dict[str, Any]:
    """All but some sections, as JSON has them; the address of a server without user and password."""
    fields = config.model_dump(mode="json", exclude=exclude)
    if fields["track"]["uri"]:
        fields["track"]["uri"] = without_credentials(fields["track"]["uri"])
    return fields


def refuse_to_move(folder: str) -> None:
    """ConfigError where an earlier run lies in a bucket, where nothing can be moved."""
    if is_uri(folder) and read_record(folder, "run.json") is not None:
        raise ConfigError(
            f"{folder}: --run.fresh moves the earlier run aside, and in a bucket nothing can be moved. "
            f"Give another --run.name, or move that folder with the tool of your store."
        )


def move_aside(folder: str) -> None:
    """`name` becomes `name.1`, `name.2`, ...; the lock file stays where it is."""
    if read_record(folder, "run.json") is None:
        return
    here = Path(folder)
    names = (here.with_name(f"{here.name}.{number}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    here.rename(aside)
    here.mkdir()
    print(f"the earlier run {here.name} is now {aside}")


def keep_error(folder: str, text: str) -> str:
    """Put a text, as what was said now, at the end of the run's errors.log; its path or URI."""
    file = join(folder, ERRORS)
    try:
        before = read_file(file)
    except FileNotFoundError:
        before = b""
    when = datetime.datetime.now().isoformat(timespec="seconds")
    write_whole(file, before + f"--- {when}\n{text.rstrip()}\n".encode())
    return file


def no_room(error: BaseException, folder: str) -> DataError | None:
    """What to tell where an exception is that of a disk without room; else None."""
    if not (isinstance(error, OSError) and error.errno in NO_ROOM):
        return None
    return DataError(
        f"{error.filename or folder}: cannot be written ({error.strerror}). Free space, or take away what "
        f"limits it; the same command goes on from the last checkpoint."
    )


def where_it_stands(folder: str, steps: int, fresh: bool = False) -> str:
    """Where a run stands, as a sentence; `steps`: batches of an epoch. fresh: it was begun with --run.fresh,
    which another time would move it aside."""
    saved = saved_step(folder)
    at = f"The run stands after {place(reached_step(folder), steps)}; "
    if not saved:
        return f"{at}it has no checkpoint yet, the same command begins again."
    command = "the same command without --run.fresh" if fresh else "the same command"
    return f"{at}{command} goes on from the checkpoint of {place(saved, steps)}."


def place(step: int, steps: int) -> str:
    """ "epoch 2, batch 31" of the batches that are through; `steps`: batches of an epoch."""
    epoch, batch = divmod(max(step - 1, 0), steps)
    return f"epoch {epoch + 1}, batch {batch + 1}" if step else "no batch"


def reached_step(folder: str) -> int:
    """Batches of the whole run until its last row of metrics: in a bucket, that of the last checkpoint."""
    try:
        rows = read_file(join(folder, "metrics.jsonl")).splitlines()
    except FileNotFoundError:
        rows = []
    for row in reversed(rows):
        with contextlib.suppress(ValueError):  # a last line that is just being written
            return int(json.loads(row)["step"])
    return 0


def saved_step(folder: str) -> int:
    """Batches of the whole run at the checkpoint that Ray Train would go on from; 0: none."""
    for _ in range(10):  # Ray may be writing it in this moment
        with contextlib.suppress(ValueError):
            snapshot = read_record(folder, "ray/checkpoint_manager_snapshot.json") or {}
            latest = snapshot.get("latest_checkpoint_result")
            return int(latest["metrics"]["step"]) if latest else 0
        time.sleep(0.1)
    return 0


def _write_record(
    folder: str, config: RunConfig, dataset_digest: str, run_id: str | None, **opening: bool
) -> None:
    now = {"run_id": run_id, "decides": _decides(config, dataset_digest), **opening}
    write_json(join(folder, "run.json"), now)


def _decides(config: RunConfig, dataset_digest: str) -> dict[str, Any]:
    return {"dataset_digest": dataset_digest, **config.decides()}


def storage_of(folder: str) -> str:
    """The folder, path or URI, in which a run's folder lies."""
    if not is_uri(folder):
        return str(Path(folder).parent)
    address, mark, query = folder.partition("?")
    return f"{address.rpartition('/')[0]}{mark}{query}"
