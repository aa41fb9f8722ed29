"""What a user can fix, as exceptions: PoseError and its kinds.

The command line prints a PoseError's text and exits with 2; the server answers 4xx. A Failure is nobody's
wrong input: exit code 1. Anything else that is raised is our defect; its traceback goes into a file.
"""

from __future__ import annotations

import re


def first_line(error: BaseException) -> str:
    """Of another library's error, for a message of ours: its first line without colours, at most 200
    characters."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip()
    return (text or repr(error)).splitlines()[0][:200]


def shown(text: str, keep: str = "") -> str:
    r"""A text that others wrote, such as a file's name, for a terminal or a log: what is not printed but
    obeyed (control characters, changes of direction, half a surrogate pair) as \x1b and the like. keep: of
    those what stays."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


class PoseError(Exception):
    """Something the user can fix. Its text is one paragraph: the file, the field and the way out. Names and
    values in it are others', so that it is made printable."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(shown(a, keep="\n\t") if isinstance(a, str) else a for a in args))


class ImageError(PoseError):
    """A picture that cannot be used. `reason`: empty, not_an_image, unsupported_format, too_large,
    truncated, decode_failed."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        # Exceptions cross process borders in Ray: rebuild from both arguments.
        return (ImageError, (self.reason, str(self)))


class CheckpointError(PoseError):
    """A checkpoint folder or a weights file that is incomplete, damaged or of another model."""


class DataError(PoseError):
    """COCO files, skeleton files, shards, boxes or results that contradict their format."""


class ConfigError(PoseError):
    """A setting that is unknown or contradicts another, or asks for more than there is."""


class Failure(Exception):
    """Something failed that no input is to blame for: a lost worker, an engine. Its text says what happened,
    the way on, and the file with the traceback."""
