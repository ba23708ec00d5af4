"""All tables but the results: savings, time and memory, data, engines, checks, repair, depth, lm-eval."""

from __future__ import annotations

from gradpruner.common.printing import (
    MISSING,
    duration,
    num_bytes,
    number,
    percent,
    ratio,
    runs_of,
    short,
    signed_percent,
    text,
    times,
    whole,
)
from gradpruner.reports.cells import Cell, Line, Table, exact_cell, line
from gradpruner.reports.fields import FEW_EXAMPLES
from gradpruner.reports.record import Change, PlanRecord, Search
from gradpruner.reports.view import View

_UNITS = {
    "layers": "Decoder layers",
    "decoder_parameters": "Decoder parameters",
    "parameters": "All parameters",
    "kv_bytes_per_token": "KV cache per token",
    "flops_per_token": "FLOPs per token",
    "disk_bytes": "Size on disk",
}
COST_PARTS = ("tuning", "recording", "choosing", "repairing", "pruning", "training")
_COST_NAMES = {"tuning": "Dense tuning", "training": "Own training"}
"""The parts of a row's cost, in the order they are done."""


def plan_label(view: View, name: str) -> str:
    """Returns the label of the row that a plan belongs to."""
    plan = view.record.plans[name]
    return next((row.label for row in view.rows if row.plan is plan), text(name))


def savings_tables(view: View) -> list[Table]:
    """Returns one table per distinct saving; plans that save the same share a table."""
    groups: dict[str, list[str]] = {}
    for name, plan in view.record.plans.items():
        if plan.savings:
            groups.setdefault(repr(plan.savings), []).append(name)
    tables = []
    for names in groups.values():
        lines = [_saving(unit, change) for unit, change in view.record.plans[names[0]].savings.items()]
        caption = " · ".join(plan_label(view, name) for name in names)
        tables.append(Table(caption, ("Unit", "Before", "After", "Change", "Ratio"), lines))
    return tables


def _saving(unit: str, change: Change) -> Line:
    show = num_bytes if "bytes" in unit else short if unit.startswith("flops") else whole
    kept = ratio(change.after, change.before)
    return line(
        _UNITS.get(unit, text(unit).replace("_", " ").capitalize()),
        exact_cell(show, change.before),
        exact_cell(show, change.after),
        signed_percent(None if kept is None else kept - 1),
        Cell(times(kept), share=None if kept is None else min(max(kept, 0.0), 1.0)),
    )


def widths_table(view: View) -> Table:
    """Returns the widths of the layers that plans of heads, channels and hidden dimensions leave."""
    parts = {"heads": "num_heads", "kv_heads": "num_kv_heads", "channels": "intermediate_size"}
    lines = []
    for name, plan in view.record.plans.items():
        if not plan.widths:
            continue
        cells = [Cell(plan_label(view, name))]
        for key, dense in parts.items():
            known = [value for layer in plan.widths if (value := number(layer.get(key))) is not None]
            low, high = (whole(min(known)), whole(max(known))) if known else (MISSING, MISSING)
            shown = low if low == high else f"{low} to {high}"
            cells.append(Cell(shown, f"of {whole(plan.shape.get(dense))}"))
        cells.append(Cell(whole(plan.hidden), f"of {whole(plan.shape.get('hidden_size'))}"))
        lines.append(line(*cells))
    columns = ("Plan", "Query heads", "Key/value heads", "MLP channels", "Hidden dimensions")
    return Table("Widths of a layer", columns, lines)


def whole_cost_table(view: View) -> Table:
    """Returns each row's time by part, its total time, and the total as a multiple of the dense row's.

    "resumed" marks rows with a resumed stage, whose time before the interruption may be missing.
    """
    lines = [
        line(
            row.label,
            *(exact_cell(duration, cost.seconds.get(part) or None) for part in COST_PARTS),
            exact_cell(duration, cost.seconds.get("total"), "resumed" if cost.resumed else ""),
            MISSING if row.is_dense else times(row.costs.get("total_ratio")),
            whole(cost.tokens),
        )
        for row in view.rows
        if (cost := row.recorded.cost).seconds
    ]
    names = (
        *(_COST_NAMES.get(part, part.capitalize()) for part in COST_PARTS),
        "Total",
        "vs dense",
        "Trained tokens",
    )
    return Table("Total time", ("Variant", *names), lines)


