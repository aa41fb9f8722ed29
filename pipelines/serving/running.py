"""Which Ray of this machine serves a port: the next `hrnet deploy` finds it and changes what is live."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from pipelines.storage.files import write_whole


@dataclass(frozen=True)
class Endpoint:
    """An endpoint that a process of this machine keeps up."""

    address: str
    """Of its Ray."""
    host: str
    haproxy: bool
    pid: int
    started: float
    """When that process began: another one may have its id later."""
    grpc_port: int | None = None


@contextlib.contextmanager
def announced(
    port: int, address: str, host: str, haproxy: bool, grpc_port: int | None = None
) -> Iterator[None]:
    """This process serves `port`, while the block lasts."""
    process = psutil.Process()
    file = _file(port)
    endpoint = Endpoint(address, host, haproxy, process.pid, process.create_time(), grpc_port)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_whole(file, json.dumps(asdict(endpoint)))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def ports() -> list[int]:
    """Those of this machine that endpoints of this user's serve."""
    pattern = re.compile(rf"{re.escape(platform.node())}-(\d+)\.json")
    found = [int(named[1]) for file in _folder().glob("*.json") if (named := pattern.fullmatch(file.name))]
    return sorted(port for port in found if endpoint_at(port))


def endpoint_at(port: int) -> Endpoint | None:
    """The endpoint of this user's that serves the port; None where its process has ended."""
    try:
        endpoint = Endpoint(**json.loads(_file(port).read_text()))
        alive = psutil.Process(endpoint.pid).create_time() == endpoint.started
    except (OSError, ValueError, TypeError, psutil.Error):
        return None
    return endpoint if alive else None


def _folder() -> Path:
    """In the user's cache folder, which machines may share."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "hrnet" / "serving"


def _file(port: int) -> Path:
    return _folder() / f"{platform.node()}-{port}.json"
