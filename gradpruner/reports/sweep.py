"""Plots of an ablation: quality or cost over the settings, and how early the kept layers settle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from gradpruner.common.printing import number, percent, short
from gradpruner.reports.fields import Measured
from gradpruner.reports.svg import (
    DASHES,
    Key,
    Margins,
    Plot,
    colour,
    dash_css,
    draw,
    percent_ticks,
    plain_ticks,
)
from gradpruner.reports.tables import COSTS
from gradpruner.reports.view import Point, Row, View, metric_label

_MOST_SERIES = 6
_MOST_NUMBERS = 16

Series = tuple[str, str, list[tuple[float, Measured]]]
"""Row name, label, and points (position on the horizontal axis, measured value)."""


def sweep_plot(view: View) -> Plot | None:
    """Draws the main metric, or the cost in `plot.y`, over the settings: lines, or bars for names."""
    found = _series(view)
    if not found:
        return None
    name, show = COSTS.get(str(view.record.plot.get("y")), (metric_label(view.metric), percent))
    bars = _is_categorical(view)
    reference = _flat_dense(found)
    shown = [s for s in found if reference is None or s[0] != "dense"]

    def paint(axes: Axes) -> None:
        if bars:
            _paint_bars(axes, view, shown, show)
        else:
            _paint_lines(axes, view, shown)
            _line_limits(axes, shown, reference)
        if reference is not None:
            axes.axhline(reference, color=colour("series-0"), linewidth=1.4, dashes=(4, 3), zorder=1)
        axes.set_ylabel(name.lower())
        if show is percent:
            percent_ticks(axes)
        else:
            axes.yaxis.set_major_formatter(lambda value, _: show(value))
        axes.set_xlabel(view.sweep_label)

    legend = [
        Key(_hue(i, row), label, "box" if bars else "line", "" if bars else dash_css(i))
        for i, (row, label, _) in enumerate(shown)
    ]
    if reference is not None:
        legend.append(Key("series-0", f"dense ({show(reference)})", "line", "5 4"))
    described = [f"{label}: {', '.join(_described(view, points, show))}" for _, label, points in shown]
    seeds = max((len(m.per_seed) for row in view.rows for m in row.after.values()), default=0)
    how = "Bars are means over seeds, thin lines" if bars else "Points are means over seeds, the shaded band"
    caption = f"{how} from the lowest to the highest seed." if seeds > 1 else "Only one seed."
    return Plot(
        "sweep",
        f"{name} over {view.sweep_label}",
        caption,
        f"{name} over {view.sweep_label}. {'; '.join(described)}.",
        draw("sweep", 400, paint, margins=Margins(left=74)),
        tuple(legend),
    )


def kept_plot(view: View) -> Plot | None:
    """Draws the share of the layers kept at the last setting that are kept at every setting (paper, Fig. 2).

    Compares plans of the same seed.
    """
    main = view.main_name
    rows = [(at, point.row(main)) for at, point in _positions(view)]
    known = [(at, row.plans) for at, row in rows if row is not None and row.plans]
    final = [plan.kept for plan in known[-1][1]] if known else []
    if len(known) < 3 or not all(final):
        return None
    points = []
    for at, plans in known:
        shares = [len(plan.kept & kept) / len(kept) for plan, kept in zip(plans, final, strict=False)]
        points.append((at, Measured(value=sum(shares) / len(shares), low=min(shares), high=max(shares))))

    def paint(axes: Axes) -> None:
        _paint_lines(axes, view, [(str(main), "", points)])
        axes.set_ylim(min(0.5, *(m.value for _, m in points)) - 0.05, 1.04)
        axes.set_xlabel(view.sweep_label)
        axes.set_ylabel("overlap with the last setting")
        axes.yaxis.set_major_formatter(lambda value, _: percent(value, 0))

    seeds = f", mean over {len(final)} seeds with their range" if len(final) > 1 else ""
    return Plot(
        "stability",
        "How early the kept layers settle",
        f"Share of the layers kept at the last setting that are already kept at this setting{seeds}.",
        f"Overlap with the layers kept at the last setting: {', '.join(_described(view, points, percent))}.",
        draw("stability", 340, paint, margins=Margins(left=74)),
    )


def _series(view: View) -> list[Series]:
    found: list[Series] = []
    for name, label in list(view.names.items())[: _MOST_SERIES + 1]:
        rows = [(at, point.row(name)) for at, point in _positions(view)]
        points = [(at, m) for at, row in rows if row is not None and (m := _value(row, view)) is not None]
        if points:
            found.append((name, label, points))
    return found


def _value(row: Row, view: View) -> Measured | None:
    wanted = str(view.record.plot.get("y"))
    if wanted in COSTS:
        value = number(row.costs.get(wanted))
        return None if value is None else Measured(value=value)
    return row.after.get(view.metric)


def _positions(view: View) -> list[tuple[float, Point]]:
    """Returns the position of every setting: its value, or its index if the values are names."""
    if _is_categorical(view):
        return [(float(i), point) for i, point in enumerate(view.points)]
    return [(number(point.value) or 0.0, point) for point in view.points]


def _is_categorical(view: View) -> bool:
    return view.record.plot.get("kind") == "bars" or any(number(p.value) is None for p in view.points)


def _flat_dense(found: Sequence[Series]) -> float | None:
    """Returns the dense model's value, if it is the same at all settings."""
    values = [measured.value for name, _, points in found if name == "dense" for _, measured in points]
    return values[0] if values and len(set(values)) == 1 else None


