"""Plots that compare rows: quality, difference to the dense model, quality against size and cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from gradpruner.printing import duration, interval, number, percent, points, short, text
from gradpruner.reports.drawing import Key, Plot, drawn, is_wide, percent_ticks, series
from gradpruner.reports.record import Measured
from gradpruner.reports.svg import Margins, colour
from gradpruner.reports.view import Row, View, metric_label

_ROW = 30
_LABEL_ROOM = 30
_MOST_TICKS = 6
_MOST_LABEL = 34
_SECOND_STEPS = (0.01, 0.1, 1, 10, 60, 600, 3600, 36000, 360000)


def hue_of(view: View, row: Row) -> str:
    """Returns a row's palette name: in a study GradPruner stands out, dense is the reference."""
    if row.is_dense:
        return "series-0"
    if view.kind == "run":
        return series(view.rows.index(row))
    if row.name in ("merged", "dropped", "gradpruner") or row.name == view.main_name:
        return "series-2"
    return "keep"


def quality_plot(view: View) -> Plot | None:
    """Draws the main metric of every row: the value with its interval, or the mean with every seed."""
    rows = _measured(view)
    if not rows:
        return None
    name, metric, study = metric_label(view.metric), view.metric, view.kind != "run"
    values = [_value(row, metric) for row in rows]
    dense = next((row.after(metric) for row in rows if row.is_dense), None)
    majority = _near(view.majority, values)
    before = [_near(m.value, values) if (m := row.before(metric)) is not None else None for row in rows]

    def paint(axes: Axes) -> None:
        shown = [v for v in (majority,) if v is not None]
        if dense is not None and dense.value is not None:
            if not study and dense.low is not None and dense.high is not None:
                axes.axvspan(dense.low, dense.high, color=colour("grid"), linewidth=0, zorder=0)
            axes.axvline(dense.value, color=colour("series-0"), linewidth=1.2, dashes=(4, 3), zorder=1)
        if majority is not None:
            axes.axvline(majority, color=colour("muted"), linewidth=1.2, dashes=(1, 2), zorder=1)
        for at, (row, early) in enumerate(zip(rows, before, strict=True)):
            hue, seeds, after = colour(hue_of(view, row)), row.quality[metric].per_seed, row.after(metric)
            assert after is not None
            if study and len(seeds) < 2:
                after = Measured(value=after.value)
            axes.plot(seeds, [at] * len(seeds), "|", markersize=9, color=hue, markeredgewidth=1.4, zorder=2)
            if early is not None and not study:
                shown.append(early)
                axes.plot([early], [at], "o", markersize=6, color=hue, markerfacecolor=colour("surface"))
            shown += [*seeds, *_paint_interval(axes, after, at, hue, row.name != "dropped" or not study)]
        _rows_axis(axes, [_valued(row, metric) for row in rows], shown)
        percent_ticks(axes, "x")
        axes.set_xlabel(name.lower())

    said = "; ".join(
        f"{row.label}: {percent(v)} {_brackets(row.after(metric))}".strip()
        for row, v in zip(rows, values, strict=True)
    )
    return Plot(
        "quality",
        f"{name} of every row",
        _reading(view, rows, majority, before),
        f"{name} of the finished models. {said}.",
        drawn("quality", _height(rows), paint, margins=_margins([_valued(row, metric) for row in rows])),
        _quality_legend(view, rows, dense, majority, before),
    )


def _reading(view: View, rows: Sequence[Row], majority: float | None, before: Sequence[float | None]) -> str:
    """How the quality plot is to be read."""
    if view.kind == "run":
        far = [row.before(view.metric) for row, near in zip(rows, before, strict=True) if near is None]
        low = [m.value for m in far if m is not None and m.value is not None]
        reach = " to ".join(dict.fromkeys(percent(end) for end in (min(low), max(low)))) if low else ""
        left = f" Before fine-tuning, left of what is shown: {reach}." if low else ""
        if view.majority is not None and majority is None:
            left += f" Always giving the most frequent answer would have {percent(view.majority)}."
        return f"Dots are the measured values, lines their 95% bootstrap intervals.{left}"
    if any(len(row.quality[view.metric].per_seed) > 1 for row in rows):
        return "Dots are means over seeds, lines reach from the lowest to the highest seed."
    return "One seed: how much another one would change is not known."


def _quality_legend(
    view: View,
    rows: Sequence[Row],
    dense: Measured | None,
    majority: float | None,
    before: Sequence[float | None],
) -> tuple[Key, ...]:
    legend = []
    if view.kind != "run":
        legend = [Key("series-2", "GradPruner", "dot")]
        if any(row.name == "dropped" for row in rows):
            legend.append(Key("series-2", "GradPruner, no merging", "ring"))
        legend.append(Key("keep", "other methods", "dot"))
    elif any(value is not None for value in before):
        legend = [Key("series-1", "finished", "dot"), Key("muted", "before fine-tuning", "ring")]
    if dense is not None:
        legend.append(Key("series-0", "dense", "line", "5 4"))
    if majority is not None:
        legend.append(Key("muted", f"always the most frequent answer ({percent(majority)})", "line", "2 3"))
    return tuple(legend)


