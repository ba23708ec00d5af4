"""Plots that compare rows: quality, difference to the dense model, and quality against size and cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from gradpruner.common.printing import duration, interval, number, percent, points, short, text
from gradpruner.reports.fields import Measured
from gradpruner.reports.svg import (
    Key,
    Margins,
    Plot,
    colour,
    draw,
    is_wide,
    percent_ticks,
    series,
    tick_digits,
)
from gradpruner.reports.view import Row, View, metric_label, metric_words

_ROW = 30
_LABEL_ROOM = 30
_MOST_TICKS = 6
_MOST_LABEL = 34
_SECOND_STEPS = (0.01, 0.1, 1, 10, 60, 600, 3600, 36000, 360000)
_REFERENCE: dict[str, Any] = {"color": colour("series-0"), "linewidth": 1.2, "dashes": (4, 3), "zorder": 1}
"""The line of the dense model."""


def hue_of(view: View, row: Row) -> str:
    """Returns the palette name of a row; in a study, GradPruner has a colour of its own."""
    if row.is_dense:
        return "series-0"
    if view.kind == "run":
        return series(view.rows.index(row))
    if row.name in ("merged", "dropped", "gradpruner") or row.name == view.main_name:
        return "series-2"
    return "keep"


def quality_plot(view: View) -> Plot | None:
    """Draws the main metric of every row: of a run with intervals, of a study with every seed."""
    rows, metric, study = _measured(view), view.metric, view.kind != "run"
    if not rows:
        return None
    found = [row.after[metric] for row in rows]
    dense = next((row.after[metric] for row in rows if row.is_dense), None)
    majority = _near(view.majority, found)
    before = [_near(row.before[metric].value, found) if metric in row.before else None for row in rows]
    few = [f" (n={after.n})" if after.is_small else "" for after in found]
    labels = _labels(rows, [f"{percent(a.value)}{n}" for a, n in zip(found, few, strict=True)])

    def paint(axes: Axes) -> None:
        shown = [] if majority is None else [majority]
        if dense is not None:
            if not study and dense.ends:
                axes.axvspan(*dense.ends, color=colour("grid"), linewidth=0, zorder=0)
            axes.axvline(dense.value, **_REFERENCE)
        if majority is not None:
            axes.axvline(majority, color=colour("muted"), linewidth=1.2, dashes=(1, 2), zorder=1)
        for at, (row, after, early) in enumerate(zip(rows, found, before, strict=True)):
            hue, seeds = colour(hue_of(view, row)), after.per_seed
            axes.plot(seeds, [at] * len(seeds), "|", markersize=9, color=hue, markeredgewidth=1.4, zorder=2)
            if early is not None and not study:
                shown.append(early)
                axes.plot([early], [at], "o", markersize=6, color=hue, markerfacecolor=colour("surface"))
            dot = Measured(value=after.value) if study and len(seeds) < 2 else after
            shown += [*seeds, *_paint_interval(axes, dot, at, hue, not _is_ring(view, row))]
        _rows_axis(axes, labels, shown)
        percent_ticks(axes, "x")
        axes.set_xlabel(metric_words(metric))

    values = [f"{percent(a.value)} {interval(a.low, a.high)}".strip() for a in found]
    words = "; ".join(f"{row.label}: {value}" for row, value in zip(rows, values, strict=True))
    return Plot(
        "quality",
        f"{metric_label(metric)} of every row",
        _reading(view, rows, majority, before),
        f"{metric_label(metric)} of the finished models. {words}.",
        draw("quality", _height(rows), paint, margins=_margins(labels)),
        _quality_legend(view, rows, majority, before),
    )


def _reading(view: View, rows: Sequence[Row], majority: float | None, before: Sequence[float | None]) -> str:
    """Returns the caption of the quality plot: how to read it."""
    if view.kind == "run":
        pairs = zip(rows, before, strict=True)
        far = [
            row.before[view.metric].value for row, near in pairs if near is None and view.metric in row.before
        ]
        reach = " to ".join(dict.fromkeys(percent(end) for end in (min(far), max(far)))) if far else ""
        hidden = f" Before fine-tuning, too low to be shown here: {reach}." if far else ""
        if view.majority is not None and majority is None:
            hidden += f" Always giving the most frequent answer would score {percent(view.majority)}."
        return f"Dots are measured values; lines are their 95% bootstrap intervals.{hidden}"
    if any(len(row.after[view.metric].per_seed) > 1 for row in rows):
        return "Dots are means over seeds; lines reach from the lowest to the highest seed."
    return "Only one seed: how much the result varies from seed to seed is not known."


def _quality_legend(
    view: View, rows: Sequence[Row], majority: float | None, before: Sequence[float | None]
) -> tuple[Key, ...]:
    legend = []
    if view.kind != "run":
        legend = [Key("series-2", "GradPruner", "dot")]
        if any(row.name == "dropped" for row in rows):
            legend.append(Key("series-2", "GradPruner, no merging", "ring"))
        legend.append(Key("keep", "other methods", "dot"))
    elif any(value is not None for value in before):
        legend = [Key("series-1", "finished", "dot"), Key("muted", "before fine-tuning", "ring")]
    if any(row.is_dense for row in rows):
        legend.append(Key("series-0", "dense", "line", "5 4"))
    if majority is not None:
        legend.append(Key("muted", f"always the most frequent answer ({percent(majority)})", "line", "2 3"))
    return tuple(legend)


def difference_plot(view: View) -> Plot | None:
    """Draws each row's paired difference to the dense model, with its interval."""
    rows = [row for row in _measured(view) if not row.is_dense and view.metric in row.paired]
    if not rows:
        return None
    found = [row.paired[view.metric] for row in rows]
    described = [f"{points(paired.value)} {interval(paired.low, paired.high)}".strip() for paired in found]
    labels = _labels(rows, described)

    def paint(axes: Axes) -> None:
        axes.axvline(0, **_REFERENCE)
        shown = [0.0]
        for at, (row, paired) in enumerate(zip(rows, found, strict=True)):
            shown += _paint_interval(axes, paired, at, colour(hue_of(view, row)), not _is_ring(view, row))
        _rows_axis(axes, labels, shown)
        axes.xaxis.set_major_formatter(lambda value, _: points(round(value, 9), tick_digits(axes.xaxis)))
        axes.set_xlabel("points of difference to the dense model")

    seeds = ", averaged over seeds" if view.kind != "run" else ""
    words = "; ".join(f"{row.label} {shown} points" for row, shown in zip(rows, described, strict=True))
    return Plot(
        "difference",
        "Difference to the dense model",
        f"Paired on the same examples{seeds}; lines are 95% bootstrap intervals over examples. "
        "A row whose line crosses the dashed line does not clearly differ from the dense model.",
        f"{metric_label(view.metric)}, difference to the dense model. {words}.",
        draw("difference", _height(rows), paint, margins=_margins(labels)),
    )


