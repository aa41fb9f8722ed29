"""What Serve runs: brought up, switched, taken back where a change fails, drained.

Intent is Serve's user_config, which Serve starts replicas with; truth is what the replicas say. A change that
only names another model is made inside the running replicas; any other brings new ones up beside them. Where
a change fails in one replica, all get back what was live: what Serve starts after a crash has worked before.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import hashlib
import itertools
import logging
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from hrnet_core.errors import ConfigError
from pipelines.cluster.session import on_cluster, require, serve_logs
from pipelines.serving.ingress import SERVE_GRACE_S, environment, refuse_port_in_use, remove_folder
from pipelines.settings.config import RaySettings, ServeSettings
from serve.settings import LiveSettings, ModelChoice, ServeArgs

if TYPE_CHECKING:
    from ray import serve


class Overtaken(ConfigError):
    """Another deploy has changed what is to be live since."""


APP = "hrnet"
LOADING_S = 600
"""How long running replicas may take to load another model, a compiled one too."""


def bring_up(args: ServeArgs, settings: ServeSettings, ray_settings: RaySettings) -> str:
    """The application as `args` say on the Ray of this process; returns its address once it answers.

    ConfigError where it does not come up. What was live before then goes on, and is what Serve starts again.
    """
    require(ray_settings, args.num_replicas, args.num_cpus, args.num_gpus, "hrnet deploy")
    start_serve(settings)
    before = intended()
    if before is None:
        _first(args)
    else:
        refuse_taking_keys_off(args, before, settings)
        _change(args, before)
    shown = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    url = f"http://{shown}:{settings.port}"
    _wait_ready(url)
    if settings.grpc_port:
        _wait_answered(f"{shown}:{settings.grpc_port}")
    return url


def refuse_taking_keys_off(args: ServeArgs, before: ServeArgs, settings: ServeSettings) -> None:
    """ConfigError where an endpoint that asks for keys would go on without, and nobody said so."""
    if before.need_keys and not args.need_keys and not settings.anyone:
        where = f"--serve.keys {before.keys}" if before.keys else "HRNET_SERVE_KEYS"
        raise ConfigError(
            f"the endpoint asks for keys, and this deploy names none: give {where} as before, or say "
            f"--serve.anyone to answer whoever reaches it."
        )


def start_serve(settings: ServeSettings) -> None:
    """Serve's controller and proxies, where they do not run yet."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if serve.status().proxies:
        return
    if not on_cluster():
        refuse_port_in_use(settings.host, settings.port)
        if settings.grpc_port:
            refuse_port_in_use(settings.host, settings.grpc_port, "grpc-port")
    timeout = settings.body_s + settings.deadline_s + SERVE_GRACE_S
    variables = environment(settings)
    atexit.register(remove_folder, variables)
    serve.start(
        proxy_location="EveryNode" if on_cluster() else "HeadOnly",
        http_options={"host": settings.host, "port": settings.port, "request_timeout_s": timeout},
        grpc_options=_grpc_options(settings, timeout),
        controller_options={"runtime_env": {"env_vars": variables}},
    )


def _grpc_options(settings: ServeSettings, timeout: float) -> dict[str, Any] | None:
    """None: no gRPC. Serve's reflection knows the messages of the common descriptor pool only, not ours."""
    from serve.v2_grpc import SERVICER

    if settings.grpc_port is None:
        return None
    taken = {"port": settings.grpc_port, "grpc_servicer_functions": [SERVICER]}
    return {**taken, "request_timeout_s": timeout, "enable_reflection": False}