def difference_plot(view: View) -> Plot | None:
    """Draws the paired difference of every row to the dense model, with its interval."""
    rows = [row for row in _measured(view) if not row.is_dense and row.paired(view.metric) is not None]
    if not rows:
        return None
    name = metric_label(view.metric)
    found = [paired for row in rows if (paired := row.paired(view.metric)) is not None]
    said = [f"{points(paired.value)} {_brackets(paired)}".strip() for paired in found]
    labels = [f"{text(row.label, _MOST_LABEL)}\u2003{words}" for row, words in zip(rows, said, strict=True)]

    def paint(axes: Axes) -> None:
        axes.axvline(0, color=colour("series-0"), linewidth=1.2, dashes=(4, 3), zorder=1)
        shown = [0.0]
        for at, (row, paired) in enumerate(zip(rows, found, strict=True)):
            filled = row.name != "dropped" or view.kind == "run"
            shown += _paint_interval(axes, paired, at, colour(hue_of(view, row)), filled)
        _rows_axis(axes, labels, shown)
        digits = 0 if max(shown) - min(shown) > 0.05 else 1
        axes.xaxis.set_major_formatter(
            lambda value, _: points(round(value, 9)) if digits else points(value)[:-2]
        )
        axes.set_xlabel("points of difference to the dense model")

    seeds = ", averaged over seeds" if view.kind != "run" else ""
    words = "; ".join(f"{row.label} {shown} points" for row, shown in zip(rows, said, strict=True))
    return Plot(
        "difference",
        "Difference to the dense model",
        f"Paired on the same examples{seeds}; lines are 95% bootstrap intervals over examples. "
        "What crosses the dashed line cannot be told from the dense model.",
        f"{name}, difference to the dense model. {words}.",
        drawn("difference", _height(rows), paint, margins=_margins(labels)),
    )


def size_plot(view: View) -> Plot | None:
    """Draws quality against size, where rows of several sizes were measured."""
    rows = [r for r in view.rows if r.num_parameters is not None and r.after(view.metric) is not None]
    if len({row.num_parameters for row in rows if not row.is_dense}) < 2:
        return None
    sizes = {id(row): float(row.num_parameters or 0) for row in rows}
    rows.sort(key=lambda row: -sizes[id(row)])
    dense = next((row for row in rows if row.is_dense), None)
    rows = [row for row in rows if not row.is_dense] if dense is not None else rows
    labels = {id(row): f"{point.label}: {row.label}" if view.kind == "ablation" else row.label
              for point in view.points for row in point.rows}  # fmt: skip
    name = metric_label(view.metric)

    def paint(axes: Axes) -> None:
        xs, ys = [sizes[id(row)] for row in rows], [_value(row, view.metric) for row in rows]
        _scatter(axes, view, rows, xs, ys, _value(dense, view.metric) if dense is not None else None)
        pad = 0.08 * (max(xs) - min(xs))
        axes.set_xlim(min(xs) - pad, max(xs) + pad)
        axes.locator_params(axis="x", nbins=_MOST_TICKS)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.set_xlabel("parameters")
        axes.set_ylabel(name.lower())

    said = [f"{labels[id(r)]}: {short(r.num_parameters)}, {percent(_value(r, view.metric))}" for r in rows]
    of_dense = f" The dashed line is the dense model, with {short(sizes[id(dense)])}." if dense else ""
    return Plot(
        "size",
        f"{name} against size",
        f"Left is smaller, up is better; lines are intervals.{of_dense}",
        f"{name} against parameters. {'; '.join(said)}.",
        drawn("size", 380, paint, margins=Margins(left=70, right=24)),
        _numbered(view, rows, labels),
    )


def cost_plot(view: View) -> Plot | None:
    """Draws quality against what each method of a comparison needs before fine-tuning."""
    rows = [
        row
        for row in _measured(view)
        if not row.is_dense and not row.is_smaller and number(row.costs.get("method_seconds")) is not None
    ]
    if len(rows) < 2 or view.kind != "compare":
        return None
    seconds = [max(number(row.costs.get("method_seconds")) or 0.0, 0.0) for row in rows]
    positive = [value for value in seconds if value > 0] or [1.0]
    log = is_wide(seconds)
    # Where the axis has no zero, what takes no time stands at its left end.
    at = [max(value, min(positive) / 2) for value in seconds] if log else seconds
    values = [_value(row, view.metric) for row in rows]
    dense = next((_value(row, view.metric) for row in _measured(view) if row.is_dense), None)
    name = metric_label(view.metric)

    def paint(axes: Axes) -> None:
        _time_axis(axes, at, log)
        _scatter(axes, view, rows, at, values, dense)
        axes.set_xlabel("time the method takes before fine-tuning")
        axes.set_ylabel(name.lower())

    said = [f"{r.label}: {duration(s)}, {percent(v)}" for r, s, v in zip(rows, seconds, values, strict=True)]
    return Plot(
        "cost",
        f"{name} and what it costs to prune",
        "Left is cheaper, up is better. Time is everything a method needs before the pruned model can be "
        f"fine-tuned, recovery included{'; logarithmic' if log else ''}. The dashed line is the dense model.",
        f"{name} against method time. {'; '.join(said)}.",
        drawn("cost", 430, paint, margins=Margins(left=70, right=24)),
        _numbered(view, rows, {id(row): row.label for row in rows}),
    )


