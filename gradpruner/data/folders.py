"""Which files of a folder hold a split: one file, shards, the layouts of the hub, `save_to_disk`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from gradpruner.common.errors import DataError
from gradpruner.data.parsing import PACKED, SUFFIXES, type_of

# A run asks for "eval"; data sets have a test split, or only a validation split.
_ALSO_CALLED = {
    "train": ("training",),
    "eval": ("evaluation", "test", "validation", "valid", "dev", "val", "validate"),
    "validation": ("valid", "dev", "val", "validate"),
}
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
_FILES_NAMED = 8  # in a message


def split_names(split: str) -> tuple[str, ...]:
    """Returns what a split may be called, its own name first."""
    return (split, *_ALSO_CALLED.get(split, ()))


def split_files(folder: Path, split: str) -> list[Path]:
    """Returns the files that hold `split`, in the order of their names.

    "train.jsonl" (with any type and compression) comes first; else the layouts `datasets` knows:
    shards "train-00000-of-00002.parquet" and "train_0.csv", in the folder or in one below it
    ("data/"), and folders named after the split. Where a folder has no "eval" split, its test split is
    taken, else its validation split.

    Raises:
        DataError: If there is none, several fit, a shard is missing, or two subsets have the split.
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
        f"{', '.join(split + suffix for suffix in SUFFIXES)}, "
        f"packed ones ({', '.join(PACKED)}), shards ({split}-00000-of-00002.parquet), folders and "
        f"the names {', '.join(names)}. Data files there: {', '.join(present[:_FILES_NAMED]) or 'none'}.",
        hint="Rename a file, or pass the file itself.",
    )


def has_split(folder: Path, split: str) -> bool:
    """Whether a folder holds `split` apart from its other rows.

    Raises:
        DataError: If several fit, or a shard is missing.
    """
    names = split_names(split)
    if is_saved_dataset(folder):
        return any((folder / name / "state.json").is_file() for name in names)
    return any(bool(_files_of(folder, name)) for name in names)


def _files_of(folder: Path, name: str) -> list[Path]:
    """The files of a split by one of its names; [] where there are none."""
    files = [folder / (name + suffix + packed) for suffix in SUFFIXES for packed in ("", *PACKED)]
    found = [path for path in files if path.is_file()]
    if len(found) > 1:
        raise DataError(
            f"{folder}: several files for split '{name}': {', '.join(p.name for p in found)}.",
            hint="Pass the file you mean, or remove the others.",
        )
    return found or _laid_out(folder, name)


def _laid_out(folder: Path, name: str) -> list[Path]:
    """The files `name-00000-of-00002.*`, `name_0.*`, or `name/*`, in the folder or one below."""
    mark = re.compile(rf"{re.escape(name)}([-_.]\d+)*(-of-\d+)?", re.IGNORECASE)
    within: dict[Path, list[Path]] = {}
    for path in sorted([*folder.glob("*"), *folder.glob("*/*"), *folder.glob("*/*/*")]):
        if not type_of(path) or not path.is_file():
            continue
        below = path.parent != folder and path.parent.name == name
        if below or mark.fullmatch(path.name.partition(type_of(path))[0]):
            within.setdefault(path.parent, []).append(path)
    if len(within) > 1:
        places = ", ".join(sorted(place.relative_to(folder).as_posix() for place in within))
        raise DataError(
            f"{folder}: split '{name}' is there several times, in {places}.",
            hint="Pass the folder of the subset you mean.",
        )
    files = next(iter(within.values()), [])
    _check_shards(folder, name, files)
    return files


def _check_shards(folder: Path, name: str, files: Sequence[Path]) -> None:
    """Refuses a set of shards of which some are missing or which are two sets."""
    numbered = [match for path in files if (match := _SHARD.search(path.name))]
    totals = sorted({int(match[2]) for match in numbered})
    if not numbered:
        return
    if len(totals) > 1 or len({path.suffix for path in files}) > 1 or len(numbered) != len(files):
        raise DataError(
            f"{folder}: files for split '{name}' belong to different sets: "
            f"{', '.join(path.name for path in files[:_FILES_NAMED])}.",
            hint="Keep one set of shards there, or pass one file.",
        )
    missing = sorted(set(range(totals[0])) - {int(match[1]) for match in numbered})
    if missing:
        raise DataError(
            f"{folder}: {len(numbered)} of {totals[0]} shards of split '{name}' are there; missing: "
            f"{', '.join(f'{number:05d}' for number in missing[:_FILES_NAMED])}.",
            hint="Download the missing shards, or pass the files you have one by one.",
        )


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    single = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return single or (folder / "dataset_dict.json").is_file()


def saved_split(folder: Path, split: str) -> Path:
    """Returns the folder of `split` in what `save_to_disk` wrote; a `Dataset` saved alone is any split.

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
        f"{folder}: a folder of save_to_disk without split '{split}'. Tried: {', '.join(names)}. "
        f"There: {', '.join(present) or 'none'}.",
        hint="Pass the folder of the split you mean.",
    )
