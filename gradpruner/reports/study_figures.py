"""The plots of a comparison: quality, difference to the dense model, quality against cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from gradpruner.reports.drawing import Key, Plot, drawn
from gradpruner.reports.formats import duration, interval, number, percent, signed_percent, text
from gradpruner.reports.reading import Measured, metric_label
from gradpruner.reports.study_reading import Quality, StudyRow, StudyView
from gradpruner.reports.svg import Margins, colour

_ROW = 30
_LABEL_ROOM = 30
_MOST_TICKS = 6
_SECOND_STEPS = (0.01, 0.1, 1, 10, 60, 600, 3600, 36000, 360000)


def hue_of(view: StudyView, row: StudyRow) -> str:
    """Returns a row's palette name: GradPruner stands out, dense is the reference."""
    if row.is_dense:
        return "series-0"
    if row.name in ("merged", "dropped", "gradpruner") or row.name == view.main_name:
        return "series-2"
    return "keep"


def quality_plot(view: StudyView) -> Plot | None:
    """Draws the main metric of every method: mean, range over seeds, every seed."""
    rows = _measured(view)
    if not rows:
        return None
    name = metric_label(view.metric)
    several = any(len(row.quality[view.metric].per_seed) > 1 for row in rows)
    dense = next((row.quality[view.metric].mean.value for row in rows if row.is_dense), None)
    majority = _near(view.majority, [row.quality[view.metric].mean.value for row in rows])

    def paint(axes: Axes) -> None:
        if dense is not None:
            axes.axvline(dense, color=colour("series-0"), linewidth=1.2, dashes=(4, 3), zorder=1)
        if majority is not None:
            axes.axvline(majority, color=colour("muted"), linewidth=1.2, dashes=(1, 2), zorder=1)
        shown = [v for v in (dense, majority) if v is not None]
        for at, row in enumerate(rows):
            shown += _paint_quality(axes, row.quality[view.metric], at, colour(hue_of(view, row)),
                                    row.name != "dropped")  # fmt: skip
        _rows_axis(axes, [_valued(row, view.metric) for row in rows], shown)
        axes.set_xlabel(name.lower())

    legend = [Key("series-2", "GradPruner", "dot")]
    if any(row.name == "dropped" for row in rows):
        legend.append(Key("series-2", "GradPruner, no merging", "ring"))
    legend.append(Key("keep", "other methods", "dot"))
    if dense is not None:
        legend.append(Key("series-0", "dense", "line", "5 4"))
    if majority is not None:
        words = f"always the most frequent answer ({percent(majority)})"
        legend.append(Key("muted", words, "line", "2 3"))
    said = [f"{row.label}: {percent(row.quality[view.metric].mean.value)}" for row in rows]
    how = "Dots are means over seeds, lines reach from the lowest to the highest seed." if several else ""
    return Plot(
        "quality",
        f"{name} of every method",
        how or "One seed: how much another one would change is not known.",
        f"{name} after fine-tuning. {'; '.join(said)}.",
        drawn("quality", _height(rows), paint, margins=_margins([_valued(r, view.metric) for r in rows])),
        tuple(legend),
    )


def difference_plot(view: StudyView) -> Plot | None:
    """Draws the paired difference of every method to the dense model, with its interval."""
    rows = [r for r in _measured(view) if not r.is_dense and r.quality[view.metric].paired is not None]
    if not rows:
        return None
    name = metric_label(view.metric)
    labels = [f"{text(row.label, 34)}\u2003{_points(row.quality[view.metric].paired)}" for row in rows]

    def paint(axes: Axes) -> None:
        axes.axvline(0, color=colour("series-0"), linewidth=1.2, dashes=(4, 3), zorder=1)
        shown = [0.0]
        for at, row in enumerate(rows):
            paired = row.quality[view.metric].paired
            assert paired is not None
            shown += _paint_interval(axes, paired, at, colour(hue_of(view, row)),
                                     row.name != "dropped")  # fmt: skip
        _rows_axis(axes, labels, shown)
        axes.xaxis.set_major_formatter(lambda value, _: signed_percent(value, _digits(axes))[:-1])
        axes.set_xlabel("points of difference to the dense model")

    said = [f"{label.replace(chr(0x2003), ' ')} points" for label in labels]
    return Plot(
        "difference",
        "Difference to the dense model",
        "Paired on the same examples, averaged over seeds; lines are 95% bootstrap intervals over examples. "
        "What crosses the dashed line cannot be told from the dense model.",
        f"{name}, difference to the dense model. {'; '.join(said)}.",
        drawn("difference", _height(rows), paint, margins=_margins(labels)),
    )


