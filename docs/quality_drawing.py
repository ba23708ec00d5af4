"""The drawing of docs/quality.md: every way of pruning against dense, by number of layers and by time."""

from __future__ import annotations

from typing import Any

import quality_blocks as blocks
import quality_cells as cells
from drawing import as_svg, digest, plotting
from quality_cost import totals

CHANGE = "test score against dense, %"


def draw() -> str:
    """Returns the drawing as SVG.

    Above: relative change of every way against dense; by the whole time. Below: by number of layers, task by
    task.
    """
    pyplot = plotting()
    pyplot.rcParams["font.size"] = 8
    ways, tasks = _ways(), [task for task in cells.measured_tasks() if task != cells.WRITING]
    heights = (0.24 * len(ways) + 0.6, 3.2)
    figure = pyplot.figure(figsize=(13.5, sum(heights)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    forest, time = above.subplots(1, 2)
    panels = below.subplots(1, len(tasks), sharey=True)
    _forest(forest, ways)
    _by_time(time)
    for panel, task in zip(panels, tasks, strict=True):
        _by_depth(panel, task)
    panels[0].set_ylabel(CHANGE)
    _legend(panels[-1])
    for axes in (forest, time, *panels):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", linewidth=0.3)
    return as_svg(figure, shown())


def _forest(axes: Any, ways: list[tuple[str, tuple[float, float, float]]]) -> None:
    for place, (_, (mean, low, high)) in enumerate(ways):
        axes.plot([100 * low, 100 * high], [place, place], color="#356a9a", linewidth=1.4)
        axes.plot([100 * mean], [place], "o", color="#356a9a", markersize=4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(ways)), [label for label, _ in ways])
    axes.invert_yaxis()
    axes.set_xlim(left=max(axes.get_xlim()[0], -30))
    axes.set_xlabel(CHANGE)


def _by_depth(axes: Any, task: str) -> None:
    for way, found_at in blocks.WAYS_DOWN.items():
        at = {gone: [pair for pair in found_at(gone) if pair[0] == task] for gone in blocks.DEPTHS}
        line = [(gone, 100 * cells.loss(found)[0]) for gone, found in at.items() if found]
        axes.plot([x for x, _ in line], [y for _, y in line], "o-", markersize=3.5, label=way)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(blocks.DEPTHS)
    axes.set_title(cells.TASKS[task], fontsize="medium")
    axes.set_xlabel("layers removed of 30")


def _by_time(axes: Any) -> None:
    axes.plot([1], [0], "s", color="black", markersize=4, label="dense, tuned")
    for label, time, found in totals():
        mean, low, high = (100 * part for part in cells.loss(found))
        axes.errorbar(
            [time], [mean], [[mean - low], [high - mean]], fmt="o", markersize=4, linewidth=1, label=label
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlim(left=0)
    axes.set_xlabel("whole time, in tunings of the dense model")
    axes.set_ylabel(CHANGE)
    _legend(axes)


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _ways() -> list[tuple[str, tuple[float, float, float]]]:
    """Label, mean and interval of every way that is measured: repaired ones, then trained ones."""
    found = []
    for repair in ("influence", "layer_wise", "least_squares"):
        for choice, label in blocks.CHOICES.items():
            here = cells.pairs(f"shrink/{choice}/{cells.USUAL}/{repair}")
            if here:
                found.append((f"not trained: {label}, {blocks.REPAIRS[repair]}", cells.loss(here)))
    found.append((blocks.BEST, cells.loss(cells.better())))
    for row, label in blocks.ROWS.items():
        if here := cells.trained(row):
            only = "" if cells.classified(here) else f" ({cells.TASKS[cells.WRITING]})"
            found.append((label + only, cells.loss(here)))
    return found


def shown() -> str:
    """The digest of the data the drawing shows."""
    return digest([[key, entry["test"]["score"]] for key, entry in sorted(cells.cells().items())])
