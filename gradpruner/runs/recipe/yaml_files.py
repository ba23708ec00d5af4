"""YAML files as plain values, checked, with errors that say what is wrong and where.

Importing this module imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gradpruner.common.errors import ConfigError
from gradpruner.common.files import read_plain
from gradpruner.common.json_files import MAX_DEPTH, check_json
from gradpruner.common.printing import shown

RECIPE_LIMIT = 2**20  # bytes
_MOST_VALUES = 100_000
_OPENING = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses keys that are given twice, and keys that are not text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Checks the keys of a mapping, then builds it."""
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a list or a mapping; a name is needed", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key.value}' is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file of sections as plain values.

    Raises:
        ConfigError: If the file is missing, is not valid YAML or gives a key twice; with line and column.
    """
    try:
        raw = parse_yaml(read_plain(path, RECIPE_LIMIT).decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"There is no recipe at {path}.", hint="`gradpruner ls recipes` lists the built-in recipes."
        ) from None
    except OSError as error:
        raise ConfigError(f"{shown(str(path), 200)} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(
            f"{shown(str(path), 200)} is not a recipe: {error}.",
            hint="Give a YAML file of sections, in UTF-8.",
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: not valid YAML: {_problem(error)}.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a mapping of sections is needed, not {type(raw).__name__}.")
    return raw


def _problem(error: yaml.YAMLError) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split())


def parse_yaml(text: str) -> Any:
    """Reads YAML as plain values of JSON's types. NaN is let through, as sections refuse it by its key.

    Raises:
        yaml.YAMLError: If it is not YAML; with line and column if they are known.
        ValueError: If it holds what a recipe cannot: a date, a number of more than 64 bits, half a surrogate
            pair, NUL, too deep nesting, or aliases that expand to too many values.
    """
    depth = 0
    for token in yaml.scan(text, yaml.SafeLoader):  # building deeply nested values would exhaust the stack
        depth += isinstance(token, _OPENING)
        depth -= isinstance(token, _CLOSING)
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    try:
        value = yaml.load(text, _Loader)
    except (AttributeError, KeyError, TypeError, IndexError, ArithmeticError) as error:
        raise ValueError(f"a value is not what its tag says ({error})") from error
    level, depth, seen = [value], 0, 0
    while level:
        depth, seen = depth + 1, seen + len(level)
        if depth > MAX_DEPTH or seen > _MOST_VALUES:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep, or holds too many values")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [*item, *item.values()]
            elif isinstance(item, list):
                below += item
            else:
                check_scalar(item)
        level = below
    return value


def check_scalar(value: Any) -> None:
    """Raises ValueError for a value that YAML allows and a recipe cannot hold."""
    if isinstance(value, str):
        check_json(value)
        if "\0" in value:
            raise ValueError(f"{shown(value)} holds a NUL character")
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise ValueError("it holds a number of more than 64 bits")
    elif value is not None and not isinstance(value, int | float):
        raise ValueError(f"{shown(str(value))} is a {type(value).__name__}; quote it if it is text")
