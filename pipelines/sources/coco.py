"""A COCO folder in: the table of people and the photographs, with a reason for each that is left out.

Decided here, on the annotations (annotations.py, rows.py) and the folder's listing alone; pictures are opened
by who uses them.
"""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from operator import attrgetter
from pathlib import Path

from hrnet_core.errors import DataError, ImageError
from hrnet_core.locations import is_uri, refuse_no_bucket
from hrnet_core.skeleton import Skeleton
from pipelines.sources.annotations import TO_CROP, Wanted, read_annotations
from pipelines.sources.layout import locate, splits_there
from pipelines.sources.records import Photo, Rejection, Split, on_photos
from pipelines.sources.rows import ImageEntry, image_problem, listed, printable
from pipelines.storage.files import absolute, is_file, is_folder, join, list_files

LINK_LEADS_OUT = "a symbolic link leads out of the COCO folder: copy the files themselves (cp -rL)"


def read_coco(root: str | Path, split: str, skeleton: Skeleton, wanted: Wanted = TO_CROP) -> Split:
    """A split's annotations and the listing of its pictures (layout.py); ROOT may be a URI.

    DataError where the folder, the file or its index is wrong as a whole. A photo's place comes from its
    file_name, never from its id. A missing picture costs a rejection only if it had people.
    """
    root = absolute(str(root))  # workers may run elsewhere
    annotation_file, pictures = locate(root, split)
    _check_folders(root, split, annotation_file, pictures)
    listing = _Listing(pictures)

    def size_of(image: ImageEntry) -> tuple[int, int] | None:
        from pipelines.sources.photos import open_header  # Pillow, which few files need here

        found = image_problem(image, sized=False) or listing.find(image.file_name, needed=True)
        with contextlib.suppress(ImageError):  # the picture's own verdict comes when it is opened
            if isinstance(found, str):
                header, _ = open_header(join(pictures, found))
                return header.width, header.height
        return None

    read = read_annotations(annotation_file, skeleton, wanted, size_of)
    _refuse_foreign_paths(annotation_file, pictures, read.images.values())
    judged = read.judged
    people = judged.people[judged.usable]
    counts = {image_id: rows.stop - rows.start for image_id, rows in people.by_image().items()}
    photos, rejected, mended = [], list(judged.rejected), 0
    for image_id, image in read.images.items():
        count = counts.get(image_id, 0)
        found = image_problem(image) or listing.find(image.file_name, needed=count > 0)
        if isinstance(found, tuple):
            reason, detail = found
            rejected.append(Rejection(reason, printable(image.file_name), image_id, None, detail, count))
        else:
            mended += found != image.file_name
            photos.append(Photo(image_id, found, join(pictures, found), image.width, image.height))
    entries = Counter(photo.path for photo in photos)
    for photo in photos:
        if entries[photo.path] > 1:
            detail = f"{entries[photo.path]} entries of 'images' lead to this file"
            lost = counts.get(photo.image_id, 0)
            rejected.append(Rejection("same_file", photo.file_name, photo.image_id, None, detail, lost))
    photos = [photo for photo in photos if entries[photo.path] == 1]
    repaired = {**judged.repaired, **({"file_names": mended} if mended else {})}
    return Split(
        name=split,
        annotation_file=annotation_file,
        annotation_sha256=read.sha256,
        photos=tuple(photos),
        people=on_photos(people, photos),
        truth=read.truth,
        rejected=tuple(sorted(rejected, key=attrgetter("order"))),
        repaired=repaired,
    )


def _check_folders(root: str, split: str, annotation_file: str, pictures: str) -> None:
    if not is_folder(root):
        refuse_no_bucket(root)
        raise DataError(f"{root} is not a folder: give the root of a COCO set (preprocess: --data.root).")
    if not is_file(annotation_file):
        if is_file(f"{annotation_file}.gz"):
            raise DataError(f"{annotation_file}: there is {annotation_file}.gz. Unpack it: gunzip -k.")
        above = os.path.dirname(root.rstrip("/"))
        if not is_uri(root) and is_file(locate(above, split)[0]):
            raise DataError(
                f"{root}: the annotations of split {split!r} lie beside or above it. Give the folder that "
                f"holds annotations/ and the pictures: {above}"
            )
        there = splits_there(root)
        if not there and (is_folder(join(root, "labels")) or is_file(join(root, "data.yaml"))):
            raise DataError(
                f"{root}: YOLO-pose labels (labels/ or data.yaml, no annotations/). Preprocess takes them "
                f"with --data.format yolo_pose. They have no areas and no crowds: an AP on them would not "
                f"be COCO's, so evaluate wants COCO annotations."
            )
        if split in there:
            raise DataError(
                f"{root}: split {split!r} has annotations here, but no folder with its pictures: {split}/, "
                f"images/{split}/ and images/ are looked for (docs/sources.md). Move or link them there."
            )
        raise DataError(
            f"{annotation_file}: no such file. Splits with annotations here: {listed(there) or 'none'}. Name "
            f"one with --data.train-split, --data.val-split (evaluate: --split), or check --data.root."
        )
    if not is_folder(pictures):
        raise DataError(
            f"{pictures}: no such folder. The pictures of split {split!r} are looked for in {split}/, "
            f"images/{split}/ and images/ beside annotations/. Check --data.root, or unpack them there."
        )