def states(seconds: float = 30) -> list[dict[str, Any]]:
    """What each replica says of itself (`PoseService.state`); none where nothing runs."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if APP not in serve.status().applications:
        return []
    try:
        return list(serve.get_app_handle(APP).broadcast("state").results(timeout_s=seconds))
    except (RayServeException, RayError, TimeoutError, RuntimeError):  # none is ready, or one has just ended
        return []


def intended() -> ServeArgs | None:
    """What is to be live: of the last deploy that was not taken back. None where no replica can say."""
    said = states()
    return _understood(said[0]["intended"]) if said else None


def _understood(told: dict[str, Any]) -> ServeArgs:
    """What a replica is to serve, in its words, which may be those of another version of hrnet: a setting
    that this one does not know, or would refuse, is left out."""
    try:
        return ServeArgs.model_validate(told)
    except ValidationError as error:
        known = copy.deepcopy(told)
        for problem in error.errors():
            # A member of a list: the whole list.
            names = itertools.takewhile(lambda step: isinstance(step, str), problem["loc"])
            *within, field = map(str, names)
            part = known
            for step in within:
                part = part[step]
            part.pop(field, None)
        return ServeArgs.model_validate(known)


def back(before: ServeArgs) -> ServeArgs:
    """The version that was live before the one that is, all else as it is. ConfigError where none was."""
    if before.previous is None:
        raise ConfigError(
            f"{before.name} {before.version} is the first version that was deployed here: there is none to "
            f"go back to. Name one: hrnet deploy models:/{before.name}/NUMBER."
        )
    return before.model_copy(update=dict(before.previous))


def drain() -> None:
    """Replicas answer new requests with 503 and Retry-After; returns when those in progress are answered."""
    now = intended()
    if now is None:
        return
    with contextlib.suppress(RuntimeError):  # it ends anyway
        _run(now.model_copy(update={"draining": True}))
    deadline = time.monotonic() + now.deadline_s
    while any(one["in_progress"] for one in states()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.2)  # an answer is on its way after the work on it is done


def end_proxies() -> None:
    """Close the port: a proxy without replicas would answer in plain text."""
    import ray
    from ray import serve

    for proxy in serve.status().proxies:
        with contextlib.suppress(ValueError):  # gone already
            ray.kill(ray.get_actor(f"SERVE_PROXY_ACTOR-{proxy}", namespace="serve"))


def _first(args: ServeArgs) -> None:
    from ray import serve

    try:
        _run(args)
    except RuntimeError as error:
        reason = _why_not(str(error))
        serve.delete(APP)  # else Serve would go on trying, or start it after a crash
        raise ConfigError(reason) from None


def _change(args: ServeArgs, before: ServeArgs) -> None:
    """From one configuration that works to the next, or back to it."""
    another = _identity(before) != _identity(args)
    previous = before.choice() if another else before.previous
    args = args.model_copy(update={"previous": previous, "last_failure": "", "draining": False})
    if _version(args) != _version(before):
        more = f"{args.num_replicas} more ({args.num_cpus:g} CPU and {args.num_gpus:g} GPU each)"
        changed = ", ".join(_changed(args, before))
        until = f"the old replicas go on until there is room for {more}"
        print(f"replacing what runs (changed: {changed}): {until}", flush=True)
    elif another:
        print(
            f"loading {with_detector(args)} beside {with_detector(before)} in the running replicas",
            flush=True,
        )
    with _taken_back(args, before):
        try:
            _run(args)
        except RuntimeError as error:
            raise ConfigError(_why_not(str(error))) from None
        _wait_settled(args, before)


@contextlib.contextmanager
def _taken_back(args: ServeArgs, before: ServeArgs) -> Iterator[None]:
    """Where the block fails or is interrupted, what was live before is what Serve runs, and starts again."""
    try:
        yield
    except Overtaken:
        raise
    except BaseException as error:
        said = str(error) if isinstance(error, ConfigError | KeyboardInterrupt) else ""
        reason = said or f"stopped ({type(error).__name__})."
        told = f"{args.name} {args.version}: {reason}"
        try:
            _run(before.model_copy(update={"last_failure": told}))
            _wait_settled(before, args)
        except (RuntimeError, ConfigError) as again:
            raise ConfigError(
                f"{reason} {before.name} {before.version} could not be put back: {again}"
            ) from None
        if not isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{reason} {before.name} {before.version} answers as before, and is what Serve starts again."
        ) from None


def _run(args: ServeArgs) -> None:
    """Serve told of a configuration; returns once its replicas run. RuntimeError where they do not."""
    from ray import serve

    from serve.app import deployment
    from serve.routes import make_app

    # With a version of its own Serve changes running replicas where only user_config differs; without one it
    # would replace them each time. A Serve config file does the same.
    told = deployment(args).options(version=_version(args), _internal=True)
    application: serve.Application = told.bind(args, make_app)
    serve.run(application, name=APP)


def _identity(choice: ModelChoice) -> tuple[str, ...]:
    return (
        choice.name,
        choice.version,
        choice.sha256,
        choice.person_detector.sha256 if choice.person_detector else "",
    )


def with_detector(choice: ModelChoice) -> str:
    """Its version, and the detector where it has one."""
    return (
        f"{choice.version} with {choice.person_detector.name}" if choice.person_detector else choice.version
    )


def _changed(args: ServeArgs, before: ServeArgs) -> list[str]:
    """The settings that need new replicas and are others than before: also those that were given then and now
    have their defaults."""
    now, then = (one.model_dump(exclude=set(LiveSettings.model_fields)) for one in (args, before))
    now, then = (one | one.pop("limits") for one in (now, then))
    return [name for name in now if now[name] != then[name]]


def _version(args: ServeArgs) -> str:
    """Changes with whatever needs new replicas."""
    fixed = args.model_dump_json(exclude=set(LiveSettings.model_fields))
    return hashlib.sha256(fixed.encode()).hexdigest()[:16]


def _wait_settled(args: ServeArgs, before: ServeArgs) -> None:
    """Until every replica has tried what it was told. ConfigError where one serves something else."""
    deadline = time.monotonic() + LOADING_S
    while time.monotonic() < deadline:
        said = states()
        told = [_understood(one["intended"]).choice() for one in said]
        if any(choice not in (args.choice(), before.choice()) for choice in told):
            raise Overtaken(f"{args.name} {args.version}: another deploy has named another version since.")
        if said and all(one["settled"] for one in said) and set(told) == {args.choice()}:
            failed = [one for one in said if one["serving"] != args.choice().model_dump()]
            if failed:
                raise ConfigError(f"a replica could not load it: {failed[0]['load_error']}")
            return
        time.sleep(0.2)
    raise ConfigError(f"the replicas have not loaded it after {LOADING_S} s.")


def _why_not(error: str) -> str:
    """What Serve knows of a deployment that did not come up, as one paragraph."""
    from ray import serve

    application = serve.status().applications.get(APP)
    messages = [d.message for d in application.deployments.values()] if application else []
    # Serve's message ends with the replica's traceback, and that with the exception.
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if "Error" in line.split(":")[0]), error)
    return f"Serve could not start the model: {reason} Logs: {serve_logs()}"


def _wait_ready(url: str, seconds: float = 60) -> None:
    """Until the proxy knows the way to the replica."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by way of http_proxy

    def ready() -> bool:
        try:
            with opener.open(f"{url}/readyz", timeout=5):
                return True
        except OSError:  # URLError and HTTPError are
            return False

    late = f"{url}/readyz did not answer within {seconds:g} s, although Serve runs the application"
    _wait(ready, seconds, f"{late}.", f"{late}: from here the address may not be reachable.")


def _wait_answered(address: str, seconds: float = 60) -> None:
    """_wait_ready, of gRPC."""
    from serve.v2_grpc import is_ready

    late = (
        f"{address} did not answer over gRPC within {seconds:g} s. --serve.grpc-port is for the start of "
        f"Serve; where that runs already, it listens as before."
    )
    note = f"{late} Or from here the address may not be reachable."
    _wait(lambda: is_ready(address, timeout_s=5), seconds, late, note)


def _wait(answers: Callable[[], bool], seconds: float, late: str, note: str) -> None:
    """Until it answers. ConfigError (`late`) where it does not; on a cluster, where the address may not be
    reachable from here, `note`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answers():
            return
        time.sleep(0.1)
    if not on_cluster():
        raise ConfigError(f"{late} Logs: {serve_logs()}")
    print(f"note: {note}", flush=True)
