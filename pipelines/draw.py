"""`hrnet draw`: a COCO set of drawn people, to try every stage without a download.

The pictures show articulated people in everyday poses (pipelines/drawn/person.py) in simple scenes
(pipelines/drawn/scenes.py). The annotations follow COCO and are told as a careful annotator would:

    v = 2   the body part at the keypoint's own pixel is seen there
    v = 1   inside the picture, hidden by the own body, another person or a thing
    v = 0   outside the picture; a facial point that looks away from us; a hidden point beyond the box
            of what is seen of the person (nobody could place it)
    area    the pixels of the person that are seen; bbox and polygons are those of the same mask
    crowd   a group of small people far away: one annotation, iscrowd 1, RLE, no keypoints
    people below MIN_HEIGHT px, or almost hidden: annotated without keypoints (num_keypoints 0)

Every picture depends on (seed, split, index) only: the same bytes on any number of processes.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2

from hrnet_core.errors import ConfigError, DataError
from hrnet_core.locations import folder_to_write
from hrnet_core.skeleton import COCO17
from pipelines.drawn.picture import FIRST_ID, SPLITS, annotate, draw_picture
from pipelines.sources.layout import annotations_of
from pipelines.storage.files import (
    is_empty,
    is_file,
    join,
    list_files,
    read_json,
    writable,
    write_whole,
    writing_many,
)

VERSION = 1
"""Raised with every change of what is drawn: an older set is not taken for this one's."""
PICTURES_PER_JOB = 32


@dataclass(frozen=True)
class DrawnSet:
    """What `draw` left in its folder."""

    folder: str
    """Path or URI"""
    images: dict[str, int]
    """Pictures by split"""
    people: dict[str, int]
    """People with keypoints by split"""

    def __str__(self) -> str:
        parts = [f"{split}: {n} pictures, {self.people[split]} people" for split, n in self.images.items()]
        return f"{self.folder}: {'; '.join(parts)} with keypoints"


def draw(
    out: str | Path, images: int, seed: int = 0, val_images: int | None = None, workers: int = 1
) -> DrawnSet:
    """Write a COCO root of drawn people, at a path or URI: annotations/, train2017/, val2017/.

    images: training pictures. val_images: validation pictures in addition; default images // 5, at
    least 4. workers: processes. A folder that holds the same set already is left as it is; one that
    holds anything else is refused.

    Raises ConfigError for impossible counts and where no folder can be made, DataError for one that is not
    ours to fill.
    """
    val_images = max(4, images // 5) if val_images is None else val_images
    wanted = {"version": VERSION, "seed": seed, "images": images, "val_images": val_images}
    for name, value in {**wanted, "workers": workers}.items():
        least = 0 if name == "seed" else 1
        if value < least:
            raise ConfigError(f"draw: {name} must be at least {least}, got {value}.")
    folder = folder_to_write(out, "OUT")
    finished = _claim(folder, wanted)
    if finished is not None:
        return finished
    counts = _counts(wanted)
    jobs = [
        (folder, seed, split, start, min(start + PICTURES_PER_JOB, counts[split]))
        for split in SPLITS
        for start in range(0, counts[split], PICTURES_PER_JOB)
    ]
    if workers == 1:
        results = [_draw_some(*job) for job in jobs]
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
            results = list(pool.map(_draw_some, *zip(*jobs, strict=True)))
    found = {}
    for split in SPLITS:
        mine = [r for job, r in zip(jobs, results, strict=True) if job[2] == split]
        pictures = [image for part in mine for image in part[0]]
        annotations = [annotation for part in mine for annotation in part[1]]
        found[split] = sum(a["num_keypoints"] > 0 for a in annotations)
        _write_json(annotations_of(folder, split), _coco(seed, split, pictures, annotations))
    _write_json(join(folder, "drawn.json"), {**wanted, "people": found})
    return DrawnSet(folder, counts, found)


def _claim(folder: str, wanted: dict[str, int]) -> DrawnSet | None:
    """Mark the folder as ours. A finished set of the same parameters is returned; else DataError."""
    marker = join(folder, "drawn.json")
    if is_file(folder):
        raise DataError(f"{folder}: is a file; draw needs a folder to write to.")
    try:
        there = read_json(marker)
    except (ValueError, TypeError):
        there = {}
    if there is not None:
        if any(there.get(name) != value for name, value in wanted.items()):
            raise DataError(
                f"{folder}: holds a drawn set of other parameters ({_parameters(there)}; "
                f"wanted {_parameters(wanted)}). Choose another folder, or delete this one."
            )
        if "people" in there and _complete(folder, wanted):
            return DrawnSet(folder, _counts(wanted), there["people"])
    elif not is_empty(folder):
        raise DataError(
            f"{folder}: is not empty and was not made by draw (it has no drawn.json). Choose another folder."
        )
    _write_json(marker, wanted)
    return None


def _counts(parameters: dict[str, int]) -> dict[str, int]:
    return dict(zip(SPLITS, (parameters["images"], parameters["val_images"]), strict=True))


def _complete(folder: str, parameters: dict[str, int]) -> bool:
    return all(
        is_file(annotations_of(folder, split))
        and sum(name.endswith(".jpg") for name in list_files(join(folder, split))) == count
        for split, count in _counts(parameters).items()
    )


def _parameters(fields: dict[str, Any]) -> str:
    return ", ".join(f"{k} {fields.get(k)}" for k in ("version", "seed", "images", "val_images"))


def _draw_some(
    folder: str, seed: int, split: str, start: int, stop: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Draw, write and annotate pictures start..stop-1 of a split; runs in a worker process."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    images, annotations = [], []
    with writing_many(sync=False) as put:
        for index in range(start, stop):
            drawing = draw_picture(seed, split, index)
            image_id = FIRST_ID[split] + index
            name = f"{image_id:012d}.jpg"
            quality = 86 + (index * 7) % 10
            bgr = cv2.cvtColor(drawing.picture, cv2.COLOR_RGB2BGR)
            _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
            put(join(folder, f"{split}/{name}"), data.tobytes())
            height, width = drawing.ids.shape
            images.append({"id": image_id, "file_name": name, "width": width, "height": height, "license": 1})
            annotations += annotate(drawing, image_id)
    cv2.setNumThreads(threads)
    return images, annotations


def _coco(
    seed: int, split: str, images: list[dict[str, Any]], annotations: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "info": {"description": f"Drawn people, seed {seed}, {split}", "version": str(VERSION)},
        "licenses": [{"id": 1, "name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}],
        "images": images,
        "annotations": annotations,
        "categories": [
            {
                "id": 1,
                "name": "person",
                "supercategory": "person",
                "keypoints": list(COCO17.keypoints),
                "skeleton": [[a + 1, b + 1] for a, b in COCO17.limbs],
            }
        ],
    }


def _write_json(file: str, content: dict[str, Any]) -> None:
    with writable(file):
        write_whole(file, json.dumps(content, separators=(",", ":")))
