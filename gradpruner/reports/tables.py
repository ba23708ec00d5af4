"""The report's tables as plain data, so that HTML, terminal and markdown show the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gradpruner.reports.cells import (
    Cell,
    Row,
    Table,
    bytes_cell,
    exact_of,
    markdown_of,
    measured_cell,
    paired_cell,
    savings_row,
    short_cell,
)
from gradpruner.reports.formats import (
    MISSING,
    duration,
    interval,
    number,
    percent,
    ratio,
    short,
    signed_percent,
    text,
    times,
    whole,
)
from gradpruner.reports.reading import (
    Plan,
    RunView,
    Variant,
    mapping,
    metric_label,
    read_run,
    sequence,
)


def accuracy_table(view: RunView) -> Table:
    """Returns quality and size of every variant, before and after fine-tuning."""
    columns = ["Variant", "Layers", "Parameters"]
    shown = []
    for metric in view.metrics:
        if any(metric in v.before for v in view.variants):
            columns.append(f"{metric_label(metric)} before tuning")
            shown.append((metric, "before"))
        if any(metric in v.after for v in view.variants):
            columns.append(f"{metric_label(metric)} [95%]")
            shown.append((metric, "after"))
    paired = any(view.metric in v.paired for v in view.variants)
    columns += ["Relative to dense", *(["Paired difference [95%]"] if paired else []), "n"]
    rows = []
    for variant in view.variants:
        cells = [Cell(variant.label), *_size_cells(view, variant)]
        moments = {"before": variant.before, "after": variant.after}
        cells += [measured_cell(moments[when].get(metric)) for metric, when in shown]
        cells.append(Cell(relative_quality(view, variant)))
        if paired:
            cells.append(paired_cell(variant.paired.get(view.metric)))
        cells.append(_count_cell(variant))
        rows.append(_variant_row(view, variant, cells))
    return Table("Quality of every variant", tuple(columns), tuple(rows))


def finetune_table(view: RunView) -> Table:
    """Returns what fine-tuning each variant took."""
    columns = ("Variant", "Trainable", "Steps", "Tokens", "Time", "vs dense", "Peak memory")
    rows = []
    for variant in view.variants:
        tuned = variant.finetune
        cells = [
            Cell(variant.label),
            short_cell(tuned.get("trainable_parameters")),
            Cell(whole(tuned.get("steps")), _resumed_words(tuned)),
            short_cell(tuned.get("tokens")),
            Cell(duration(tuned.get("seconds")), exact=exact_of(tuned.get("seconds"), "s")),
            Cell(relative_time(view, variant)),
            bytes_cell(tuned.get("peak_memory_bytes")),
        ]
        # The error itself is told once, in the accuracy table.
        rows.append(replace(_variant_row(view, variant, cells), error=""))
    return Table("Fine-tuning", columns, tuple(rows))


def _resumed_words(tuned: dict[str, Any]) -> str:
    """Says that a fine-tuning was interrupted, and from which step on its time is known."""
    resumed, behind = number(tuned.get("resumed_from")), number(tuned.get("measured_from"))
    if behind:
        return f"timed from {whole(behind)}"
    return f"resumed at {whole(resumed)}" if resumed else ""


def evaluation_table(view: RunView) -> Table:
    """Returns what evaluating each variant took."""
    rows = []
    for variant in view.variants:
        evaluated = variant.evaluation
        cells = [
            Cell(variant.label),
            Cell(duration(evaluated.get("seconds")), exact=exact_of(evaluated.get("seconds"), "s")),
            Cell(short(evaluated.get("tokens_per_second"))),
            bytes_cell(evaluated.get("peak_memory_bytes")),
        ]
        # The error itself is told once, in the accuracy table.
        rows.append(replace(_variant_row(view, variant, cells), error=""))
    return Table("Evaluation", ("Variant", "Time", "Tokens/s", "Peak memory"), tuple(rows))


def savings_tables(view: RunView) -> tuple[Table, ...]:
    """Returns one table per distinct saving; plans that save the same share one. Then the widths, if any."""
    groups: dict[tuple[Any, ...], list[Plan]] = {}
    for plan in view.plans.values():
        if plan.savings:
            groups.setdefault(tuple(plan.savings.items()), []).append(plan)
    labels = {v.plan.name: v.label for v in reversed(view.variants) if v.plan is not None}
    tables = []
    for plans in groups.values():
        names = " · ".join(labels.get(plan.name, text(plan.name)) for plan in plans)
        rows = [savings_row(unit, before, after) for unit, (before, after) in plans[0].savings.items()]
        columns = ("Unit", "Before", "After", "Removed", "Ratio")
        tables.append(Table(names, columns, tuple(rows)))
    widths = widths_table(view)
    return (*tables, *([widths] if widths.rows else []))


def widths_table(view: RunView) -> Table:
    """Returns how wide the layers are that plans of heads, channels and hidden dimensions leave."""
    rows = []
    labels = {v.plan.name: v.label for v in reversed(view.variants) if v.plan is not None}
    for name, plan in mapping(view.run, "plans").items():
        shape, layers = mapping(plan, "shape"), [mapping(w) for w in sequence(plan, "widths")]
        if not layers:
            continue
        cells = [Cell(labels.get(name, text(name)))]
        parts = {"heads": "num_heads", "kv_heads": "num_kv_heads", "channels": "intermediate_size"}
        for key, dense in parts.items():
            found = [value for layer in layers if (value := number(layer.get(key))) is not None]
            low, high = (whole(min(found)), whole(max(found))) if found else (MISSING, MISSING)
            cells.append(Cell(low if low == high else f"{low} to {high}", f"of {whole(shape.get(dense))}"))
        cells.append(Cell(whole(mapping(plan).get("hidden")), f"of {whole(shape.get('hidden_size'))}"))
        rows.append(Row(tuple(cells)))
    columns = ("Plan", "Query heads", "Key/value heads", "MLP channels", "Hidden dimensions")
    return Table("Widths of a layer", columns, tuple(rows))


def stage_table(view: RunView) -> Table:
    """Returns duration and memory of each stage, with its share of the total time."""
    stages = [mapping(stage) for stage in sequence(view.run, "stages")]
    total = sum(number(stage.get("seconds")) or 0 for stage in stages)
    rows = []
    for stage in stages:
        state = text(stage.get("state"))
        share = ratio(stage.get("seconds"), total)
        cells = (
            Cell(text(stage.get("name")).replace("_", " ")),
            Cell(state, "resumed" if stage.get("resumed") is True else ""),
            Cell(duration(stage.get("seconds")), exact=exact_of(stage.get("seconds"), "s")),
            Cell(percent(share), share=share),
            bytes_cell(stage.get("peak_memory_bytes")),
        )
        rows.append(Row(cells, kind="failed" if state == "failed" else ""))
    if len(rows) > 1:
        cells = (Cell("All stages"), Cell(""), Cell(duration(total)), Cell(""), Cell(""))
        rows.append(Row(cells, kind="main"))
    columns = ("Stage", "State", "Time", "Share", "Peak memory")
    return Table("Stages", columns, tuple(rows), words=("State",))


def data_table(view: RunView) -> Table:
    """Returns source and size of the training and evaluation data."""
    rows = []
    for name, label in (("train", "Training"), ("eval", "Evaluation")):
        part = mapping(view.run, "data", name)
        if part:
            sha256 = part.get("sha256")
            cells = (
                Cell(label),
                Cell(text(part.get("source"))),
                Cell(text(part.get("format"))),
                Cell(whole(part.get("rows"))),
                Cell(whole(part.get("dropped_rows"))),
                Cell(whole(part.get("supervised_tokens"))),
                Cell(text(sha256)[:12], exact="" if sha256 is None else text(sha256)),
            )
            rows.append(Row(cells))
    columns = ("Data", "Source", "Format", "Rows", "Dropped", "Supervised tokens", "SHA-256")
    return Table("Data", columns, tuple(rows), words=("Source", "Format", "SHA-256"))


def summary_table(view: RunView) -> Table:
    """Returns the short table of the terminal and the README: one line per variant."""
    columns = ("Variant", "Layers", "Params", f"{metric_label(view.metric)} [95%]", "n",
               "vs dense", "Fine-tune", "Time")  # fmt: skip
    rows = []
    for variant in view.variants:
        measured = variant.after.get(view.metric)
        detail = "" if measured is None else interval(measured.low, measured.high)
        quality = percent(measured.value if measured else None)
        cells = [
            Cell(variant.label),
            Cell(whole(variant.num_layers)),
            Cell(short(variant.num_parameters)),
            Cell(quality, detail=detail),
            _count_cell(variant) if measured else Cell(MISSING),
            Cell(relative_quality(view, variant)),
            Cell(duration(variant.finetune.get("seconds"))),
            Cell(relative_time(view, variant)),
        ]
        rows.append(_variant_row(view, variant, cells))
    return Table("Results", columns, tuple(rows))


def markdown_table(run: dict[str, Any]) -> str:
    """Returns the variants of one run as a markdown table, ending in a newline.

    Args:
        run: A run record as read from run.json; missing parts show as a dash.

    Returns:
        GitHub-flavoured markdown; a failed variant has its error in the place of its accuracy.
    """
    table = summary_table(read_run(run))
    return markdown_of(table, next(i for i, name in enumerate(table.columns) if name.endswith("[95%]")))


def relative_quality(view: RunView, variant: Variant) -> str:
    """Returns the relative change of the headline metric against dense, both fine-tuned."""
    if variant.is_dense or view.dense is None:
        return MISSING
    mine, dense = variant.after.get(view.metric), view.dense.after.get(view.metric)
    if mine is None or dense is None:
        return MISSING
    return signed_percent(ratio(mine.value - dense.value, dense.value))


def relative_time(view: RunView, variant: Variant) -> str:
    """Returns the fine-tuning time as a multiple of the dense model's."""
    if variant.is_dense or view.dense is None:
        return MISSING
    return times(ratio(variant.finetune.get("seconds"), view.dense.finetune.get("seconds")))


