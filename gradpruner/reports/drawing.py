"""What all figures of a report are made of: sizes, keys, plots, lines and how they are said in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from gradpruner.printing import percent
from gradpruner.reports.svg import colour, plain_ticks

_MOST_POINTS = 120
_LOG_SPREAD = 30.0
"""Positive values further apart than this are drawn on a logarithmic scale: on a plain one most look flat."""
DASHES = ((), (6, 2), (2, 1.5), (6, 2, 1.5, 2), (1, 1))
_LINE_WIDTH = 1.8


@dataclass(frozen=True)
class Key:
    """One legend entry: palette name, words, mark ('box', 'dot', 'ring', 'line'), dash pattern."""

    colour: str
    label: str
    mark: str = "box"
    dash: str = ""


@dataclass(frozen=True)
class Plot:
    """A drawn figure.

    Attributes:
        name: Identity on the page, letters and dashes.
        title: Heading.
        caption: How to read it.
        description: What it shows, in words and numbers; the text alternative.
        drawing: The SVG.
        legend: What the colours mean.
    """

    name: str
    title: str
    caption: str
    description: str
    drawing: str
    legend: tuple[Key, ...] = ()


def series(index: int) -> str:
    """Returns the palette name of the variant at `index`; 0 is the dense model."""
    return "series-0" if index == 0 else f"series-{1 + (index - 1) % 6}"


def line(axes: Axes, points: Sequence[tuple[float, float]], index: int, marker: bool = False) -> None:
    """One curve in the colour and dashes of its series, `index`."""
    xs, ys = zip(*points, strict=True)
    (curve,) = axes.plot(xs, ys, color=colour(series(index)), linewidth=_LINE_WIDTH)
    if marker or len(points) == 1:
        curve.set_marker("o")
        curve.set_markersize(3.5)
    elif DASHES[index % 5]:
        curve.set_dashes(DASHES[index % 5])


def dash_css(index: int) -> str:
    """Returns the dash pattern of a variant's line in CSS pixels, '' for a solid line."""
    return " ".join(f"{_LINE_WIDTH * length:g}" for length in DASHES[index % 5])


def bucket(points: Sequence[tuple[float, float]]) -> int:
    """How many neighbouring points are drawn as one."""
    return -(-len(points) // _MOST_POINTS)


def averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over equal runs of points: what remains readable where six noisy curves overlap."""
    size = bucket(points)
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in c) / len(c), sum(y for _, y in c) / len(c)) for c in chunks]


def is_wide(values: Sequence[float | None]) -> bool:
    """Whether values are drawn on a logarithmic scale."""
    known = [value for value in values if value is not None]
    least = min((value for value in known if value > 0), default=0.0)
    return least > 0 and min(known) >= 0 and max(known) > _LOG_SPREAD * least


def loss_axis(axes: Axes, log: bool, label: str) -> None:
    """The axes of a training loss."""
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("training loss")
    plain_ticks(axes, log)


def percent_ticks(axes: Axes, which: str = "y") -> None:
    """Percentages on an axis, with as many digits as tell its ticks apart."""
    axis, (low, high) = (axes.yaxis, axes.get_ylim()) if which == "y" else (axes.xaxis, axes.get_xlim())
    digits = 0 if high - low > 0.05 else 1
    axis.set_major_formatter(lambda value, _: percent(value, digits))


def settled(points: Sequence[tuple[float, float]]) -> str:
    """Says from which step on the overlap stays what it finally is."""
    step = points[-1][0]
    for x, y in reversed(points):
        if y != points[-1][1]:
            break
        step = x
    if step == points[-1][0]:
        return "still changed at the last recorded step: record more steps"
    return f"does not change after step {step:,.0f}"
