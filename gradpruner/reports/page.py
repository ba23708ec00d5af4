"""What every page of the report package shares: templates, writing, provenance, strips of layers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from gradpruner.files import write_text
from gradpruner.reports.drawing import Plot
from gradpruner.reports.formats import MISSING, moment, num_bytes, number, short, text, whole
from gradpruner.reports.reading import Plan, mapping, sequence
from gradpruner.reports.svg import PALETTE


@cache
def environment() -> Environment:
    """Returns the templates of this package; what is missing in a context is an error."""
    return Environment(
        loader=PackageLoader("gradpruner.reports", "."),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_page(template: str, brand: str, context: dict[str, Any], out: str | Path) -> Path:
    """Renders one page and writes it in one step.

    Args:
        template: A template that extends page.html.
        brand: What kind of page this is, in a few words.
        context: The template's values; `title` is among them.
        out: The file to write; its folder is made, an existing file is replaced.

    Returns:
        `out`.
    """
    page = (
        environment()
        .get_template(template)
        .render({"brand": brand, "palette": PALETTE, "MISSING": MISSING, **context})
    )
    # A lone surrogate from a file name must not cost the user the report.
    write_text(Path(out), page.encode("utf-8", "replace").decode("utf-8"))
    return Path(out)


def inline(plot: Plot | None) -> dict[str, Any] | None:
    """Marks the drawing, and nothing else, as markup: matplotlib has escaped what is in them."""
    if plot is None:
        return None
    return {**vars(plot), "drawing": Markup(plot.drawing)}


def facts_of(*facts: tuple[str, str]) -> list[tuple[str, str]]:
    """Returns the (name, value) pairs that are known."""
    return [(name, value) for name, value in facts if value != MISSING]


def strip_of(plan: Plan, label: str) -> dict[str, Any]:
    """Returns one plan as a row of cells, one per layer, with its counts in words."""
    words = {"keep": "kept", "receive": "kept", "drop": "dropped"}
    cells = []
    for action in plan.actions:
        role = plan.role(action.layer)
        what = words.get(role, f"merged into {whole(action.into)}")
        cells.append((role, f"Layer {action.layer}: {what}"))
    roles = [role for role, _ in cells]
    merged = [f"{', '.join(map(str, layers))} → {to}" for to, layers in plan.targets.items()]
    dropped = ", ".join(str(a.layer) for a in plan.actions if a.action == "drop")
    kept = roles.count("keep") + roles.count("receive")
    counts = [f"{kept} of {len(roles)} layers kept"]
    for role, word in (("merge", "merged"), ("drop", "dropped")):
        if role in roles:
            counts.append(f"{roles.count(role)} {word}")
    return {
        "label": label,
        "cells": cells,
        "summary": ", ".join(counts),
        "merged": "; ".join(merged),
        "dropped": dropped,
        "first": plan.actions[0].layer,
        "last": plan.actions[-1].layer,
    }


def as_yaml(recipe: Any) -> str:
    """Returns a recipe as YAML, '' when there is none."""
    if not recipe:
        return ""
    # Through text for whatever is not plain data, so that an odd value cannot stop the report.
    return yaml.safe_dump(_plain_data(recipe), sort_keys=False, allow_unicode=True, width=96)


def _plain_data(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_data(item) for item in value]
    if isinstance(value, float):
        return number(value)
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def packages_of(run: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the packages that were used, with their versions."""
    return facts_of(*((text(k), text(v)) for k, v in mapping(run, "provenance", "packages").items()))


def provenance_facts(run: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns where the numbers of a run.json or study.json come from."""
    found, model = mapping(run, "provenance"), mapping(run, "model")
    machine = mapping(found, "machine")
    devices = ", ".join(text(device) for device in sequence(machine, "devices")) or "CPU only"
    commit = text(found.get("commit"))
    if found.get("dirty"):
        commit += " with uncommitted changes"
    memory = num_bytes(machine.get("memory_bytes"))
    return facts_of(
        ("GradPruner", text(run.get("gradpruner_version"))),
        ("Command", text(run.get("command"))),
        ("Created", moment(run.get("created"))),
        ("Finished", moment(run.get("finished"))),
        ("Commit", commit),
        ("Seed", text(found.get("seed"))),
        ("Python", text(found.get("python"))),
        ("Platform", text(machine.get("platform"))),
        ("Processor", text(machine.get("cpu"))),
        ("Cores", whole(machine.get("cores"))),
        ("Memory", memory),
        ("Devices", devices if machine else MISSING),
        ("Model", text(model.get("path"))),
        ("Model type", text(model.get("model_type"))),
        ("Model layers", whole(model.get("num_layers"))),
        ("Model parameters", whole(model.get("num_parameters"))),
        ("Decoder parameters", short(model.get("decoder_parameters"))),
        ("Weights", text(model.get("dtype"))),
        ("Model SHA-256", text(model.get("sha256"))),
    )
