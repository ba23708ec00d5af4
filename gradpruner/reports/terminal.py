"""The run in the terminal: one table, a strip of layers per plan, the verdict. Fits 100 columns."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from gradpruner.reports.cells import Table
from gradpruner.reports.formats import number, text, whole
from gradpruner.reports.reading import Plan, RunView, mapping, read_run, sequence
from gradpruner.reports.tables import savings_tables, summary_table
from gradpruner.reports.verdict import judge
from gradpruner.reports.whole_cost import whole_cost_table

VERDICT_STYLES = {
    "even": "bold cyan",
    "unclear": "bold yellow",
    "better": "bold green",
    "worse": "bold red",
    "unknown": "bold",
}
_GLYPHS = {"keep": "█", "receive": "█", "merge": "▼", "drop": "·"}
_PLAIN_GLYPHS = {"keep": "#", "receive": "#", "merge": "m", "drop": "."}
_GLYPH_STYLES = {"keep": "blue", "receive": "blue", "merge": "yellow", "drop": "dim"}
_ASCII = str.maketrans({"–": "-", "−": "-", "×": "x", "→": "->", "…": "...", "·": "."})
_PER_LINE = 80


def print_summary(run: dict[str, Any], console: Console) -> None:
    """Prints results, layers, verdict and warnings of one run.

    Args:
        run: A run record as read from run.json; missing parts are left out.
        console: Where to; no colours when it is no terminal, no symbols when it cannot show them.
    """
    view = read_run(run)
    say(console, text(run.get("title") or "GradPruner run", 90), "bold")
    measured = any(row.get("evaluation") or row.get("before") for row in map(mapping, _rows(run)))
    if measured or not _print_decisions(view, console):
        _print_results(view, console)
    for warning in sequence(run, "warnings"):
        say(console, f"Warning: {text(warning)}", "yellow")


def _rows(run: dict[str, Any]) -> list[Any]:
    return list(mapping(run, "variants").values())


def _print_results(view: RunView, console: Console) -> None:
    """What was measured: the table of variants, their layers, the verdict."""
    if view.variants:
        table = summary_table(view)
        console.print(rich_table(table, console))
        for row in table.rows:
            if row.kind == "failed":
                say(console, f"{row.cells[0].text} failed: {row.error}", "red")
        if any(cell.text.endswith("*") for row in table.rows for cell in row.cells[4:5]):
            say(console, "* fewer than 100 examples: read the interval.", "dim")
    costs = whole_cost_table(view, tokens=False)
    if costs.rows:
        say(console, "Whole cost of every row: all that had to be done for it", "dim")
        console.print(rich_table(costs, console))
    strips = [(v.label, v.plan) for v in view.variants if v.plan is not None]
    rows = {v.name for v in view.variants}
    planned = [(f"planned: {text(name)}", plan) for name, plan in view.plans.items() if name not in rows]
    _print_strips(strips + planned, console)
    verdict = judge(view)
    console.print()
    say(console, verdict.word, VERDICT_STYLES[verdict.level])
    say(console, verdict.sentence)
    for note in verdict.notes:
        say(console, f"- {note}")


def _print_decisions(view: RunView, console: Console) -> bool:
    """What is known before anything is measured: scores, plans, savings. Returns whether there was any."""
    for name, scores in mapping(view.run, "scores").items():
        _print_scores(text(name), sequence(scores, "values"), console)
    _print_strips([(text(name), plan) for name, plan in view.plans.items()], console)
    for table in savings_tables(view):
        say(console, f"Savings: {table.caption}", "bold")
        console.print(rich_table(table, console))
    facts = mapping(view.run, "trace")
    if facts and not view.plans:
        steps, effective = whole(facts.get("num_steps")), whole(facts.get("effective_steps"))
        say(console, f"{steps} steps recorded, {effective} with energy.")
    return bool(facts or view.plans or mapping(view.run, "scores"))


def _print_scores(name: str, values: list[Any], console: Console) -> None:
    """One line per layer, least important first; the bar is the share of the highest score."""
    numbers = [number(value) or 0.0 for value in values]
    highest = max(numbers, default=0.0)
    table = RichTable("layer", "score", "of the highest", title=f"Scores: {name}", title_justify="left")
    for layer in sorted(range(len(numbers)), key=lambda i: (numbers[i], i)):
        share = numbers[layer] / highest if highest else 0.0
        table.add_row(str(layer), f"{numbers[layer]:.3e}", f"{share:.2%}")
    table.box = box.ASCII if console.options.ascii_only else box.SIMPLE_HEAD
    console.print(table)


def say(console: Console, line: str, style: str = "") -> None:
    """Prints one line as it is, without symbols the console cannot show."""
    # Text, not a string: a label such as "[red]" is no markup.
    console.print(Text(_plain(line, console), style=style))


def rich_table(table: Table, console: Console, error_at: int = 3) -> RichTable:
    """Returns a table for the console; a failed row says so in column `error_at`."""
    ascii_only = console.options.ascii_only
    shown = RichTable(box=box.ASCII if ascii_only else box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(table.columns):
        # Only labels may wrap: a broken number could be misread.
        if i:
            shown.add_column(Text(name), justify="right", no_wrap=True, overflow="fold")
        else:
            shown.add_column(Text(name), overflow="fold", min_width=12, max_width=26)
    styles = {"failed": "red", "main": "bold", "": ""}
    for row in table.rows:
        cells = [_plain(f"{c.text} {c.detail}".strip(), console) for c in row.cells]
        if row.kind == "failed":
            cells[error_at] = "failed"
        shown.add_row(*(Text(cell) for cell in cells), style=styles[row.kind])
    return shown


def _print_strips(plans: list[tuple[str, Plan]], console: Console) -> None:
    glyphs = _PLAIN_GLYPHS if console.options.ascii_only else _GLYPHS
    shown = [(label, plan) for label, plan in plans if plan.actions]
    if not shown:
        return
    legend = Text("Layers: ")
    for role, word in (("keep", "kept"), ("merge", "merged"), ("drop", "dropped")):
        legend.append(glyphs[role], style=_GLYPH_STYLES[role])
        legend.append(f" {word}  ")
    console.print(legend)
    for label, plan in shown:
        say(console, f"{label}{_merge_words(plan)}")
        for line in _strip_lines(plan, glyphs):
            console.print(line)


def _strip_lines(plan: Plan, glyphs: dict[str, str]) -> list[Text]:
    lines = []
    for start in range(0, len(plan.actions), _PER_LINE):
        line = Text()
        line.append(f"{plan.actions[start].layer:>4} ", style="dim")
        for action in plan.actions[start : start + _PER_LINE]:
            role = plan.role(action.layer)
            line.append(glyphs[role], style=_GLYPH_STYLES[role])
        last = plan.actions[min(start + _PER_LINE, len(plan.actions)) - 1].layer
        line.append(f" {last}", style="dim")
        lines.append(line)
    return lines


def _merge_words(plan: Plan) -> str:
    """Returns ': 19 of 32 kept; merged 18 and 19 into 17'."""
    words = [f"{', '.join(map(str, layers))} into {to}" for to, layers in plan.targets.items()]
    merged = f"; merged {'; '.join(words)}" if words else ""
    return f": {whole(plan.num_kept)} of {len(plan.actions)} kept{merged}"


def _plain(shown: str, console: Console) -> str:
    """Replaces no-break spaces, and on a console without Unicode everything beyond ASCII."""
    shown = shown.replace("\u00a0", " ")
    if not console.options.ascii_only:
        return shown
    return shown.translate(_ASCII).encode("ascii", "replace").decode("ascii")
