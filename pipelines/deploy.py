"""hrnet deploy: a checkpoint, or the champion, answering HTTP requests on Ray Serve.

The checkpoint is resolved, checked and copied here, before anything starts. On a laptop Ray and Serve run as
long as the first deploy's process; on a cluster Serve goes on when it has ended. Where an endpoint runs
already, on a laptop the one on the same port, deploy changes what is live there.
"""

from __future__ import annotations

import contextlib
import os
import time
from concurrent.futures import wait
from pathlib import Path
from typing import TYPE_CHECKING

from hrnet_core.errors import CheckpointError, ConfigError, PoseError, first_line
from hrnet_core.locations import one_line
from pipelines.cluster.session import (
    metrics_port,
    on_cluster,
    ray_address,
    ray_is_whole,
    ray_session,
    room_for,
    selector,
    serve_logs,
    with_metrics_port,
)
from pipelines.cluster.shared_paths import refuse_unshared
from pipelines.process.code_version import code_version
from pipelines.process.stop import Stopped, begun, stoppable
from pipelines.serving import live
from pipelines.serving.expected import expected_scores
from pipelines.serving.guard import who_may_ask
from pipelines.serving.ingress import haproxy, refuse_port_in_use
from pipelines.serving.pinned import pinned, pinned_detector, prune, standing_still
from pipelines.serving.running import Endpoint, announced, endpoint_at, ports
from pipelines.serving.samples import samples_folder
from pipelines.settings.config import RaySettings, RunSettings, ServeSettings, TrackSettings
from pipelines.storage.files import absolute
from pipelines.tracking.checkpoints import LocalCheckpoint, local_checkpoint
from serve import traces
from serve.settings import CPUS_PER_REPLICA, Limits, ReplicaSettings, ServeArgs

if TYPE_CHECKING:
    from hrnet_core.checkpoint import CheckpointSpec


def deploy(
    checkpoint: str | None,
    settings: ServeSettings,
    *,
    run: RunSettings | None = None,
    track: TrackSettings | None = None,
    ray_settings: RaySettings | None = None,
    rollback: bool = False,
    block: bool = True,
) -> str:
    """Serve a checkpoint folder, a URI of one, or "models:/hrnet-pose@champion"; returns the address.

    checkpoint: None is the champion of `track.registered_model`. What it is served as: a registered version
    under the name of its model, others under `track.registered_model` with digits of their weights' sha256.
    rollback: instead the version that was live before the one that is; `checkpoint` is to be None.

    Here: prints the address once requests are answered and, with `block`, waits for Ctrl-C or SIGTERM, then
    ends Serve and the Ray it started; before that both raise Stopped. Where another process of this machine
    serves the port, switches the model there and returns. block=False wants a Ray that runs in this process,
    and leaves Serve running on it. On a cluster (RAY_ADDRESS) it never blocks, and Serve goes on after this
    process.

    CheckpointError, ConfigError, DataError before Serve is told anything where the checkpoint, a setting or
    the samples are wrong; ConfigError where Serve cannot bring the model up. What was live before goes on.
    """
    run, track, ray_settings = run or RunSettings(), track or TrackSettings(), ray_settings or RaySettings()
    block = block and not on_cluster()
    there = endpoint_at(settings.port) if block else None
    with stoppable():
        if rollback:
            if checkpoint is not None:
                raise ConfigError("--rollback takes no CHECKPOINT: it brings back what was live before.")
            return _roll_back(settings, ray_settings, there)
        # Who reaches it is decided by where it listens already.
        here = settings
        if there:
            here = settings.model_copy(update={"host": there.host, "grpc_port": there.grpc_port})
        if block and there is None:
            refuse_port_in_use(settings.host, settings.port)
            if served := _served():
                print(f"note: {served} already; this starts another one beside", flush=True)
        with local_checkpoint(checkpoint, track, run.storage) as found:
            args, spec = serve_args(found, here, run, track)
        # Ray gives its workers the lowest priority; here they are what the machine is for. Read by the node.
        os.environ.setdefault("RAY_worker_niceness", "0")
        joined, started = (there.address, ray_settings) if there else (None, with_metrics_port(ray_settings))
        # What Serve's processes print is of no use here; their logs have it.
        with ray_session(started, address=joined, workers_shown=False):
            if block and settings.cpus_per_replica is None:
                args = args.model_copy(update=_share_of_the_machine(args))
            if block and there is None:
                return _until_a_signal(args, spec, settings, run, ray_settings)
            if there:
                _say_what_stays(settings, there)
            args = args.model_copy(update={"labels": selector(ray_settings)})
            _refuse_unshared(args, run)
            url = live.bring_up(args, here, ray_settings)
            print(_told(url, args, spec, here), flush=True)
            _remove_old_copies(args, run.storage, settings.port)
    return url


