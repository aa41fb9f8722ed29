"""A client of the endpoint: Python's standard library only, so that it runs where the rest is not installed
(`pip install --no-deps hrnet-ray`).

    from serve.client import Client

    with Client("http://127.0.0.1:8000", key="...") as client:
        answer = client.poses("photo.jpg", [[x, y, w, h]])
        answer["results"][0]["persons"][0]["keypoints"]        # [[x, y, score], ...]
        everyone = client.poses("photo.jpg", max_found=10)      # by the endpoint's detector
        for file, answer in client.poses_of_many(files, progress=print):
            ...

    python -m serve.client http://127.0.0.1:8000 photo.jpg --boxes "[[x, y, w, h]]"
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import http.client
import json
import os
import random
import sys
import threading
import time
import urllib.parse
import urllib.request
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Nothing was computed, or what was is lost: the same request may be sent again.
RETRIED = (408, 429, 502, 503)
END = object()
Picture = str | Path | bytes
Boxes = Sequence[Sequence[float]] | None
Progress = Callable[[int, int | None], object]
"""Called with how many are done, and of how many, where that is known."""


class ServerError(Exception):
    """The server refused or failed. `problem` is its problem+json, `status` the HTTP status."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        title, detail = problem.get("title", "error"), problem.get("detail", "")
        super().__init__(f"{status} {title}: {detail}")
        self.status, self.problem = status, problem


