"""Blocks of the documents about methods and their comparison; see render.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
KINDS = {
    "score": "scores layers",
    "plan": "plans by itself",
    "shrink": "prunes while it trains",
    "callbacks": "changes fine-tuning only",
}


def methods() -> str:
    """The table of registered methods."""
    from gradpruner.methods import METHODS

    head = ("method", "what it does", "how it decides", "options", "plain Hugging Face model")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in METHODS.names():
        method = METHODS.find(name)
        kind = next(words for kind, words in KINDS.items() if getattr(method, kind))
        kind += ", from recorded LoRA gradients" * method.needs_trace + ", then recovers" * bool(
            method.recover
        )
        fields = method.options.model_fields.items()
        options = ", ".join(f"{option} = {shown(field.default)}" for option, field in fields)
        plain = "yes" if method.uniform else "no: widths differ between layers"
        lines.append(f"| {name} | {method.description} | {kind} | {options} | {plain} |")
    return "\n".join(lines)


def shown(default: Any) -> str:
    if isinstance(default, bool) or default is None:
        return {True: "yes", False: "no", None: "automatic"}[default]
    return ", ".join(map(str, default)) if isinstance(default, list | tuple) else f"{default}"


def comparison() -> str:
    """Every method on every task, mode and seed measured."""
    module = benchmark()
    return str(module.markdown(module.load_studies()))


def comparison_balance() -> str:
    """Wins and losses of every method."""
    module = benchmark()
    return str(module.balance(module.load_studies()))


def comparison_costs() -> str:
    """What every method costs, before and after."""
    module = benchmark()
    return str(module.costs(module.load_studies()))


def benchmark() -> Any:
    """benchmarks/comparison.py as a module."""
    spec = importlib.util.spec_from_file_location("comparison", BENCHMARKS / "comparison.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["comparison"] = module
    spec.loader.exec_module(module)
    return module


BLOCKS = {
    "methods": methods,
    "comparison": comparison,
    "comparison_balance": comparison_balance,
    "comparison_costs": comparison_costs,
}
