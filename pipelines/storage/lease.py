"""One owner at a time of what lies in a bucket, which knows no locks: an object that says who has it.

The owner writes it anew each RENEW_S; who finds it untouched for LEASE_S, by the bucket's own clock, takes it
over. Two that ask in the same moment both write, and the later write stands: the other finds that out before
it begins, or at its next renewal where the bucket was slower than SETTLE_S, and stops.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import psutil

from hrnet_core.errors import ConfigError, DataError
from hrnet_core.locations import one_line, open_folder
from pipelines.process.environment import job_name
from pipelines.storage.files import join, read_json, write_json

RENEW_S, LEASE_S, SETTLE_S = 30.0, 180.0, 1.0


@contextlib.contextmanager
def leased(folder: str, name: str, what: str) -> Iterator[None]:
    """Hold the object `name` in a folder (URI) for the time of the block. `what` stands first in messages.

    ConfigError where another that is alive has it, and from the block where another took it. DataError where
    the bucket does not take it.
    """
    owner = {"host": platform.node(), "process": os.getpid(), "job": job_name(), "id": uuid.uuid4().hex}
    file = join(folder, name)
    try:
        _refuse_living(folder, name, what)
        write_json(file, owner)
    except OSError as error:
        raise DataError(
            f"{file}: cannot be written ({one_line(error)}). Check the rights on the bucket."
        ) from None
    time.sleep(SETTLE_S)
    if read_json(file) != owner:
        raise ConfigError(f"{what}: another process began in the same moment. Wait for it.")
    ended, lost = threading.Event(), threading.Event()
    keeper = threading.Thread(target=_keep, args=(file, owner, ended, lost), daemon=True)
    keeper.start()
    try:
        yield
    except KeyboardInterrupt:
        if lost.is_set():
            raise ConfigError(
                f"{what}: another process took it over, as this one had not renewed its lease {file} for "
                f"{LEASE_S:g} s. It goes on there."
            ) from None
        raise
    finally:
        ended.set()
        keeper.join()
        if not lost.is_set():
            files, path = open_folder(file)
            with contextlib.suppress(OSError):  # a lease that stays runs out
                files.delete_file(path)


def _keep(file: str, owner: dict[str, Any], ended: threading.Event, lost: threading.Event) -> None:
    while not ended.wait(RENEW_S):
        with contextlib.suppress(OSError, DataError):  # a bucket that is away: asked again
            if read_json(file) not in (owner, None):
                lost.set()
                _thread.interrupt_main()  # as if the user had said so
                return
            write_json(file, owner)


def _refuse_living(folder: str, name: str, what: str) -> None:
    """ConfigError where the lease has an owner that may be alive."""
    owner = read_json(join(folder, name))
    if owner is None:
        return
    if owner["host"] == platform.node() and not psutil.pid_exists(owner["process"]):
        return
    silent = _seconds_since(folder, name)
    if silent < LEASE_S:
        job = f"job {told}, " if (told := owner.get("job")) else ""
        raise ConfigError(
            f"{what}: {job}process {owner['process']} on {owner['host']} has it, and said so {silent:.0f} s "
            f"ago. Wait for it, or give another --run.name; if that process is dead, the same command takes "
            f"over in {LEASE_S - silent:.0f} s."
        )


def _seconds_since(folder: str, name: str) -> float:
    """How long ago an object was written. The bucket's clock says so twice: ours may be another."""
    probe = f"{name}.{uuid.uuid4().hex}"
    write_json(join(folder, probe), {})
    files, now = open_folder(join(folder, probe))
    written, asked = files.get_file_info([now.removesuffix(probe) + name, now])
    files.delete_file(now)
    return (asked.mtime_ns - written.mtime_ns) / 1e9
