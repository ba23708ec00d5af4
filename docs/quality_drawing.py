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
    ways, tasks = _ways(), cells.CLASSES
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
    for way, line in _lines(task).items():
        axes.plot([x for x, _ in line], [y for _, y in line], "o-", markersize=3.5, label=way)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(blocks.DEPTHS)
    axes.set_title(cells.TASKS[task], fontsize="medium")
    axes.set_xlabel("layers removed of 30")


def _lines(task: str) -> dict[str, list[tuple[int, float]]]:
    """Layers removed and change in per cent, by way."""
    found: dict[str, list[tuple[int, float]]] = {}
    for way in blocks.WAYS_DOWN:
        at = {
            gone: [pair for pair in blocks.at_depth(way, gone) if pair[0] == task] for gone in blocks.DEPTHS
        }
        found[way] = [(gone, round(100 * cells.loss(pairs)[0], 2)) for gone, pairs in at.items() if pairs]
    return found


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
    """Label, mean and interval of every way that is measured: repaired ones, then trained ones.

    Repairs by position were the default before; they are in the tables.
    """
    found = []
    for repair in ("influence", "least_squares"):
        for choice, label in blocks.CHOICES.items():
            here = cells.pairs(f"shrink/{choice}/{cells.USUAL}/{repair}")
            if here:
                found.append((f"not trained: {label}, {blocks.REPAIRS[repair]}", cells.loss(here)))
    found.append((blocks.BEST, cells.loss(cells.better())))
    for row, label in blocks.ROWS.items():
        if "/layer_wise/" not in row and (here := cells.trained(row)):
            only = "" if cells.classified(here) else f" ({cells.TASKS[cells.WRITING]})"
            found.append((label + only, cells.loss(here)))
    return found


def shown() -> str:
    """The digest of what the drawing shows."""
    drawn = [*_ways(), *((label, (time, *cells.loss(found))) for label, time, found in totals())]
    rounded = [(label, [round(part, 4) for part in parts]) for label, parts in drawn]
    return digest([rounded, [_lines(task) for task in cells.CLASSES]])
