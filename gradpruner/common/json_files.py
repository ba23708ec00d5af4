"""Our own JSON files: written atomically and read strictly, with the type of every value checked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from gradpruner.common.errors import IntegrityError
from gradpruner.common.files import read_plain, write_text
from gradpruner.common.printing import shown
from gradpruner.common.version import __version__

T = TypeVar("T")
_ADAPTERS: dict[Any, Any] = {}  # type -> pydantic's TypeAdapter, which is slow to create
MAX_DEPTH = 64
_SURROGATE = re.compile("[\ud800-\udfff]")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically. Raises ValueError for NaN and Inf, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def parse_json(text: str | bytes) -> Any:
    """Parses JSON strictly.

    Refuses what would make a later step fail: NaN and Inf, integers of more than 64 bits, half a surrogate
    pair, duplicate keys, and more than `MAX_DEPTH` levels of nesting.

    Raises:
        ValueError: If the text is not JSON, or breaks one of these rules. The message says which.
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
    """Raises ValueError if a JSON value holds half a surrogate pair, NaN or Inf, or is nested too deeply."""
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
        raise ValueError(f"the key {twice[:80]!r} appears twice")
    return found


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"it holds an integer of {len(text)} digits; at most 64 bits are allowed")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {text[:40]}, which is not a finite number")
    return value


def read_json(path: Path, kind: str) -> Any:
    """Reads a JSON file; `kind` says what it should be, for messages ("pruning plan").

    Raises:
        IntegrityError: If the file is missing, or `parse_json` refuses it. For a syntax error, the message
            gives line and column.
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
    """Reads a JSON file into `shape`, a dataclass or TypedDict that lists its fields and their types.

    Raises:
        IntegrityError: If the file is missing or not valid JSON, or a field is missing, unknown or of the
            wrong type.
    """
    return typed(read_json(path, kind), shape, f"{path} is not a readable {kind}")


def read_versioned(
    path: Path, kind: str, shape: type[T], version: int, hint: str, former: Collection[str] = ()
) -> T:
    """Reads a JSON file like `read_object`, if its field "format_version" is `version`.

    The field itself is not part of `shape`. `hint` says in errors what to do. Fields in `former`, which
    earlier releases wrote, are left out.

    Raises:
        IntegrityError: As `read_object`, or if the file has another format version.
    """
    fault = f"{path} is not a readable {kind}"
    try:
        raw = read_json(path, kind)
        check_version(raw, version)
        left_out = {"format_version", *former}
        return typed({name: raw[name] for name in raw if name not in left_out}, shape, fault)
    except IntegrityError as error:
        raise IntegrityError(error.message, hint=hint) from error
    except ValueError as error:
        raise IntegrityError(f"{fault}: {error}.", hint=hint) from error


def check_version(raw: Any, version: int) -> None:
    """Raises ValueError unless `raw` is a JSON object whose field "format_version" is `version`."""
    if not isinstance(raw, dict):
        raise ValueError(f"it is {shown(raw)}; a JSON object is needed")
    found = raw.get("format_version")
    if type(found) is not int or found != version:
        raise ValueError(f"format_version is {shown(found)}; gradpruner {__version__} reads {version}")


def typed(value: Any, shape: type[T], fault: str) -> T:
    """Converts a JSON value to a type, strictly.

    Args:
        value: A JSON value.
        shape: Any type that pydantic understands. "1" is not accepted for 1; lists become tuples.
        fault: The beginning of error messages ("x.json is not a readable plan").

    Raises:
        IntegrityError: If a field is missing or of the wrong type, or, for a dataclass, unknown.
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
        where = ".".join(map(str, first["loc"])) or "top level"
        given = "" if first["type"] == "missing" else f" (given: {shown(first['input'])})"
        raise IntegrityError(f"{fault}: {where}: {first['msg']}{given}.") from None