def _refuse_unshared(args: ServeArgs, run: RunSettings) -> None:
    """ConfigError on a cluster where a node that may get a replica has not got what it would read."""
    copied = args.checkpoint.startswith(f"{absolute(run.storage)}/deployed/")
    checkpoint = ("--run.storage" if copied else "CHECKPOINT", args.checkpoint)
    detector = args.person_detector.model if args.person_detector else None
    others = {"--serve.detector": detector, "--serve.keys": args.keys, "--serve.samples": args.samples}
    refuse_unshared([checkpoint, *others.items()])


def serve_args(
    found: LocalCheckpoint, settings: ServeSettings, run: RunSettings, track: TrackSettings
) -> tuple[ServeArgs, CheckpointSpec]:
    """(ServeArgs, the checkpoint's spec), with everything checked that can be before Serve starts."""
    with standing_still(found) as still:
        try:
            spec = _checked(still, settings)
        except (CheckpointError, ConfigError) as error:  # of the copy: it is gone when this is read
            raise type(error)(str(error).replace(str(still), found.name)) from None
        reachable = pinned(found, still, run.storage, settings.port)
    sha256 = spec.weights_sha256 or ""
    flip_test = spec.flip_test if settings.flip_test is None else settings.flip_test
    name, _, version = (found.version or f"{track.registered_model}/{sha256[:12]}").rpartition("/")
    replica = settings.model_dump(include=set(ReplicaSettings.model_fields))
    replica |= who_may_ask(settings)
    detector = pinned_detector(settings.detector, run.storage) if settings.detector else None
    replica["samples"] = samples_folder(settings, spec.skeleton, run.storage)
    return ServeArgs(
        **replica,
        checkpoint=reachable,
        version=version,
        source=found.name,
        name=name,
        sha256=sha256,
        expected_scores=expected_scores(found, sha256, flip_test, run.storage),
        person_detector=detector,
        batch_wait_s=settings.batch_wait_ms / 1000,
        limits=Limits(**settings.model_dump(include=set(Limits.model_fields))),
        num_replicas=settings.replicas,
        num_cpus=settings.cpus_per_replica or CPUS_PER_REPLICA,
        num_gpus=1.0 if settings.use_gpu else 0.0,
        code=code_version(),
    ), spec


def _checked(folder: Path, settings: ServeSettings) -> CheckpointSpec:
    from hrnet_core.checkpoint import exported_names, read_spec, verify_checkpoint
    from hrnet_core.modes import unusable

    # On a cluster the replicas' machines decide, not this one.
    device = "cuda" if settings.use_gpu else "cpu"
    why = "" if on_cluster() else unusable(settings.mode, device, exported_names(folder))
    if why:
        raise ConfigError(f"mode {settings.mode!r} cannot run here: {why}.")
    if not on_cluster() and (why := traces.cannot(settings.traces)):
        raise ConfigError(f"--serve.traces or OTEL_EXPORTER_OTLP_ENDPOINT: {why}.")
    verify_checkpoint(folder)
    return read_spec(folder)


