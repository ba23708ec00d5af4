"""The headline numbers of a run or a comparison: size, quality, time."""

from __future__ import annotations

from dataclasses import dataclass

from gradpruner.common.printing import MISSING, duration, interval, percent, points, short, times, whole
from gradpruner.reports.cells import change
from gradpruner.reports.fields import Measured
from gradpruner.reports.verdict import compared
from gradpruner.reports.view import Row, View, metric_label


@dataclass(frozen=True)
class Tile:
    """A headline number: its name, its change, the values before and after, and a remark."""

    name: str
    change: str
    before: str
    after: str
    remark: str = ""


def tiles(view: View) -> list[Tile]:
    """Returns the headline numbers that are known: size, quality, time."""
    main, dense, metric = view.main, view.dense, view.metric
    if view.kind == "ablation" or main is None:
        return []
    model = view.record.model
    layers = (dense.num_layers if dense else None) or model.num_layers
    size = (dense.num_parameters if dense else None) or model.num_parameters
    before, after, tuned = compared(view)
    smaller = change(main.num_parameters, size)
    found = [
        Tile("Layers", change(main.num_layers, layers), whole(layers), whole(main.num_layers)),
        Tile("Parameters", smaller, short(size), short(main.num_parameters), main.label),
        _quality_tile(
            "Compared to dense" + ("" if tuned else ", not fine-tuned"),
            before,
            after,
            main.paired.get(metric) if tuned else None,
            metric,
        ),
    ]
    last = view.first.row("last")
    if view.kind == "compare" and last is not None and last is not main and metric in last.after:
        gain = last.rival[metric].turned() if metric in last.rival else None
        found.append(_quality_tile("Compared to last layers", last.after[metric], after, gain, metric))
    found += [time] if (time := _time_tile(main, dense)).change != MISSING else []
    shown = found if view.kind == "run" else found[1:]
    return [tile for tile in shown if {tile.before, tile.after} != {MISSING}]


def _quality_tile(
    name: str, other: Measured | None, mine: Measured | None, paired: Measured | None, metric: str
) -> Tile:
    """Returns a difference in points, with its interval if it was measured example by example."""
    gain, remark = MISSING, metric_label(metric)
    if paired is not None:
        gain = f"{points(paired.value)} points"
        remark += f"; 95%: {interval(*paired.ends)}" if paired.ends else ""
    elif other is not None and mine is not None:
        gain = f"{points(mine.value - other.value)} points"
    before, after = (percent(m.value if m else None) for m in (other, mine))
    return Tile(name, gain, before, after, remark)


def _time_tile(main: Row, dense: Row | None) -> Tile:
    """Returns a row's total time if it was recorded, otherwise its fine-tuning time."""
    costs = main.costs
    alone = times(costs.get("training_ratio"))
    if costs.get("total_ratio") is not None:
        before, after = (duration(row.costs.get("total_seconds") if row else None) for row in (dense, main))
        words = "all but evaluation" + (f"; fine-tuning alone {alone}" if alone != MISSING else "")
        return Tile("Total time", times(costs["total_ratio"]), before, after, words)
    if main.recorded.finetune.seconds is not None or dense is None:
        before, after = (duration(row.recorded.finetune.seconds if row else None) for row in (dense, main))
    else:
        before, after = times(dense.costs.get("training_ratio")), alone
    return Tile("Fine-tuning time", alone, before, after, "without recording, choosing and pruning")
