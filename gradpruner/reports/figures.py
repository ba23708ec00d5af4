"""The report's plots. Each says in words what it shows, for those who cannot see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from gradpruner.reports.drawing import (
    HALF,
    Key,
    Plot,
    averaged,
    bucket,
    dash_css,
    drawn,
    line,
    series,
    settled,
)
from gradpruner.reports.formats import interval, number, percent, text, whole
from gradpruner.reports.reading import (
    Measured,
    Plan,
    RunView,
    Variant,
    mapping,
    metric_label,
    pairs,
    sequence,
)
from gradpruner.reports.svg import Margins, colour, house_style, plain_ticks, whole_ticks

_LOG_SPREAD = 30.0


@dataclass(frozen=True)
class Plots:
    """All figures of a page; what the run holds no data for is None."""

    accuracy: Plot | None
    scores: tuple[Plot, ...]
    losses: Plot | None
    stability: Plot | None
    recording: Plot | None


def draw_plots(view: RunView) -> Plots:
    """Draws every figure of the report."""
    with house_style():
        return Plots(
            accuracy=accuracy_plot(view),
            scores=score_plots(view),
            losses=loss_plot(view),
            stability=stability_plot(view),
            recording=recording_plot(view),
        )


def accuracy_plot(view: RunView) -> Plot | None:
    """Draws every variant's headline metric with its interval, before and after fine-tuning."""
    variants = [v for v in view.variants if view.metric in v.after or view.metric in v.before]
    if not variants:
        return None
    paint = lambda axes: _paint_accuracy(axes, view, variants)  # noqa: E731
    # An upper estimate of the text's width; the browser's font is not known here.
    labels = 24 + 7 * max(len(_row_label(v, view.metric, 34)) for v in variants)
    after = any(view.metric in v.after for v in variants)
    before = any(view.metric in v.before for v in variants)
    trained = any(v.finetune for v in variants)
    legend = [Key("series-1", "after fine-tuning" if trained else "measured", "dot")] if after else []
    legend += [Key("muted", "before fine-tuning", "ring")] if before else []
    if view.dense is not None and (d := view.dense.after.get(view.metric)) and d.has_interval:
        legend.append(Key("grid", "interval of dense"))
    if view.majority is not None:
        words = f"always the most frequent answer ({percent(view.majority)})"
        legend.append(Key("ink", words, "line", "5 4"))
    name = metric_label(view.metric)
    said = [f"{v.label}: {_say(v.after.get(view.metric))}" for v in variants]
    return Plot(
        "accuracy",
        f"{name} with 95% intervals",
        "Dots are the measured values, lines their 95% bootstrap intervals.",
        f"{name} after fine-tuning. {'; '.join(said)}.",
        drawn("accuracy", len(variants) * 46 + 62, paint, margins=Margins(left=labels)),
        tuple(legend),
    )


def score_plots(view: RunView) -> tuple[Plot, ...]:
    """Draws the layer scores of every method, coloured by what its plan does with each layer."""
    recorded = mapping(view.run, "scores")
    # The recorded method has evidence (intervals, stability) and belongs to the headline's plan.
    ordered = sorted(recorded, key=lambda name: not sequence(recorded, name, "stability"))
    plots = []
    for i, method in enumerate(ordered):
        entry = mapping(recorded, method)
        values = [number(value) for value in sequence(entry, "values")]
        if not any(value is not None for value in values):
            continue
        plan = view.plans.get(method)
        if plan is None and i == 0:
            plan = view.main.plan if view.main else next(iter(view.plans.values()), None)
        plots.append(_score_plot(i, method, entry, values, plan))
    return tuple(plots)


def loss_plot(view: RunView) -> Plot | None:
    """Draws the fine-tuning loss of every variant over its steps."""
    curves = []
    for i, variant in enumerate(view.variants):
        points = pairs(sequence(variant.finetune, "losses"), "step", "loss")
        if points:
            curves.append((i, variant.label, points))
    if not curves:
        return None
    span = max(bucket(points) for _, _, points in curves)
    smoothed = f" Each point is the mean of up to {span} logged values." if span > 1 else ""
    said = [f"{label}: from {p[0][1]:.3g} to {p[-1][1]:.3g}" for _, label, p in curves]
    legend = [Key(series(i), label, "line", dash_css(i)) for i, label, _ in curves]

    def paint(axes: Axes) -> None:
        for i, _, points in curves:
            line(axes, averaged(points), i)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("training loss")
        plain_ticks(axes)
        whole_ticks(axes, 10)

    return Plot(
        "losses",
        "Fine-tuning loss",
        f"Loss on the answer tokens of the training data.{smoothed}",
        f"Fine-tuning loss, first and last value. {'; '.join(said)}.",
        drawn("losses", 340, paint),
        tuple(legend),
    )


