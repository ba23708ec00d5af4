"""Repair and depth in the report: how well each cut was made up for, and how many layers were certified."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from gradpruner.plans.layer_plan import runs_of
from gradpruner.reports.cells import Cell, Row, Table
from gradpruner.reports.drawing import Key, Plot, drawn, series
from gradpruner.reports.formats import MISSING, number, percent, short, signed_percent, text, whole
from gradpruner.reports.reading import RunView, count, mapping, sequence
from gradpruner.reports.svg import colour, house_style, whole_ticks


def repair_table(view: RunView) -> Table:
    """One line per cut: which layers went, what was refitted, and the error left on held-out samples."""
    rows = []
    kinds = set()
    for variant in view.variants:
        repair = mapping(view.run, "variants", variant.name, "repair")
        kinds |= {text(repair.get("kind")).replace("_", " ")} if repair else set()
        for cut in map(mapping, sequence(repair, "cuts")):
            gone = [int(layer) for layer in sequence(cut, "gone")]
            ridge = number(cut.get("ridge"))
            cells = (
                Cell(variant.label),
                Cell(runs_of(gone)),
                Cell(f"{text(cut.get('linear'))} of layer {whole(number(cut.get('layer')))}"),
                Cell("left as it was" if ridge is None else f"{ridge:g}"),
                Cell(percent(number(cut.get("error_before")))),
                Cell(percent(number(cut.get("error_after")))),
            )
            rows.append(Row(cells))
    columns = ("Variant", "Layers gone", "Refitted", "Ridge", "Error before", "Error after")
    caption = f"Repair ({', '.join(sorted(kinds))}): squared error of the hidden state, held-out samples"
    return Table(caption, columns, tuple(rows), words=("Layers gone", "Refitted"))


def depth_table(view: RunView) -> Table:
    """One line per number of layers that was measured on validation rows, and its certificate."""
    rows = []
    for variant in view.variants:
        search = _search(view, variant.name)
        for point in _points(search):
            chosen = point["num_prune"] == count(search.get("best"))
            cells = (
                Cell(variant.label),
                Cell(whole(point["num_prune"])),
                Cell(short(number(point["parameters"]))),
                Cell(signed_percent(-point["loss"])),
                Cell(signed_percent(-point["upper"])),
                Cell(whole(point["rows"])),
                Cell(text(point["verdict"])),
            )
            rows.append(Row(cells, kind="main" if chosen else ""))
    columns = ("Variant", "Layers gone", "Parameters left", "Measured", "At worst", "Rows", "Verdict")
    return Table("How many layers may go", columns, tuple(rows), words=("Verdict",))


def draw_depths(view: RunView) -> Plot | None:
    """Draws quality on validation rows against the layers that go, with the certified bound."""
    found = [(i, v.label, _search(view, v.name)) for i, v in enumerate(view.variants)]
    found = [(i, label, search) for i, label, search in found if _points(search)]
    if not found:
        return None
    limit = number(found[0][2].get("limit")) or 0.0

    def paint(axes: Axes) -> None:
        for i, _, search in found:
            points = _points(search)
            hue = colour(series(i))
            axes.plot(
                [p["num_prune"] for p in points], [-p["loss"] for p in points], "o-", color=hue, markersize=5
            )
            for point in points:
                axes.vlines(point["num_prune"], -point["upper"], -point["loss"], color=hue, linewidth=1.4)
        axes.axhline(-limit, color=colour("ink"), linewidth=1.2, dashes=(4, 3))
        axes.set_xlabel("layers gone")
        axes.set_ylabel("against dense, before any recovery")
        axes.yaxis.set_major_formatter(lambda value, _: percent(value, 1))
        whole_ticks(axes, 10)

    said = []
    for _, label, search in found:
        best = count(search.get("best"))
        said.append(f"{label}: {best if best is not None else 'no number of'} layers certified")
    rows = count(found[0][2].get("rows"))
    words = f"at most {percent(limit, 2)} lost on {whole(rows)} validation rows"
    with house_style():
        drawing = drawn("depths", 300, paint)
    legend = [Key(series(i), label, "line") for i, label, _ in found]
    return Plot(
        "depths",
        "How many layers may go",
        f"Dots are measured losses; lines reach down to the worst case. {'; '.join(said)}, {words}.",
        f"Loss by layers gone. {'; '.join(said)}.",
        drawing,
        (*legend, Key("ink", words, "line", "5 4")),
    )


def _search(view: RunView, name: str) -> dict[str, Any]:
    variant = next((v for v in view.variants if v.name == name), None)
    plan = variant.plan.name if variant and variant.plan else name
    return mapping(view.run, "plans", plan, "search")


def _points(search: dict[str, Any]) -> list[dict[str, Any]]:
    """The measured numbers of layers whose figures are all there."""
    points = []
    for entry in map(mapping, sequence(search, "curve")):
        values = {name: number(entry.get(name)) for name in ("num_prune", "loss", "upper", "rows")}
        if None not in values.values():
            others = {"verdict": entry.get("verdict") or MISSING, "parameters": entry.get("parameters")}
            points.append({**values, **others})
    return points
