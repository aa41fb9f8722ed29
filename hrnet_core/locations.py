"""Where a folder or file lies: a path of this machine, or a URI that pyarrow.fs opens, s3://, gs:// and az://.

pyarrow is imported by who opens one: nobody else pays for it. Requests to a bucket are repeated by its
client, with growing random pauses. Credentials come from the environment, never with a URI: it is printed.
"""

from __future__ import annotations

import datetime
import functools
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

from hrnet_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pyarrow import fs

TRIES = 8
"""Of a request to S3 that is throttled or fails: about half a minute of pauses in all."""
STALL_SECONDS = 30
"""A request to S3 over which nothing comes for so long is given up and tried again."""
RETRY_SECONDS = 60
"""How long Google's client repeats a request."""
PIECE = 8 << 20
"""Bytes of a file that are in memory while it is copied."""
BUCKETS = ("s3://", "gs://", "gcs://", "az://")
"""What begins the URI of a bucket, or of what others call a container."""
CREDENTIALS = re.compile(
    r"(?:s3|gs|gcs|az)://(?!anonymous@)[^/?\s]*[@:]"  # a bucket's name has neither; a secret may have a slash
    r"|://[^/?\s@]*:[^/?\s@]*@"  # user:password@
    r"|://\S*[?&][^=&\s]*(?:secret|password|token|key|signature|credential)[^=&\s]*=",
    re.IGNORECASE,
)


def is_uri(path: str) -> bool:
    return "://" in path


def destination(place: str | Path, what: str) -> str:
    """Where a verb is to write, path or URI; asked before any work. `what` names it in the ConfigError of a
    URI that has lost a slash, as pathlib does to them, and in the DataError of a bucket that is not there.
    DataError also as of `open_folder`."""
    text = str(place)
    if not is_uri(text):
        if lost := re.match(r"(\w[\w+.-]+:/)(.*)", text):
            refuse_credentials("/".join(lost.groups()))
            raise ConfigError(
                f"{what} {text}: a URI has two slashes, {lost[1]}/{lost[2]}. Give it as a text."
            )
        return str(Path(text).expanduser())
    open_folder(text)
    refuse_no_bucket(text, what)
    return text


def folder_to_write(place: str | Path, what: str) -> str:
    """`destination` of a folder. ConfigError also where none can be made on this machine: a file is there, or
    above it, or the rights lack."""
    where = destination(place, what)
    if not is_uri(where):
        _refuse_unwritable(Path(where), where, what)
    return where


def file_to_write(place: str | Path, what: str) -> str:
    """`destination` of a file. ConfigError also where none can be written on this machine: a folder is there,
    or a file above it, or the rights lack."""
    where = destination(place, what)
    if is_uri(where) or (os.path.exists(where) and not os.path.isfile(where) and not os.path.isdir(where)):
        return where  # or a pipe, a terminal
    if os.path.isdir(where):
        raise ConfigError(f"{what} {where}: is a folder. Name a file in it.")
    _refuse_unwritable(Path(where).parent, where, what)
    return where


def _refuse_unwritable(folder: Path, place: str, what: str) -> None:
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        raise ConfigError(f"{what} {place}: {above} is a file, not a folder. Name another {what}.")
    if not os.access(above, os.W_OK):
        raise ConfigError(f"{what} {place}: {above} may not be written to. Name another {what}.")


def refuse_credentials(text: str) -> None:
    """DataError where a URI in the text has credentials in it; the message has not."""
    if CREDENTIALS.search(text):
        scheme = re.sub(r".*?(\w*)://.*", r"\1", text, flags=re.DOTALL)
        raise DataError(
            f"{scheme}://...: credentials do not belong in a URI, which is printed and logged. Take them out "
            f"and set them in the environment (docs/sources.md)."
        )


def without_credentials(text: str) -> str:
    """A text whose URIs show no user and password: for addresses of servers, where they are usual."""
    return re.sub(r"(?<=://)[^/\s@]+@", "...@", text)


