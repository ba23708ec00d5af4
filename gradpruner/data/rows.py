"""Reads files, folders and hub datasets into rows that know where they came from.

parsing.py reads the content of one file, folders.py finds the files of a split, and shapes.py decides
what the columns mean. Hub datasets and folders of `save_to_disk` are read by `datasets`, imported only
when it is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from gradpruner.common.errors import DataError
from gradpruner.common.files import path_fault
from gradpruner.common.printing import shown
from gradpruner.data.folders import is_saved_dataset, saved_split, split_files, split_names
from gradpruner.data.parsing import (
    PACKED,
    SUFFIXES,
    DataRow,
    Faults,
    class_names,
    first_line,
    rows_of,
    type_of,
    unpacked,
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")


@dataclass(frozen=True)
class RowSet:
    """All rows of one source.

    Attributes:
        rows: At least one.
        source: The path or hub id, for reports.
        sha256: Hex digest of the file's bytes; for several files, of their digests; for the hub and for
            `save_to_disk`, of the rows as canonical JSON lines.
        faults: Id and reason of every row that could not be read, if such rows are skipped.
        label_names: Column of class numbers -> names of the classes, if the source has them.
    """

    rows: tuple[DataRow, ...]
    source: str
    sha256: str
    faults: tuple[tuple[str, str], ...] = ()
    label_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_rows(source: str | Path, split: str = "train", *, skip_bad: bool = False) -> RowSet:
    """Reads a file, the files of `split` in a folder, or a split of a hub dataset.

    Args:
        source: Path of a file or folder, or a hub id: "owner/name", "name", "owner/name:config".
        split: The files of a folder, key of a JSON object, or split of a hub dataset.
        skip_bad: Record lines that cannot be read in `RowSet.faults` instead of refusing the file.

    Raises:
        DataError: If nothing is found (the message lists every place tried), or a file cannot be read.
    """
    path = Path(source).expanduser()
    if fault := path_fault(path):
        raise DataError(f"The data {shown(str(source))} cannot be read: {fault}.", hint="Give another path.")
    if path.is_dir():
        if is_saved_dataset(path):
            return _read_saved(path, split)
        files = split_files(path, split)
        if len(files) == 1:
            return read_file(files[0], split, skip_bad=skip_bad)
        return _joined(path, [read_file(file, split, skip_bad=skip_bad, root=path) for file in files])
    if path.exists():
        return read_file(path, split, skip_bad=skip_bad)
    name = str(source)
    if _HUB_ID.fullmatch(name) and not type_of(path):
        hub_id, _, config = name.partition(":")
        return read_hub(hub_id, split, config=config or None, tried=(str(path.absolute()),))
    file, mark, count = name.partition("#")
    if mark and Path(file).expanduser().exists():
        raise DataError(
            f"No data at '{name}': after # a number is needed, and '{count}' is not one.",
            hint=f"Write {file}#500 to draw 500 rows, or {file} for all.",
        )
    raise DataError(
        f"No data at '{name}'. Tried: file or folder {path.absolute()}.",
        hint=f"Give an existing file ({', '.join(SUFFIXES)}), a folder with {split}.jsonl, "
        "or a hub dataset id (owner/name).",
    )


def read_file(
    path: Path, split: str = "train", *, skip_bad: bool = False, root: Path | None = None
) -> RowSet:
    """Reads one data file; its name gives its type and compression.

    Args:
        path: The file.
        split: If the file holds a JSON object, the key of the list to read.
        skip_bad: Record rows that cannot be read in `RowSet.faults` instead of refusing the file.
        root: Folder that row ids are relative to; None puts only the file name into row ids.

    Raises:
        DataError: If the type is unknown, the file is empty or malformed, or its encoding cannot be
            recognised.
    """
    if not type_of(path):
        raise DataError(
            f"{path}: cannot tell the file type from '{path.suffix or path.name}'.",
            hint=f"Give it one of the suffixes {', '.join(SUFFIXES)}, followed by {', '.join(PACKED)} if it "
            "is compressed.",
        )
    if not path.is_file():
        raise DataError(
            f"{path} is not a regular file.",
            hint="Write the rows to a file first; a pipe cannot be read twice.",
        )
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    content = unpacked(path, packed)
    faults = Faults(skip_bad)
    found = tuple(rows_of(path, content, split, faults))
    if not found and faults.found:
        raise DataError(
            f"{path}: no row can be read. First error: {faults.found[0][1]}", hint="Fix the file."
        )
    if not found:
        raise DataError(f"{path} has no rows.", hint="Write at least one row.")
    bad = faults.found
    if root is not None:
        place = path.relative_to(root).parent.as_posix()
        prefix = "" if place == "." else f"{place}/"
        found = tuple(DataRow(prefix + row.id, row.fields) for row in found)
        bad = [(prefix + row_id, reason) for row_id, reason in bad]
    names = class_names(content) if type_of(path) == ".parquet" else {}
    return RowSet(found, str(path), hashlib.sha256(packed).hexdigest(), tuple(bad), names)


def _joined(folder: Path, parts: Sequence[RowSet]) -> RowSet:
    """Joins the files of one split, in their order."""
    for part in parts[1:]:
        if part.label_names != parts[0].label_names:
            raise DataError(
                f"{folder}: {Path(parts[0].source).name} and {Path(part.source).name} have different names "
                f"for class numbers: {parts[0].label_names} and {part.label_names}.",
                hint="They are not shards of one dataset; write them again with the same class names.",
            )
    digest = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()
    return RowSet(
        tuple(row for part in parts for row in part.rows),
        f"{folder} ({len(parts)} files)",
        digest,
        tuple(fault for part in parts for fault in part.faults),
        parts[0].label_names,
    )


def _read_saved(folder: Path, split: str) -> RowSet:
    """Reads a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    import datasets

    part = saved_split(folder, split)
    try:
        table = datasets.load_from_disk(str(part))
        rows, names = [dict(row) for row in table], _names_of(table)
    except Exception as error:  # missing or damaged files raise error types of four packages
        raise DataError(
            f"{part}: written by save_to_disk, but load_from_disk cannot read it ({first_line(error)}).",
            hint="Save it again, or write it with to_json(...) or to_parquet(...).",
        ) from error
    return _row_set(rows, part.name, str(part), names, str(part))


