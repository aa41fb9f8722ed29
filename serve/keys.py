"""Who may ask: bearer keys, from a file or from the environment, and how much each may ask for.

A key a line: a name for logs and metrics, the key itself (or sha256: and its hex digest, so that the file
holds no secret), and if wanted its own limits. # begins a comment.

    camera-1   4f1c0b7e...                      rate=5  share=0.25
    dashboard  sha256:9f86d081884c7d659a2f...

Keys are compared by their digests, all of them and in constant time, and stand in no log, message or error.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from hrnet_core.errors import ConfigError
from serve.schemas import Problem

VARIABLE = "HRNET_SERVE_KEYS"
"""Environment variable of the replicas with keys, separated by line ends or semicolons."""
SHORTEST = 16
LINE = "A line is: NAME KEY [rate=5] [share=0.25]"
LOOKED_AT_EVERY_S = 1.0
NAME = re.compile(r"[\w.@-]{1,64}")
logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Key:
    """One who may ask."""

    name: str
    digest: bytes
    """sha256 of the key."""
    rate: float | None = None
    """Requests a second in one replica; None: as the setting says."""
    share: float | None = None
    """Of a replica's places, 0 to 1; None: as the setting says."""


def read_keys(text: str, where: str) -> list[Key]:
    """The keys of a file or variable. ConfigError names the line, never what stands in it."""
    keys: list[Key] = []
    for number, line in enumerate(re.split(r"[\n;]", text), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        try:
            key = _key(words)
        except ValueError as error:
            raise ConfigError(f"{where}, line {number}: {error}. {LINE}") from None
        if any(hmac.compare_digest(key.digest, other.digest) for other in keys):
            raise ConfigError(f"{where}, line {number}: the same key as in an earlier line.")
        keys.append(key)
    if not keys:
        raise ConfigError(f"{where}: no key in it. {LINE}")
    return keys


def _key(words: list[str]) -> Key:
    if len(words) < 2:
        raise ValueError("a name and a key are needed")
    name, secret, *limits = words
    if not NAME.fullmatch(name):
        raise ValueError("the name may have letters, digits and . @ - _, up to 64 of them")
    if secret.startswith("sha256:"):
        if not re.fullmatch("sha256:[0-9a-f]{64}", secret):
            raise ValueError("after sha256: stand the 64 hex digits of the key's digest")
        digest = bytes.fromhex(secret.removeprefix("sha256:"))
    elif len(secret) < SHORTEST:
        raise ValueError(f"a key has at least {SHORTEST} characters (openssl rand -hex 24 makes one)")
    else:
        digest = hashlib.sha256(secret.encode()).digest()
    given = dict(limit.partition("=")[::2] for limit in limits)
    if not set(given) <= {"rate", "share"}:
        raise ValueError("after the key there may be rate= and share=")
    numbers = {limit: float(value) for limit, value in given.items()}
    if not all(0 < value < math.inf for value in numbers.values()) or numbers.get("share", 1) > 1:
        raise ValueError("rate is above 0, share above 0 and at most 1")
    return Key(name, digest, **numbers)


class Keys:
    """The keys of a replica. Those of a file are read again when it changes; one that cannot be read then
    leaves the old ones in force.

    needed: there must be some. Else, without file and variable, everyone may ask.

    ConfigError at the start where a file or the variable cannot be used, or is needed and not there.
    """

    def __init__(self, file: str | None, needed: bool = False) -> None:
        self.file = Path(file) if file else None
        text = os.environ.get(VARIABLE, "")
        self._variable = read_keys(text, VARIABLE) if text.strip() else []
        self._looked, self._seen = -math.inf, self._stamp()
        self._file = self._read()
        if needed and not self.wanted:
            raise ConfigError(
                f"keys are needed and none are here: give --serve.keys FILE, or set {VARIABLE} in the "
                f"environment of every node."
            )

    @property
    def wanted(self) -> bool:
        """Whether a key is asked for."""
        return self.file is not None or bool(self._variable)

    def holder(self, authorization: str | None) -> Key | None:
        """Whose key an Authorization header holds; None where there is no header. Problem (401) where there
        is one and its key is unknown."""
        if not authorization:
            return None
        scheme, _, secret = authorization.strip().partition(" ")
        digest = hashlib.sha256(secret.strip().encode("utf-8", "replace")).digest()
        self._look()
        found = None
        for key in [*self._file, *self._variable]:  # all of them: the time tells nothing
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None or scheme.lower() != "bearer":
            headers = {"WWW-Authenticate": 'Bearer realm="hrnet", error="invalid_token"'}
            raise Problem("unauthorized", "the key sent is not known here.", headers=headers)
        return found

    def _look(self) -> None:
        """Read the file again if it is another one than last time."""
        if self.file is None or time.monotonic() - self._looked < LOOKED_AT_EVERY_S:
            return
        self._looked, stamp = time.monotonic(), self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._file = self._read()
            logger.info("%s: %d keys are in force", self.file, len(self._file))
        except ConfigError as error:
            logger.error("keeping the keys that were in force: %s", error)

    def _read(self) -> list[Key]:
        if self.file is None:
            return []
        try:
            return read_keys(self.file.read_text(), str(self.file))
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ConfigError(f"{self.file}: the keys cannot be read ({why}).") from None

    def _stamp(self) -> tuple[int, ...]:
        try:
            status = self.file.stat() if self.file else None
        except OSError:
            status = None
        return (status.st_mtime_ns, status.st_size, status.st_ino) if status else ()


class Rates:
    """How often each may ask: `rate` requests a second, and as many at once after a pause (at least one)."""

    def __init__(self) -> None:
        self._left: dict[str, tuple[float, float]] = {}

    def wait_s(self, name: str, rate: float) -> float:
        """0, and the request is counted; or the seconds until one more is allowed."""
        now, most = time.monotonic(), max(1.0, rate)
        left, then = self._left.get(name, (most, now))
        left = min(most, left + (now - then) * rate)
        allowed = left >= 1
        self._left[name] = (left - 1 if allowed else left, now)
        return 0.0 if allowed else (1 - left) / rate
