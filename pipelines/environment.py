"""Variables of the environment that others read: engines, and the processes that are started here."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping


@contextlib.contextmanager
def defaults(variables: Mapping[str, str]) -> Iterator[None]:
    """The environment with these, where it does not say otherwise, for what is begun in the block."""
    ours = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def job_name() -> str | None:
    """By which `ray job` knows the job whose driver this process is; None where it is none's."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    name = job.get("metadata", {}).get("job_submission_id")
    return None if name is None else str(name)