def _share_of_the_machine(args: ServeArgs) -> dict[str, float | int]:
    """All its cores as threads. Half of them as what Ray counts: a change of settings starts new replicas
    beside the old ones, and they have to fit."""
    share = max(1, room_for(1, 0) // (args.max_replicas or args.num_replicas))
    return {"num_cpus": share / 2, "threads": args.threads or share}


def _remove_old_copies(args: ServeArgs, storage: str, port: int) -> None:
    """Of earlier deploys, once this one is live. It is, whatever becomes of them."""
    now = live.intended()
    if now is None:
        return
    try:
        removed = prune(args.checkpoint, storage, port, {now.checkpoint, (now.previous or now).checkpoint})
    except (PoseError, OSError, ValueError) as error:
        print(f"note: old copies beside {args.checkpoint} were not removed: {one_line(error)}", flush=True)
        return
    if removed:
        print(f"removed {len(removed)} old copies beside {args.checkpoint}", flush=True)


def _until_a_signal(
    args: ServeArgs,
    spec: CheckpointSpec,
    settings: ServeSettings,
    run: RunSettings,
    ray_settings: RaySettings,
) -> str:
    """The endpoint, as long as this process lives."""
    url = live.bring_up(args, settings, ray_settings)
    _remove_old_copies(args, run.storage, settings.port)
    by_haproxy = haproxy(settings)
    with announced(settings.port, ray_address(), settings.host, by_haproxy, settings.grpc_port):
        metrics = f"  Prometheus  http://127.0.0.1:{metrics_port()}/metrics"
        logs = f"  logs  {serve_logs()}"
        print(f"{_told(url, args, spec, settings)}\n{metrics}\n{logs}\n  end   Ctrl-C", flush=True)
        _wait_for_signal()
    print("stopping ...", flush=True)
    _drain(by_haproxy)
    return url


def _roll_back(settings: ServeSettings, ray_settings: RaySettings, there: Endpoint | None) -> str:
    if there is None and not on_cluster() and not _ray_runs_here():
        names = f"{served}; " if (served := _served()) else ""
        raise ConfigError(
            f"nothing is served on port {settings.port} of this machine ({names}--serve.port names another "
            f"one)."
        )
    with ray_session(ray_settings, address=there.address if there else None, workers_shown=False):
        before = live.intended()
        if before is None:
            raise ConfigError("no endpoint runs here, so there is nothing to go back from.")
        args = live.back(before)
        url = live.bring_up(args, settings, ray_settings)
    again, now = live.with_detector(args), live.with_detector(before)
    print(f"serving {args.name} {again} again, set as it was then, in place of {now}: {url}", flush=True)
    return url


def _served() -> str:
    """The ports of this user's endpoints on this machine: who forgets --serve.port means one of them."""
    return f"you serve {', '.join(map(str, found))}" if (found := ports()) else ""


def _ray_runs_here() -> bool:
    import ray

    return bool(ray.is_initialized())


def _say_what_stays(settings: ServeSettings, there: Endpoint) -> None:
    print(f"the endpoint of process {there.pid} on port {settings.port} changes its model", flush=True)
    if (settings.host, haproxy(settings)) != (there.host, there.haproxy):
        print(f"note: it keeps listening on {there.host}; --serve.host and --serve.haproxy are for a start")
    if settings.grpc_port not in (None, there.grpc_port):
        keeps = f"listening to gRPC on {there.grpc_port}" if there.grpc_port else "answering HTTP alone"
        print(f"note: it keeps {keeps}; --serve.grpc-port is for a start")


# --- waiting -----------------------------------------------------------------------------------


def _wait_for_signal() -> None:
    with contextlib.suppress(Stopped):
        while True:
            time.sleep(1)


def _drain(by_haproxy: bool) -> None:
    """Requests in progress get their answers, unless Ray ends too: a supervisor may send its signal to every
    process that it knows of."""

    def drain() -> None:
        live.drain()
        if not by_haproxy:  # HAProxy answers 503 as problem+json until the last moment
            live.end_proxies()

    drained = begun(drain)
    while not drained.done() and ray_is_whole():
        wait([drained], 0.2)
    error = drained.exception() if drained.done() else None
    if error or not drained.done():
        why = (
            f"{type(error).__name__}: {first_line(error)}" if error and ray_is_whole() else "Ray ended first"
        )
        print(f"not waited for requests in progress ({why})", flush=True)


def _told_of_drift(args: ServeArgs) -> str:
    if args.expected_scores:
        return f"  drift of scores is measured from an evaluation's {sum(args.expected_scores):,} keypoints"
    return (
        "  drift of scores is not measured: no evaluation of these weights, with the flip test that is "
        "served, was found (docs/watching.md)"
    )


def _told(url: str, args: ServeArgs, spec: CheckpointSpec, settings: ServeSettings) -> str:
    width, height = spec.input_size
    key = "-H 'Authorization: Bearer KEY' " if args.need_keys else ""
    served = f"{args.name} {live.with_detector(args)}"
    boxes = "" if args.person_detector else "-F 'boxes=[[X, Y, W, H]]' "
    calls = f"{url.removeprefix('http://').rpartition(':')[0]}:{settings.grpc_port}"
    return "\n".join(
        [
            f"serving {served} ({height}x{width}, {spec.codec.name}) from {args.source}",
            f"  page  {url}/",
            f"  try   curl {key}-F image=@photo.jpg {boxes}{url}/v1/poses",
            f"  API   {url}/docs",
            *([f"  gRPC  {calls} (Open Inference Protocol)"] if settings.grpc_port else []),
            _told_of_drift(args),
        ]
    )