def size_plot(view: View) -> Plot | None:
    """Draws quality against size; None unless the pruned rows have several sizes."""
    labelled = [
        (row, f"{point.label}: {row.label}" if view.kind == "ablation" else row.label)
        for point in view.points
        for row in point.rows
        if row.num_parameters is not None and view.metric in row.after
    ]
    if len({row.num_parameters for row, _ in labelled if not row.is_dense}) < 2:
        return None
    labelled.sort(key=lambda entry: -(entry[0].num_parameters or 0))
    dense = next((row for row, _ in labelled if row.is_dense), None)
    rows, labels = zip(*(entry for entry in labelled if not entry[0].is_dense), strict=True)
    xs = [float(row.num_parameters or 0) for row in rows]
    name = metric_label(view.metric)

    def paint(axes: Axes) -> None:
        _scatter(axes, view, rows, xs, dense)
        pad = 0.08 * (max(xs) - min(xs))
        axes.set_xlim(min(xs) - pad, max(xs) + pad)
        axes.locator_params(axis="x", nbins=_MOST_TICKS)
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
        axes.set_xlabel("parameters")

    described = [
        f"{label}: {short(row.num_parameters)}, {percent(row.after[view.metric].value)}"
        for row, label in zip(rows, labels, strict=True)
    ]
    of_dense = (
        f" The dashed line is the dense model ({short(dense.num_parameters)} parameters)." if dense else ""
    )
    return Plot(
        "size",
        f"{name} against size",
        f"Left is smaller, up is better. Vertical lines are intervals.{of_dense}",
        f"{name} against parameters. {'; '.join(described)}.",
        draw("size", 380, paint, margins=Margins(left=70, right=24)),
        _numbered(view, rows, labels),
    )


def cost_plot(view: View) -> Plot | None:
    """Draws quality against the time that each method of a comparison takes before fine-tuning."""
    rows = [
        row
        for row in _measured(view)
        if row.is_pruned and number(row.costs.get("method_seconds")) is not None
    ]
    if len(rows) < 2 or view.kind != "compare":
        return None
    seconds = [max(number(row.costs.get("method_seconds")) or 0.0, 0.0) for row in rows]
    log = is_wide(seconds)
    # A logarithmic axis has no zero: a method that takes no time is drawn at the left end.
    least = min((value for value in seconds if value > 0), default=1.0) / 2
    at = [max(value, least) for value in seconds] if log else seconds
    name = metric_label(view.metric)

    def paint(axes: Axes) -> None:
        _time_axis(axes, at, log)
        _scatter(axes, view, rows, at, view.dense)
        axes.set_xlabel("time the method takes before fine-tuning")

    described = [
        f"{row.label}: {duration(s)}, {percent(row.after[view.metric].value)}"
        for row, s in zip(rows, seconds, strict=True)
    ]
    return Plot(
        "cost",
        f"{name} against the cost of pruning",
        "Left is cheaper, up is better. The time is all a method needs until the pruned model can be "
        f"fine-tuned, including recovery{' (logarithmic)' if log else ''}. The dashed line is the dense "
        "model.",
        f"{name} against method time. {'; '.join(described)}.",
        draw("cost", 430, paint, margins=Margins(left=70, right=24)),
        _numbered(view, rows, [row.label for row in rows]),
    )


