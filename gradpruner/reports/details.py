"""The tables of a run beside its results: savings, time and memory, data, engines, checks, repair, depth."""

from __future__ import annotations

from gradpruner.common.printing import (
    MISSING,
    duration,
    num_bytes,
    number,
    percent,
    ratio,
    short,
    signed_percent,
    text,
    times,
    whole,
)
from gradpruner.plans.layer_plan import runs_of
from gradpruner.reports.cells import Cell, Line, Table, exact_cell, line
from gradpruner.reports.fields import FEW_EXAMPLES
from gradpruner.reports.record import Change, Plan, Search
from gradpruner.reports.view import View

_UNITS = {
    "layers": "Decoder layers",
    "decoder_parameters": "Decoder parameters",
    "parameters": "All parameters",
    "kv_bytes_per_token": "KV cache per token",
    "flops_per_token": "FLOPs per token",
    "disk_bytes": "Size on disk",
}
PARTS = ("tuning", "recording", "choosing", "repairing", "pruning", "training")
"""What is counted of a row, in the order it is done."""


def plan_label(view: View, name: str) -> str:
    """The label of the row that a plan made."""
    plan = view.record.plans[name]
    return next((row.label for row in view.rows if row.plan is plan), text(name))


def savings_tables(view: View) -> list[Table]:
    """One table per distinct saving; plans that save the same share one."""
    groups: dict[str, list[str]] = {}
    for name, plan in view.record.plans.items():
        if plan.savings:
            groups.setdefault(repr(plan.savings), []).append(name)
    tables = []
    for names in groups.values():
        lines = [_saving(unit, change) for unit, change in view.record.plans[names[0]].savings.items()]
        caption = " · ".join(plan_label(view, name) for name in names)
        tables.append(Table(caption, ("Unit", "Before", "After", "Removed", "Ratio"), lines))
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
    """How wide the layers are that plans of heads, channels and hidden dimensions leave."""
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
    """Seconds of every part by row, their sum, and the sum as a multiple of the dense row's.

    "resumed" stands where a stage went on from an interrupted start, which may lack seconds.
    """
    lines = [
        line(
            row.label,
            *(exact_cell(duration, cost.get(part) or None) for part in PARTS),
            exact_cell(duration, cost.get("total"), "resumed" if row.recorded.cost_resumed else ""),
            MISSING if row.is_dense else times(row.costs.get("total_ratio")),
            whole(row.recorded.cost_tokens),
        )
        for row in view.rows
        if (cost := row.recorded.cost)
    ]
    names = (*(part.capitalize() for part in PARTS), "In all", "vs dense", "Trained tokens")
    return Table("Whole cost", ("Variant", *names), lines)


def finetune_table(view: View) -> Table:
    """What fine-tuning and evaluating each row took."""
    lines = []
    for row in view.rows:
        tuned, evaluated = row.recorded.finetune, row.recorded.evaluation
        # That a fine-tuning was interrupted, and from which step on its time is known.
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
    columns = ("Variant", "Trainable", "Steps", "Tokens", "Tuning time", "Tuning memory",
               "Evaluation time", "Tokens/s", "Evaluation memory")  # fmt: skip
    return Table("Fine-tuning and evaluation", columns, lines)


def stage_table(view: View) -> Table:
    """Duration and memory of each stage, with its share of the total time."""
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


def stages_said(view: View) -> str:
    """All stages in one line."""
    stages = view.record.stages
    failed = sum(stage.state == "failed" for stage in stages)
    total = duration(sum(stage.seconds or 0 for stage in stages))
    return f"{len(stages)} stages, {total} in all" + (f", {failed} failed" if failed else "")


def data_table(view: View) -> Table:
    """Source and size of the training and evaluation data."""
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
    columns = ("Data", "Source", "Format", "Rows", "Dropped", "Supervised tokens", "SHA-256")
    return Table("Data", columns, lines, words=("Source", "Format", "SHA-256"))


def serving_table(view: View) -> Table:
    """The engines that cannot serve a plan's model as it is, judging by their sources."""
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
    return Table("Engines that do not serve it", columns, lines, words=columns[1:])


def served_said(view: View) -> str:
    """The engines that serve every plan, in one line; '' when there is none."""
    states: dict[str, set[str]] = {}
    for plan in view.record.plans.values():
        for found in plan.portability:
            states.setdefault(text(found.engine), set()).add(text(found.status))
    fine = [engine for engine, found in states.items() if found == {"ok"}]
    plans = "every plan" if len(view.record.plans) > 1 else "it"
    named = " and ".join(part for part in (", ".join(fine[:-1]), *fine[-1:]) if part)
    return f"{named}: {plans} is served as it is, going by their sources." if fine else ""


def gate_table(view: View) -> Table:
    """What was verified of every pruned model before it was used."""
    lines = []
    for row in view.rows:
        report = row.recorded.verified
        if not report.checks:
            continue
        passed = sum(1 for check in report.checks if check.passed)
        logits = next((text(c.detail) for c in report.checks if c.name == "logits"), "-")
        words = f"{passed} of {len(report.checks)} checks made, none failed" if report.passed else "failed"
        kind = "" if report.passed else "failed"
        lines.append(line(row.label, text(report.level), words, logits, kind=kind))
    columns = ("Variant", "Level", "Result", "Logits against the source")
    return Table("Verified before use", columns, lines, words=columns[1:])


def repair_table(view: View) -> Table:
    """One line per cut: which layers went, what was refitted, and the error left on held-out samples."""
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
                "left as it was" if cut.ridge is None else f"{cut.ridge:g}",
                percent(cut.error_before),
                percent(cut.error_after),
            )
            lines.append(line(*words))
    columns = ("Variant", "Layers gone", "Refitted", "Ridge", "Error before", "Error after")
    caption = f"Repair ({', '.join(sorted(kinds))}): squared error of the hidden state, held-out samples"
    return Table(caption, columns, lines, words=("Layers gone", "Refitted"))


def searches(view: View) -> list[tuple[int, str, Search]]:
    """Of every row whose depth was searched: its place, its label, and the search."""
    plans = [row.plan or view.record.plans.get(row.name, Plan()) for row in view.rows]
    found = zip(view.rows, plans, strict=True)
    return [(i, row.label, plan.search) for i, (row, plan) in enumerate(found) if plan.search.curve]


def depth_table(view: View) -> Table:
    """One line per number of layers that was measured on validation rows, and its certificate."""
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
    columns = ("Variant", "Layers gone", "Parameters left", "Measured", "At worst", "Rows", "Verdict")
    return Table("How many layers may go", columns, lines, words=("Verdict",))


def harness_table(view: View) -> Table:
    """What lm-evaluation-harness measured."""
    lines = []
    for row in view.rows:
        for task, entry in row.recorded.lm_eval.items():
            for metric, scored in entry.metrics.items():
                value, spread = scored.value, scored.stderr
                # Most of its metrics are fractions; perplexities and the like are not.
                fraction = value is not None and 0 <= value <= 1
                shown = percent(value) if fraction else f"{value:.4g}" if value is not None else MISSING
                error = f"± {100 * spread:.1f}" if spread is not None and fraction else ""
                few = "*" if (entry.n or FEW_EXAMPLES) < FEW_EXAMPLES else ""
                names = (text(task), row.label, text(metric))
                lines.append(line(*names, Cell(shown, error), whole(entry.n) + few))
    lines.sort(key=lambda line: (line.cells[0].text, line.cells[2].text))
    columns = ("Task", "Variant", "Metric", "Value ± standard error", "n")
    return Table("lm-evaluation-harness", columns, lines, words=("Variant", "Metric"))
