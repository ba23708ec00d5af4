"""The "next:" lines that a command prints at its end."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from gradpruner.cli.messages import console

NEXT: dict[str, tuple[tuple[str, str], ...]] = {
    "init": (
        ("check the recipe without loading weights", "gradpruner run {recipe} --dry-run"),
        ("run it", "gradpruner run {recipe}"),
    ),
    "rate": (("train with this rate, which the run directory keeps", "gradpruner run --out {out}"),),
    "record": (("choose the layers to remove", "gradpruner plan --out {out}"),),
    "score": (("choose the layers to remove", "gradpruner plan --out {out}"),),
    "plan": (
        ("edit the plan if you like, then run the rest", "gradpruner run --out {out} --plan {plan}"),
        ("or only prune", "gradpruner prune --out {out} --plan {plan}"),
    ),
    "prune": (("fine-tune the pruned models", "gradpruner finetune --out {out}"),),
    "finetune": (("evaluate the models", "gradpruner evaluate --out {out}"),),
    "evaluate": (("print the table as Markdown", "gradpruner report {out} --markdown"),),
    "report": (
        ("evaluate the smaller model on other rows", "gradpruner evaluate {model} --eval-data ROWS"),
        ("remove fewer or more layers, reusing what is done", "gradpruner run --out {out} --num-prune N"),
        ("print the table as Markdown", "gradpruner report {out} --markdown"),
    ),
    "report of the dense model alone": (
        (
            "remove layers from it",
            "gradpruner shrink {model} --data ROWS --eval-data ROWS --out {out}-small",
        ),
        ("print the table as Markdown", "gradpruner report {out} --markdown"),
    ),
    "prune layers": (
        ("check it again, at any time", "gradpruner verify {folder}"),
        ("evaluate it", "gradpruner evaluate {folder} --eval-data ROWS"),
    ),
    "prune widths": (("evaluate it", "gradpruner evaluate {folder} --eval-data ROWS"),),
}
"""Command -> (purpose, next command) pairs; names in braces are filled in."""


def suggest(after: str, **values: Any) -> None:
    """Prints the next commands; a line is left out if it needs a value that is missing."""
    known = {name: shlex.quote(str(value)) for name, value in values.items() if value is not None}
    lines = []
    for why, command in NEXT.get(after, ()):
        try:
            lines.append(f"  {command.format(**known)}  # {why}")
        except KeyError:
            continue
    if lines:
        console().print(
            "\n".join(["next:", *lines]), style="dim", highlight=False, markup=False, soft_wrap=True
        )


def suggest_after_run(until: str, record: dict[str, Any], out: str) -> None:
    """Prints the next commands after a run up to the stage `until`."""
    from gradpruner.reports.shipping import advice
    from gradpruner.reports.view import read

    pruned = [row for variant, row in record["rows"].items() if variant != "dense" and row in record["plans"]]
    ship = advice(read(record), Path(out))
    model = ship.path or None if ship else None
    dense = record["rows"].get("dense")
    if until == "report" and list(record["rows"].values()) == [dense]:
        tuned = (record["variants"][dense]["finetune"] or {}).get("output")
        suggest("report of the dense model alone", out=out, model=Path(out) / tuned if tuned else None)
        return
    plan = Path(out) / "plans" / f"{pruned[0]}.json" if pruned else None
    suggest(until, out=out, plan=plan, model=model)
