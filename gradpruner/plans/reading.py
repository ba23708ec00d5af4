"""A plan of either kind, from a file or from JSON values; here alone it is decided which kind it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradpruner.common.json_files import read_json
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.width_plan import WidthPlan

Plan = PruningPlan | WidthPlan


def read_plan(raw: Any, where: str = "plan") -> Plan:
    """Reads a plan of either kind, possibly edited by hand.

    Raises:
        PlanError: If it says what no plan can.
    """
    kind = WidthPlan if isinstance(raw, dict) and raw.get("kind") == WidthPlan.kind else PruningPlan
    return kind.from_dict(raw, where)


def load_plan(path: Path) -> Plan:
    """Reads a plan file of either kind.

    Raises:
        PlanError: If it says what no plan can.
        IntegrityError: If it is missing or not JSON.
    """
    return read_plan(read_json(path, "pruning plan"), str(path))