def _variant_row(view: RunView, variant: Variant, cells: Sequence[Cell]) -> Row:
    kind = "failed" if variant.error is not None else "main" if variant is view.main else ""
    return Row(tuple(cells), kind=kind, error=text(variant.error, 500) if variant.error else "")


def _size_cells(view: RunView, variant: Variant) -> list[Cell]:
    dense = view.dense
    details = ["", ""]
    if dense is not None and not variant.is_dense:
        for i, (mine, whole_model) in enumerate(
            (
                (variant.num_layers, dense.num_layers),
                (variant.num_parameters, dense.num_parameters),
            )
        ):
            fraction = ratio(mine, whole_model)
            details[i] = "" if fraction is None else signed_percent(fraction - 1)
    parameters = variant.num_parameters
    return [
        Cell(whole(variant.num_layers), detail=details[0]),
        Cell(short(parameters), detail=details[1], exact=exact_of(parameters)),
    ]


def _count_cell(variant: Variant) -> Cell:
    """Returns the smallest n behind the variant's results, starred when it is too small."""
    found = [m for m in (variant.after or variant.before).values() if m.n is not None]
    if not found:
        return Cell(MISSING)
    fewest = min(found, key=lambda m: m.n or 0)
    mark = "*" if fewest.is_small else ""
    return Cell(f"{whole(fewest.n)}{mark}")