def stability_plot(view: RunView) -> Plot | None:
    """Draws how early the set of kept layers settles (paper, Fig. 2)."""
    curves = []
    for method, entry in mapping(view.run, "scores").items():
        points = pairs(sequence(entry, "stability"), "step", "overlap")
        if points:
            curves.append((metric_label(method), points))
    if not curves:
        return None

    def paint(axes: Axes) -> None:
        for i, (_, points) in enumerate(curves, start=1):
            line(axes, points, i, marker=len(points) <= 60)
        axes.set_ylim(min(0.0, *(y for _, points in curves for _, y in points)), 1.04)
        axes.set_xlabel("recorded step")
        axes.set_ylabel("overlap with the final set")
        axes.yaxis.set_major_formatter(lambda value, _: percent(value, 0))
        whole_ticks(axes, 6)

    said = [
        (f"{name}: the set " if len(curves) > 1 else "The set ") + settled(points) for name, points in curves
    ]
    legend = [Key(series(i), name, "line") for i, (name, _) in enumerate(curves, start=1)]
    return Plot(
        "stability",
        "Rank stability",
        f"Share of the finally kept layers that would be kept already at this step. {'; '.join(said)}.",
        f"Overlap of the kept set at each step with the final one. {'; '.join(said)}.",
        drawn("stability", 280, paint, HALF),
        tuple(legend) if len(legend) > 1 else (),
    )


def recording_plot(view: RunView) -> Plot | None:
    """Draws the loss while the gradients were recorded."""
    trace = mapping(view.run, "trace")
    losses = [number(loss) for loss in sequence(trace, "losses")]
    points = [(float(i), loss) for i, loss in enumerate(losses, start=1) if loss is not None]
    if not points:
        return None

    def paint(axes: Axes) -> None:
        line(axes, averaged(points), 1, marker=len(points) <= 60)
        axes.set_xlabel("recorded step")
        axes.set_ylabel("training loss")
        plain_ticks(axes)
        whole_ticks(axes, 6)

    steps, effective = trace.get("num_steps"), trace.get("effective_steps")
    used = f"{whole(effective)} of {whole(steps)} steps carry evidence: " if effective else ""
    why = "LoRA's B starts at zero, so the first gradients of A are zero." if used else ""
    return Plot(
        "recording",
        "Loss while recording",
        f"{used}{why}".strip(),
        f"Recording loss, from {points[0][1]:.3g} to {points[-1][1]:.3g}.",
        drawn("recording", 280, paint, HALF),
    )


def _score_plot(
    index: int, method: str, entry: dict[str, Any], values: list[float | None], plan: Plan | None
) -> Plot:
    known = [value for value in values if value is not None]
    positive = [value for value in known if value > 0]
    log = bool(positive) and min(known) >= 0 and max(positive) > _LOG_SPREAD * min(positive)
    roles = [plan.role(layer) if plan else "keep" for layer in range(len(values))]
    words = {"keep": "kept", "receive": "kept, receives a merge", "merge": "merged into another",
             "drop": "dropped"}  # fmt: skip
    legend = tuple(Key(role, word) for role, word in words.items() if role in roles)
    merges = [f"{a.layer} into {a.into}" for a in plan.merges] if plan else []
    groups = [
        f"{word}: {', '.join(str(i) for i, r in enumerate(roles) if r == role)}"
        for role, word in words.items()
        if role in roles
    ]
    has_intervals = bool(sequence(entry, "low")) and bool(sequence(entry, "high"))
    caption = " ".join(
        (
            "Higher is more important.",
            "Logarithmic scale." if log else "",
            "Thin lines are bootstrap intervals over the recorded steps." if has_intervals else "",
            f"Merged: {', '.join(merges)}." if merges else "",
        )
    )
    paint = lambda axes: _paint_scores(axes, entry, values, plan, log)  # noqa: E731
    norm = entry.get("norm")
    room = 30 if merges else 0
    return Plot(
        f"scores-{index}",
        f"Layer scores: {metric_label(method).lower()}" + (f" ({text(norm)})" if norm else ""),
        " ".join(caption.split()),
        f"Scores of {len(values)} layers, from {min(known):.3g} to {max(known):.3g}. "
        + (f"Layers {'; '.join(groups)}." if plan else ""),
        drawn(f"scores-{index}", 330 + room, paint, margins=Margins(top=12 + room)),
        legend if plan else (),
    )