def _names_of(table: Any) -> dict[str, tuple[str, ...]]:
    features = getattr(table, "features", None) or {}
    named = {column: getattr(feature, "names", None) for column, feature in features.items()}
    return {column: tuple(names) for column, names in named.items() if names}


def _row_set(
    rows: Sequence[dict[str, Any]], name: str, source: str, names: dict[str, tuple[str, ...]], what: str
) -> RowSet:
    """Makes a set of rows read by `datasets`, with ids "name[0]" ...; `what` names them in an error."""
    if not rows:
        raise DataError(f"{what} has no rows.", hint="Write at least one row.")
    digest = hashlib.sha256()
    for row in rows:
        line = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    found = tuple(DataRow(f"{name}[{index}]", row) for index, row in enumerate(rows))
    return RowSet(found, source, digest.hexdigest(), label_names=names)


class NoSplitError(DataError):
    """A dataset of the hub has no such split."""


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
        split: Name of the split. If the hub has no such split, the other names that files in a folder may
            have are tried ("validation" for "eval").
        config: Configuration (subset) name; None for the default one.
        revision: Branch, tag or commit; None for the main branch.
        data_files: Pattern of this split's files in the repository; None lets the hub decide.
        tried: Places already looked at, for the message.

    Raises:
        NoSplitError: If the dataset has no such split.
        DataError: If the dataset or the configuration is not available.
    """
    import datasets

    files = {split: data_files} if data_files else None
    refused: Exception | None = None
    for taken in (split,) if files else split_names(split):
        try:
            table = datasets.load_dataset(hub_id, config, split=taken, revision=revision, data_files=files)
            rows, names = [dict(row) for row in table], _names_of(table)
            break
        except Exception as error:  # the library raises some thirty types from six packages here
            refused = refused or error
            if not (isinstance(error, ValueError) and "split" in str(error)):
                _refuse_hub(hub_id, split, config, tried, error)
    else:
        assert refused is not None
        _refuse_hub(hub_id, split, config, tried, refused, NoSplitError)
    name = f"{hub_id}:{config}" if config else hub_id
    which = taken if taken == split else f"asked for {split}, took {taken}"
    what = f"Hub dataset '{hub_id}', split '{taken}',"
    return _row_set(rows, f"{name}/{taken}", f"{name} ({which})", names, what)


def _refuse_hub(
    hub_id: str,
    split: str,
    config: str | None,
    tried: tuple[str, ...],
    error: Exception,
    kind: type[DataError] = DataError,
) -> NoReturn:
    offline = any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )
    where = f"hub dataset {hub_id}" + (f", configuration {config}" if config else "")
    where += f", split {split}" + (" (offline: local cache only)" if offline else "")
    places = "; ".join([*(f"file or folder {place}" for place in tried), where])
    hint = "Check the spelling of the path or id and the split, or download the data "
    hint += f"and pass the file or a folder with {split}.jsonl."
    if offline:
        hint += " Unset HF_HUB_OFFLINE to look on the hub."
    raise kind(f"No data at '{hub_id}'. Tried: {places} ({first_line(error)}).", hint=hint) from error
