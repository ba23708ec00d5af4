"""Finds the files of a folder that hold a split: one file, shards, the hub's layouts, `save_to_disk`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from gradpruner.common.errors import DataError, IntegrityError
from gradpruner.common.json_files import read_json
from gradpruner.data.parsing import PACKED, SUFFIXES, type_of

# A run asks for "eval"; most datasets have a test split, or only a validation split.
_ALSO_CALLED = {
    "train": ("training",),
    "eval": ("evaluation", "test", "validation", "valid", "dev", "val", "validate"),
    "validation": ("valid", "dev", "val", "validate"),
}
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
_SCORES = "evaluation.json"
_FILES_NAMED = 8  # in a message


def split_names(split: str) -> tuple[str, ...]:
    """Returns the names a split may have, its own name first."""
    return (split, *_ALSO_CALLED.get(split, ()))


def split_files(folder: Path, split: str) -> list[Path]:
    """Returns the files that hold `split`, sorted by name.

    Looks for "train.jsonl" (with any type and compression) first, then for the layouts `datasets` knows:
    shards "train-00000-of-00002.parquet" and "train_0.csv", in the folder or in a folder in it ("data/"),
    and folders named after the split. If a folder has no "eval" split, its test split is used, or else its
    validation split.

    Raises:
        DataError: If no file is found, several match, a shard is missing, or two subsets have the split.
    """
    names = split_names(split)
    for name in names:
        if found := _files_of(folder, name):
            return found
    present = [
        path.relative_to(folder).as_posix()
        for pattern in ("*", "*/*")
        for path in sorted(folder.glob(pattern))
        if type_of(path)
    ]
    raise DataError(
        f"{folder}: no file for split '{split}'. Tried: "
        f"{', '.join(split + suffix for suffix in SUFFIXES)}, also compressed ({', '.join(PACKED)}), "
        f"shards ({split}-00000-of-00002.parquet) and folders, under the names {', '.join(names)}. Data "
        f"files there: {', '.join(present[:_FILES_NAMED]) or 'none'}.",
        hint="Rename a file, or pass the file itself.",
    )


def has_split(folder: Path, split: str) -> bool:
    """Whether a folder holds `split` separately from its other rows.

    Raises:
        DataError: If several files match, or a shard is missing.
    """
    names = split_names(split)
    if is_saved_dataset(folder):
        return any((folder / name / "state.json").is_file() for name in names)
    return any(bool(_files_of(folder, name)) for name in names)


def file_of(folder: Path, split: str) -> Path | None:
    """Returns the file in the folder itself that is called after a split; None if it is not exactly one."""
    named = next(filter(None, (_called(folder, name) for name in split_names(split))), [])
    return named[0] if len(named) == 1 else None


def _called(folder: Path, name: str) -> list[Path]:
    files = [folder / (name + suffix + packed) for suffix in SUFFIXES for packed in ("", *PACKED)]
    return [path for path in files if path.is_file() and not _is_scores(path)]


def _is_scores(path: Path) -> bool:
    """Whether a file is what `gradpruner evaluate` wrote, which holds no rows."""
    if path.name != _SCORES:
        return False
    try:
        found = read_json(path, "evaluation")
    except IntegrityError:
        return False
    return isinstance(found, dict) and "provenance" in found


def _files_of(folder: Path, name: str) -> list[Path]:
    """Returns the files of a split under one of its names; [] if there are none."""
    found = _called(folder, name)
    if len(found) > 1:
        raise DataError(
            f"{folder}: several files for split '{name}': {', '.join(p.name for p in found)}.",
            hint="Pass one of the files, or remove the others.",
        )
    return found or _laid_out(folder, name)


def _laid_out(folder: Path, name: str) -> list[Path]:
    """Returns the files `name-00000-of-00002.*`, `name_0.*` or `name/*`, in the folder or a folder in it."""
    mark = re.compile(rf"{re.escape(name)}([-_.]\d+)*(-of-\d+)?", re.IGNORECASE)
    within: dict[Path, list[Path]] = {}
    for path in sorted([*folder.glob("*"), *folder.glob("*/*"), *folder.glob("*/*/*")]):
        if not type_of(path) or not path.is_file() or _is_scores(path):
            continue
        below = path.parent != folder and path.parent.name == name
        if below or mark.fullmatch(path.name.partition(type_of(path))[0]):
            within.setdefault(path.parent, []).append(path)
    if len(within) > 1:
        places = ", ".join(sorted(place.relative_to(folder).as_posix() for place in within))
        raise DataError(
            f"{folder}: several folders hold split '{name}': {places}.",
            hint="Pass one of these folders.",
        )
    files = next(iter(within.values()), [])
    _check_shards(folder, name, files)
    return files


def _check_shards(folder: Path, name: str, files: Sequence[Path]) -> None:
    """Raises DataError if shards are missing, or belong to different sets."""
    numbered = [match for path in files if (match := _SHARD.search(path.name))]
    totals = sorted({int(match[2]) for match in numbered})
    if not numbered:
        return
    if len(totals) > 1 or len({path.suffix for path in files}) > 1 or len(numbered) != len(files):
        raise DataError(
            f"{folder}: files for split '{name}' belong to different sets: "
            f"{', '.join(path.name for path in files[:_FILES_NAMED])}.",
            hint="Keep one set of shards in the folder, or pass one file.",
        )
    missing = sorted(set(range(totals[0])) - {int(match[1]) for match in numbered})
    if missing:
        raise DataError(
            f"{folder}: {len(numbered)} of {totals[0]} shards of split '{name}' are in the folder; missing: "
            f"{', '.join(f'{number:05d}' for number in missing[:_FILES_NAMED])}.",
            hint="Download the missing shards, or pass the files you have one by one.",
        )


def is_saved_dataset(folder: Path) -> bool:
    """Whether this folder was written by `save_to_disk`."""
    single = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return single or (folder / "dataset_dict.json").is_file()


def saved_split(folder: Path, split: str) -> Path:
    """Returns the folder of `split` in a folder of `save_to_disk`; a single `Dataset` stands for any split.

    Raises:
        DataError: If there is no such split.
    """
    if not (folder / "dataset_dict.json").is_file():
        return folder
    names = split_names(split)
    for name in names:
        if (folder / name / "state.json").is_file():
            return folder / name
    present = sorted(path.parent.name for path in folder.glob("*/state.json"))
    raise DataError(
        f"{folder}: written by save_to_disk, but has no split '{split}'. Tried: {', '.join(names)}. "
        f"Splits there: {', '.join(present) or 'none'}.",
        hint="Pass the folder of one split.",
    )
