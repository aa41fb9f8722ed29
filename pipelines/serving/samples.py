"""The page's sample pictures: a folder that is there, or one made of a COCO split."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hrnet_core.errors import ConfigError
from hrnet_core.locations import is_uri
from pipelines.serving.pinned import published
from pipelines.settings.config import ServeSettings
from pipelines.storage.files import absolute, is_file, join, write_json, write_whole

if TYPE_CHECKING:
    from hrnet_core.skeleton import Skeleton

SAMPLES = 8


def samples_folder(settings: ServeSettings, skeleton: Skeleton, storage: str) -> str | None:
    """A samples folder that the replicas can read: the one asked for, or one made of a COCO split."""
    from serve.samples import load_samples

    if settings.samples is None:
        return None
    folder = absolute(settings.samples)
    if not (is_uri(folder) or is_file(join(folder, "boxes.json"))):
        with tempfile.TemporaryDirectory(prefix="hrnet-samples-") as made:
            samples_from_coco(Path(folder), skeleton, settings.max_pixels, Path(made))
            folder = published(Path(made), join(storage, "samples"))
    load_samples(folder)  # refused here, not in the replica
    return folder


def samples_from_coco(pictures: Path, skeleton: Skeleton, max_pixels: int, into: Path) -> None:
    """ROOT/SPLIT with its annotations -> a samples folder of up to 8 pictures whose people are well seen."""
    from pipelines.sources.annotations import ALL, TO_CROP
    from pipelines.sources.coco import read_coco
    from pipelines.sources.layout import locate
    from pipelines.sources.photos import Picture, check_photo

    annotations, _ = locate(pictures.parent, pictures.name)
    if not is_file(annotations):
        raise ConfigError(
            f"samples {pictures}: neither boxes.json in it nor {annotations} beside it. Name a folder of "
            f"pictures with a boxes.json (docs/serving.md), or the SPLIT folder of a COCO root."
        )
    boxes: dict[str, list[list[float]]] = {}
    split = read_coco(pictures.parent, pictures.name, skeleton, TO_CROP._replace(category=ALL))
    for photo, rows in split.by_photo():
        people = split.people[rows]
        large = people.area >= 0.01 * photo.width * photo.height
        seen = people[large & ((people.keypoints[..., 2] > 0).mean(axis=1) >= 0.5)]
        picture = check_photo(photo, max_pixels) if 1 <= len(seen) <= 4 else None
        # The page sees the picture as EXIF turns it; COCO's boxes are of the stored pixels.
        if isinstance(picture, Picture) and picture.header.orientation == 1:
            name = Path(photo.path).name
            write_whole(into / name, picture.content)
            boxes[name] = [[round(float(v), 1) for v in box] for box in seen.bbox_xywh]
        if len(boxes) == SAMPLES:
            break
    write_json(into / "boxes.json", boxes)
