"""JSON files of our own: written in one step, read back strictly, every value of the type it must have."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from gradpruner.common.errors import IntegrityError
from gradpruner.common.files import read_plain, shown, write_text

T = TypeVar("T")
_ADAPTERS: dict[Any, Any] = {}
MAX_DEPTH = 64
_SURROGATE = re.compile("[\ud800-\udfff]")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file in one step; NaN and Inf are refused because JSON has neither."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def parse_json(text: str | bytes) -> Any:
    """Reads JSON strictly.

    What a later step could not take is refused here: NaN and Inf, numbers of more than 64 bits, half a
    surrogate pair, a key that is there twice, lists in lists in lists.

    Raises:
        ValueError: Saying what is wrong.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_number, parse_constant=_number
        )
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    check_json(value)
    return value


def check_json(value: Any) -> None:
    """Raises ValueError if a JSON value holds text that is not text, NaN, or is nested too deeply."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                if _SURROGATE.search(item):
                    raise ValueError(
                        f"it holds half a surrogate pair, which is not a character: {item[:40]!r}"
                    )
            elif isinstance(item, dict):
                below += [*item, *item.values()]
            elif isinstance(item, list | tuple):
                below += item
            elif isinstance(item, float) and not math.isfinite(item):
                raise ValueError(f"it holds {item}, which is not a JSON number")
        level = below


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return found


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"it holds a number of {len(text)} digits; 64 bits are allowed")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {text[:40]}, which is not a finite number")
    return value


def read_json(path: Path, kind: str) -> Any:
    """Reads a JSON file this package wrote; `kind` says what it is, for the message ("pruning plan").

    Raises:
        IntegrityError: If it is missing or not JSON as `parse_json` takes it; where it is not JSON at all the
            message gives line and column.
    """
    try:
        return parse_json(read_plain(path))
    except FileNotFoundError:
        raise IntegrityError(f"There is no {kind} at {path}.") from None
    except OSError as error:
        raise IntegrityError(f"{path} is not a readable {kind}: {error.strerror}.") from error
    except ValueError as error:
        raise IntegrityError(f"{path} is not a readable {kind}: {error}.") from error


def read_object(path: Path, kind: str, shape: type[T]) -> T:
    """Reads a JSON file this package wrote and checks the type of every value.

    `shape` is a dataclass or TypedDict that says which fields there are, and of which types.

    Raises:
        IntegrityError: As `read_json`, or naming the first field that is missing, unknown or of another type.
    """
    return typed(read_json(path, kind), shape, f"{path} is not a readable {kind}")


def typed(value: Any, shape: type[T], fault: str) -> T:
    """Checks a JSON value against a type and returns it as that type.

    The type is one that pydantic understands; it is exact (no "1" for 1), and lists stand for tuples.
    `fault` is the beginning of the message.

    Raises:
        IntegrityError: Naming the first field that is missing or of another type.
    """
    from pydantic import TypeAdapter, ValidationError

    if is_dataclass(shape) and isinstance(value, dict):
        unknown = sorted(value.keys() - {entry.name for entry in fields(shape)})
        if unknown:
            raise IntegrityError(f"{fault}: unknown field {shown(unknown[0])}.")
    if shape not in _ADAPTERS:
        _ADAPTERS[shape] = TypeAdapter(shape)
    try:
        found: T = _ADAPTERS[shape].validate_json(json.dumps(value), strict=True)
        return found
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        given = "" if first["type"] == "missing" else f" (given: {shown(first['input'])})"
        raise IntegrityError(f"{fault}: {where}: {first['msg']}{given}.") from None
