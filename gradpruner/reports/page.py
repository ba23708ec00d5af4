"""What fills the page: templates, provenance, strips of layers."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from gradpruner.printing import MISSING, moment, num_bytes, short, text, whole
from gradpruner.reports.record import Plan, Record
from gradpruner.reports.svg import PALETTE


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
    """Returns a page of this package; what is missing in a context is an error."""
    script = {"script": Markup(_script()), "script_hash": script_hash()}
    given = {"palette": PALETTE, "MISSING": MISSING, **script, **context}
    return _environment().get_template(template).render(given)


def _script() -> str:
    return (files("gradpruner.reports") / "copy.js").read_text(encoding="utf-8").strip()


def script_hash() -> str:
    """Returns what names the only script in a content security policy: no other one runs on a page."""
    return "sha256-" + base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode()


def facts_of(*facts: tuple[str, str]) -> list[tuple[str, str]]:
    """Returns the (name, value) pairs that are known."""
    return [(name, value) for name, value in facts if value != MISSING]


def strip_of(plan: Plan, label: str) -> dict[str, Any]:
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
    # Through JSON, so that an odd value cannot stop the report; what is not finite becomes null.
    plain = json.loads(json.dumps(recipe, default=str), parse_constant=lambda _: None)
    shown: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=96)
    return shown


def provenance_facts(record: Record) -> list[tuple[str, str]]:
    """Returns where the numbers of a record come from."""
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
