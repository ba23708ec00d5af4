"""run.json -> one HTML file that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradpruner.reports import figures, tables
from gradpruner.reports.formats import moment, num_bytes, number, text, whole
from gradpruner.reports.other_tasks import harness_table, other_tasks_table
from gradpruner.reports.page import (
    as_yaml,
    facts_of,
    inline,
    packages_of,
    provenance_facts,
    strip_of,
    write_page,
)
from gradpruner.reports.reading import RunView, mapping, read_run, sequence
from gradpruner.reports.repairs import depth_table, draw_depths, repair_table
from gradpruner.reports.verdict import judge, tiles
from gradpruner.reports.whole_cost import whole_cost_table


def render_html(run: dict[str, Any], out: Path) -> Path:
    """Writes the report of one run.

    Args:
        run: A run record as read from run.json. Nothing is recomputed; missing parts are left out
            or named as missing.
        out: The HTML file to write; its folder is made, an existing file is replaced.

    Returns:
        `out`. The bytes depend on `run` alone.
    """
    return write_page("report.html", "GradPruner report", _context(read_run(run)), out)


def _context(view: RunView) -> dict[str, Any]:
    run = view.run
    trace = mapping(run, "trace")
    plots = figures.draw_plots(view)
    return {
        "title": text(run.get("title") or "GradPruner run", 200),
        "made": facts_of(
            ("Finished", moment(run.get("finished") or run.get("created"))),
            ("Model", text(mapping(run, "model").get("path"))),
            ("Type", text(mapping(run, "model").get("model_type"))),
        ),
        "verdict": judge(view),
        "tiles": tiles(view),
        "main": view.main,
        "strips": _strips(view),
        "warnings": [text(warning) for warning in sequence(run, "warnings")],
        "accuracy": tables.accuracy_table(view),
        "accuracy_plot": inline(plots.accuracy),
        "metric_is_small": any(
            m.is_small for v in view.variants for m in (*v.after.values(), *v.before.values())
        ),
        "score_plots": [inline(plot) for plot in plots.scores],
        "loss_plot": inline(plots.losses),
        "stability_plot": inline(plots.stability),
        "recording_plot": inline(plots.recording),
        "trace": facts_of(
            ("Steps", whole(trace.get("num_steps"))),
            ("With evidence", whole(trace.get("effective_steps"))),
            ("Adapter", text(trace.get("adapter"))),
            ("Rank", text(trace.get("rank"))),
            ("Clipping", text(trace.get("clip"))),
            ("Trace on disk", num_bytes(trace.get("bytes_on_disk"))),
        ),
        "savings": tables.savings_tables(view),
        "other_tasks": [table for table in (other_tasks_table(view), harness_table(view)) if table.rows],
        "serving": tables.serving_table(view),
        "gate": tables.gate_table(view),
        "costs": [
            *(table for table in (whole_cost_table(view),) if table.rows),
            tables.finetune_table(view),
            tables.evaluation_table(view),
        ],
        "depths": depth_table(view),
        "repairs": repair_table(view),
        "depth_plot": inline(draw_depths(view)),
        "stages": tables.stage_table(view),
        "data": tables.data_table(view),
        "overlap_rows": int(number(mapping(run, "data").get("overlap_rows")) or 0),
        "recipe": as_yaml(run.get("recipe")),
        "provenance": provenance_facts(run),
        "packages": packages_of(run),
        "schema_version": text(run.get("schema_version")),
    }


def _strips(view: RunView) -> list[dict[str, Any]]:
    """Returns one strip of layers per plan, the headline's first."""
    labels = {v.plan.name: v.label for v in reversed(view.variants) if v.plan is not None}
    plans = [plan for plan in view.plans.values() if plan.actions]
    first = view.main.plan if view.main else None
    plans.sort(key=lambda plan: plan is not first)
    return [strip_of(plan, labels.get(plan.name, text(plan.name))) for plan in plans]