def finetune_table(view: View) -> Table:
    """Returns time, memory and tokens of fine-tuning and evaluating each row."""
    lines = []
    for row in view.rows:
        tuned, evaluated = row.recorded.finetune, row.recorded.evaluation
        # If fine-tuning was interrupted: the step it resumed at, or the step its time is known from.
        resumed = f"resumed at {whole(tuned.resumed_from)}" if tuned.resumed_from else ""
        if tuned.measured_from:
            resumed = f"timed from {whole(tuned.measured_from)}"
        found = line(
            row.label,
            exact_cell(short, tuned.trainable_parameters),
            Cell(whole(tuned.steps), resumed),
            exact_cell(short, tuned.tokens),
            exact_cell(duration, tuned.seconds),
            exact_cell(num_bytes, tuned.peak_memory_bytes),
            exact_cell(duration, evaluated.seconds),
            short(evaluated.tokens_per_second),
            exact_cell(num_bytes, evaluated.peak_memory_bytes),
        )
        if any(cell.text != MISSING for cell in found.cells[1:]):
            lines.append(found)
    columns = ("Variant", "Trainable", "Steps", "Tokens", "Training time", "Training memory",
               "Evaluation time", "Tokens/s", "Evaluation memory")  # fmt: skip
    return Table("Fine-tuning and evaluation", columns, lines)


def stage_table(view: View) -> Table:
    """Returns time and memory of each stage, with its share of the total time."""
    stages = view.record.stages
    total = sum(stage.seconds or 0 for stage in stages)
    lines = []
    for stage in stages:
        state, share = text(stage.state), ratio(stage.seconds, total)
        cells = (
            text(stage.name).replace("_", " "),
            Cell(state, "resumed" if stage.resumed is True else ""),
            exact_cell(duration, stage.seconds),
            Cell(percent(share), share=share),
            exact_cell(num_bytes, stage.peak_memory_bytes),
        )
        lines.append(line(*cells, kind="failed" if state == "failed" else ""))
    return Table("Stages", ("Stage", "State", "Time", "Share", "Peak memory"), lines, words=("State",))


def stages_summary(view: View) -> str:
    """Returns the number of stages and their total time, in one line."""
    stages = view.record.stages
    failed = sum(stage.state == "failed" for stage in stages)
    total = duration(sum(stage.seconds or 0 for stage in stages))
    return f"{len(stages)} stages, {total} in total" + (f", {failed} failed" if failed else "")


def data_table(view: View) -> Table:
    """Returns source and size of the training and evaluation data."""
    lines = [
        line(
            label,
            text(part.source),
            text(part.format),
            whole(part.rows),
            whole(part.dropped_rows),
            whole(part.supervised_tokens),
            Cell(text(part.sha256)[:12], exact="" if part.sha256 is None else text(part.sha256)),
        )
        for label, part in (("Training", view.record.train), ("Evaluation", view.record.eval))
        if part.model_fields_set
    ]
    columns = ("Data", "Source", "Format", "Rows", "Dropped", "Learned tokens", "SHA-256")
    return Table("Data", columns, lines, words=("Source", "Format", "SHA-256"))


def serving_table(view: View) -> Table:
    """Returns the engines that cannot serve a plan's model as it is, judging by their source code."""
    lines = []
    for name, plan in view.record.plans.items():
        for found in plan.portability:
            status = text(found.status)
            if status == "ok":
                continue
            both = " (also without pruning)" if found.also_unpruned else ""
            kind = "failed" if status in ("wrong", "refused") and not both else ""
            words = (plan_label(view, name), text(found.engine), status + both, text(found.reason or "-"))
            lines.append(line(*words, kind=kind))
    columns = ("Plan", "Engine", "State", "Why")
    return Table("Engines that cannot serve the pruned models", columns, lines, words=columns[1:])


def served_summary(view: View) -> str:
    """Names the engines that serve the models of all plans, in one line; '' if there are none."""
    states: dict[str, set[str]] = {}
    for plan in view.record.plans.values():
        for found in plan.portability:
            states.setdefault(text(found.engine), set()).add(text(found.status))
    fine = [engine for engine, found in states.items() if found == {"ok"}]
    models = "all pruned models" if len(view.record.plans) > 1 else "the pruned model"
    named = " and ".join(part for part in (", ".join(fine[:-1]), *fine[-1:]) if part)
    whose = "their" if len(fine) > 1 else "its"
    return f"{named} can serve {models} as is, judging by {whose} source code." if fine else ""


