"""Renders run.json or study.json as one self-contained HTML file: no network and no other file needed."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from gradpruner.common.files import write_text
from gradpruner.common.printing import MISSING, moment, num_bytes, short, text, whole
from gradpruner.reports import comparing, details, figures, sweep, tables
from gradpruner.reports.answers import KINDS, sample_answers
from gradpruner.reports.cells import Table
from gradpruner.reports.folders import REPORT
from gradpruner.reports.headline import tiles
from gradpruner.reports.markdown import markdown_table
from gradpruner.reports.notes import budget_words, serving_note
from gradpruner.reports.record import PlanRecord, Record
from gradpruner.reports.shipping import Advice, advice
from gradpruner.reports.svg import PALETTE, Plot, house_style
from gradpruner.reports.terminal import title_of
from gradpruner.reports.verdict import judge
from gradpruner.reports.view import Row, View, read

_MOST_STRIPS = 24
Block = tuple[str, Any]
"""The name of a macro in parts.html, and the value it shows."""


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading; sections without blocks are left out."""

    id: str
    title: str
    blocks: list[Block]


def render_html(source: dict[str, Any], out: Path) -> Path:
    """Writes the report of one run or study.

    Args:
        source: The contents of run.json or study.json. Nothing is recomputed; missing parts are left out or
            shown as missing.
        out: The HTML file to write, in the record's folder, from which sample answers are read. An existing
            file is replaced.

    Returns:
        `out`. Its bytes depend only on the record and the answers.
    """
    page = render("page.html", page_of(read(source), out.parent))
    # A lone surrogate in a file name must not break the report.
    write_text(out, page.encode("utf-8", "replace").decode("utf-8"))
    return out


def write_study_report(source: dict[str, Any], folder: Path) -> Path:
    """Writes report.html and table.md into the folder of a study, and returns the former."""
    write_text(folder / "table.md", markdown_table(source, folder))
    return render_html(source, folder / REPORT)


def page_of(view: View, folder: Path) -> dict[str, Any]:
    """Returns the context of page.html."""
    record, ship = view.record, advice(view, folder)
    with house_style():
        sections = [section for section in _sections(view, folder, ship) if section.blocks]
    kind, name = ("report", "run.json") if view.kind == "run" else ("study", "study.json")
    return {
        "brand": f"GradPruner {kind}" + (f" · {text(record.figure)}" if record.figure else ""),
        "title": title_of(view),
        "what": text(record.what or ""),
        "made": facts_of(
            ("Finished", moment(record.finished or record.created)),
            ("Model", text(record.model.path)),
            ("Type", text(record.model.model_type)),
            ("Task", text(record.task)),
            ("Fine-tuning", text(record.mode)),
            ("Seeds", ", ".join(map(str, view.seeds)) or MISSING),
        ),
        "ship": ship,
        "verdict": judge(view),
        "tiles": tiles(view),
        "warnings": [text(warning) for warning in record.warnings],
        "sections": sections,
        "foot": f"{name} (schema {text(record.schema_version)})",
    }


def _sections(view: View, folder: Path, ship: Advice | None) -> list[Section]:
    descriptions = {row.label: row.description for row in view.rows if row.description}
    return [
        *_results(view, folder, ship.row if ship else None),
        *_layers(view),
        *_costs(view),
        Section("data", "Data", _data(view)),
        Section("methods", "What each row is", _facts(*descriptions.items(), kind="columns")),
        Section("recipe", "Recipe", _recipe(view)),
        Section("provenance", "Provenance", _provenance(view)),
    ]


def _results(view: View, folder: Path, ship: Row | None) -> list[Section]:
    table = tables.results_table(view, ship)
    shown = tables_of(table) or [("absent", "Nothing was measured yet.")]
    about = [tables.reading_words(view), serving_note(view)] if table.lines else []
    shown = _notes("lead", budget_words(view)) + shown + _notes("note", *about)
    plots = [comparing.size_plot(view), comparing.cost_plot(view)]
    if view.kind == "ablation":
        kept = sweep.kept_plot(view) if view.record.plot.get("kind") == "stability" else None
        drawn = plots_of(kept, sweep.sweep_plot(view), *plots)
        results = [Section("figures", "Figures", drawn), Section("results", "Results", shown)]
    else:
        drawn = plots_of(comparing.quality_plot(view), comparing.difference_plot(view), *plots)
        results = [Section("results", "Results", shown + drawn)]
    answers = sample_answers(view, folder)
    return [
        *results,
        Section("answers", "Sample answers", [("answers", (answers, KINDS))] if answers else []),
        Section("further", "Further metrics", tables_of(tables.further_table(view))),
        Section("other-tasks", "Other evaluation data",
                tables_of(tables.other_tasks_table(view), details.harness_table(view))),
    ]  # fmt: skip