def _refuse_foreign_paths(annotation_file: str, pictures: str, images: Collection[ImageEntry]) -> None:
    """DataError where no entry names a place below the split's folder: labelme's are of its own machine."""
    problems = [image_problem(image, sized=False) for image in images]
    if images and all(problem and problem[0] == "path_outside_root" for problem in problems):
        first = printable(next(iter(images)).file_name)
        name = first.replace("\\", "/").rpartition("/")[2]
        raise DataError(
            f"{annotation_file}: every file_name is an absolute path or leads out of its folder, the first "
            f"is {first!r}. Nothing outside of {pictures} is opened: put the pictures there, and write names "
            f"relative to it, such as {name!r}."
        )


def _spellings(file_name: str) -> Iterator[str]:
    """A name as it stands; with slashes for backslashes (Windows); with composed characters for decomposed
    ones and the other way round; without its first folders (the split's own, or those of the machine that
    wrote it)."""
    yield file_name
    plain = file_name.replace("\\", "/")
    yield plain
    yield from (unicodedata.normalize(form, plain) for form in ("NFC", "NFD"))
    parts = plain.split("/")
    yield from ("/".join(parts[start:]) for start in range(1, len(parts)))


def _stem(name: str) -> str:
    return os.path.splitext(name)[0].lower()


class _Listing:
    """What lies in the split's folder, listed once a folder: 118,000 single looks would take longer."""

    def __init__(self, pictures: str) -> None:
        self._pictures = pictures
        self._inside = [os.path.realpath(folder) for folder in (pictures, os.path.dirname(pictures))]
        self._folders: dict[str, dict[str, bool] | None] = {}
        self._likely: dict[str, dict[str, str]] = {}

    def find(self, file_name: str, needed: bool) -> str | tuple[str, str]:
        """The name under which a picture lies here, or (reason, detail) where it is needed and not there, or
        is a link that leads elsewhere."""
        for spelling in _spellings(file_name):
            folder, _, name = spelling.rpartition("/")
            listing = self._listing(folder)
            if listing is None or (listing.get(name) and not self._is_inside(f"{self._pictures}/{spelling}")):
                return "path_outside_root", LINK_LEADS_OUT
            if name in listing:
                return spelling
        if not needed:
            return file_name
        folder, _, name = file_name.replace("\\", "/").rpartition("/")
        likely = self._likely_names(folder)
        twin = likely.get(name.lower()) or likely.get(_stem(name))
        if twin and twin.lower() == name.lower():
            return "missing_image", f"upper and lower case differ: there is {twin!r}"
        return "missing_image", f"no such file, but there is {twin!r}" if twin else "no such file"

    def _likely_names(self, folder: str) -> dict[str, str]:
        """The files of a folder by their names in lower case, with and without what is behind the dot: made
        once, as every picture of a set may be missing."""
        if folder not in self._likely:
            names = sorted(self._listing(folder) or ())
            self._likely[folder] = {_stem(name): name for name in names}
            self._likely[folder] |= {name.lower(): name for name in names}
        return self._likely[folder]

    def _listing(self, folder: str) -> dict[str, bool] | None:
        if folder not in self._folders:
            self._folders[folder] = self._list(join(self._pictures, folder) if folder else self._pictures)
        return self._folders[folder]

    def _list(self, folder: str) -> dict[str, bool] | None:
        """Name -> is a link, of the files in a folder; None for a folder that is elsewhere. What is no file
        (a pipe, a device) is not there: opening it might never end."""
        if is_uri(folder):
            return dict.fromkeys(list_files(folder), False)
        if not os.path.isdir(folder):
            return {}
        if not self._is_inside(folder):
            return None
        try:
            with os.scandir(folder) as entries:
                return {e.name: e.is_symlink() for e in entries if e.is_symlink() or e.is_file()}
        except OSError as error:
            raise DataError(
                f"{folder}: the pictures cannot be listed ({error.strerror}). Check the rights of the folder."
            ) from None

    def _is_inside(self, path: str) -> bool:
        real = os.path.realpath(path)
        return any(os.path.commonpath([real, folder]) == folder for folder in self._inside)
