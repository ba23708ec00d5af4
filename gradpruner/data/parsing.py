"""Parses the content of one data file into rows: JSON Lines, JSON, CSV and parquet.

JSON Lines, JSON and CSV have readers of our own: a user with one bad line in ten thousand needs its
file, line and column, and an empty file, a ragged row or a repeated field must be an error, not a
guess. Parquet is read by pyarrow, imported only when it is needed.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradpruner.common.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""File types that can be read."""

PACKED = (".gz", ".bz2", ".xz")
"""Compression suffixes that may follow the type in a file name."""

_OPENERS: Mapping[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_MOST_UNPACKED = 4 << 30  # bytes; a small file may decompress to more than fits into memory
_BLOCK = 1 << 24  # bytes decompressed at a time
_BOM = b"\xef\xbb\xbf"  # the byte order mark some editors write; not part of the text
# UTF-32 first: its mark begins with that of UTF-16.
_WIDE_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_FIELD_LIMIT = 1 << 30  # bytes in one CSV field; Python's own limit of 128 KiB cuts long documents


@dataclass(frozen=True)
class DataRow:
    """One record and its place in the file.

    Attributes:
        id: "file:line" for JSON Lines and CSV (the first line is 1), "file[index]" for JSON, parquet
            and the hub (the first row is 0).
        fields: The columns as read; text is never stripped.
    """

    id: str
    fields: Mapping[str, Any]


@dataclass
class Faults:
    """Collects rows that cannot be read, as (row id, reason); without `skip`, raises at once."""

    skip: bool = False
    found: list[tuple[str, str]] = field(default_factory=list)

    def add(self, row_id: str, error: DataError) -> None:
        """Raises the error, or records it if bad rows are skipped."""
        if not self.skip:
            raise error
        self.found.append((row_id, str(error).splitlines()[0].removeprefix(f"{row_id}: ")))


def type_of(path: Path) -> str:
    """Returns the type by a file's name, e.g. ".jsonl" for "train.jsonl.gz"; "" if it is not supported."""
    name = path.name.lower()
    packed = next((suffix for suffix in PACKED if name.endswith(suffix)), "")
    suffix = Path(name.removesuffix(packed)).suffix
    return suffix if suffix in SUFFIXES else ""


def rows_of(path: Path, content: bytes, split: str, faults: Faults) -> Iterator[DataRow]:
    """Yields the rows of a file's decompressed content; the path gives the type and is named in messages.

    If a JSON file holds an object, its list under `split` is read.

    Raises:
        DataError: If the file is empty or malformed, or its encoding cannot be recognised.
    """
    kind = type_of(path)
    if not content.removeprefix(_BOM).strip():
        raise DataError(f"{path} is empty.", hint="Write at least one row.")
    if kind == ".parquet":
        yield from _parquet_rows(path, content)
        return
    text = _decode(path, content)
    if not text.strip():
        raise DataError(f"{path} is empty.", hint="Write at least one row.")
    if kind == ".json":
        yield from _json_rows(path, text, split, faults)
    elif kind in (".csv", ".tsv"):
        yield from _csv_rows(path, text, "\t" if kind == ".tsv" else ",", faults)
    else:
        yield from _jsonl_rows(path, text, faults)


def unpacked(path: Path, content: bytes) -> bytes:
    """Returns the decompressed content of a file; the content itself if its name has no compression suffix.

    Raises:
        DataError: If the file is damaged, not compressed, or decompresses to more than 4 GiB.
    """
    packed = path.suffix.lower()
    if packed not in PACKED:
        return content
    parts: list[bytes] = []
    size = 0
    try:
        with _OPENERS[packed](io.BytesIO(content)) as stream:
            while block := stream.read(_BLOCK):
                size += len(block)
                if size > _MOST_UNPACKED:
                    raise DataError(
                        f"{path}: decompresses to more than {_MOST_UNPACKED >> 30} GiB.",
                        hint="Split it into several files, or write parquet.",
                    )
                parts.append(block)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"{path}: cannot be decompressed ({error}).",
            hint=f"Check that it is a complete {packed} file, or decompress it yourself.",
        ) from error
    return b"".join(parts)


def _decode(path: Path, content: bytes) -> str:
    """Decodes UTF-8, or UTF-16 and UTF-32 if a byte order mark or the zero bytes of ASCII text show it."""
    wide = next((name for mark, name in _WIDE_MARKS if content.startswith(mark)), None) or _unmarked(content)
    if wide is not None:
        try:
            return content.decode(wide)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: begins as {wide.upper()} text, but cannot be decoded: {error.reason} at byte "
                f"{error.start}.",
                hint=f"Convert it, for example: iconv -f {wide.upper()} -t UTF-8 '{path.name}'.",
            ) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The decoder does not count the byte order mark.
        offset = error.start + (3 if content.startswith(_BOM) else 0)
        line = content.count(b"\n", 0, offset) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8: byte 0x{content[offset]:02x} at byte offset {offset}.",
            hint="Convert it from its encoding, for example for Western European text: "
            f"iconv -f CP1252 -t UTF-8 '{path.name}'.",
        ) from error


