"""The page's sample pictures."""

from __future__ import annotations

import json
import mimetypes
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hrnet_core.errors import ConfigError
from hrnet_core.locations import fetch
from serve.body import boxes_of_json
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
        try:
            folder = fetch(uri, Path(temporary), ["boxes.json"])
            boxes = json.loads((folder / "boxes.json").read_text())
            if not isinstance(boxes, dict):
                raise ValueError("not a JSON object")
            names = list(boxes)[:MAX_SAMPLES]
            if any(Path(name).name != name for name in names):
                raise ValueError("a name in it is a path, not a file of the folder")
            for name in names:
                boxes_of_json(boxes[name], name)
            fetch(uri, folder, names)
            kinds = {name: mimetypes.guess_type(name)[0] or "application/octet-stream" for name in names}
            return {name: Sample((folder / name).read_bytes(), kinds[name], boxes[name]) for name in names}
        except (OSError, ValueError, Problem) as error:
            raise ConfigError(
                f"{uri}/boxes.json: {error}. A samples folder holds pictures and a boxes.json with "
                f'{{"picture.jpg": [[x, y, w, h], ...]}}.'
            ) from None