def serving_table(view: RunView) -> Table:
    """Returns how inference engines serve what every plan leaves, from reading their sources."""
    rows = []
    for name, plan in mapping(view.run, "plans").items():
        for verdict in map(mapping, sequence(plan, "portability")):
            status = text(verdict.get("status"))
            both = " (also without pruning)" if verdict.get("also_unpruned") else ""
            kind = "failed" if status in ("wrong", "refused") and not both else ""
            words = (
                text(name),
                text(verdict.get("engine")),
                status + both,
                text(verdict.get("reason") or "-"),
            )
            rows.append(Row(tuple(map(Cell, words)), kind=kind))
    columns = ("Plan", "Engine", "State", "Why")
    return Table("Served by other engines", columns, tuple(rows), words=columns[1:])


def gate_table(view: RunView) -> Table:
    """Returns what was verified of every pruned model before it was used."""
    rows = []
    for variant in map(mapping, mapping(view.run, "variants").values()):
        report = mapping(variant, "pruning", "verified")
        checks = [mapping(check) for check in sequence(report, "checks")]
        if not checks:
            continue
        passed = sum(1 for check in checks if check.get("passed"))
        logits = next((text(c.get("detail")) for c in checks if c.get("name") == "logits"), "-")
        label, level = text(variant.get("label")), text(report.get("level"))
        words = (label, level, f"{passed} of {len(checks)} checks made, none failed", logits)
        if not report.get("passed"):
            words = (label, level, "failed", logits)
        rows.append(Row(tuple(map(Cell, words)), kind="" if report.get("passed") else "failed"))
    columns = ("Variant", "Level", "Result", "Logits against the source")
    return Table("Verified before use", columns, tuple(rows), words=columns[1:])