def _paint_scores(
    axes: Axes,
    entry: dict[str, Any],
    values: Sequence[float | None],
    plan: Plan | None,
    log: bool,
) -> None:
    layers = range(len(values))
    positive = [value for value in values if value is not None and value > 0]
    floor = min(positive) / 3 if log else 0.0
    heights = [floor if value is None or (log and value <= 0) else value for value in values]
    colours = [colour(plan.role(layer) if plan else "keep") for layer in layers]
    axes.bar(layers, [h - floor for h in heights], bottom=floor, width=0.78, color=colours)
    lows, highs = sequence(entry, "low"), sequence(entry, "high")
    for layer, low, high in zip(layers, lows, highs, strict=False):
        ends = number(low), number(high)
        if ends[0] is not None and ends[1] is not None:
            bottom = max(ends[0], floor) if log else ends[0]
            axes.vlines(layer, bottom, ends[1], color=colour("ink"), linewidth=0.9)
    if log:
        axes.set_yscale("log")
        axes.set_ylim(bottom=floor)
    plain_ticks(axes, log)
    axes.set_xlim(-0.8, len(values) - 0.2)
    axes.set_xlabel("layer")
    axes.set_ylabel("score")
    whole_ticks(axes, 16)
    if plan and plan.targets:
        _paint_merges(axes, plan.targets)


def _paint_merges(axes: Axes, targets: dict[int, list[int]]) -> None:
    """Draws a bracket per target above the bars: up from each merged layer, down into it."""
    frame: dict[str, Any] = {
        "transform": axes.get_xaxis_transform(),
        "clip_on": False,
        "color": colour("merge"),
    }
    low, high = (1 + pixels / axes.bbox.height for pixels in (12, 28))
    for target, layers in targets.items():
        axes.plot([min(*layers, target), max(*layers, target)], [high, high], linewidth=1.4, **frame)
        for layer in layers:
            axes.plot([layer, layer], [low, high], linewidth=1.4, **frame)
        axes.plot([target, target], [low, high], linewidth=1.4, **frame)
        axes.plot([target], [low], marker="v", markersize=6, markeredgewidth=0, **frame)


def _paint_accuracy(axes: Axes, view: RunView, variants: Sequence[Variant]) -> None:
    shown: list[float] = [] if view.majority is None else [view.majority]
    dense = view.dense.after.get(view.metric) if view.dense else None
    if dense and dense.low is not None and dense.high is not None:
        axes.axvspan(dense.low, dense.high, color=colour("grid"), linewidth=0, zorder=0)
    if view.majority is not None:
        axes.axvline(view.majority, color=colour("ink"), linewidth=1.2, dashes=(4, 3), zorder=1)
    for row, variant in enumerate(variants):
        hue = colour(series(view.variants.index(variant)))
        both = view.metric in variant.after and view.metric in variant.before
        for measured, filled in (
            (variant.before.get(view.metric), False),
            (variant.after.get(view.metric), True),
        ):
            if measured is None:
                continue
            y = row + ((0.13 if filled else -0.13) if both else 0.0)
            shown += _paint_measured(axes, measured, y, hue, filled)
    pad = max(0.04 * (max(shown) - min(shown)), 0.01)
    axes.set_xlim(min(shown) - pad, max(shown) + pad)
    axes.set_ylim(len(variants) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=colour("grid"), linewidth=1)
    labels = [_row_label(v, view.metric, 34) for v in variants]
    axes.set_yticks(range(len(variants)), labels)
    axes.tick_params(axis="y", labelcolor=colour("ink"))
    axes.xaxis.set_major_formatter(lambda value, _: percent(value, 0 if pad > 0.012 else 1))
    axes.locator_params(axis="x", nbins=8)
    axes.set_xlabel(metric_label(view.metric).lower())


def _paint_measured(axes: Axes, measured: Measured, y: float, hue: str, filled: bool) -> tuple[float, ...]:
    """Draws one dot with its interval; returns the values that must be in sight."""
    extent: tuple[float, ...] = (measured.value,)
    if measured.low is not None and measured.high is not None:
        width = 2.4 if filled else 1.2
        axes.hlines(y, measured.low, measured.high, color=hue, linewidth=width, zorder=2)
        extent = (measured.low, measured.value, measured.high)
    face = hue if filled else colour("surface")
    axes.plot([measured.value], [y], "o", markersize=7.5 if filled else 6, color=hue,
              markerfacecolor=face, markeredgewidth=1.4, zorder=3)  # fmt: skip
    return extent


def _say(measured: Measured | None) -> str:
    if measured is None:
        return "not evaluated"
    return f"{percent(measured.value)} {interval(measured.low, measured.high)}".strip()


def _row_label(variant: Variant, metric: str, limit: int) -> str:
    """Returns the variant's label, cut to `limit` characters, and its value."""
    measured = variant.after.get(metric) or variant.before.get(metric)
    if measured is None:
        return text(variant.label, limit)
    few = f" (n={measured.n})" if measured.is_small else ""
    return f"{text(variant.label, limit)}\u2003{percent(measured.value)}{few}"