def verification_table(view: View) -> Table:
    """Returns the checks that every pruned model passed or failed before it was used."""
    lines = []
    for row in view.rows:
        report = row.recorded.verified
        if not report.checks:
            continue
        passed = sum(1 for check in report.checks if check.passed)
        logits = next((text(c.detail) for c in report.checks if c.name == "logits"), "-")
        words = f"{passed} of {len(report.checks)} checks passed, none failed" if report.passed else "failed"
        undone = ", ".join(text(check.name) for check in report.checks if check.passed is None)
        words += f"; not done: {undone}" if report.passed and undone else ""
        kind = "" if report.passed else "failed"
        lines.append(line(row.label, text(report.level), words, logits, kind=kind))
    columns = ("Variant", "Level", "Result", "Logits against the source")
    return Table("Verified before use", columns, lines, words=columns[1:])


def repair_table(view: View) -> Table:
    """Returns one line per cut: layers removed, linear refitted, and error on held-out samples."""
    lines = []
    kinds = set()
    for row in view.rows:
        for cut in row.recorded.cuts:
            kinds.add(text(row.recorded.repair_kind).replace("_", " "))
            gone = [int(layer) for layer in cut.gone if number(layer) is not None]
            words = (
                row.label,
                runs_of(gone) if gone else MISSING,
                f"{text(cut.linear)} of layer {whole(cut.layer)}",
                "unchanged" if cut.ridge is None else f"{cut.ridge:g}",
                percent(cut.error_before),
                percent(cut.error_after),
            )
            lines.append(line(*words))
    columns = ("Variant", "Layers removed", "Refitted", "Ridge", "Error before", "Error after")
    caption = f"Repair ({', '.join(sorted(kinds))}): squared error of the hidden state on held-out samples"
    return Table(caption, columns, lines, words=("Layers removed", "Refitted"))


def searches(view: View) -> list[tuple[int, str, Search]]:
    """Returns index, label and search of every row whose number of layers was searched for."""
    plans = [row.plan or view.record.plans.get(row.name, PlanRecord()) for row in view.rows]
    found = zip(view.rows, plans, strict=True)
    return [(i, row.label, plan.search) for i, (row, plan) in enumerate(found) if plan.search.curve]


def depth_table(view: View) -> Table:
    """Returns one line per number of layers measured on validation rows, with its certified bound."""
    lines = []
    for _, label, search in searches(view):
        for depth in search.curve:
            words = (
                label,
                whole(depth.num_prune),
                short(depth.parameters),
                signed_percent(-depth.loss),
                signed_percent(-depth.upper),
                whole(depth.rows),
                text(depth.verdict),
            )
            lines.append(line(*words, kind="main" if depth.num_prune == search.best else ""))
    columns = ("Variant", "Layers removed", "Parameters left", "Measured", "Worst case", "Rows", "Verdict")
    return Table("How many layers can be removed", columns, lines, words=("Verdict",))


def harness_table(view: View) -> Table:
    """Returns the scores of lm-evaluation-harness."""
    lines = []
    for row in view.rows:
        for task, entry in row.recorded.lm_eval.items():
            for metric, scored in entry.metrics.items():
                value, spread = scored.value, scored.stderr
                # Most harness metrics are fractions; some, such as perplexity, are not.
                fraction = value is not None and 0 <= value <= 1
                shown = percent(value) if fraction else f"{value:.4g}" if value is not None else MISSING
                error = f"± {100 * spread:.1f}" if spread is not None and fraction else ""
                few = "*" if (entry.n or FEW_EXAMPLES) < FEW_EXAMPLES else ""
                names = (text(task), row.label, text(metric))
                lines.append(line(*names, Cell(shown, error), whole(entry.n) + few))
    lines.sort(key=lambda line: (line.cells[0].text, line.cells[2].text))
    columns = ("Task", "Variant", "Metric", "Value ± standard error", "n")
    return Table("lm-evaluation-harness", columns, lines, words=("Variant", "Metric"))
