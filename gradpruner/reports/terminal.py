"""A run or a study in the terminal, within 100 columns: a table, a strip of layers per plan, the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from gradpruner.common.printing import number, plain, print_line, text, whole
from gradpruner.common.ranking import print_scores
from gradpruner.reports.cells import Table
from gradpruner.reports.details import savings_tables
from gradpruner.reports.notes import budget_words, serving_note
from gradpruner.reports.record import PlanRecord
from gradpruner.reports.shipping import Advice, advice
from gradpruner.reports.tables import short_table
from gradpruner.reports.verdict import judge
from gradpruner.reports.view import Row, View, read

_STYLES = {
    "even": "bold cyan",
    "unclear": "bold yellow",
    "better": "bold green",
    "worse": "bold red",
    "unknown": "bold",
}
# Role of a layer -> its symbol, its ASCII symbol and its style.
_GLYPHS = {
    "keep": ("█", "#", "blue"),
    "receive": ("█", "#", "blue"),
    "merge": ("▼", "m", "yellow"),
    "drop": ("·", ".", "dim"),
}
_PER_LINE = 80


def print_summary(
    source: dict[str, Any],
    console: Console,
    folder: Path | None = None,
    *,
    advise: bool = True,
    decisions: bool = False,
) -> None:
    """Prints results, layers, verdict, advice and warnings of one run or study.

    Args:
        source: The contents of run.json or study.json; missing parts are left out.
        console: Where to print; gets no colours if it is not a terminal, only ASCII if it cannot show more.
        folder: The record's folder; by default the folder it was written to.
        advise: Print which model to ship, and the next commands.
        decisions: Print scores and plans alone, if there are any, although models have been measured.
    """
    view = read(source)
    print_line(console, text(title_of(view), 90), "bold")
    measured = any(row.after or row.before or row.error for row in view.rows)
    if (measured and not decisions) or not _print_decisions(view, console):
        ship = advice(view, folder)
        _print_results(view, console, ship.row if ship else None)
        if advise and ship is not None:
            _print_advice(ship, console)
    for warning in view.record.warnings:
        print_line(console, f"Warning: {text(warning)}", "yellow")


def title_of(view: View) -> str:
    """Returns the title of a report."""
    fallback = {"run": "GradPruner run", "compare": "Comparison", "ablation": "Ablation"}
    return text(view.record.title or fallback[view.kind], 200)


def _print_results(view: View, console: Console, ship: Row | None) -> None:
    """Prints the table of rows, their layers and the verdict."""
    table = short_table(view, ship)
    if table.lines:
        console.print(rich_table(table, console))
    if any(cell.text.endswith("*") for line in table.lines for cell in line.cells):
        print_line(console, "* fewer than 100 examples: rely on the interval, not on the value.", "dim")
    if view.kind == "run":
        strips = [(row.label, row.plan) for row in view.rows if row.plan is not None]
        rows = {row.name for row in view.rows}
        planned = [
            (f"planned: {text(name)}", plan) for name, plan in view.record.plans.items() if name not in rows
        ]
        _print_strips(strips + planned, console)
        console.print()
    verdict = judge(view)
    print_line(console, verdict.word, _STYLES[verdict.level])
    for line in (verdict.sentence, budget_words(view), serving_note(view)):
        if line:
            print_line(console, line)
    for note in verdict.notes:
        print_line(console, f"- {note}")


def _print_advice(ship: Advice, console: Console) -> None:
    """Prints which model to ship, and the next commands."""
    print_line(console, ship.heading, "bold")
    for words in (ship.path, ship.reason):
        if words:
            print_line(console, f"  {words}")
    for step in ship.commands:
        print_line(console, f"  {step.title}: {step.command}")


def _print_decisions(view: View, console: Console) -> bool:
    """Prints what is known before any evaluation: scores, plans, savings. Returns False if nothing is."""
    record = view.record
    for name, scores in record.scores.items():
        values, low, high = (
            [number(v) or 0.0 for v in part] for part in (scores.values, scores.low, scores.high)
        )
        print_scores(console, text(name), values, low, high)
    _print_strips([(text(name), plan) for name, plan in view.record.plans.items()], console)
    for table in savings_tables(view):
        print_line(console, f"Savings: {table.caption}", "bold")
        console.print(rich_table(table, console))
    recorded = bool(record.trace.model_fields_set)
    if recorded and not view.record.plans:
        steps, effective = whole(record.trace.num_steps), whole(record.trace.effective_steps)
        print_line(console, f"{steps} steps recorded; {effective} of them with energy.")
    return bool(recorded or view.record.plans or record.scores)


def rich_table(table: Table, console: Console) -> RichTable:
    """Returns a table for the console; a failed line shows "failed" instead of its quality."""
    ascii_only = console.options.ascii_only
    shown = RichTable(box=box.ASCII if ascii_only else box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(table.columns):
        # Only labels may wrap: a wrapped number could be misread.
        if i:
            shown.add_column(Text(name), justify="right", no_wrap=True, overflow="fold")
        else:
            shown.add_column(Text(name), overflow="fold", min_width=12, max_width=26)
    styles = {"failed": "red", "main": "bold", "": ""}
    for line in table.lines:
        cells = [plain(text, console) for text in table.texts(line, "failed")]
        shown.add_row(*(Text(cell) for cell in cells), style=styles[line.kind])
    return shown


def _print_strips(plans: list[tuple[str, PlanRecord]], console: Console) -> None:
    shown = [(label, plan) for label, plan in plans if plan.actions]
    if not shown:
        return
    glyphs = {role: (sign[console.options.ascii_only], style) for role, (*sign, style) in _GLYPHS.items()}
    legend = Text("Layers: ")
    for role, word in (("keep", "kept"), ("merge", "merged"), ("drop", "dropped")):
        legend.append(*glyphs[role]).append(f" {word}  ")
    console.print(legend)
    for label, plan in shown:
        print_line(console, f"{label}{_merge_words(plan)}")
        for start in range(0, len(plan.actions), _PER_LINE):
            part = plan.actions[start : start + _PER_LINE]
            line = Text(f"{part[0].layer:>4} ", style="dim")
            for action in part:
                line.append(*glyphs[plan.roles[action.layer]])
            console.print(line.append(f" {part[-1].layer}", style="dim"))


def _merge_words(plan: PlanRecord) -> str:
    """Returns a plan in words, for example ': 19 of 32 kept; merged 18, 19 into 17'."""
    words = [f"{', '.join(map(str, layers))} into {to}" for to, layers in plan.targets.items()]
    merged = f"; merged {'; '.join(words)}" if words else ""
    return f": {len(plan.kept)} of {len(plan.actions)} kept{merged}"
