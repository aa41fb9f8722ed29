"""The endpoint: one Ray Serve deployment that decodes, crops, batches people and answers.

    request -> uploads (body.py) -> crops (work.py) -> batch over all requests (service.py) -> answer

A batch is formed of people, not of requests: each request hands in its crops, in portions that fit a
batch, and gets its own rows back. Decoding runs in a few threads, the network in one of its own, so the
event loop always answers /livez and /readyz.

The model comes with Serve's user_config (LiveSettings): a changed one is loaded beside the old and takes
its place once it has passed its self-test; one that fails leaves the old in place and says so.
"""

from __future__ import annotations

from typing import Any

from ray import serve

from hrnet_core.memory import PASSES
from serve.routes import make_app
from serve.settings import LiveSettings, ServeArgs
from serve.v2_grpc import PoseEndpoint

# After the work ends, requests that were already sent get this long for their answer.
GRACE_S = 10


def build(args: ServeArgs | dict[str, Any]) -> serve.Application:
    """The Serve application (`serve.app:build` in a Serve config file, `args:` as in ServeArgs)."""
    args = ServeArgs.model_validate(args)
    return deployment(args).bind(args, make_app)


def deployment(args: ServeArgs) -> serve.Deployment:
    """How Serve runs the replicas."""
    scale: dict[str, Any] = {"num_replicas": args.num_replicas}
    if args.max_replicas is not None:
        replicas = {"min_replicas": args.num_replicas, "max_replicas": args.max_replicas}
        load = max(1, args.max_requests // 4)
        # Serve's own half a minute of looking and another of waiting is long for who stands in a queue.
        pace = {"look_back_period_s": 15, "upscale_delay_s": 5}
        scale = {"autoscaling_config": {**replicas, **pace, "target_ongoing_requests": load}}
    as_wanted = serve.deployment(
        name="poses",
        user_config=args.model_dump(include=set(LiveSettings.model_fields)),
        # Serve's line for each request says less than ours (routes.py).
        logging_config={"encoding": args.log_format.upper(), "enable_access_log": False},
        ray_actor_options={
            "num_cpus": args.num_cpus,
            "num_gpus": args.num_gpus,
            "label_selector": args.labels,
            "runtime_env": {"env_vars": {} if args.num_gpus else PASSES},
        },
        # Our 429 must come first: it is problem+json. Serve's own queue only guards against a flood.
        max_ongoing_requests=args.max_requests + args.max_bodies + 16,
        max_queued_requests=16 * args.max_requests,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        # A checkpoint does not get better by loading it twenty times.
        max_constructor_retry_count=1,
        # Old replicas go on until their successors are ready.
        max_surge_percent=100,
        graceful_shutdown_timeout_s=args.limits.body_s + args.deadline_s + GRACE_S,
        health_check_timeout_s=args.deadline_s + GRACE_S,
        **scale,
    )
    return as_wanted(serve.ingress()(PoseEndpoint))
