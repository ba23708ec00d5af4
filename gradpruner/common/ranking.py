"""Layers in order of their scores, the table that shows them, and the name of who scored them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradpruner.common.printing import print_table

if TYPE_CHECKING:
    from rich.console import Console


def ascending(values: Sequence[float]) -> list[int]:
    """Returns the layers from least to most important. On a tie, the earlier layer is more important.

    Early layers are harder to do without, and later layers can be merged into a kept early layer.
    """
    return sorted(range(len(values)), key=lambda layer: (values[layer], -layer))


def method_and_choice(method: str, evidence: Mapping[str, Any]) -> str:
    """Returns the method and, if it took the layers of another method, that one: "either: gate"."""
    found = evidence.get("comparison")
    chosen = found.get("chosen") if isinstance(found, dict) else None
    return f"{method}: {chosen}" if chosen else method


def print_scores(
    console: Console,
    method: str,
    values: Sequence[float],
    low: Sequence[float] = (),
    high: Sequence[float] = (),
) -> None:
    """Prints one line per layer, the least important first, with its interval if every layer has one."""
    highest = max(values, default=0.0)
    intervals = len(low) == len(high) == len(values)
    columns = ["layer", "score", *(["95 % from", "to"] if intervals else []), "of the highest"]
    rows = [
        (
            layer,
            values[layer],
            *((low[layer], high[layer]) if intervals else ()),
            f"{values[layer] / highest:.1%}" if highest > 0 else "",
        )
        for layer in ascending(values)
    ]
    print_table(console, f"Scores ({method}), least important layers first", columns, rows)