def _layers(view: View) -> list[Section]:
    found = _strips(view)
    note = _notes("note", "These are the plans of the first seed.") if view.kind != "run" else []
    strips: list[Block] = [("strips", found), *note] if found else []
    repair = [
        *plots_of(figures.depth_plot(view)),
        *tables_of(details.depth_table(view), details.repair_table(view)),
    ]
    trace = view.record.trace
    recorded = _facts(
        ("Steps", whole(trace.num_steps)),
        ("With energy", whole(trace.effective_steps)),
        ("Adapter", text(trace.adapter)),
        ("Rank", text(trace.rank)),
        ("Clipping", text(trace.clip)),
        ("Trace on disk", num_bytes(trace.bytes_on_disk)),
    )
    pair = [plot for _, plot in plots_of(figures.stability_plot(view), figures.recording_plot(view))]
    return [
        Section("layers", "Which layers are removed", strips + plots_of(*figures.score_plots(view))),
        Section("repair", "Repair", repair),
        Section("losses", "Fine-tuning", plots_of(figures.loss_plot(view))),
        Section("recording", "Recorded gradients", recorded + ([("pair", pair)] if pair else [])),
    ]


def _costs(view: View) -> list[Section]:
    stages = tables_of(details.stage_table(view))
    times = tables_of(details.whole_cost_table(view), details.finetune_table(view))
    engines = [*_notes("line", details.served_summary(view)), *tables_of(details.serving_table(view))]
    return [
        Section("savings", "Savings", tables_of(*details.savings_tables(view), details.widths_table(view))),
        Section("serving", "Serving and verification", engines + tables_of(details.verification_table(view))),
        Section("cost", "Time and memory",
                times + ([("fold", (details.stages_summary(view), stages))] if stages else [])),
    ]  # fmt: skip


def _data(view: View) -> list[Block]:
    rows = view.record.overlap_rows or 0
    warning: list[Block] = []
    if rows:
        words = (
            f"{rows} evaluation row{' also occurs' if rows == 1 else 's also occur'} in the training data."
        )
        warning.append(("callout", (words, "The scores above are too high by an unknown amount.")))
    parts = {"Training rows": view.record.train, "Evaluation rows": view.record.eval}
    said = {name: "; ".join(text(note, 300) for note in part.notes) for name, part in parts.items()}
    about = [f"{name}: {notes}." for name, notes in said.items() if notes]
    return warning + tables_of(details.data_table(view)) + _notes("note", *about)


def _recipe(view: View) -> list[Block]:
    recipe, sweep_of = view.record.recipe, view.record.sweep
    shown = _facts(
        ("Varied", text(sweep_of.key if sweep_of else None)),
        ("Settings", whole(len(view.points)) if view.kind == "ablation" else MISSING),
    )
    if not recipe:
        return [*shown, ("absent", "The recipe was not recorded.")]
    what = "The resolved recipe" if view.kind == "run" else "The recipe that all rows share"
    return [*shown, ("fold", (f"{what}, including all defaults", [("text", as_yaml(recipe))]))]


def _provenance(view: View) -> list[Block]:
    known = _facts(*provenance_facts(view.record), kind="columns") or [("absent", "Nothing was recorded.")]
    packages = _facts(*((text(k), text(v)) for k, v in view.record.provenance.packages.items()))
    return known + ([("heading", "Packages"), *packages] if packages else [])


def _strips(view: View) -> list[dict[str, Any]]:
    """Returns a strip of layers per plan, the main row's first; for a study, the plans of the first seed."""
    if view.kind == "run":
        plans = [(name, plan) for name, plan in view.record.plans.items() if plan.actions]
        first = view.main.plan if view.main else None
        plans.sort(key=lambda entry: entry[1] is not first)
        return [strip_of(plan, details.plan_label(view, name)) for name, plan in plans]
    strips = []
    for point in view.points:
        for row in point.rows:
            if row.is_dense or row.plan is None:
                continue
            label = row.label if view.kind == "compare" else f"{view.sweep_label} {point.label}"
            if view.kind == "ablation" and len(view.names) > 2:
                label += f", {row.label}"
            strips.append(strip_of(row.plan, label))
    return strips[:_MOST_STRIPS]


