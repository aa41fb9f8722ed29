"""What Ray runs first in each of its processes: by itself, as whatever it imports each of them waits for."""

import logging
import os


def quiet_worker() -> None:
    """Ray's own chatter off in a worker process; what our code prints or raises there still arrives.

    Without a dashboard, Ray Train warns each second that it cannot ask it about its controller; with two
    Rays on a machine it asks for the address of "the" one and stumbles, unless this one is named.
    """
    import ray

    os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    logging.getLogger("ray").setLevel(logging.ERROR)
