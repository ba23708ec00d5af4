"""The quality study: what every way to a smaller model takes in all, in tunings of the dense model."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from quality_cells import (
    CLASSES,
    ROW_FAST,
    ROW_IGIA,
    USUAL,
    Pair,
    better,
    cells,
    classified,
    compared,
    trained,
    twice,
)

TRAINED_ROWS = (1600, 3200, 10_000, 30_000, 100_000)
WAYS: dict[str, tuple[Callable[[], list[Pair]], tuple[str, ...]]] = {
    "dense, twice as long": (lambda: [pair for task in CLASSES for pair in twice(task)], ("dense", "dense")),
    "tuned, repaired, nothing trained": (compared, ("dense", "recording", "influence", "influence")),
    "the same, recovered (best)": (better, ("dense", "recording", "influence", "influence", "recovery")),
    "from base: last layers, repaired (fast)": (lambda: trained(ROW_FAST), ("least_squares", "tuning")),
    "from base: IGIA, repaired": (lambda: trained(ROW_IGIA), ("recording", "least_squares", "tuning")),
    "from base: IGIA, no repair": (lambda: trained("base/igia/none/labels"), ("recording", "tuning")),
    "from base: as in the paper": (lambda: trained("base/paper/none/labels"), ("recording", "tuning")),
    "from base: last layers, no repair": (lambda: trained("base/last/none/labels"), ("tuning",)),
}
"""Label -> measured pairs, and the parts of the work: the default choice repairs two models to compare them."""


def seconds(task: str) -> dict[str, float]:
    """The seconds of every part of the work on a task, on one core.

    Of each part the fastest cell counts, because other work ran on the machine.
    """
    entries = [entry for entry in cells().values() if entry["task"] == task]

    def least(part: str, taken: Callable[[dict[str, Any]], float]) -> float:
        return min(time for e in entries if part in e["cell"] and (time := taken(e)) > 0)

    def training(entry: dict[str, Any]) -> float:
        return float(entry["training"]["seconds"])

    def repair(entry: dict[str, Any]) -> float:
        return float(entry.get("repair_seconds", 0))

    return {
        "dense": least("dense/0.0", training),
        "tuning": least(f"/labels/{USUAL}/", training),
        "recovery": least(f"/distil/{USUAL}/", training),
        "recording": least("train/base/igia", lambda entry: float(entry["evidence"]["seconds"])),
        "least_squares": least(f"train/{ROW_FAST}", repair),
        "influence": _repair_by_influence(task),
    }


def _repair_by_influence(task: str) -> float:
    """The fastest repair of any task, for the tokens of this one."""
    fitted = [entry["repair"] for entry in cells().values() if entry["cell"].endswith(f"/{USUAL}/influence")]
    tokens = cells()[f"{task}/0/shrink/igia/{USUAL}/influence"]["repair"]["tokens"]
    return float(min(one["seconds"] / one["tokens"] for one in fitted) * tokens)


def totals() -> list[tuple[str, float, list[Pair]]]:
    """Label, whole time relative to tuning the dense model (mean of the tasks), and pairs, of every way."""
    times = {task: seconds(task) for task in CLASSES}
    found = []
    for label, (pairs_of, parts) in WAYS.items():
        pairs = classified(pairs_of())
        tasks = sorted({pair[0] for pair in pairs})
        if tasks:
            shares = [sum(times[task][part] for part in parts) / times[task]["dense"] for task in tasks]
            found.append((label, statistics.mean(shares), pairs))
    return found


def taken() -> str:
    """The table of what `fast` costs relative to tuning the dense model, by number of training rows.

    Recording and repair see a fixed number of rows, so they weigh more when training is short.
    """
    times = seconds("sst2")
    whole, small = times["dense"] / TRAINED_ROWS[0], times["tuning"] / TRAINED_ROWS[0]
    fitted, recorded = times["least_squares"], times["recording"]
    lines = [
        "| training rows | repair | tuning the pruned model | fast, in all | with a recording, for IGIA or the gate |",
        "|---|---|---|---|---|",
    ]
    for rows in TRAINED_ROWS:
        dense = whole * rows
        parts = [fitted, small * rows, fitted + small * rows, recorded + fitted + small * rows]
        lines.append(f"| {rows:,} | {' | '.join(f'{part / dense:.2f}' for part in parts)} |")
    return "\n".join(
        [
            *lines,
            "",
            "Relative to tuning the dense model on the same number of rows; SST-2, one core, the fastest cell of each kind.",
        ]
    )


BLOCKS = {"quality_taken": taken}