def cost_plot(view: StudyView) -> Plot | None:
    """Draws quality against what each method needs before fine-tuning."""
    rows = [
        row
        for row in _measured(view)
        if not row.is_dense and not row.is_smaller and number(row.costs.get("method_seconds")) is not None
    ]
    if len(rows) < 2:
        return None
    seconds = [max(number(row.costs.get("method_seconds")) or 0.0, 0.0) for row in rows]
    positive = [value for value in seconds if value > 0] or [1.0]
    log = max(positive) > 30 * min(positive)
    # Where the axis has no zero, what takes no time stands at its left end.
    at = [max(value, min(positive) / 2) for value in seconds] if log else seconds
    values = [row.quality[view.metric].mean.value for row in rows]
    dense = next((r.quality[view.metric].mean.value for r in _measured(view) if r.is_dense), None)
    name = metric_label(view.metric)

    def paint(axes: Axes) -> None:
        _time_axis(axes, at, log)
        shown = [*values, *([dense] if dense is not None else [])]
        pad = max(0.08 * (max(shown) - min(shown)), 0.01)
        axes.set_ylim(min(shown) - pad, max(shown) + pad)
        if dense is not None:
            axes.axhline(dense, color=colour("series-0"), linewidth=1.2, dashes=(4, 3), zorder=1)
        places = [math.log(max(x, 1e-9)) for x in at]
        for i, (x, y, row) in enumerate(zip(at, values, rows, strict=True), start=1):
            hue = colour(hue_of(view, row))
            face = colour("surface") if row.name == "dropped" else hue
            axes.plot([x], [y], "o", markersize=8, color=hue, markerfacecolor=face, markeredgewidth=1.6,
                      zorder=3)  # fmt: skip
            # Numbers, explained above the figure: names would lie on top of each other.
            # A number stands away from the nearest neighbour in time, so that it belongs to one dot only.
            gaps = [(abs(other - places[i - 1]), other) for k, other in enumerate(places) if k != i - 1]
            right = min(gaps)[1] <= places[i - 1]
            axes.annotate(str(i), (x, y), (6, 5) if right else (-6, -12), textcoords="offset points",
                          ha="left" if right else "right", fontsize=11, color=colour("ink"))  # fmt: skip
        axes.set_xlabel("time the method takes before fine-tuning")
        axes.set_ylabel(name.lower())
        digits = 0 if max(shown) - min(shown) > 0.05 else 1
        axes.yaxis.set_major_formatter(lambda value, _: percent(value, digits))

    numbered = [
        Key(hue_of(view, row), f"{i} {text(row.label, 30)}", "ring" if row.name == "dropped" else "dot")
        for i, row in enumerate(rows, start=1)
    ]
    said = [f"{r.label}: {duration(s)}, {percent(v)}" for r, s, v in zip(rows, seconds, values, strict=True)]
    return Plot(
        "cost",
        f"{name} and what it costs to prune",
        "Left is cheaper, up is better. Time is everything a method needs before the pruned model can be "
        f"fine-tuned, recovery included{'; logarithmic' if log else ''}. The dashed line is the dense model.",
        f"{name} against method time. {'; '.join(said)}.",
        drawn("cost", 430, paint, margins=Margins(left=70, right=24)),
        tuple(numbered),
    )