def _scatter(
    axes: Axes, view: View, rows: Sequence[Row], xs: Sequence[float], ys: Sequence[float], dense: float | None
) -> None:
    """Numbered dots with their intervals, and the dense model as a line.

    Numbers are explained above the figure: names would lie on top of each other.
    """
    shown = [*ys, *([dense] if dense is not None else [])]
    if dense is not None:
        axes.axhline(dense, color=colour("series-0"), linewidth=1.2, dashes=(4, 3), zorder=1)
    places = [math.log(max(x, 1e-9)) for x in xs]
    for i, (x, y, row) in enumerate(zip(xs, ys, rows, strict=True), start=1):
        hue, after = colour(hue_of(view, row)), row.after(view.metric)
        if view.kind == "run" and after is not None and after.low is not None and after.high is not None:
            axes.vlines(x, after.low, after.high, color=hue, linewidth=1.4, zorder=2)
            shown += [after.low, after.high]
        face = colour("surface") if row.name == "dropped" and view.kind != "run" else hue
        axes.plot([x], [y], "o", markersize=8, color=hue, markerfacecolor=face, markeredgewidth=1.6, zorder=3)
        # A number stands away from the nearest neighbour, so that it belongs to one dot only.
        gaps = [(abs(other - places[i - 1]), other) for k, other in enumerate(places) if k != i - 1]
        right = min(gaps)[1] <= places[i - 1] if gaps else True
        axes.annotate(str(i), (x, y), (6, 5) if right else (-6, -12), textcoords="offset points",
                      ha="left" if right else "right", fontsize=11, color=colour("ink"))  # fmt: skip
    pad = max(0.08 * (max(shown) - min(shown)), 0.01)
    axes.set_ylim(min(shown) - pad, max(shown) + pad)
    percent_ticks(axes)


def _numbered(view: View, rows: Sequence[Row], labels: dict[int, str]) -> tuple[Key, ...]:
    ring = ["ring" if row.name == "dropped" and view.kind != "run" else "dot" for row in rows]
    return tuple(
        Key(hue_of(view, row), f"{i} {text(labels[id(row)], 30)}", mark)
        for i, (row, mark) in enumerate(zip(rows, ring, strict=True), start=1)
    )


def _measured(view: View) -> list[Row]:
    return [row for row in view.first.rows if row.after(view.metric) is not None]


def _value(row: Row, metric: str) -> float:
    after = row.after(metric)
    return (after.value if after is not None else None) or 0.0


def _near(reference: float | None, values: Sequence[float]) -> float | None:
    """Leaves a reference out that lies so far off that it would squeeze what is to be compared."""
    low, high = min(values), max(values)
    return reference if reference is not None and reference > low - max(high - low, 0.05) else None


def _valued(row: Row, metric: str) -> str:
    measured = row.after(metric)
    few = f" (n={measured.n})" if measured is not None and measured.is_small else ""
    return f"{text(row.label, _MOST_LABEL)}\u2003{percent(_value(row, metric))}{few}"


def _brackets(measured: Measured | None) -> str:
    return interval(measured.low, measured.high) if measured is not None else ""


def _height(rows: Sequence[Row]) -> int:
    return len(rows) * _ROW + 66


def _margins(labels: Sequence[str]) -> Margins:
    # An upper estimate of the text's width; the browser's font is not known here.
    return Margins(left=_LABEL_ROOM + 7 * max(map(len, labels)), right=20)


def _rows_axis(axes: Axes, labels: Sequence[str], shown: Sequence[float]) -> None:
    """One line per row, from top to bottom; every interval is in sight from end to end."""
    pad = max(0.04 * (max(shown) - min(shown)), 0.01)
    axes.set_xlim(min(shown) - pad, max(shown) + pad)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=colour("grid"), linewidth=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", labelcolor=colour("ink"))
    axes.locator_params(axis="x", nbins=8)


def _paint_interval(axes: Axes, measured: Measured, y: float, hue: str, filled: bool) -> list[float]:
    """Draws one dot with its interval; returns the values that must be in sight."""
    value = measured.value or 0.0
    extent = [value]
    if measured.low is not None and measured.high is not None:
        axes.hlines(y, measured.low, measured.high, color=hue, linewidth=2.2, zorder=2)
        extent = [measured.low, value, measured.high]
    face = hue if filled else colour("surface")
    axes.plot([value], [y], "o", markersize=7.5, color=hue, markerfacecolor=face,
              markeredgewidth=1.6, zorder=3)  # fmt: skip
    return extent


def _time_axis(axes: Axes, seconds: Sequence[float], log: bool) -> None:
    """Puts durations people know on the horizontal axis."""
    if log:
        room = 10 ** (0.06 * math.log10(max(seconds) / min(seconds)))
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
