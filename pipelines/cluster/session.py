"""The Ray that a stage runs on: one it starts here, or the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import heapq
import importlib
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TextIO

from hrnet_core import memory
from hrnet_core.errors import ConfigError, PoseError
from pipelines.cluster.joining import refusals_told, refuse_address
from pipelines.process import environment
from pipelines.process.progress import Every
from pipelines.process.stop import GROUPS, begun, handlers_kept, held
from pipelines.settings.config import RaySettings

HOOK = "pipelines.cluster.worker_process.begin"
METRICS_PORT = 9464  # where OpenTelemetry's exporters for Prometheus listen
TRAIN_HELPERS = 4
"""Processes that Ray Train starts beside its controller and its workers."""
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's variable for a Ray of one machine: with "0" its processes listen on the loopback address alone, as on
macOS and Windows; on Linux they would listen to everyone. Ray reads it when it is imported."""

SHARED = 1.2
"""Seconds of CPUs that threads of a task keep, against those of one thread: they wait for Python's lock."""


def on_cluster() -> bool:
    """True where RAY_ADDRESS names a Ray to join (a submitted job has it set)."""
    return _named_address() != "local"


def _named_address() -> str:
    return os.environ.get("RAY_ADDRESS") or "local"


@contextlib.contextmanager
def ray_session(
    settings: RaySettings,
    quiet: bool = False,
    address: str | None = None,
    workers_shown: bool = True,
    dashboard: bool = False,
    train: bool = False,
) -> Iterator[None]:
    """Ray for the time of the block. Joins `address`, one that a process of this machine has started, else
    RAY_ADDRESS if set, else starts one and ends it after.

    A Ray that already runs in this process is used as it is and left running. Never attaches to a
    Ray that merely happens to run on this machine. quiet: what it and workers say on stderr is not shown
    (`quiet_engines`). workers_shown: what workers print is. dashboard: for stages that need what it knows.
    train: for Ray Train.
    """
    if address:  # of a Ray started here, which asks for its token; read when ray is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if address or not on_cluster():
        os.environ.setdefault(LOOPBACK_ONLY, "0")
    import ray

    if ray.is_initialized():
        yield
        return
    started = _started(settings, address, workers_shown, dashboard, train, plain=quiet and not train)
    with quiet_engines() if quiet else contextlib.nullcontext(), started:
        yield


def with_metrics_port(settings: RaySettings) -> RaySettings:
    """For a Ray that is started here: the metrics port asked for, which must be free, else the usual one if
    it is free, else Ray takes any."""
    port = settings.metrics_port or METRICS_PORT
    if on_cluster():
        return settings
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("0.0.0.0", port))
    except OSError as error:
        if settings.metrics_port is None:
            return settings
        raise ConfigError(
            f"--ray.metrics-port {port} cannot be used ({error.strerror}): another program has it. Choose "
            f"another, or leave it out: then any free one is taken."
        ) from None
    return settings.model_copy(update={"metrics_port": port})


def serve_logs() -> str:
    """Folder on this node with what Serve's processes write: of this Ray, where session_latest is whichever
    was started last. On other nodes of a cluster it usually has the same name."""
    return f"{_node().get_logs_dir_path()}/serve"


def ray_is_whole() -> bool:
    """False once one of the processes has ended that `ray.init` started here: of a Ray that ends."""
    return (node := _node()) is not None and node.remaining_processes_alive()


def _node() -> Any:
    """What this process has of its Ray's node; None where it is at none."""
    from ray._private.worker import _global_node  # it has no public name

    return _global_node


