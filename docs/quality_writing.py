"""The tables of the quality study about tasks that write sentences."""

from __future__ import annotations

import statistics
from typing import Any

from quality_blocks import CHOICES, DEPTHS, REPAIRS
from quality_cells import USUAL, WRITTEN, cells, dense_of


def writing() -> str:
    """The tables of the tasks that write sentences, by number of layers and choice."""
    tables = ["\n".join(lines) for task in WRITTEN if (lines := _written(task))]
    notes = "Loss in nats per answer token; test score in %; the number of seeds in brackets."
    return "\n\n".join([*tables, notes])


def _written(task: str) -> list[str]:
    """The lines of one task's table: means over the seeds that are measured."""
    dense = dense_of(task, 0)
    if dense is None:
        return []
    rows = {"dense/untrained": "dense, before tuning", dense["cell"]: "dense, tuned"}
    for gone in DEPTHS:
        for choice, name in CHOICES.items():
            for repair in ("influence", "layer_wise"):
                label = f"{gone} of 30 layers removed, {name}, {REPAIRS[repair]}"
                rows[f"shrink/{choice}/{gone}/{repair}"] = label
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in cells().values():
        if entry["task"] == task:
            found.setdefault(entry["cell"], []).append(entry)
    for choice, name in CHOICES.items():
        for cell in filter(lambda cell: cell.startswith(f"train/tuned/{choice}/"), found):
            repair, how, gone, rate = cell.removeprefix(f"train/tuned/{choice}/").split("/")
            kind, _, count = repair.partition("-")
            repaired = REPAIRS[kind] + (f", {count} rows" if count else "")
            prompts = ", who is followed on prompts too" if "prompts" in how else ""
            times = how.partition("-x")[2]
            passes = f", {times} passes" if times else ""
            rows[cell] = (
                f"{gone} removed, {name}, {repaired}, recovered with the teacher{prompts}{passes}, rate {rate}"
            )
    for choice, name in CHOICES.items():
        begins = f"train/base/{choice}/least_squares/labels/{USUAL}/"
        for cell in filter(lambda cell: cell.startswith(begins), found):
            rate = cell.removeprefix(begins)
            rows[cell] = f"{USUAL} removed before tuning, {name}, least squares, tuned, rate {rate}"
    lines = [f"| {WRITTEN[task]} | loss on validation rows | test score |", "|---|---|---|"]
    for cell, label in rows.items():
        if entries := found.get(cell):
            nll = statistics.mean(entry["validation"]["nll"] for entry in entries)
            score = 100 * statistics.mean(entry["test"]["score"] for entry in entries)
            lines.append(f"| {label} | {nll:.2f} ({len(entries)}) | {score:.1f} |")
    return lines


BLOCKS = {"quality_writing": writing}
