"""Names beside the points of a scatter plot, none on top of another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from gradpruner.reports.svg import colour

_REACHES = (11, 20, 30, 42, 56, 72, 92)
_ANGLES = (0, 180, 90, 270, 45, 315, 135, 225, 22, 338, 158, 202, 68, 292, 112, 248)
_DOT = 6.0
_FAR = 16.0


@dataclass(frozen=True)
class Label:
    """A name, the point it belongs to in data coordinates, and whether it stands out."""

    text: str
    x: float
    y: float
    strong: bool = False


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Area shared with another rectangle."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)


def place_labels(axes: Axes, labels: Sequence[Label], size: float) -> list[Box]:
    """Writes every label where it covers no point and no other label; far ones get a thin line.

    Limits of the axes must be final. Places are tried from near to far, so the result depends on the
    points alone; where nothing is free the place that covers least is taken.

    Returns:
        The rectangles taken, in the order of `labels`.
    """
    # Matplotlib counts pixels at its own resolution; sizes here are those of the drawing, 72 to the inch.
    unit = axes.figure.dpi / 72
    points = [tuple(axes.transData.transform((label.x, label.y))) for label in labels]
    frame = Box(axes.bbox.x0, axes.bbox.y0, axes.bbox.x1, axes.bbox.y1)
    dots = [Box(x - _DOT * unit, y - _DOT * unit, x + _DOT * unit, y + _DOT * unit) for x, y in points]
    taken: dict[int, Box] = {}
    # Those that stand out choose first, then from right to left: the right has least room.
    order = sorted(range(len(labels)), key=lambda i: (not labels[i].strong, -points[i][0], i))
    for i in order:
        box, reach = _best_place(labels[i], points[i], (size, unit), frame, [*dots, *taken.values()])
        taken[i] = box
        _write(axes, labels[i], points[i], box, reach, size)
    return [taken[i] for i in range(len(labels))]


def _best_place(
    label: Label, point: tuple[float, ...], sizes: tuple[float, float], frame: Box, others: Sequence[Box]
) -> tuple[Box, float]:
    # 0.58 em is an upper estimate of a letter's width; the browser's font is not known here.
    em = sizes[0] * sizes[1]
    width, height = (0.64 if label.strong else 0.58) * em * len(label.text), 1.25 * em
    best: tuple[float, Box, float] | None = None
    for reach in _REACHES:
        for angle in _ANGLES:
            box = _box(point, width, height, reach * sizes[1], angle)
            outside = width * height - box.overlap(frame)
            covered = sum(box.overlap(other) for other in others) + 4 * outside
            if best is None or covered < best[0]:
                best = covered, box, reach
            if covered <= 1e-6:
                return box, reach
    assert best is not None
    return best[1], best[2]


def _box(point: tuple[float, ...], width: float, height: float, reach: float, angle: int) -> Box:
    """The rectangle whose nearest side or corner is `reach` pixels from the point at `angle` degrees."""
    across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    x = point[0] + reach * across + (across - 1) / 2 * width
    y = point[1] + reach * up + (up - 1) / 2 * height
    return Box(x, y, x + width, y + height)


def _write(axes: Axes, label: Label, point: tuple[float, ...], box: Box, reach: float, size: float) -> None:
    inverse = axes.transData.inverted()
    # Against the side that faces the point: the box is wider than the words.
    side, at = "center", (box.left + box.right) / 2
    if box.right <= point[0]:
        side, at = "right", box.right
    elif box.left >= point[0]:
        side, at = "left", box.left
    where, middle = inverse.transform((at, (box.bottom + box.top) / 2))
    hue = colour("ink" if label.strong else "muted")
    if reach > _FAR:
        # To the nearest place of the text, so that it does not run through it.
        end = (
            min(max(point[0], box.left), box.right),
            min(max(point[1], box.bottom + 2), box.top - 2),
        )
        near = inverse.transform(end)
        axes.plot([label.x, near[0]], [label.y, near[1]], color=colour("muted"), linewidth=0.7, zorder=2)
    axes.text(where, middle, label.text, fontsize=size, color=hue, va="center", ha=side, zorder=4,
              fontweight="bold" if label.strong else "normal")  # fmt: skip
