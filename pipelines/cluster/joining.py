"""Joining the Ray that RAY_ADDRESS names: what cannot be joined is told in a sentence, before Ray looks for
it for minutes without a word.
"""

from __future__ import annotations

import contextlib
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from hrnet_core.errors import ConfigError, Failure
from hrnet_core.locations import one_line

PATIENCE = 20.0
"""Seconds in which a head that is being started again may come back."""
ANSWER_SECONDS = 5.0
TOKEN = "the head's is in its ~/.ray/auth_token; copy it to yours, or give it as RAY_AUTH_TOKEN"
UNSET = "Unset RAY_ADDRESS, and the verb starts a Ray here"


def refuse_address(address: str, patience: float = PATIENCE) -> None:
    """ConfigError where RAY_ADDRESS is no address that a verb can join, and where no Ray answers at
    HOST:PORT. "local" and "auto" are left to Ray."""
    if address in ("local", "auto"):
        return
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS {address} is where jobs are submitted, no Ray to join. Submit the command, ray job "
            f"submit --address {address} -- hrnet ... (RAY_API_SERVER_ADDRESS names that address for good). "
            f"{UNSET}."
        )
    if address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS {address}: a verb does not run over Ray's client. Submit it as a job, ray job "
            f"submit --address http://HOST:8265 -- hrnet ... (docs/cluster.md). {UNSET}."
        )
    parts = re.fullmatch(r"\[?([^\[\]/]+?)\]?:(\d{1,5})", address)
    if parts is None:
        raise ConfigError(f"RAY_ADDRESS {address}: is no HOST:PORT, such as 10.0.0.1:6379. {UNSET}.")
    said = _answer(parts[1], int(parts[2]), address, patience)
    if said[:1].isalnum() or said[:1] == b"-":  # gRPC begins with a length, TLS with a code below 32
        shown = said[:40].decode("latin-1").splitlines()[0]
        raise ConfigError(
            f"RAY_ADDRESS {address}: what answers there is no Ray's head, but {shown!r}. Name the port of "
            f"`ray start --head --port` (6379), not the dashboard's. {UNSET}."
        )
    if not _node_here():
        raise ConfigError(
            f"RAY_ADDRESS {address}: a verb joins a Ray from one of its nodes, and this machine is none. "
            f"Submit the command as a job, ray job submit -- hrnet ... (docs/cluster.md). {UNSET}."
        )


def _answer(host: str, port: int, address: str, patience: float) -> bytes:
    """The first bytes of what listens there, to a request of HTTP; b"" for none within a while."""
    deadline = time.monotonic() + patience
    while True:
        try:
            with socket.create_connection((host, port), timeout=ANSWER_SECONDS) as probe:
                probe.sendall(b"GET / HTTP/1.1\r\nHost: ray\r\n\r\n")
                return _received(probe)
        except (OSError, OverflowError, UnicodeError) as error:  # UnicodeError: no name of a host
            if time.monotonic() > deadline:
                why = getattr(error, "strerror", None) or one_line(error)
                raise ConfigError(
                    f"RAY_ADDRESS {address}: no Ray answers there ({why}). Is its head up, and can this "
                    f"machine reach it? {UNSET}."
                ) from None
        time.sleep(min(1.0, patience))


def _received(probe: socket.socket) -> bytes:
    with contextlib.suppress(OSError):
        return probe.recv(64)
    return b""


def _node_here() -> bool:
    """Whether this machine is a node of some Ray, seen as Ray sees it, which would look for a minute."""
    commands = (process.info["cmdline"] or [""] for process in psutil.process_iter(["cmdline"]))
    return any(Path(command[0]).name == "raylet" for command in commands)


@contextlib.contextmanager
def refusals_told(address: str) -> Iterator[None]:
    """Around `ray.init`: its refusals in our words. address: what is joined; "local": Ray is started here."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        raise ConfigError(
            f"the Ray at {address} asks for its token, and RAY_AUTH_MODE=token is set here without one: "
            f"{TOKEN}."
        ) from None
    except ConnectionError as error:
        if address == "auto":
            raise ConfigError(f"RAY_ADDRESS auto: no Ray runs on this machine. {UNSET}.") from None
        raise ConfigError(
            f"the Ray at {address} answers but cannot be joined ({one_line(error)}). If it asks for a token: "
            f"set RAY_AUTH_MODE=token; {TOKEN}. If this machine is none of its nodes: "
            f"submit the command as a job (docs/cluster.md)."
        ) from None
    except OSError as error:
        if "AF_UNIX path length" not in str(error) and error.filename is None:
            raise
        why = f"{error.filename}: {error.strerror}" if error.filename else "its sockets' path is too long"
        raise ConfigError(
            f"Ray cannot write its files ({why}). Its token is in ~/.ray, all else in "
            f"{tempfile.gettempdir()} or where RAY_TMPDIR says: set HOME to a folder that you may write to, "
            f"RAY_TMPDIR to one with a short path and room."
        ) from None
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        both = one_line(error).removeprefix("Version mismatch: ")
        raise ConfigError(
            f"the Ray at {address} cannot be joined from here, as its versions are others. {both}. Use an "
            f"environment with its versions, or end what runs there and start it from this one."
        ) from None
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        raise Failure(
            "Ray did not start within half a minute, as this machine is too busy or short of memory. Give "
            "the same command again when it has less to do."
        ) from error