def _scatter(axes: Axes, view: View, rows: Sequence[Row], xs: Sequence[float], dense: Row | None) -> None:
    """Draws quality as numbered dots with their intervals, and the dense model as a line.

    The legend above the figure explains the numbers; names would overlap.
    """
    shown = [row.after[view.metric].value for row in (*rows, dense) if row and view.metric in row.after]
    if len(shown) > len(rows):
        axes.axhline(shown[-1], **_REFERENCE)
    places = [math.log(max(x, 1e-9)) for x in xs]
    for i, (x, row) in enumerate(zip(xs, rows, strict=True), start=1):
        hue, after = colour(hue_of(view, row)), row.after[view.metric]
        if view.kind == "run" and after.ends:
            axes.vlines(x, *after.ends, color=hue, linewidth=1.4, zorder=2)
            shown += after.ends
        face = colour("surface") if _is_ring(view, row) else hue
        at = (x, after.value)
        axes.plot(*([place] for place in at), "o", markersize=8, color=hue, markerfacecolor=face,
                  markeredgewidth=1.6, zorder=3)  # fmt: skip
        # Put the number on the side away from the nearest dot, so that it is clear which dot it labels.
        gaps = [(abs(other - places[i - 1]), other) for k, other in enumerate(places) if k != i - 1]
        right = min(gaps)[1] <= places[i - 1] if gaps else True
        axes.annotate(str(i), at, (6, 5) if right else (-6, -12), textcoords="offset points",
                      ha="left" if right else "right", fontsize=11, color=colour("ink"))  # fmt: skip
    pad = max(0.08 * (max(shown) - min(shown)), 0.01)
    axes.set_ylim(min(shown) - pad, max(shown) + pad)
    axes.set_ylabel(metric_words(view.metric))
    percent_ticks(axes)


def _numbered(view: View, rows: Sequence[Row], labels: Sequence[str]) -> tuple[Key, ...]:
    return tuple(
        Key(hue_of(view, row), f"{i} {text(label)}", "ring" if _is_ring(view, row) else "dot")
        for i, (row, label) in enumerate(zip(rows, labels, strict=True), start=1)
    )


def _measured(view: View) -> list[Row]:
    return [row for row in view.first.rows if view.metric in row.after]


def _is_ring(view: View, row: Row) -> bool:
    """Returns whether a row's dot is hollow: in a study, GradPruner without merging."""
    return row.name == "dropped" and view.kind != "run"


def _near(reference: float | None, found: Sequence[Measured]) -> float | None:
    """Returns a reference value, or None if it is so far below the rows that it would squeeze them."""
    low, high = min(m.value for m in found), max(m.value for m in found)
    return reference if reference is not None and reference > low - max(high - low, 0.05) else None


def _labels(rows: Sequence[Row], values: Sequence[str]) -> list[str]:
    return [f"{text(row.label, _MOST_LABEL)}\u2003{value}" for row, value in zip(rows, values, strict=True)]


def _height(rows: Sequence[Row]) -> int:
    return len(rows) * _ROW + 66


def _margins(labels: Sequence[str]) -> Margins:
    # A generous estimate of the width of the labels; the browser's font is not known here.
    return Margins(left=_LABEL_ROOM + 7 * max(map(len, labels)), right=20)


def _rows_axis(axes: Axes, labels: Sequence[str], shown: Sequence[float]) -> None:
    """Lists the rows from top to bottom and makes room for every value in `shown`."""
    pad = max(0.04 * (max(shown) - min(shown)), 0.01)
    axes.set_xlim(min(shown) - pad, max(shown) + pad)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=colour("grid"), linewidth=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", labelcolor=colour("ink"))
    axes.locator_params(axis="x", nbins=8)


def _paint_interval(axes: Axes, measured: Measured, y: float, hue: str, filled: bool) -> list[float]:
    """Draws one dot with its interval; returns the values the axis must show."""
    if measured.ends:
        axes.hlines(y, *measured.ends, color=hue, linewidth=2.2, zorder=2)
    face = hue if filled else colour("surface")
    axes.plot([measured.value], [y], "o", markersize=7.5, color=hue, markerfacecolor=face,
              markeredgewidth=1.6, zorder=3)  # fmt: skip
    return [measured.value, *(measured.ends or ())]


def _time_axis(axes: Axes, seconds: Sequence[float], log: bool) -> None:
    """Labels the horizontal axis with round durations."""
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
    axes.xaxis.set_major_formatter(lambda value, _: _brief(value))


def _brief(seconds: float) -> str:
    """Formats a tick, for example '0.1 s', '10 min' or '1 h'."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g}\u00a0{unit}"
    return f"{seconds:.3g}\u00a0s"
