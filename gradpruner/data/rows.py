"""Files, folders and hub datasets, read into rows that remember where they came from.

Own readers for JSON Lines, JSON and CSV, because a user who has one bad line in ten thousand needs
its file, line and column, and because an empty file, a ragged row or a field written twice must be
an error and not a guess. Parquet is read by pyarrow, hub datasets by `datasets`; both are imported
only when they are needed. What the columns mean is decided in data.py.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gradpruner.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""File types that can be read."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")
_BOM = b"\xef\xbb\xbf"  # the byte order mark some editors write; not part of the text
_FIELD_LIMIT = 1 << 30  # bytes in one CSV field; Python's own limit of 128 KiB cuts long documents


@dataclass(frozen=True)
class Row:
    """One record and where it stands.

    Attributes:
        id: "file:line" for JSON Lines and CSV (first line is 1), "file[index]" for JSON, parquet
            and the hub (first row is 0).
        fields: The columns as read; text is never stripped.
    """

    id: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class RowSet:
    """All rows of one source.

    Attributes:
        rows: At least one.
        source: The path or hub id, for reports.
        sha256: Hex digest of the file's bytes; for the hub, of the rows as canonical JSON lines.
    """

    rows: tuple[Row, ...]
    source: str
    sha256: str


def read_rows(source: str | Path, split: str = "train") -> RowSet:
    """Reads a file, the `split` file of a folder, or a split of a hub dataset.

    Args:
        source: Path of a file or folder, or a hub id: "owner/name", "name", "owner/name:config".
        split: Which file of a folder, which key of a JSON object, which split of a hub dataset.

    Raises:
        DataError: If nothing is found (with every place tried), or the file cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return read_file(_split_file(path, split), split)
    if path.exists():
        return read_file(path, split)
    name = str(source)
    if _HUB_ID.fullmatch(name) and path.suffix.lower() not in SUFFIXES:
        hub_id, _, config = name.partition(":")
        return read_hub(hub_id, split, config=config or None, tried=(str(path.absolute()),))
    raise DataError(
        f"No data at '{name}'. Tried: file or folder {path.absolute()}.",
        hint=f"Give an existing file ({', '.join(SUFFIXES)}), a folder holding {split}.jsonl, "
        "or a hub dataset id (owner/name).",
    )


