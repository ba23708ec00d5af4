"""The drawing of docs/quality.md: every way of pruning against dense, and scores by number of layers."""

from __future__ import annotations

import quality_blocks as blocks
import quality_cells as cells
from drawing import as_svg, digest, plotting


def draw() -> str:
    """Returns the drawing as SVG. Left: relative change of every way against dense. Right: by number of layers."""
    pyplot = plotting()
    pyplot.rcParams["font.size"] = 8
    ways = _ways()
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10.5, 0.27 * len(ways) + 1.6), width_ratios=(1.5, 1), layout="constrained"
    )
    for place, (_, (mean, low, high)) in enumerate(ways):
        left.plot([100 * low, 100 * high], [place, place], color="#356a9a", linewidth=1.4)
        left.plot([100 * mean], [place], "o", color="#356a9a", markersize=4)
    left.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(range(len(ways)), [label for label, _ in ways])
    left.invert_yaxis()
    left.set_xlim(left=max(left.get_xlim()[0], -30))
    left.set_xlabel("test score against dense, %")
    for way, found_at in blocks.WAYS_DOWN.items():
        line = [(gone, 100 * cells.loss(found)[0]) for gone in blocks.DEPTHS if (found := found_at(gone))]
        if line:
            right.plot([x for x, _ in line], [y for _, y in line], "o-", markersize=3.5, label=way)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xticks(blocks.DEPTHS)
    right.set_xlabel("layers removed of 30")
    right.set_ylabel("test score against dense, %")
    right.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", linewidth=0.3)
    return as_svg(figure, shown())


def _ways() -> list[tuple[str, tuple[float, float, float]]]:
    """Label, mean and interval of every way that is measured: repaired ones, then trained ones."""
    found = []
    for repair in ("influence", "layer_wise", "least_squares"):
        for choice, label in blocks.CHOICES.items():
            here = cells.pairs(f"shrink/{choice}/{cells.USUAL}/{repair}")
            if here:
                found.append((f"not trained: {label}, {blocks.REPAIRS[repair]}", cells.loss(here)))
    found.append((blocks.BEST, cells.loss(cells.better())))
    return found + [
        (label, cells.loss(here)) for row, label in blocks.ROWS.items() if (here := cells.trained(row))
    ]


def shown() -> str:
    """The digest of the data the drawing shows."""
    return digest([[key, entry["test"]["score"]] for key, entry in sorted(cells.cells().items())])