def tables_of(*found: Table) -> list[Block]:
    """Returns a block for every table that has lines."""
    return [("table", table) for table in found if table.lines]


def plots_of(*found: Plot | None) -> list[Block]:
    """Returns a block for every plot that is not None."""
    return [("figure", plot) for plot in found if plot is not None]


def _notes(kind: str, *found: str) -> list[Block]:
    return [(kind, words) for words in found if words]


def _facts(*pairs: tuple[str, str], kind: str = "inline") -> list[Block]:
    known = facts_of(*pairs)
    return [("facts", (known, kind))] if known else []


def facts_of(*facts: tuple[str, str]) -> list[tuple[str, str]]:
    """Returns the (name, value) pairs that are known."""
    return [(name, value) for name, value in facts if value != MISSING]


def strip_of(plan: PlanRecord, label: str) -> dict[str, Any]:
    """Returns one plan as a row of cells, one per layer, with its counts in words."""
    words = {"keep": "kept", "receive": "kept", "drop": "dropped"}
    roles = [plan.roles[action.layer] for action in plan.actions]
    cells = [
        (role, f"Layer {action.layer}: {words.get(role, f'merged into {whole(action.into)}')}")
        for action, role in zip(plan.actions, roles, strict=True)
    ]
    merged = [f"{', '.join(map(str, layers))} → {to}" for to, layers in plan.targets.items()]
    counts = [f"{len(plan.kept)} of {len(cells)} layers kept"]
    for role, word in (("merge", "merged"), ("drop", "dropped")):
        if role in roles:
            counts.append(f"{roles.count(role)} {word}")
    return {
        "label": label,
        "cells": cells,
        "summary": ", ".join(counts),
        "merged": "; ".join(merged),
        "dropped": ", ".join(str(a.layer) for a in plan.actions if a.action == "drop"),
        "first": plan.actions[0].layer,
        "last": plan.actions[-1].layer,
    }


def as_yaml(recipe: dict[str, Any]) -> str:
    """Returns a recipe as YAML."""
    # Through JSON, so that an odd value cannot stop the report; NaN and infinity become null.
    plain = json.loads(json.dumps(recipe, default=str), parse_constant=lambda _: None)
    shown: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=96)
    return shown


def provenance_facts(record: Record) -> list[tuple[str, str]]:
    """Returns name and value of everything recorded about software, machine and model."""
    found, model, machine = record.provenance, record.model, record.provenance.machine
    named = machine.get("devices")
    devices = ", ".join(map(text, named)) if isinstance(named, list) else ""
    return facts_of(
        ("GradPruner", text(record.gradpruner_version)),
        ("Command", text(record.command)),
        ("Created", moment(record.created)),
        ("Finished", moment(record.finished)),
        ("Commit", text(found.commit) + (" with uncommitted changes" if found.dirty else "")),
        ("Seed", text(found.seed)),
        ("Python", text(found.python)),
        ("Platform", text(machine.get("platform"))),
        ("Processor", text(machine.get("cpu"))),
        ("Cores", whole(machine.get("cores"))),
        ("Memory", num_bytes(machine.get("memory_bytes"))),
        ("Devices", (devices or "CPU only") if machine else MISSING),
        ("Model", text(model.path)),
        ("Model type", text(model.model_type)),
        ("Model layers", whole(model.num_layers)),
        ("Model parameters", whole(model.num_parameters)),
        ("Decoder parameters", short(model.decoder_parameters)),
        ("Weights", text(model.dtype)),
        ("Model SHA-256", text(model.sha256)),
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("gradpruner.reports", "."),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, context: dict[str, Any]) -> str:
    """Renders a template of this package; a name missing in `context` is an error."""
    script = {"script": Markup(_script()), "script_hash": script_hash()}
    names = {"palette": PALETTE, "MISSING": MISSING, **script, **context}
    return _environment().get_template(template).render(names)


def _script() -> str:
    return (files("gradpruner.reports") / "copy.js").read_text(encoding="utf-8").strip()


def script_hash() -> str:
    """Returns the hash of our script, by which a content security policy allows it and no other script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode()
