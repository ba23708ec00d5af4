"""Plots of a run: layer scores, losses, rank stability and number of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from gradpruner.common.printing import counted, number, percent, text, whole
from gradpruner.reports.details import searches
from gradpruner.reports.record import CHOICES, PlanRecord, Scores
from gradpruner.reports.svg import (
    HALF,
    Key,
    Margins,
    Plot,
    averaged,
    bucket,
    colour,
    dash_css,
    draw,
    is_wide,
    line,
    loss_axis,
    plain_ticks,
    series,
    settled,
    whole_ticks,
)
from gradpruner.reports.view import View, answer_losses, metric_label, pairs


def score_plots(view: View) -> list[Plot]:
    """Draws the layer scores of every method, coloured by what its plan does with each layer."""
    recorded = view.record.scores
    # The scores of the recorded gradients come first: they have stability curves, and the main row's plan
    # uses them.
    ordered = sorted(recorded, key=lambda name: not recorded[name].stability)
    plans, main = view.record.plans, view.main.plan if view.main else None
    own = {text(plan.scores): plan for plan in reversed((*([main] if main else []), *plans.values()))}
    plots = []
    for i, method in enumerate(ordered):
        values = [number(value) for value in recorded[method].values]
        if not any(value is not None for value in values):
            continue
        plan = own.get(method) or plans.get(method)
        if plan is None and i == 0:
            plan = main or next(iter(plans.values()), None)
        name, norm = metric_label(method).lower(), recorded[method].norm
        chosen = CHOICES.get(text(plan.comparison.chosen)) if plan else None
        name = f"{name}: {chosen}" if chosen else name
        title = f"Layer scores: {name}" + (f" ({text(norm)})" if norm else "")
        plots.append(_score_plot(f"scores-{i}", title, recorded[method], values, plan or PlanRecord()))
    return plots


def loss_plot(view: View) -> Plot | None:
    """Draws the fine-tuning loss of every row over its steps."""
    found = [(row.label, answer_losses(row.recorded.finetune.losses)) for row in view.rows]
    return curves_plot("losses", "Fine-tuning loss", found)


def curves_plot(name: str, title: str, found: Sequence[tuple[str, list[tuple[float, float]]]]) -> Plot | None:
    """Draws training losses over their steps.

    Colours go by position, so that a row without losses does not shift the colours of the others.
    """
    curves = [(i, label, points) for i, (label, points) in enumerate(found) if points]
    if not curves:
        return None
    span = max(bucket(points) for _, _, points in curves)
    smoothed = f" Each point is the mean of up to {span} logged values." if span > 1 else ""
    means = [(i, averaged(points)) for i, _, points in curves]
    log = is_wide([y for _, points in means for _, y in points])
    described = [f"{label}: from {p[0][1]:.3g} to {p[-1][1]:.3g}" for _, label, p in curves]

    def paint(axes: Axes) -> None:
        for i, points in means:
            line(axes, points, i)
        loss_axis(axes, log, "optimizer step")
        whole_ticks(axes, 10)

    return Plot(
        name,
        title,
        f"Loss on the answer tokens of the training data{' (logarithmic)' if log else ''}.{smoothed}",
        f"{title}, first and last value. {'; '.join(described)}.",
        draw(name, 340, paint),
        tuple(Key(series(i), label, "line", dash_css(i)) for i, label, _ in curves),
    )


def stability_plot(view: View) -> Plot | None:
    """Draws how early the set of kept layers settles (paper, Fig. 2)."""
    scores = view.record.scores.items()
    found = [(metric_label(name), pairs(entry.stability, "step", "overlap")) for name, entry in scores]
    curves = [(name, points) for name, points in found if points]
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

    described = [
        (f"{name}: the set " if len(curves) > 1 else "The set ") + settled(points) for name, points in curves
    ]
    legend = [Key(series(i), name, "line") for i, (name, _) in enumerate(curves, start=1)]
    return Plot(
        "stability",
        "Rank stability",
        "Share of the layers kept in the end that would already be kept if recording stopped at this step. "
        f"{'; '.join(described)}.",
        f"Overlap of the kept set at each step with the final one. {'; '.join(described)}.",
        draw("stability", 280, paint, HALF),
        tuple(legend) if len(legend) > 1 else (),
    )


def recording_plot(view: View) -> Plot | None:
    """Draws the loss while gradients were recorded."""
    trace = view.record.trace
    losses = [number(loss) for loss in trace.losses]
    points = [(float(i), loss) for i, loss in enumerate(losses, start=1) if loss is not None]
    if not points:
        return None
    log = is_wide([y for _, y in averaged(points)])

    def paint(axes: Axes) -> None:
        line(axes, averaged(points), 1, marker=len(points) <= 60)
        loss_axis(axes, log, "recorded step")
        whole_ticks(axes, 6)

    steps, effective = trace.num_steps, trace.effective_steps
    used = f"{whole(effective)} of {whole(steps)} steps with energy: " if effective else ""
    why = "LoRA's B starts at zero, so the first gradients of A are zero." if used else ""
    return Plot(
        "recording",
        "Loss while recording",
        f"{used}{why}{' Logarithmic.' if log else ''}".strip(),
        f"Recording loss, from {points[0][1]:.3g} to {points[-1][1]:.3g}.",
        draw("recording", 280, paint, HALF),
    )


def depth_plot(view: View) -> Plot | None:
    """Draws the loss on validation rows over the number of layers removed, with its certified bound."""
    found = searches(view)
    if not found:
        return None
    limit, rows = found[0][2].limit or 0.0, found[0][2].rows

    def paint(axes: Axes) -> None:
        for i, _, search in found:
            hue, curve = colour(series(i)), search.curve
            axes.plot([d.num_prune for d in curve], [-d.loss for d in curve], "o-", color=hue, markersize=5)
            for d in curve:
                axes.vlines(d.num_prune, -d.upper, -d.loss, color=hue, linewidth=1.4)
        axes.axhline(-limit, color=colour("ink"), linewidth=1.2, dashes=(4, 3))
        axes.set_xlabel("layers removed")
        axes.set_ylabel("change from dense, before recovery")
        axes.yaxis.set_major_formatter(lambda value, _: percent(value, 1))
        whole_ticks(axes, 10)

    described = "; ".join(f"{label}: {_layers(search.best)} certified" for _, label, search in found)
    words = f"at most {percent(limit, 2)} lost on {whole(rows)} validation rows"
    return Plot(
        "depths",
        "How many layers can be removed",
        f"Dots are measured losses; lines reach down to the worst case. {described}, {words}.",
        f"Loss by number of layers removed. {described}.",
        draw("depths", 300, paint),
        (*(Key(series(i), label, "line") for i, label, _ in found), Key("ink", words, "line", "5 4")),
    )


def _layers(count: int | None) -> str:
    return "no number of layers" if count is None else counted(count, "layer")


def _score_plot(name: str, title: str, entry: Scores, values: list[float | None], plan: PlanRecord) -> Plot:
    known = [value for value in values if value is not None]
    log = is_wide(known)
    roles = [plan.roles.get(layer, "keep") for layer in range(len(values))]
    words = {"keep": "kept", "receive": "kept, receives a merge", "merge": "merged into another",
             "drop": "dropped"}  # fmt: skip
    shown = {role: word for role, word in words.items() if role in roles}
    merges = ", ".join(f"{i} into {to}" for to, layers in plan.targets.items() for i in layers)
    groups = "; ".join(
        f"{word}: {', '.join(str(i) for i, r in enumerate(roles) if r == role)}"
        for role, word in shown.items()
    )
    caption = (
        "Higher is more important.",
        "Logarithmic scale." if log else "",
        "Thin lines are bootstrap intervals over the recorded steps." if entry.low and entry.high else "",
        f"Merged: {merges}." if merges else "",
    )
    room = 30 if merges else 0
    has_plan = bool(plan.model_fields_set)
    return Plot(
        name,
        title,
        " ".join(part for part in caption if part),
        f"Scores of {len(values)} layers, from {min(known):.3g} to {max(known):.3g}. "
        + (f"Layers {groups}." if has_plan else ""),
        draw(
            name,
            330 + room,
            lambda axes: _paint_scores(axes, entry, values, plan, log),
            margins=Margins(top=12 + room),
        ),
        tuple(Key(role, word) for role, word in shown.items()) if has_plan else (),
    )


def _paint_scores(
    axes: Axes, entry: Scores, values: Sequence[float | None], plan: PlanRecord, log: bool
) -> None:
    layers = range(len(values))
    floor = min(value for value in values if value is not None and value > 0) / 3 if log else 0.0
    heights = [floor if value is None or (log and value <= 0) else value for value in values]
    colours = [colour(plan.roles.get(layer, "keep")) for layer in layers]
    axes.bar(layers, [h - floor for h in heights], bottom=floor, width=0.78, color=colours)
    for layer, *ends in zip(layers, entry.low, entry.high, strict=False):
        low, high = map(number, ends)
        if low is not None and high is not None:
            axes.vlines(layer, max(low, floor) if log else low, high, color=colour("ink"), linewidth=0.9)
    if log:
        axes.set_yscale("log")
        axes.set_ylim(bottom=floor)
    plain_ticks(axes, log)
    axes.set_xlim(-0.8, len(values) - 0.2)
    axes.set_xlabel("layer")
    axes.set_ylabel("score")
    whole_ticks(axes, 16)
    if plan.targets:
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
