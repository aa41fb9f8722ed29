"""YAML of others: what it says, and what is refused before it grows."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hrnet_core.errors import CheckpointError, ConfigError, DataError
from hrnet_core.files import read_object
from hrnet_core.skeleton import COCO17
from pipelines.settings.config_file import load_config
from pipelines.settings.yaml_file import parse_yaml
from pipelines.sources.data_yaml import read_description

LAUGHS = "\n".join(
    ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 6))]
)
"""200,000 letters in 300; with each line ten times as many."""
MERGED = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 6))]
)
NO_YAML = {
    "aliases of aliases": LAUGHS,
    "merges of merges": MERGED,
    "a list that holds itself": "a: &a [*a]",
    "nested": "[" * 5000,
    "a date that there is not": "a: 2001-99-99",
    "a number of 5,000 digits": f"a: {'9' * 5000}",
    "cut off": "a: [1",
}


@pytest.mark.parametrize("what", NO_YAML)
def test_what_cannot_be_read_is_refused_in_a_sentence(what: str, tmp_path: Path) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(NO_YAML[what])
    config = tmp_path / "mine.yaml"
    config.write_text(NO_YAML[what])
    with pytest.raises(ConfigError, match="not a readable YAML file") as told:
        load_config(str(config))
    assert len(str(told.value)) < 1000
    (tmp_path / "data.yaml").write_text(NO_YAML[what])
    with pytest.raises(DataError, match="not a readable YAML file"):
        read_description(str(tmp_path), "train", COCO17, None)


def test_aliases_and_merges_of_a_usual_size_are_read() -> None:
    text = "a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, x: 2}\nc: [*a, *a]\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml("") is None
    assert parse_yaml("names: [" + "x, " * 9_000 + "]")["names"] == ["x"] * 9_000


def test_json_of_a_checkpoint_nested_too_deeply_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.json").write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: no readable JSON"):
        read_object(tmp_path / "checkpoint.json", CheckpointError, "Copy it again.")