def _unmarked(content: bytes) -> str | None:
    """Detects UTF-16 without a mark: files begin with two ASCII characters ({", [{, a column name)."""
    zeros = "".join("0" if byte == 0 else "x" for byte in content[:4])
    return {"x0x0": "utf-16-le", "0x0x": "utf-16-be"}.get(zeros)


def _parse_json(path: Path, text: str, first_line: int) -> Any:
    """Parses a JSON document that starts on line `first_line` of the file."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(
                f"{path}:{first_line}: field '{twice}' appears twice in one object.",
                hint="Keep one of them.",
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


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def kind_of(value: object) -> str:
    """Returns the kind of a JSON value, in words."""
    if value is None:
        return "null"
    names = {bool: "true/false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, Mapping) else "not JSON")


def _jsonl_rows(path: Path, text: str, faults: Faults) -> Iterator[DataRow]:
    # Only \n ends a line: U+2028 and similar characters are legal inside JSON strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row_id = f"{path.name}:{number}"
        try:
            value = _parse_json(path, line, number)
            if not isinstance(value, dict):
                hint = "Each line is one object: {...}."
                if isinstance(value, list):
                    hint += " For one list of all rows, name the file .json."
                raise DataError(f"{path}:{number}: expected an object, found {kind_of(value)}.", hint)
        except DataError as error:
            faults.add(row_id, error)
            continue
        yield DataRow(row_id, value)


def _json_rows(path: Path, text: str, split: str, faults: Faults) -> Iterator[DataRow]:
    first, _, rest = text.strip().partition("\n")
    if rest and first.startswith("{") and first.rstrip().endswith("}"):
        # JSON Lines in a file called .json, as many tools write it.
        yield from _jsonl_rows(path, text, faults)
        return
    value = _parse_json(path, text, 1)
    if isinstance(value, dict):
        keys = [key for key in (split, "data") if isinstance(value.get(key), list)]
        conversation = "messages" in value or "conversations" in value
        if not keys and (conversation or not any(isinstance(part, list) for part in value.values())):
            value = [value]
        elif not keys:
            raise DataError(
                f"{path}: no list of rows under '{split}' or 'data'. Keys: {', '.join(map(str, value))}.",
                hint=f'Write a list of objects, {{"data": [...]}} or {{"{split}": [...]}}.',
            )
        else:
            value = value[keys[0]]
    if not isinstance(value, list):
        raise DataError(
            f"{path}: expected a list of objects, found {kind_of(value)}.",
            hint='Write [{...}, {...}], {"data": [...]} or one object per line in a .jsonl file.',
        )
    for index, item in enumerate(value):
        row_id = f"{path.name}[{index}]"
        if isinstance(item, dict):
            yield DataRow(row_id, item)
            continue
        error = DataError(
            f"{path}[{index}]: expected an object, found {kind_of(item)}.",
            hint="Write every element of the list as one row: {...}.",
        )
        faults.add(row_id, error)


def _csv_rows(path: Path, text: str, delimiter: str, faults: Faults) -> Iterator[DataRow]:
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
                error = DataError(
                    f"{path}:{line}: {len(values)} fields, but the header has {len(header)} "
                    f"({', '.join(header)}).",
                    hint='Put texts with commas or line breaks in double quotes; write " as "".',
                )
                faults.add(f"{path.name}:{line}", error)
            elif delimiter == "\t" and any(_holds_row(value, len(header)) for value in values):
                error = DataError(
                    f"{path}:{line}: a field goes on over a tab and the next line.",
                    hint='Two texts probably begin or end with a double quote: write " as "" and quote them.',
                )
                faults.add(f"{path.name}:{line}", error)
            else:
                yield DataRow(f"{path.name}:{line}", dict(zip(header, values, strict=True)))
            line = reader.line_num + 1
    except csv.Error as fault:
        raise DataError(
            f"{path}:{line}: malformed CSV: {fault}.", hint="Check the double quotes of this row."
        ) from fault
    finally:
        csv.field_size_limit(limit)


def _holds_row(value: str, columns: int) -> bool:
    """Whether a field of a TSV file has a line that looks like a row of its own."""
    lines = value.split("\n") if "\n" in value else []
    return any(line.count("\t") == columns - 1 > 0 and not line.startswith("\t") for line in lines)


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


def _parquet_rows(path: Path, content: bytes) -> Iterator[DataRow]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        records: list[dict[str, Any]] = pq.read_table(io.BytesIO(content)).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path}: not a readable parquet file ({first_line(error)}).",
            hint="Write it again, or pass JSON Lines.",
        ) from error
    for index, record in enumerate(records):
        yield DataRow(f"{path.name}[{index}]", record)


def class_names(content: bytes) -> dict[str, tuple[str, ...]]:
    """Returns the label names that `datasets` wrote into a parquet file's schema, by column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        written = (pq.read_schema(io.BytesIO(content)).metadata or {}).get(b"huggingface")
        features = json.loads(written)["info"]["features"] if written else {}
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    if not isinstance(features, dict):
        return {}
    found = {}
    for name, feature in features.items():
        names = feature.get("names") if isinstance(feature, dict) else None
        if isinstance(names, list) and names and all(isinstance(one, str) for one in names):
            found[name] = tuple(names)
    return found