def open_folder(folder: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI and the folder's (or file's) path on it.

    DataError for a URI that pyarrow cannot open, and for one with credentials in it.
    """
    import pyarrow as pa
    from pyarrow import fs

    if not is_uri(folder):
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(folder))
    refuse_credentials(folder)
    parts = urlsplit(folder)
    try:
        if parts.scheme == "s3":
            return _s3(parts.netloc, parts.query), unquote(parts.netloc + parts.path).rstrip("/")
        if parts.scheme == "az":
            return _azure(parts.query), unquote(parts.netloc + parts.path).rstrip("/")
        if parts.scheme in ("gs", "gcs"):
            who, _, bucket = parts.netloc.rpartition("@")
            return _google(who == "anonymous", parts.query), unquote(bucket + parts.path).rstrip("/")
        files, path = fs.FileSystem.from_uri(folder)
        return files, path
    except (pa.ArrowException, ValueError, OSError) as error:
        raise DataError(f"{folder}: not a folder that can be opened ({one_line(error)}).") from None


def refuse_no_bucket(place: str, what: str = "") -> None:
    """DataError where a URI names a bucket that is not there; `what` stands before it. Asks the store once;
    a store that does not say is left to the reading."""
    from pyarrow import fs

    if not place.startswith(BUCKETS):
        return
    files, key = open_folder(place)
    bucket = key.partition("/")[0]
    try:
        missing = files.get_file_info(bucket).type == fs.FileType.NotFound
    except OSError:
        return
    if missing:
        shown = place.partition("?")[0]
        raise DataError(
            f"{what}{': ' if what else ''}{shown}: no bucket {bucket!r}. Make it, or check the name."
        )


@functools.cache
def _s3(bucket: str, query: str) -> fs.S3FileSystem:
    """The client of a bucket: credentials from the environment, region and endpoint from the URI's query,
    else from the environment. Not by `from_uri`: its client repeats every 200 ms and knows no pause.

    Kept for the process: each new one would connect and look for its credentials again.
    """
    from pyarrow import fs

    options = _options(query, "s3", "region", "scheme", "endpoint_override")
    env = os.environ.get
    endpoint = options.get("endpoint_override") or env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL")
    region = options.get("region") or env("AWS_REGION") or env("AWS_DEFAULT_REGION")
    if not region:  # Amazon's buckets answer in their own region only; others have none
        region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=int(env("AWS_MAX_ATTEMPTS", TRIES))),
        request_timeout=STALL_SECONDS,
        allow_delayed_open=True,  # a small file is one request
        **{**options, "region": region, "endpoint_override": endpoint},
    )


@functools.cache
def _google(anonymous: bool, query: str) -> fs.GcsFileSystem:
    """The client of Google's storage: credentials as its libraries look for them, or none."""
    from pyarrow import fs

    options = _options(query, "gs", "scheme", "endpoint_override", "retry_limit_seconds")
    seconds = float(options.pop("retry_limit_seconds", RETRY_SECONDS))
    limit = datetime.timedelta(seconds=seconds)
    return fs.GcsFileSystem(anonymous=anonymous, retry_time_limit=limit, **options)


@functools.cache
def _azure(query: str) -> fs.AzureFileSystem:
    """The client of a storage account: account and endpoint from the URI's query, else from the environment;
    key or SAS token from there, else Azure's usual chain. The variables are those of Azure's command line."""
    from pyarrow import fs

    options = _options(query, "az", "account", "scheme", "endpoint_override")
    env = os.environ.get
    endpoint = urlsplit(env("AZURE_STORAGE_SERVICE_ENDPOINT", ""))
    account = options.get("account") or env("AZURE_STORAGE_ACCOUNT")
    if not account:
        raise ValueError("no storage account: set AZURE_STORAGE_ACCOUNT, or ?account= in the URI")
    authority = options.get("endpoint_override") or endpoint.netloc or None
    scheme = options.get("scheme") or endpoint.scheme or None
    return fs.AzureFileSystem(
        account_name=account,
        account_key=env("AZURE_STORAGE_KEY"),
        sas_token=env("AZURE_STORAGE_SAS_TOKEN"),
        **dict.fromkeys(("blob_storage_authority", "dfs_storage_authority"), authority),
        **dict.fromkeys(("blob_storage_scheme", "dfs_storage_scheme"), scheme),
    )


def _options(query: str, scheme: str, *known: str) -> dict[str, str]:
    options = {key: values[-1] for key, values in parse_qs(query, strict_parsing=bool(query)).items()}
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"unknown {', '.join(unknown)}; an {scheme} URI takes {', '.join(known)}")
    return options


def fetch(place: str, into: Path, names: Collection[str], optional: Collection[str] = ()) -> Path:
    """A folder of this machine: the one at a path; for a URI `into`, with its files of these names.

    FileNotFoundError where one of `names` is not there; another OSError where the bucket does not give it or
    this disk does not take it; DataError as for `open_folder`.
    """
    if not is_uri(place):
        return Path(place)
    from pyarrow import fs

    files, folder = open_folder(place)
    listed = files.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    there = {info.base_name: info for info in listed if info.type == fs.FileType.File}
    if missing := sorted(set(names) - set(there)):
        if not listed:
            refuse_no_bucket(place)
        raise FileNotFoundError(f"no {', '.join(missing)} there")
    into.mkdir(parents=True, exist_ok=True)
    for info in (there[name] for name in (*names, *optional) if name in there):
        _copy(files, info, into / info.base_name)
    return into


def fetch_file(place: str, into: Path) -> Path:
    """A file of this machine: the one at a path; for a URI its copy in `into`. Errors as of `fetch`."""
    if not is_uri(place):
        return Path(place)
    files, path = open_folder(place)
    info = files.get_file_info(path)
    into.mkdir(parents=True, exist_ok=True)
    target: Path = into / info.base_name
    _copy(files, info, target)
    return target


def is_folder_at(place: str) -> bool:
    """Whether a path or URI is a folder: in a bucket, where some key begins with its name. FileNotFoundError
    where nothing is there; other errors as of `fetch`."""
    files, path = open_folder(place)
    kind = files.get_file_info(path).type.name
    if kind == "NotFound":
        refuse_no_bucket(place)
        raise FileNotFoundError("nothing there")
    return bool(kind == "Directory")


def _copy(files: fs.FileSystem, info: fs.FileInfo, target: Path) -> None:
    # Not by fs.copy_files: Arrow 25's loses errors and returns as if all were well.
    with files.open_input_stream(info.path) as source, target.open("wb") as copy:
        while piece := source.read(PIECE):
            copy.write(piece)
    if target.stat().st_size != info.size:
        raise OSError(f"{info.base_name}: {target.stat().st_size} of its {info.size} bytes came")


def one_line(error: BaseException) -> str:
    """An error's text, which Arrow may spread over lines."""
    return " ".join(str(error).split())