def metrics_port() -> int:
    """Where this node's Ray shows Prometheus metrics."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return next(node["MetricsExportPort"] for node in ray.nodes() if node["NodeID"] == here)


@contextlib.contextmanager
def _started(
    settings: RaySettings,
    address: str | None,
    workers_shown: bool,
    dashboard: bool,
    train: bool,
    plain: bool,
) -> Iterator[None]:
    """plain: for work without an environment of its own."""
    import ray

    if address is None:
        address = _named_address()
        refuse_address(address)
    how: dict[str, Any] = {"runtime_env": {"worker_process_setup_hook": HOOK}}
    inherited: dict[str, str] = {}
    if address == "local":
        refuse_narrow_addresses()
        cpus = settings.num_cpus or environment.usable_cpus()  # Ray knows no affinity: it would take all
        how |= {"num_cpus": cpus, "include_dashboard": dashboard}
        how["_metrics_export_port"] = settings.metrics_port
        # Ray starts a process for each CPU ahead, without an environment. An environment, be it our hook
        # alone, costs another second of a core in each process, and those started ahead are of no use.
        if plain:
            del how["runtime_env"]
            inherited["RAY_LOGGER_LEVEL"] = "error"  # what the hook does
            inherited |= memory.PASSES  # what processes with an environment have in it
        if train:  # which gives its processes environments
            inherited["RAY_prestart_worker_first_driver"] = "0"
            # Ray starts as many at once as it has CPUs: workers of Ray Train would wait for its helpers.
            inherited["RAY_worker_maximum_startup_concurrency"] = str(cpus + TRAIN_HELPERS)
    if not sys.stdout.isatty():  # Ray colours what workers print, also into files
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    # Ray guards the Ray it starts with a token that it makes itself, and says so at each start.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    # Until it runs nothing else is said, for half a minute on a busy machine.
    print("starting Ray ..." if address == "local" else "joining Ray ...", flush=True)
    with contextlib.ExitStack() as ended:
        with (
            refusals_told(address),
            handlers_kept(),
            _sigterm_stays_ours(),
            environment.defaults(inherited),
            _sessions_of_their_own() as processes,
        ):
            ended.callback(_shut_down, processes)
            if train:  # beside Ray's start, which mostly waits
                begun(functools.partial(importlib.import_module, "ray.train.torch"))
            how |= {"log_to_driver": workers_shown, "logging_level": logging.WARNING}
            joined = ray.init(address=address, **how)
        if on_cluster():
            warn_unguarded(joined.dashboard_url or "")
        yield


def refuse_narrow_addresses() -> None:
    """ConfigError where this process may map less memory (`ulimit -v`) than Ray's node manager does: it would
    end without a word, now or at its first task.

    Measured with Ray 2.60 at two sizes of its object store: it maps that twice, and 0.4 GB.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return
    from ray._private import utils

    store = utils.resolve_object_store_memory(utils.estimate_available_memory())
    if limit < 2 * store + 400e6:
        raise ConfigError(
            f"a process may map {limit / 1e9:.1f} GB here (ulimit -v), and the Ray that is to be started "
            f"maps {2 * store / 1e9 + 0.4:.1f} GB, twice its object store: it would end without a word. Give "
            f"`ulimit -v unlimited` before the command, or make the store smaller, by "
            f"RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION=0.1 of the free memory in place of 0.3."
        )


@contextlib.contextmanager
def _sessions_of_their_own() -> Iterator[list[subprocess.Popen[Any]]]:
    """What Ray starts in the block, as a list that grows: out of reach of a signal to our process group
    (Ctrl-C, `timeout`, a terminal that is closed), by which Ray would end before the verb that works on it.

    Ray has no setting for it. Only on Linux, where the kernel ends these processes with us: elsewhere Ray
    finds them by our group, and the list stays empty.
    """
    from ray._private import services

    usual = getattr(services, "ConsolePopen", None)
    processes: list[subprocess.Popen[Any]] = []
    if usual is None or sys.platform != "linux":  # without it, in another Ray, all is as Ray has it
        yield processes
        return

    def start(*args: Any, **how: Any) -> subprocess.Popen[Any]:
        with held():  # Ray gives a preexec_fn
            processes.append(usual(*args, start_new_session=True, **how))
            GROUPS.add(processes[-1].pid)
        return processes[-1]

    services.ConsolePopen = start  # type: ignore[misc, assignment]  # a class, of which it is called alone
    try:
        yield processes
    finally:
        services.ConsolePopen = usual  # type: ignore[misc]