def _measured(view: StudyView) -> list[StudyRow]:
    rows = view.points[0].rows if view.points else ()
    return [row for row in rows if view.metric in row.quality]


def _near(reference: float | None, values: Sequence[float]) -> float | None:
    """Leaves a reference out that lies so far off that it would squeeze what is to be compared."""
    low, high = min(values), max(values)
    return reference if reference is not None and reference > low - max(high - low, 0.05) else None


def _valued(row: StudyRow, metric: str) -> str:
    return f"{text(row.label, 34)}\u2003{percent(row.quality[metric].mean.value)}"


def _height(rows: Sequence[StudyRow]) -> int:
    return len(rows) * _ROW + 66


def _margins(labels: Sequence[str]) -> Margins:
    # An upper estimate of the text's width; the browser's font is not known here.
    return Margins(left=_LABEL_ROOM + 7 * max(map(len, labels)), right=20)


def _rows_axis(axes: Axes, labels: Sequence[str], shown: Sequence[float]) -> None:
    """One line per row, from top to bottom."""
    pad = max(0.04 * (max(shown) - min(shown)), 0.01)
    axes.set_xlim(min(shown) - pad, max(shown) + pad)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=colour("grid"), linewidth=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", labelcolor=colour("ink"))
    axes.locator_params(axis="x", nbins=8)
    axes.xaxis.set_major_formatter(lambda value, _: percent(value, _digits(axes)))


def _digits(axes: Axes) -> int:
    low, high = axes.get_xlim()
    return 0 if high - low > 0.05 else 1


def _paint_quality(axes: Axes, quality: Quality, at: int, hue: str, filled: bool) -> list[float]:
    """Draws one mean with its seeds; returns the values that must be in sight."""
    y = float(at)
    if len(quality.per_seed) > 1:
        axes.plot(quality.per_seed, [y] * len(quality.per_seed), "|", markersize=9, color=hue,
                  markeredgewidth=1.4, zorder=2)  # fmt: skip
        return _paint_interval(axes, quality.mean, y, hue, filled) + list(quality.per_seed)
    lone = Measured(quality.mean.value, None, None, None)
    return _paint_interval(axes, lone, y, hue, filled)


def _paint_interval(axes: Axes, measured: Measured, y: float, hue: str, filled: bool) -> list[float]:
    extent = [measured.value]
    if measured.low is not None and measured.high is not None:
        axes.hlines(y, measured.low, measured.high, color=hue, linewidth=2.2, zorder=2)
        extent = [measured.low, measured.value, measured.high]
    face = hue if filled else colour("surface")
    axes.plot([measured.value], [y], "o", markersize=7.5, color=hue, markerfacecolor=face,
              markeredgewidth=1.6, zorder=3)  # fmt: skip
    return extent


def _time_axis(axes: Axes, seconds: Sequence[float], log: bool) -> None:
    """Puts durations people know on the horizontal axis."""
    if log:
        spread = math.log10(max(seconds) / min(seconds))
        room = 10 ** (0.06 * spread)
        axes.set_xscale("log")
        axes.set_xlim(min(seconds) / room, max(seconds) * room)
        low, high = axes.get_xlim()
        ticks = [value for value in _SECOND_STEPS if low <= value <= high]
        locator: Any = FixedLocator(ticks) if len(ticks) > 1 else LogLocator(numticks=4)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        pad = 0.08 * (max(seconds) - min(seconds)) or 0.1 * max(seconds) or 1.0
        axes.set_xlim(min(seconds) - pad, max(seconds) + pad)
        axes.locator_params(axis="x", nbins=_MOST_TICKS)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _brief(value)))


def _brief(seconds: float) -> str:
    """Formats a tick: '0.1 s', '10 min', '1 h'."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g}\u00a0{unit}"
    return f"{seconds:.3g}\u00a0s"


def _points(paired: Measured | None) -> str:
    if paired is None:
        return ""
    return f"{signed_percent(paired.value)[:-1]} {interval(paired.low, paired.high)}".strip()
