"""A YAML file becomes a RunConfig, or a sentence that names the file and the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hrnet_core.errors import ConfigError
from pipelines.settings.config import RunConfig
from pipelines.settings.yaml_file import parse_yaml

SHIPPED = Path(__file__).parents[1] / "configs"


def load_config(name_or_file: str) -> RunConfig:
    """A shipped config by name ("w32_256x192") or a YAML file. ConfigError names file and key.

    `base: NAME`, or a list of names, in a file: it begins as those configs, the later over the earlier, and
    says only what differs. A base that is a YAML file is sought beside the file that names it.
    """
    path, files = _find(name_or_file, Path()), list[Path]()
    fields = _layered(path, (), files)
    try:
        return RunConfig(**{**fields, "config_name": path.stem})
    except ValidationError as error:
        bases = ", ".join(file.stem for file in files[1:])
        raise ConfigError(explain(error, f"{path} (its base: {bases})" if bases else str(path))) from None


def _find(name_or_file: str, beside: Path) -> Path:
    """The file that is meant; `beside`: where a relative path begins."""
    path = beside / name_or_file
    if path.suffix not in (".yaml", ".yml"):
        path = SHIPPED / f"{name_or_file}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))
        raise ConfigError(
            f"no config {name_or_file!r}: give a YAML file, or one of the shipped names: {names}."
        )
    return path


def _layered(path: Path, above: tuple[Path, ...], files: list[Path]) -> dict[str, Any]:
    """The fields of a file over those of its bases. above: the files that it is a base of; every file that is
    read is added to `files`."""
    if path in above:
        raise ConfigError(f"{above[-1]}: base: {path.stem} is a config that begins as this one.")
    files.append(path)
    fields = _read(path)
    bases = fields.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise ConfigError(f"{path}: base: the name of a config or a list of names, got {bases!r}.")
    merged: dict[str, Any] = {}
    for layer in [*(_layered(_base(path, name), (*above, path), files) for name in bases), fields]:
        for section, values in layer.items():
            both = isinstance(values, dict) and isinstance(merged.get(section), dict)
            merged[section] = {**merged[section], **values} if both else values
    return merged


def _base(path: Path, name: str) -> Path:
    try:
        return _find(name, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: base: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = parse_yaml(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML file: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, got {type(fields).__name__}.")
    return fields


def refused(ended: BaseException) -> str | None:
    """The sentence for values of a command line that a section's model refused, where that is why tyro has
    ended the program."""
    section, error = "", ended.__context__
    if error is not None and isinstance(error.__context__, ValidationError):
        section, error = f"{getattr(error, 'arg', '')}.", error.__context__  # tyro's InstantiationError
    if not isinstance(error, ValidationError):
        return None
    return explain(error, "command line", f"--{section}")


def explain(error: ValidationError, source: str, flags: str | None = None) -> str:
    """A pydantic error as one paragraph: source, each field and what it should have been. flags: what stands
    before a field on the command line, "--train."; None: it was no command line."""
    parts = []
    for problem in error.errors():
        field = ".".join(str(p) for p in problem["loc"])
        if flags is not None and field:
            field = flags + ".".join(p for p in problem["loc"] if isinstance(p, str)).replace("_", "-")
        if problem["type"] == "extra_forbidden":
            parts.append(f"unknown key {field!r}{_did_you_mean(problem['loc'])}")
        else:
            what = problem["msg"].removeprefix("Value error, ")
            # Of a whole section, which is wrong in itself, the message names the fields.
            got = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
            parts.append(f"{field}: {what}{got}" if field else what + got)
    return f"{source}: {'; '.join(parts)}. All settings: docs/configuration.md."


def _did_you_mean(location: tuple[str | int, ...]) -> str:
    import difflib

    model: Any = RunConfig
    for section in location[:-1]:
        model = model.model_fields[section].annotation
    close = difflib.get_close_matches(str(location[-1]), list(model.model_fields), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
