"""A JSON file, plain or gzipped: parsed, with the byte at which it is none."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec

from hrnet_core.errors import DataError
from hrnet_core.locations import refuse_no_bucket
from pipelines.storage.files import file_sizes, read_file


def _parsed(raw: bytes, kind: Any) -> Any:
    """JSON as `kind`. What msgspec does not take as that is given as Python's own parser reads it: a file
    with NaN in it (refused person by person), of another kind, or, with the place told, no JSON."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError:
        return json.loads(raw.decode())


def load(file: str | Path, kind: Any = Any) -> tuple[Any, str]:
    """Parsed JSON (`kind`, if it is of that kind) and the sha256 of the bytes. DataError says at which byte
    it is none."""
    content, sha256, _ = load_marked(str(file), kind)
    return content, sha256


def load_marked(file: str, kind: Any) -> tuple[Any, str, bool]:
    """As `load`, and whether the text starts with a byte order mark."""
    way_out = "The file is damaged or incomplete: copy or unpack it again."
    try:
        raw = read_file(file)
        if file.endswith(".gz"):
            raw = gzip.decompress(raw)
        text = raw.removeprefix(codecs.BOM_UTF8)  # Windows writes it, JSON knows no such thing
        return _parsed(text, kind), hashlib.sha256(raw).hexdigest(), text is not raw
    except (OSError, EOFError) as error:
        if isinstance(error, FileNotFoundError):
            refuse_no_bucket(file)
        problem, way_out = (
            f"cannot be read ({getattr(error, 'strerror', None) or error})",
            "Check its name and its rights.",
        )
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text at byte {error.start:,}"
    except json.JSONDecodeError as error:
        place = len(error.doc[: error.pos].encode())
        problem = f"not valid JSON at byte {place:,} of {len(text):,} ({error.msg})"
    except (ValueError, RecursionError) as error:
        problem = f"not JSON that can be read ({error})"
    except MemoryError:
        (size,) = file_sizes([file])
        problem = f"{size:,} bytes, more than the memory here can hold (up to ten times its size is needed)"
        way_out = "Give the machine more memory, or take out annotations that no person has."
    raise DataError(f"{file}: {problem}. {way_out}")