def read_file(path: Path, split: str = "train") -> RowSet:
    """Reads one data file, its type told by the suffix.

    Raises:
        DataError: If the type is unknown, the file is empty, not UTF-8, or malformed.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path}: cannot tell the file type from '{path.suffix or path.name}'.",
            hint=f"Name it with one of {', '.join(SUFFIXES)}; unpack compressed files first.",
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if not content.removeprefix(_BOM).strip():
        raise DataError(f"{path} is empty.", hint="Write at least one row.")
    if suffix == ".parquet":
        rows = _parquet_rows(path, content)
    else:
        text = _decode(path, content)
        if suffix == ".json":
            rows = _json_rows(path, text, split)
        elif suffix in (".csv", ".tsv"):
            rows = _csv_rows(path, text, "\t" if suffix == ".tsv" else ",")
        else:
            rows = _jsonl_rows(path, text)
    found = tuple(rows)
    if not found:
        raise DataError(f"{path} holds no rows.", hint="Write at least one row.")
    return RowSet(found, str(path), hashlib.sha256(content).hexdigest())


def read_hub(
    hub_id: str,
    split: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    data_files: str | None = None,
    tried: tuple[str, ...] = (),
) -> RowSet:
    """Reads one split of a Hugging Face hub dataset, or of its local cache when offline.

    Args:
        hub_id: "owner/name".
        split: Split name on the hub.
        config: Configuration (subset) name; None is the default one.
        revision: Branch, tag or commit; None is the main branch.
        data_files: Pattern of the files of this split inside the repository; None lets the hub
            decide.
        tried: Places already looked at, for the message.

    Raises:
        DataError: If the dataset, the configuration or the split cannot be had.
    """
    import datasets

    files = {split: data_files} if data_files else None
    try:
        table = datasets.load_dataset(hub_id, config, split=split, revision=revision, data_files=files)
        rows = [dict(row) for row in table]
    except Exception as error:  # the library raises some thirty types from six packages here
        _refuse_hub(hub_id, split, config, tried, error)
    if not rows:
        raise DataError(f"Hub dataset '{hub_id}', split '{split}', holds no rows.")
    digest = hashlib.sha256()
    for row in rows:
        line = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    name = f"{hub_id}:{config}" if config else hub_id
    found = tuple(Row(f"{name}/{split}[{index}]", row) for index, row in enumerate(rows))
    return RowSet(found, f"{name} ({split})", digest.hexdigest())


def _refuse_hub(
    hub_id: str, split: str, config: str | None, tried: tuple[str, ...], error: Exception
) -> NoReturn:
    offline = any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )
    where = f"hub dataset {hub_id}" + (f", configuration {config}" if config else "")
    where += f", split {split}" + (" (offline: local cache only)" if offline else "")
    places = "; ".join([*(f"file or folder {place}" for place in tried), where])
    cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
    hint = "Check the spelling of the path or id and the split, or download the data "
    hint += f"and pass the file or a folder holding {split}.jsonl."
    if offline:
        hint += " Unset HF_HUB_OFFLINE to look on the hub."
    raise DataError(f"No data at '{hub_id}'. Tried: {places} ({cause}).", hint=hint) from error


def _split_file(folder: Path, split: str) -> Path:
    """The one data file of `split` in `folder`."""
    found = [path for suffix in SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"{folder}: several files for split '{split}': {', '.join(p.name for p in found)}.",
            hint="Pass the file you mean, or remove the others.",
        )
    present = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    raise DataError(
        f"{folder}: no file for split '{split}'. Tried: "
        f"{', '.join(split + suffix for suffix in SUFFIXES)}. "
        f"Data files there: {', '.join(present[:8]) or 'none'}.",
        hint="Rename a file, or pass the file itself.",
    )


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # With a byte order mark the decoder counts from behind it.
        offset = error.start + (3 if content.startswith(_BOM) else 0)
        line = content.count(b"\n", 0, offset) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8: byte 0x{content[offset]:02x} at byte offset {offset}.",
            hint=f"Convert it, for example: iconv -f LATIN1 -t UTF-8 '{path.name}'.",
        ) from error


def _parse_json(path: Path, text: str, first_line: int) -> Any:
    """Parses one JSON document that starts on `first_line` of the file."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(
                f"{path}:{first_line}: field '{twice}' appears twice in one object.",
                hint="Keep one of the two.",
            )
        return fields

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{path}:{line}:{error.colno}: malformed JSON: {error.msg}.",
            hint="Fix this line; JSON needs double quotes, escaped line breaks and no trailing commas.",
        ) from error
    except (RecursionError, ValueError) as error:
        fault = "nested too deeply" if isinstance(error, RecursionError) else "a number too long"
        raise DataError(
            f"{path}:{first_line}: malformed JSON: {fault}.", hint="Fix or remove this line."
        ) from error


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    names = {bool: "true/false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, Mapping) else "not JSON")


def _jsonl_rows(path: Path, text: str) -> Iterator[Row]:
    # Only \n ends a line: U+2028 and its kin are legal inside JSON strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        value = _parse_json(path, line, number)
        if not isinstance(value, dict):
            hint = "Each line is one object: {...}."
            if isinstance(value, list):
                hint += " For one list of all rows, name the file .json."
            raise DataError(f"{path}:{number}: expected an object, found {kind_of(value)}.", hint)
        yield Row(f"{path.name}:{number}", value)


def _json_rows(path: Path, text: str, split: str) -> Iterator[Row]:
    first, _, rest = text.strip().partition("\n")
    if rest and first.startswith("{") and first.rstrip().endswith("}"):
        # JSON Lines under the name .json, as many tools write it.
        yield from _jsonl_rows(path, text)
        return
    value = _parse_json(path, text, 1)
    if isinstance(value, dict):
        keys = [key for key in (split, "data") if isinstance(value.get(key), list)]
        if not keys and not any(isinstance(part, list) for part in value.values()):
            value = [value]
        elif not keys:
            raise DataError(
                f"{path}: no list of rows under '{split}' or 'data'. Found: {', '.join(map(str, value))}.",
                hint=f'Write a list of objects, {{"data": [...]}} or {{"{split}": [...]}}.',
            )
        else:
            value = value[keys[0]]
    if not isinstance(value, list):
        raise DataError(
            f"{path}: expected a list of objects, found {kind_of(value)}.",
            hint='Write [{...}, {...}], {"data": [...]} or one object a line in a .jsonl file.',
        )
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise DataError(
                f"{path}[{index}]: expected an object, found {kind_of(item)}.",
                hint="Every element of the list is one row: {...}.",
            )
        yield Row(f"{path.name}[{index}]", item)


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    limit = csv.field_size_limit(_FIELD_LIMIT)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for values in reader:
            if not any(value.strip() for value in values):
                pass  # a blank line
            elif header is None:
                header = _csv_header(path, line, values)
            elif len(values) != len(header):
                raise DataError(
                    f"{path}:{line}: {len(values)} fields, but the header has {len(header)} "
                    f"({', '.join(header)}).",
                    hint='Put texts with commas or line breaks in double quotes; write " as "".',
                )
            else:
                yield Row(f"{path.name}:{line}", dict(zip(header, values, strict=True)))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{line}: malformed CSV: {error}.", hint="Check the double quotes of this row."
        ) from error
    finally:
        csv.field_size_limit(limit)


def _csv_header(path: Path, line: int, values: list[str]) -> list[str]:
    header = [value.strip() for value in values]
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        raise DataError(
            f"{path}:{line}: one column '{header[0]}'; the fields are not separated by commas.",
            hint="Save it with commas, or with tabs under the suffix .tsv.",
        )
    for name in header:
        if not name or header.count(name) > 1:
            fault = f"column '{name}' appears twice" if name else "a column has no name"
            raise DataError(f"{path}:{line}: {fault} in the header.", hint="Name each column once.")
    return header


def _parquet_rows(path: Path, content: bytes) -> Iterator[Row]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        records: list[dict[str, Any]] = pq.read_table(io.BytesIO(content)).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path}: not a readable parquet file ({cause}).",
            hint="Write it again, or pass JSON Lines.",
        ) from error
    for index, record in enumerate(records):
        yield Row(f"{path.name}[{index}]", record)
