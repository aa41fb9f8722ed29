"""Who may ask an endpoint that is deployed: keys, and the names that it is asked by."""

from __future__ import annotations

from typing import Any

from hrnet_core.errors import ConfigError
from pipelines.serving.ingress import LOOPBACK
from pipelines.settings.config import ServeSettings
from pipelines.storage.files import absolute
from serve.keys import VARIABLE, Keys

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")  # as a Host header has them


def who_may_ask(settings: ServeSettings) -> dict[str, Any]:
    """`keys`, `need_keys`, `hosts` and `here_only` of ServeArgs. ConfigError where there are no keys, or none
    that can be used, and the endpoint would listen to everyone."""
    file = absolute(settings.keys) if settings.keys else None
    keys = Keys(file)
    if settings.anyone and keys.wanted:
        raise ConfigError(f"--serve.anyone, but keys are given (--serve.keys or {VARIABLE}): leave one out.")
    here = settings.host in LOOPBACK
    if not (keys.wanted or settings.anyone or here):
        raise ConfigError(
            f"--serve.host {settings.host} is reached from other machines and no keys are given: anyone may "
            f"ask. Give --serve.keys FILE (a line each: NAME KEY), set {VARIABLE} for the replicas, or say "
            f"--serve.anyone if something in front asks for keys."
        )
    hosts = settings.hosts or (LOOPBACK_NAMES if here else ())
    return {"keys": file, "need_keys": keys.wanted, "hosts": hosts, "here_only": here}
