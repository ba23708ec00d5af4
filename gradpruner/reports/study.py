"""study.json -> one self-contained HTML page, a markdown table, a summary in the terminal.

Never recomputes: what is not in the record shows as a dash.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from gradpruner.reports.cells import Table, markdown_of
from gradpruner.reports.formats import MISSING, moment, text, whole
from gradpruner.reports.reading import mapping, metric_label, sequence
from gradpruner.reports.study_reading import StudyView, read_study
from gradpruner.reports.study_tables import further_metrics_table, short_table, study_table
from gradpruner.reports.study_verdict import budget_words, judge_study, serving_note, study_tiles
from gradpruner.reports.terminal import VERDICT_STYLES, rich_table, say

_MOST_STRIPS = 24


def render_study(study: dict[str, Any], out: str | Path) -> Path:
    """Writes the page of one study.

    Args:
        study: A record as read from study.json; missing parts are left out or named as missing.
        out: The HTML file to write; its folder is made, an existing file is replaced in one step.

    Returns:
        `out`. The bytes depend on `study` alone.
    """
    # matplotlib and jinja2 load here, so that printing a study does not wait for them.
    from gradpruner.reports.page import write_page

    return write_page("study.html", "GradPruner study", _context(read_study(study)), Path(out))


def study_markdown(study: dict[str, Any]) -> str:
    """Returns the main table of one study as markdown, and below it what is needed to read it.

    Args:
        study: A record as read from study.json; missing parts show as a dash.

    Returns:
        GitHub-flavoured markdown; a failed row has its error in the place of its quality.
    """
    view = read_study(study)
    table = study_table(view)
    verdict = judge_study(view)
    lines = [
        f"{verdict.word}. {verdict.sentence}",
        budget_words(view),
        reading_words(view),
        serving_note(view),
    ]
    below = "\n\n".join(_paragraph(line) for line in lines if line)
    notes = "\n".join(f"- {_paragraph(note)}" for note in verdict.notes)
    return f"{markdown_of(table, _quality_at(table))}\n{below}\n" + (f"\n{notes}\n" if notes else "")


def print_study(study: dict[str, Any], console: Console) -> None:
    """Prints table, verdict and warnings of one study.

    Args:
        study: A record as read from study.json; missing parts are left out.
        console: Where to; no colours when it is no terminal, no symbols when it cannot show them.
    """
    view = read_study(study)
    say(console, _title(view), "bold")
    table = short_table(view)
    if table.rows:
        console.print(rich_table(table, console, _quality_at(table)))
    verdict = judge_study(view)
    say(console, verdict.word, VERDICT_STYLES[verdict.level])
    for line in (verdict.sentence, budget_words(view), serving_note(view)):
        if line:
            say(console, line)
    for note in verdict.notes:
        say(console, f"- {note}")
    for warning in sequence(study, "warnings"):
        say(console, f"Warning: {text(warning)}", "yellow")


def reading_words(view: StudyView) -> str:
    """Returns how the numbers of the main table are to be read."""
    words = []
    if len(view.seeds) > 1:
        words.append(
            f"{metric_label(view.metric)} is the mean over {len(view.seeds)} seeds, in brackets the lowest "
            "and the highest."
        )
    if any(q.paired is not None for row in view.rows for q in row.quality.values()):
        words.append(
            "Differences are in points, example by example, with 95% bootstrap intervals over examples."
        )
    if any(row.costs.get("training_ratio") is not None for row in view.rows):
        words.append("Training and inference are times against the dense model of the same seed.")
    return " ".join(words)


def _context(view: StudyView) -> dict[str, Any]:
    from gradpruner.reports import study_figures, study_sweep
    from gradpruner.reports.page import as_yaml, facts_of, inline, packages_of, provenance_facts
    from gradpruner.reports.svg import house_style

    study = view.study
    with house_style():
        if view.kind == "ablation":
            plots = [study_sweep.sweep_plot(view)]
            if mapping(study, "plot").get("kind") == "stability":
                plots.insert(0, study_sweep.kept_plot(view))
        else:
            plots = [draw(view) for draw in (study_figures.quality_plot, study_figures.difference_plot,
                                             study_figures.cost_plot)]  # fmt: skip
    seeds = ", ".join(map(str, view.seeds))
    return {
        "title": _title(view),
        "figure_name": text(study.get("figure") or ""),
        "what": text(study.get("what") or ""),
        "made": facts_of(
            ("Finished", moment(study.get("finished") or study.get("created"))),
            ("Model", text(mapping(study, "model").get("path"))),
            ("Task", text(study.get("task"))),
            ("Fine-tuning", text(study.get("mode"))),
            ("Seeds", seeds or MISSING),
        ),
        "verdict": judge_study(view),
        "tiles": study_tiles(view),
        "budget": budget_words(view),
        "reading": reading_words(view),
        "serving": serving_note(view),
        "warnings": [text(warning) for warning in sequence(study, "warnings")],
        "table": study_table(view),
        "further": further_metrics_table(view),
        "is_sweep": view.kind == "ablation",
        "methods": facts_of(*_descriptions(view).items()),
        "plots": [inline(plot) for plot in plots if plot is not None],
        "strips": _strips(view),
        "settings": facts_of(
            ("Varied", text(mapping(study, "sweep").get("key"))),
            ("Settings", whole(len(view.points)) if view.kind == "ablation" else MISSING),
        ),
        "recipe": as_yaml(study.get("recipe")),
        "provenance": provenance_facts(study),
        "packages": packages_of(study),
        "schema_version": text(study.get("schema_version")),
    }


def _descriptions(view: StudyView) -> dict[str, str]:
    """Label -> what the method is, where that was recorded."""
    return {row.label: row.description for row in view.rows if row.description not in ("", MISSING)}


def _strips(view: StudyView) -> list[dict[str, Any]]:
    """Returns one strip of layers per setting and method that prunes layers, of its first seed."""
    from gradpruner.reports.page import strip_of

    strips = []
    for point in view.points:
        for row in point.rows:
            if row.is_dense or not row.plans:
                continue
            label = row.label if view.kind == "compare" else f"{view.sweep_label} {point.label}"
            if view.kind == "ablation" and len(view.names) > 2:
                label += f", {row.label}"
            strips.append(strip_of(row.plans[0], label))
    return strips[:_MOST_STRIPS]


def _title(view: StudyView) -> str:
    fallback = "Ablation" if view.kind == "ablation" else "Comparison"
    return text(view.study.get("title") or fallback, 200)


def _quality_at(table: Table) -> int:
    return next(i for i, name in enumerate(table.columns) if name.endswith("[seeds]"))


def _paragraph(line: str) -> str:
    """Keeps names from becoming markup."""
    return line.replace("<", "\\<").replace("*", "\\*").replace("_", "\\_").replace("\u00a0", " ")
