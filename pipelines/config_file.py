"""A YAML file becomes a RunConfig, or a sentence that names the file and the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hrnet_core.errors import ConfigError
from pipelines.config import RunConfig


def load_config(name_or_file: str) -> RunConfig:
    """A shipped config by name ("w32_256x192") or a YAML file. ConfigError names file and key."""
    shipped = Path(__file__).parent / "configs"
    path = Path(name_or_file)
    if path.suffix not in (".yaml", ".yml"):
        path = shipped / f"{name_or_file}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in shipped.glob("*.yaml")))
        raise ConfigError(
            f"no config {name_or_file!r}: give a YAML file, or one of the shipped names: {names}."
        )
    try:
        fields = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML file: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, got {type(fields).__name__}.")
    try:
        return RunConfig(**{**fields, "config_name": path.stem})
    except ValidationError as error:
        raise ConfigError(explain(error, str(path))) from None


def explain(error: ValidationError, source: str) -> str:
    """A pydantic error as one paragraph: source, each field and what it should have been."""
    parts = []
    for problem in error.errors():
        field = ".".join(str(p) for p in problem["loc"]) or "the whole"
        if problem["type"] == "extra_forbidden":
            parts.append(f"unknown key {field!r}{_did_you_mean(problem['loc'])}")
        else:
            parts.append(
                f"{field}: {problem['msg'].removeprefix('Value error, ')} (got {problem['input']!r})"
            )
    return f"{source}: {'; '.join(parts)}. All settings: docs/configuration.md."


def _did_you_mean(location: tuple[str | int, ...]) -> str:
    import difflib

    model: Any = RunConfig
    for section in location[:-1]:
        model = model.model_fields[section].annotation
    close = difflib.get_close_matches(str(location[-1]), list(model.model_fields), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
