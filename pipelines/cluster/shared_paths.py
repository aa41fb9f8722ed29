"""Whether what a job names by a path is there on all nodes of a cluster: asked before any work."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator

from hrnet_core.errors import ConfigError
from hrnet_core.locations import is_uri, open_folder
from pipelines.cluster.session import on_cluster
from pipelines.storage.files import passing_file

LOOKED_AT = 20
"""Names of a folder, or files of a call, that a node must have too."""


def refuse_unshared(
    reads: Iterable[tuple[str, str | None]] = (), writes: Iterable[tuple[str, str]] = ()
) -> None:
    """On a cluster: ConfigError where a node that works has not got what this process sees at a path.

    Pairs of a flag and its path or URI; buckets and None pass. reads: a file, or a folder by the first names
    in it. writes: a folder, made if need be, by a file that lies in it for this moment. Asks the nodes that
    are there now; one that comes later is not asked. DataError where a folder cannot be written.
    """
    if not on_cluster():
        return
    with contextlib.ExitStack() as marks:
        flags: dict[str, str] = {}
        for flag, place in reads:
            if place is not None and (path := _on_disk(place)):
                flags |= dict.fromkeys(_first_names(path), flag)
        for flag, place in writes:
            if path := _on_disk(place):
                flags[marks.enter_context(passing_file(path))] = flag
        for node, missing in _missing_on_nodes(list(flags)):
            raise ConfigError(
                f"{flags[missing[0]]}: {os.path.dirname(missing[0])} is a folder of {socket.gethostname()}, "
                f"where this job's driver runs; node {node} has not got what lies there. Every node of a "
                f"cluster must find the same files under that path: name a place on a filesystem that all of "
                f"them mount, or a bucket (s3://...)."
            )


def _on_disk(place: str) -> str | None:
    """The absolute path of a path or file:// URI; None for a bucket."""
    return None if is_uri(place) and not place.startswith("file:") else open_folder(place)[1]


def _first_names(path: str) -> list[str]:
    """Of a folder, else the path itself; none where nothing is there, which the stage says better."""
    if not os.path.isdir(path):
        return [path] if os.path.exists(path) else []
    return [os.path.join(path, name) for name in sorted(os.listdir(path))[:LOOKED_AT]]


def _missing_on_nodes(files: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(name and address of a node that can work, those of the files that are not there), where some are."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not files:
        return

    def missing() -> list[str]:
        return [file for file in files if not os.path.exists(file)]

    here = ray.get_runtime_context().get_node_id()
    nodes = [n for n in ray.nodes() if n["Alive"] and {"CPU", "GPU"} & set(n["Resources"])]
    asked = []
    for node in nodes:
        if node["NodeID"] != here:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0, max_retries=0)(missing).options(scheduling_strategy=there)
            asked.append((node, task.remote()))
    for node, answer in asked:
        with contextlib.suppress(RayError):  # it is gone by now: nothing is done on it
            if found := ray.get(answer):
                yield f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})", found
