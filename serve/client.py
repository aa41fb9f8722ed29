"""A small client of the endpoint, standard library only.

from serve.client import poses
answer = poses("http://127.0.0.1:8000", "photo.jpg", [[x, y, w, h]])
answer["results"][0]["persons"][0]["keypoints"]        # [[x, y, score], ...]

python -m serve.client http://127.0.0.1:8000 photo.jpg --boxes "[[x, y, w, h]]"
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Nothing was computed yet, or another replica will do it: the same request may be sent again.
RETRIED = (429, 503)
Picture = str | Path | bytes
Boxes = Sequence[Sequence[float]] | None


class ServerError(Exception):
    """The server refused or failed. `problem` is its problem+json, `status` the HTTP status."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        title, detail = problem.get("title", "error"), problem.get("detail", "")
        super().__init__(f"{status} {title}: {detail}")
        self.status, self.problem = status, problem


def poses(
    url: str, image: Picture, boxes: Boxes = None, *, timeout_s: float = 60.0, attempts: int = 5
) -> dict[str, Any]:
    """The answer of POST /v1/poses for one picture.

    image: a file, or its bytes. boxes: [[x, y, w, h], ...] in px of the displayed picture; None: the
    whole picture is one person.

    Sent again, up to `attempts` times in all, after 429 and 503 (waiting as Retry-After says) and after a
    connection that was refused or closed. ServerError for any other answer, OSError without one.
    """
    return json.loads(_post(f"{url.rstrip('/')}/v1/poses", image, boxes, timeout_s, attempts))


def overlay(
    url: str,
    image: Picture,
    boxes: Boxes = None,
    *,
    threshold: float = 0.3,
    timeout_s: float = 60.0,
    attempts: int = 5,
) -> bytes:
    """The picture with its poses drawn in, as PNG: POST /v1/overlay. Otherwise as `poses`."""
    return _post(f"{url.rstrip('/')}/v1/overlay?threshold={threshold}", image, boxes, timeout_s, attempts)


def _post(url: str, image: Picture, boxes: Boxes, timeout_s: float, attempts: int) -> bytes:
    content, media_type = _form(image, boxes)
    # One id for all attempts: the server's log shows them together.
    headers = {"Content-Type": media_type, "X-Request-ID": str(uuid.uuid4())}
    request = urllib.request.Request(url, data=content, method="POST", headers=headers)
    for attempt in range(1, attempts + 1):
        wait = 0.2 * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)  # scattered: clients do not come at once
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            with error:
                problem = _problem(error)
            if error.code not in RETRIED or attempt == attempts:
                raise ServerError(error.code, problem) from None
            asked = error.headers.get("Retry-After", "")
            wait = float(asked) if asked.isdigit() else wait
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError):
            if attempt == attempts:
                raise
        time.sleep(wait)
    raise AssertionError("unreachable")


def _form(image: Picture, boxes: Boxes) -> tuple[bytes, str]:
    """A multipart/form-data body and its media type."""
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    boundary = uuid.uuid4().hex
    parts = [
        b'Content-Disposition: form-data; name="image"; filename="image"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n" + data
    ]
    if boxes is not None:
        numbers = [[float(v) for v in box] for box in boxes]
        parts.append(b'Content-Disposition: form-data; name="boxes"\r\n\r\n' + json.dumps(numbers).encode())
    mark = f"--{boundary}".encode()
    body = b"".join(mark + b"\r\n" + part + b"\r\n" for part in parts) + mark + b"--\r\n"
    return body, f"multipart/form-data; boundary={boundary}"


def _problem(error: urllib.error.HTTPError) -> dict[str, Any]:
    """The body of an error; a proxy's plain text becomes the detail."""
    text = error.read().decode("utf-8", "replace")
    try:
        problem = json.loads(text)
        return problem if isinstance(problem, dict) else {"detail": text}
    except ValueError:
        return {"title": str(error.reason), "detail": text[:500]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serve.client", description="Ask a server for poses.")
    parser.add_argument("url", help="such as http://127.0.0.1:8000")
    parser.add_argument("image", type=Path)
    parser.add_argument(
        "--boxes", type=json.loads, help='JSON "[[x, y, w, h], ...]"; none: the whole picture'
    )
    args = parser.parse_args(argv)
    try:
        print(json.dumps(poses(args.url, args.image, args.boxes), indent=2))
    except (ServerError, OSError) as error:
        print(f"{args.url}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