def _paint_lines(axes: Axes, view: View, found: Sequence[Series]) -> None:
    for i, (name, _, points) in enumerate(found):
        hue = colour(_hue(i, name))
        xs = [at for at, _ in points]
        lows = [m.value if m.low is None else m.low for _, m in points]
        highs = [m.value if m.high is None else m.high for _, m in points]
        if lows != highs:
            axes.fill_between(xs, lows, highs, color=hue, alpha=0.16, linewidth=0, zorder=1)
        (curve,) = axes.plot(xs, [m.value for _, m in points], "o-", color=hue, linewidth=1.8, markersize=6,
                             zorder=3)  # fmt: skip
        if DASHES[i % 5]:
            curve.set_dashes(DASHES[i % 5])
    _setting_axis(axes, view)
    plain_ticks(axes)


def _setting_axis(axes: Axes, view: View) -> None:
    """Labels the settings; leaves out labels that would overlap the one before."""
    at = _positions(view)
    sweep = view.record.sweep
    if sweep is not None and sweep.log and min(x for x, _ in at) > 0:
        axes.set_xscale("log")
    width, unit = axes.bbox.width, axes.figure.dpi / 72
    low, high = axes.get_xlim()
    ticks, labels, end = [], [], -1e9
    for x, point in at:
        pixel = axes.transData.transform((x, axes.get_ylim()[0]))[0] - axes.bbox.x0
        shown = point.label[:24]
        half = 3.6 * unit * len(shown)
        if pixel - half > end and -1 <= pixel <= width + 1:
            ticks.append(x)
            labels.append(shown)
            end = pixel + half + 6
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FixedFormatter(labels))


def _paint_bars(axes: Axes, view: View, found: Sequence[Series], show: Any) -> None:
    """Draws bars from zero, so that differences look as large as they are; numbers show small ones."""
    width = (0.6 if len(found) == 1 else 0.8) / max(len(found), 1)
    total = sum(len(points) for _, _, points in found)
    tops = (m.value if m.high is None else m.high for _, _, points in found for _, m in points)
    top = max(tops, default=0.0)
    for i, (name, _, points) in enumerate(found):
        offset = (i - (len(found) - 1) / 2) * width
        xs = [at + offset for at, _ in points]
        axes.bar(xs, [m.value for _, m in points], width=0.92 * width, color=colour(_hue(i, name)), zorder=2)
        for x, (_, m) in zip(xs, points, strict=True):
            if m.ends:
                axes.vlines(x, *m.ends, color=colour("ink"), linewidth=1.2, zorder=3)
            if total <= _MOST_NUMBERS:
                # Inside the bar, because the dense model's line may be just above it.
                y = m.value if m.low is None else min(m.low, m.value)
                axes.annotate(show(m.value), (x, y), (0, -18), textcoords="offset points", ha="center",
                              fontsize=12, color=colour("surface"), zorder=4)  # fmt: skip
    axes.set_ylim(0, 1.1 * top if top > 0 else 1)
    axes.set_xlim(-0.6, len(view.points) - 0.4)
    plain_ticks(axes)
    _setting_axis(axes, view)


def _line_limits(axes: Axes, found: Sequence[Series], reference: float | None) -> None:
    shown = [v for _, _, points in found for _, m in points for v in (m.low, m.value, m.high)]
    known = [v for v in (*shown, reference) if v is not None]
    pad = max(0.1 * (max(known) - min(known)), 0.01 * abs(max(known)), 1e-9)
    axes.set_ylim(min(known) - pad, max(known) + pad)


def _hue(index: int, name: str) -> str:
    """Returns a palette name: grey for the dense model, orange for GradPruner."""
    if name == "dense":
        return "series-0"
    order = ("series-2", "series-1", "series-3", "series-4", "series-5", "series-6")
    return order[index % len(order)] if name != "merged" else "series-2"


def _described(view: View, points: Sequence[tuple[float, Measured]], show: Any) -> list[str]:
    labels = {at: point.label for at, point in _positions(view)}
    return [f"{labels.get(at, short(at))} {show(measured.value)}" for at, measured in points]
