"""Where a folder or file lies: a path of this machine, or a URI that pyarrow.fs knows, s3:// and gs://.

pyarrow is imported by who opens one: nobody else pays for it. Requests to a bucket are repeated by its
client, with growing random pauses.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

from hrnet_core.errors import DataError

if TYPE_CHECKING:
    from pyarrow import fs

TRIES = 8
"""Of a request to S3 that is throttled or fails: about half a minute of pauses in all."""
STALL_SECONDS = 30
"""A request to S3 over which nothing comes for so long is given up and tried again."""
RETRY_SECONDS = 60
"""How long Google's client repeats a request."""


def is_uri(path: str) -> bool:
    return "://" in path


def open_folder(folder: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI and the folder's (or file's) path on it.

    DataError for a URI that pyarrow cannot open, and for one with credentials in it: a URI is printed.
    """
    import pyarrow as pa
    from pyarrow import fs

    if not is_uri(folder):
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(folder))
    parts = urlsplit(folder)
    if parts.scheme in ("s3", "gs", "gcs") and "@" in parts.netloc.replace("anonymous@", ""):
        raise DataError(
            f"{parts.scheme}://...@...: credentials do not belong in a URI, which is printed and logged. "
            f"Take them out and set them in the environment (docs/sources.md)."
        )
    try:
        if parts.scheme == "s3":
            bucket = parts.netloc
            return _s3(bucket, parts.query), unquote(f"{bucket}{parts.path}").rstrip("/")
        if parts.scheme in ("gs", "gcs") and "retry_limit_seconds" not in parts.query:
            folder += f"{'&' if parts.query else '?'}retry_limit_seconds={RETRY_SECONDS}"
        files, path = fs.FileSystem.from_uri(folder)
        return files, path
    except (pa.ArrowException, ValueError, OSError) as error:
        raise DataError(f"{folder}: not a folder that can be opened ({one_line(error)}).") from None


@functools.cache
def _s3(bucket: str, query: str) -> fs.S3FileSystem:
    """The client of a bucket: credentials from the environment, region and endpoint from the URI's query,
    else from the environment. Not by `from_uri`: its client repeats every 200 ms and knows no pause.

    Kept for the process: each new one would connect and look for its credentials again.
    """
    from pyarrow import fs

    options = {key: values[-1] for key, values in parse_qs(query, strict_parsing=bool(query)).items()}
    if unknown := sorted(set(options) - {"region", "scheme", "endpoint_override"}):
        raise ValueError(f"unknown {', '.join(unknown)}; an s3 URI takes region, scheme, endpoint_override")
    environment = os.environ
    if not options.get("endpoint_override"):
        endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
        options |= {"endpoint_override": endpoint} if endpoint else {}
    if not options.get("region"):
        region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
        if not region:  # Amazon's buckets answer in their own region only; others have none
            region = "us-east-1" if options.get("endpoint_override") else fs.resolve_s3_region(bucket)
        options["region"] = region
    retry = fs.AwsStandardS3RetryStrategy(max_attempts=int(environment.get("AWS_MAX_ATTEMPTS", TRIES)))
    return fs.S3FileSystem(
        retry_strategy=retry,
        request_timeout=STALL_SECONDS,
        allow_delayed_open=True,  # a small file is one request
        **options,
    )


def one_line(error: Exception) -> str:
    """An error's text, which Arrow may spread over lines."""
    return " ".join(str(error).split())