class Client:
    """One endpoint. Threads may share it: each has a connection of its own, which stays open.

    url: such as https://poses.example.com or http://127.0.0.1:8000; proxies are those of the environment.
    key: sent as a bearer key. timeout_s: of one attempt, and the longest wait for the next that a server may
    ask for. attempts: of a request in all. ValueError for what cannot be.

    Sent again after 408, 429, 502 and 503 (waiting as Retry-After says) and after a connection that was
    refused or closed. ServerError for any other answer that is none of the endpoint's, a redirection too;
    OSError or http.client.HTTPException without one.
    """

    def __init__(
        self, url: str, *, key: str | None = None, timeout_s: float = 60.0, attempts: int = 5
    ) -> None:
        self._url = urllib.parse.urlsplit(url.rstrip("/").removesuffix("/v1/poses"))
        if self._url.scheme not in ("http", "https") or not self._url.hostname:
            raise ValueError(f"{url}: expected an address such as http://127.0.0.1:8000")
        if attempts < 1:
            raise ValueError(f"attempts must be 1 or more, got {attempts}")
        self._key, self._timeout_s, self._attempts = key and key.strip(), timeout_s, attempts
        self._own = threading.local()
        self._open: list[http.client.HTTPConnection] = []

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        for connection in self._open:
            connection.close()

    def poses(
        self, image: Picture, boxes: Boxes = None, *, format: str = "native", image_id: int = 1, **find: Any
    ) -> Any:
        """The answer of POST /v1/poses for one picture.

        image: a file, or its bytes. boxes: [[x, y, w, h], ...] in px of the displayed picture; None: the
        endpoint's detector finds the people, where it has one; else the whole picture is one person.
        format: native, coco (a list; the picture is `image_id`) or openpose. find: `boxes_from` ("detector",
        "whole_image"), `score_threshold`, `max_found` to find people; `category_id` of coco.
        """
        asked = {} if format == "native" else {"format": format, "image_id": image_id}
        return _parsed(self._post("/v1/poses", asked | find, image, boxes))

    def overlay(self, image: Picture, boxes: Boxes = None, *, threshold: float = 0.3, **find: Any) -> bytes:
        """The picture with its poses drawn in, as PNG: POST /v1/overlay. find: as of `poses`."""
        return self._post("/v1/overlay", {"threshold": threshold, **find}, image, boxes)

    def models(self) -> dict[str, Any]:
        """GET /v1/models: what answers, and the names of its keypoints."""
        return _parsed(self._ask("GET", "/v1/models", None, {}))

    def poses_of_many(
        self,
        images: Iterable[Picture | tuple[Picture, Boxes]],
        *,
        at_once: int = 4,
        progress: Progress | None = None,
        **find: Any,
    ) -> Iterator[tuple[Picture, dict[str, Any] | Exception]]:
        """Each picture and its answer, in their order; an exception in place of an answer that there is not.

        images: pictures, or pairs of a picture and its boxes; read as they are needed. One alone, in no list,
        is a TypeError. at_once: requests. find: as of `poses`.
        """
        if isinstance(images, str | bytes | bytearray):
            raise TypeError("poses_of_many takes a list of pictures; of one, ask poses")
        total = len(images) if isinstance(images, Sequence) else None
        waiting: deque[tuple[Picture, Future[Any]]] = deque()
        done = 0
        with ThreadPoolExecutor(at_once, "poses") as pool:
            coming = iter(images)
            try:
                while True:
                    while len(waiting) < 2 * at_once and (one := next(coming, END)) is not END:
                        image, boxes = one if isinstance(one, tuple) else (one, None)
                        waiting.append((image, pool.submit(self.poses, image, boxes, **find)))
                    if not waiting:
                        return
                    image, future = waiting.popleft()
                    error = future.exception()
                    done += 1
                    if progress:
                        progress(done, total)
                    yield image, error if isinstance(error, Exception) else future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _post(self, path: str, query: dict[str, Any], image: Picture, boxes: Boxes) -> bytes:
        content, media_type = _form(image, boxes)
        asked = urllib.parse.urlencode({name: value for name, value in query.items() if value is not None})
        return self._ask("POST", f"{path}?{asked}" if asked else path, content, {"Content-Type": media_type})

    def _ask(self, method: str, path: str, content: bytes | None, headers: dict[str, str]) -> bytes:
        # One id for all attempts: the server's log shows them together.
        headers |= {"X-Request-ID": str(uuid.uuid4()), "Accept-Encoding": "gzip"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        for attempt in range(1, self._attempts + 1):
            # Scattered: clients do not come at once.
            wait = 0.2 * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            try:
                response, body = self._attempt(method, path, content, headers)
            except (OSError, http.client.HTTPException):
                if attempt == self._attempts:
                    raise
            else:
                if response.status < 300:
                    return body
                if response.status < 400:
                    where = response.headers.get("Location", "nowhere")
                    detail = f"the server sends on to {where}: give the address that it means"
                    raise ServerError(response.status, {"title": response.reason, "detail": detail})
                asked = response.headers.get("Retry-After", "")
                wait = float(asked) if asked.isdigit() else wait
                too_long = self._timeout_s is not None and wait > self._timeout_s
                if response.status not in RETRIED or attempt == self._attempts or too_long:
                    raise ServerError(response.status, _problem(response.reason, body))
            time.sleep(wait)
        raise AssertionError("unreachable")

    def _attempt(
        self, method: str, path: str, content: bytes | None, headers: dict[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        connection, prefix, more = self._connection()
        kept_open = connection.sock is not None
        try:
            connection.request(method, prefix + self._url.path + path, content, headers | more)
            response = connection.getresponse()
            body = response.read()
        except BaseException as error:
            connection.close()  # the next request opens it again
            if kept_open and isinstance(error, ConnectionError):  # the server had closed it meanwhile
                return self._attempt(method, path, content, headers)
            raise
        if response.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        return response, body

    def _connection(self) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
        """This thread's connection, what stands before a path on it, and headers for a proxy."""
        if not hasattr(self._own, "connection"):
            self._own.connection = _connect(self._url, self._timeout_s)
            self._open.append(self._own.connection[0])
        return self._own.connection


class AsyncClient:
    """Client for asyncio: the same, to be awaited, with up to `at_once` requests at a time (in threads)."""

    def __init__(self, url: str, *, at_once: int = 16, **options: Any) -> None:
        self._client = Client(url, **options)
        self._pool = ThreadPoolExecutor(at_once, "poses")

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; requests that wait are not sent any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    async def poses(self, image: Picture, boxes: Boxes = None, **options: Any) -> Any:
        """Client.poses."""
        return await self._run(lambda: self._client.poses(image, boxes, **options))

    async def overlay(self, image: Picture, boxes: Boxes = None, **options: Any) -> bytes:
        """Client.overlay."""
        return await self._run(lambda: self._client.overlay(image, boxes, **options))

    async def models(self) -> dict[str, Any]:
        """Client.models."""
        return await self._run(self._client.models)

    async def _run(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def poses(url: str, image: Picture, boxes: Boxes = None, **options: Any) -> dict[str, Any]:
    """Client(url, **options).poses(image, boxes), for one request."""
    with Client(url, **options) as client:
        return client.poses(image, boxes)


def overlay(
    url: str, image: Picture, boxes: Boxes = None, *, threshold: float = 0.3, **options: Any
) -> bytes:
    """Client(url, **options).overlay(image, boxes), for one request."""
    with Client(url, **options) as client:
        return client.overlay(image, boxes, threshold=threshold)


def _connect(
    url: urllib.parse.SplitResult, timeout_s: float
) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """A connection to a server, or to the proxy that the environment names for it."""
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    proxies = {} if urllib.request.proxy_bypass(url.netloc) else urllib.request.getproxies()
    if url.scheme not in proxies:
        return kinds[url.scheme](str(url.hostname), url.port, timeout=timeout_s), "", {}
    proxy = urllib.parse.urlsplit(proxies[url.scheme])
    connection = kinds[url.scheme](str(proxy.hostname), proxy.port, timeout=timeout_s)
    if url.scheme == "https":
        connection.set_tunnel(str(url.hostname), url.port)
        return connection, "", {}
    return connection, f"http://{url.netloc}", {"Host": url.netloc}


def _form(image: object, boxes: Boxes) -> tuple[bytes, str]:
    """A multipart/form-data body and its media type."""
    if isinstance(image, bytes | bytearray | memoryview):
        data = bytes(image)
    elif isinstance(image, str | os.PathLike):
        data = Path(image).read_bytes()
    else:
        what = type(image).__name__
        raise TypeError(
            f"a picture is a file's name or its bytes, got {what}: pixels are sent as PNG or JPEG"
        )
    boundary = uuid.uuid4().hex
    parts = [
        b'Content-Disposition: form-data; name="image"; filename="image"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n" + data
    ]
    if boxes is not None:
        try:
            numbers = [[float(v) for v in box] for box in boxes]
        except TypeError:
            raise TypeError(
                f"boxes are [[x, y, w, h], ...], a list of one for one person, got {boxes!r}"
            ) from None
        parts.append(b'Content-Disposition: form-data; name="boxes"\r\n\r\n' + json.dumps(numbers).encode())
    mark = f"--{boundary}".encode()
    body = b"".join(mark + b"\r\n" + part + b"\r\n" for part in parts) + mark + b"--\r\n"
    return body, f"multipart/form-data; boundary={boundary}"


def _parsed(body: bytes) -> Any:
    """The JSON of an answer."""
    try:
        return json.loads(body)
    except ValueError:
        detail = f"the answer begins with {body[:40]!r}, no JSON: is this the endpoint's address?"
        raise ServerError(200, {"title": "OK", "detail": detail}) from None


def _problem(reason: str, body: bytes) -> dict[str, Any]:
    """The body of an error; a proxy's plain text becomes the detail."""
    text = body.decode("utf-8", "replace")
    try:
        problem = json.loads(text)
        return problem if isinstance(problem, dict) else {"detail": text}
    except ValueError:
        return {"title": reason, "detail": text[:500]}


def first_key(file: Path | None) -> str | None:
    """The first key of a file (a line NAME KEY, or the key alone), else HRNET_KEY of the environment."""
    if file is None:
        return os.environ.get("HRNET_KEY")
    lines = (line.split("#")[0].split() for line in file.read_text().splitlines())
    words = next((line for line in lines if line), [""])
    return words[min(1, len(words) - 1)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serve.client", description="Ask a server for poses.")
    parser.add_argument("url", help="such as http://127.0.0.1:8000")
    parser.add_argument("image", type=Path, nargs="+", help="several: a line of JSON each")
    boxes = 'JSON "[[x, y, w, h], ...]" for each picture; none: as --boxes-from says'
    parser.add_argument("--boxes", type=json.loads, help=boxes)
    unboxed = "find the people of each picture, or take it as one person; auto: as the endpoint can"
    choices = ("auto", "detector", "whole_image")
    parser.add_argument("--boxes-from", choices=choices, default="auto", help=unboxed)
    parser.add_argument("--key-file", type=Path, help="its first key is sent; else HRNET_KEY's")
    args = parser.parse_args(argv)

    def tell(done: int, total: int | None) -> None:
        print(f"\r{done} of {total}", end="\n" if done == total else "", file=sys.stderr)

    failed = 0
    try:
        with Client(args.url, key=first_key(args.key_file)) as client:
            pairs: list[Any] = [(image, args.boxes) for image in args.image]
            find = {} if args.boxes_from == "auto" else {"boxes_from": args.boxes_from}
            progress = tell if len(pairs) > 1 and sys.stderr.isatty() else None
            for image, answer in client.poses_of_many(pairs, progress=progress, **find):
                file = str(image)
                if isinstance(answer, Exception):
                    failed += 1
                    print(f"{file}: {answer}", file=sys.stderr)
                elif len(pairs) == 1:
                    print(json.dumps(answer, indent=2))
                else:
                    print(json.dumps({"file": file, **answer}))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
