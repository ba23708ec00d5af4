"""Reads a plan of either kind. Only this module decides which kind a plan is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradpruner.common.json_files import read_json
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.width_plan import WidthPlan

Plan = PruningPlan | WidthPlan


def read_plan(raw: Any, where: str = "plan") -> Plan:
    """Reads a plan of either kind from JSON values, which may have been edited by hand.

    `where` says in messages where the values come from.

    Raises:
        PlanError: If the values are not a valid plan.
    """
    kind = WidthPlan if isinstance(raw, dict) and raw.get("kind") == WidthPlan.kind else PruningPlan
    return kind.from_dict(raw, where)


def load_plan(path: Path) -> Plan:
    """Reads a plan file of either kind.

    Raises:
        PlanError: If the file is not a valid plan.
        IntegrityError: If the file is missing or not valid JSON.
    """
    return read_plan(read_json(path, "pruning plan"), str(path))