@contextlib.contextmanager
def _sigterm_stays_ours() -> Iterator[None]:
    """Ray's handler, in place while it starts, exits wherever it comes: in Python's import that is dropped
    (stop.IMPORT_LOCKED), and the verb goes on until it hangs."""
    from ray._private import utils

    usual = getattr(utils, "set_sigterm_handler", None)
    if usual is None:  # in another Ray handlers_kept makes the best of it
        yield
        return
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = usual


def _shut_down(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """Ray's end, and that of what the processes have in their groups: the node manager's helpers would look
    for it for minutes where it had to be killed."""
    import ray

    alive = [process.pid for process in processes if process.poll() is None]
    ray.shutdown()
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    GROUPS.difference_update(process.pid for process in processes)


def warn_unguarded(dashboard: str) -> None:
    """A line where the job API of a dashboard (HOST:PORT, "" for none) answers who brings no token. Asked, as
    what our environment says of tokens is not what the head was started with."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    # A refusal is an OSError too.
    with contextlib.suppress(OSError), direct.open(f"http://{dashboard}/api/jobs/", timeout=5):
        print(
            f"warning: whoever reaches http://{dashboard} runs code on this cluster, as its job API asks for "
            f"no token. Start Ray with RAY_AUTH_MODE=token on every node (docs/cluster.md).",
            flush=True,
        )


def ray_address() -> str:
    """By which another process of this machine joins the Ray of this one."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


@contextlib.contextmanager
def quiet_engines() -> Iterator[None]:
    """What is written to stderr in the block (Ray's C++, workers' stderr, warnings) goes into a file of no
    name instead; an exception that is not the user's to cure has its end as a note. stdout is ours."""
    with tempfile.TemporaryFile("w+", errors="replace") as said, contextlib.ExitStack() as restored:
        sys.stderr.flush()
        shown = os.dup(2)
        restored.callback(os.close, shown)
        restored.callback(os.dup2, shown, 2)
        terminal = restored.enter_context(open(shown, "w", buffering=1, closefd=False))
        for handler in logging.getLogger().handlers:  # what the driver itself logs is ours
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr:
                restored.callback(handler.setStream, handler.setStream(terminal))
        restored.callback(faulthandler.enable if faulthandler.is_enabled() else faulthandler.disable)
        faulthandler.enable(terminal)  # a crash of native code, after which nobody reads what was said
        os.dup2(said.fileno(), 2)
        restored.enter_context(contextlib.redirect_stderr(said))
        restored.enter_context(contextlib.redirect_stdout(_WithoutRaylet(sys.stdout)))
        try:
            yield
        except (PoseError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            said.flush()
            error.add_note(f"What the engines said on stderr:\n{_end_of(said.fileno())}")
            raise


class _WithoutRaylet(threading.local):
    """stdout as it is, but what Ray's node manager prints there of a worker that died goes to stderr: the
    stage says it in its own words. A thread's end of line follows the line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._last = stream, stream

    def write(self, text: str) -> int:
        if text != "\n":
            self._last = sys.stderr if "(raylet" in text[:20] else self._stream
        return self._last.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _end_of(file: int, most: int = 200_000) -> str:
    size = os.fstat(file).st_size
    return os.pread(file, most, max(0, size - most)).decode(errors="replace")


@contextlib.contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Ray Data's own progress bars and plans off for a block; a stage says its own lines. Its log file keeps
    them."""
    from ray.data import DataContext

    context = DataContext.get_current()
    with contextlib.ExitStack() as restored:
        restored.callback(setattr, context, "enable_progress_bars", context.enable_progress_bars)
        context.enable_progress_bars = False
        for handler in logging.getLogger("ray.data").handlers:
            if handler.name == "console":
                restored.callback(handler.setLevel, handler.level)
                handler.setLevel(logging.ERROR)
        yield


def selector(settings: RaySettings) -> dict[str, str]:
    """`ray.labels` as Ray's label_selector: none on a Ray that is started here, whose node has no labels."""
    return dict(settings.labels) if on_cluster() else {}


def room_for(cpus: float, gpus: float, labels: Mapping[str, str] = MappingProxyType({})) -> int:
    """How many workers of `cpus` and `gpus` each fit the nodes with these labels that Ray has now, one worker
    on one node."""
    bundle = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
    nodes = _nodes(labels)
    return sum(min(int(n.get(kind, 0) // each) for kind, each in bundle.items()) for n in nodes)


def cpus_each(
    sizes: Sequence[float], most: int, labels: Mapping[str, str] = MappingProxyType({}), fixed: float = 0.0
) -> int:
    """How many CPUs each of some tasks should ask for, 1 to `most`, for the last of them to end soonest on
    the nodes with these labels that Ray has now; the fewest of those that are as good.

    sizes: the work of each, in the order of their start. fixed: what each costs besides, whatever its CPUs.
    No more than the smallest of these nodes has: any of them can take the place of one that is lost. 1 where
    others are at work on this Ray: a task of several waits until one node has them free.
    """
    import ray

    nodes = [int(node.get("CPU", 0)) for node in _nodes(labels)]
    smallest = min(filter(None, nodes), default=1)
    if ray.available_resources().get("CPU") != ray.cluster_resources().get("CPU"):
        return 1

    def end(cpus: int) -> float:
        free = [0.0] * max(1, sum(have // cpus for have in nodes))
        for size in sizes:
            heapq.heapreplace(free, free[0] + fixed + size * (SHARED if cpus > 1 else 1) / cpus)
        return max(free)

    return min(range(1, min(most, smallest) + 1), key=end)


def cpus_per_gpu() -> int:
    """CPUs of a node for each of its GPUs, of that node where they are fewest; 1 where there is no GPU."""
    shares = [int(n.get("CPU", 0) // n["GPU"]) for n in _nodes() if n.get("GPU")]
    return max(1, min(shares, default=1))


def _nodes(labels: Mapping[str, str] = MappingProxyType({})) -> list[dict[str, float]]:
    """Resources of the nodes with these labels that Ray has now."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [n["Resources"] for n in nodes if not labels or labels.items() <= n["Labels"].items()]


def require(settings: RaySettings, workers: int, cpus: float, gpus: float, why: str) -> None:
    """Return once Ray has room for `workers` of `cpus` and `gpus` each; else ConfigError.

    A local Ray never grows: too little is refused at once, with the flag to change. On a cluster an
    autoscaler may bring nodes: waited for with a message, then refused.
    """
    from ray.autoscaler.sdk import request_resources

    bundle = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}  # of a worker, on one node
    labels = selector(settings)
    asked, due = False, Every(30, at_once=True)
    deadline = time.monotonic() + settings.wait_minutes * 60
    while True:
        slots = room_for(cpus, gpus, labels)
        if slots >= workers:
            if asked:
                request_resources(bundles=[])  # from here on the stage's own demand keeps the nodes
            return
        all_cpus, all_gpus = (sum(n.get(kind, 0) for n in _nodes(labels)) for kind in ("CPU", "GPU"))
        have = f"{all_cpus:g} CPUs and {all_gpus:g} GPUs"
        need = f"{why} wants {workers} workers of {cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
        if labels:
            need += f" on nodes labelled {', '.join('='.join(label) for label in labels.items())}"
        if not on_cluster():
            raise ConfigError(
                f"{need}, but the Ray started here has {have}: room for {slots}. Ask for fewer workers, "
                f"or submit the job to a cluster (RAY_ADDRESS)."
            )
        if time.monotonic() > deadline:
            request_resources(bundles=[])
            raise ConfigError(
                f"{need}; after {settings.wait_minutes:g} minutes the cluster still has {have}: "
                f"room for {slots}. Check the worker limits of the cluster, or raise --ray.wait-minutes."
            )
        if due():
            print(f"waiting for the cluster: {need}, it has {have}", flush=True)
        if not asked:
            # Nothing waits for these workers yet, so an autoscaler would have no reason to bring them.
            request_resources(bundles=[bundle] * workers, bundle_label_selectors=[labels] * workers)
            asked = True
        time.sleep(2)
