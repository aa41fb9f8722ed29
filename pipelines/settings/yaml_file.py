"""YAML that others may have written: parsed, unless its aliases make it many times longer than it looks."""

from __future__ import annotations

from typing import Any

import yaml

MOST_VALUES = 100_000
"""With each alias counted as what it stands for. Half a kilobyte of aliases of aliases can stand for a
billion, which every message and every copy would write out."""


def parse_yaml(text: str) -> Any:
    """What the text says; None where it says nothing. yaml.YAMLError for whatever it cannot be read for."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_more_values(node)
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except ValueError as error:  # a date or a number that there is not
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def _refuse_more_values(node: yaml.Node) -> None:
    """Before anything is made of the nodes: merge keys (<<) would copy them then."""
    waiting, count = [node], 0
    while waiting:
        one = waiting.pop()
        count += 1
        if count > MOST_VALUES:
            raise yaml.YAMLError(f"more than {MOST_VALUES:,} values, its aliases (*NAME) written out")
        if isinstance(one, yaml.MappingNode):
            waiting += [part for pair in one.value for part in pair]
        elif isinstance(one, yaml.SequenceNode):
            waiting += one.value
