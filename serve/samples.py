"""The page's sample pictures."""

from __future__ import annotations

import json
import mimetypes
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hrnet_core.errors import ConfigError
from serve.body import read_boxes
from serve.model import fetch
from serve.schemas import Problem

MAX_SAMPLES = 24


@dataclass(frozen=True)
class Sample:
    data: bytes
    media_type: str
    boxes: list[list[float]] | None


def load_samples(uri: str) -> dict[str, Sample]:
    """Pictures named in boxes.json ({"picture.jpg": [[x, y, w, h], ...]}), in its order.

    ConfigError where the folder does not hold what it names.
    """
    with tempfile.TemporaryDirectory(prefix="hrnet-samples-") as temporary:
        folder = fetch(uri, Path(temporary))
        try:
            boxes = json.loads((folder / "boxes.json").read_text())
            if not isinstance(boxes, dict):
                raise ValueError("not a JSON object")
            names = list(boxes)[:MAX_SAMPLES]
            if any(Path(name).name != name for name in names):
                raise ValueError("a name in it is a path, not a file of the folder")
            for name in names:
                read_boxes(boxes[name], name)
            return {
                name: Sample(
                    (folder / name).read_bytes(),
                    mimetypes.guess_type(name)[0] or "application/octet-stream",
                    boxes[name],
                )
                for name in names
            }
        except (OSError, ValueError, Problem) as error:
            raise ConfigError(
                f"{uri}/boxes.json: {error}. A samples folder holds pictures and a boxes.json with "
                f'{{"picture.jpg": [[x, y, w, h], ...]}}.'
            ) from None
