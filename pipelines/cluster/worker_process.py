"""What Ray runs first in each of its processes: next to nothing, as each of them waits for it."""

import logging
import os

from hrnet_core import memory


def begin() -> None:
    """Ray's own chatter off in a worker process; what our code prints or raises there still arrives. The
    imports that follow are not looked through for cycles.

    Without a dashboard, Ray Train warns each second that it cannot ask it about its controller; with two
    Rays on a machine it asks for the address of "the" one and stumbles, unless this one is named.
    """
    import ray

    memory.collect_seldom()
    os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    logging.getLogger("ray").setLevel(logging.ERROR)
