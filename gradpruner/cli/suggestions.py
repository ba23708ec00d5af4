"""What to do next, said at the end of a command."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from gradpruner.cli.messages import console

NEXT: dict[str, tuple[tuple[str, str], ...]] = {
    "init": (
        ("check it, without loading weights", "gradpruner run {recipe} --dry-run"),
        ("do it", "gradpruner run {recipe}"),
    ),
    "rate": (("use it: it is kept there", "gradpruner run --out {out}"),),
    "record": (("which layers go", "gradpruner plan --out {out}"),),
    "score": (("which layers go", "gradpruner plan --out {out}"),),
    "plan": (
        ("prune by it, perhaps edited, and do the rest", "gradpruner run --out {out} --plan {plan}"),
        ("or prune alone", "gradpruner prune --out {out}"),
    ),
    "prune": (("tune what is left", "gradpruner finetune --out {out}"),),
    "finetune": (("measure the models", "gradpruner evaluate --out {out}"),),
    "evaluate": (("the table as Markdown", "gradpruner report {out} --markdown"),),
    "report": (
        ("measure the smaller model on other rows", "gradpruner evaluate {model} --eval-data ROWS"),
        ("remove fewer or more layers, from the same recording", "gradpruner run --out {out} --num-prune N"),
        ("the table as Markdown", "gradpruner report {out} --markdown"),
    ),
    "report of the dense model alone": (
        (
            "remove layers of it",
            "gradpruner shrink {model} --data ROWS --eval-data ROWS --out {out}-small",
        ),
        ("the table as Markdown", "gradpruner report {out} --markdown"),
    ),
    "prune a folder": (
        ("check it again, at any time", "gradpruner verify {folder}"),
        ("measure it", "gradpruner evaluate {folder} --eval-data ROWS"),
    ),
}
"""Command -> what one may do after it: why, and the command; places in braces are filled in."""


def suggest(after: str, **places: Any) -> None:
    """Prints what to do after a command; a line whose place is not known is left out."""
    known = {name: shlex.quote(str(value)) for name, value in places.items() if value is not None}
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
    """Prints what to do after a run that went as far as a stage."""
    from gradpruner.common.errors import ConfigError
    from gradpruner.reports.shipping import model_to_ship

    pruned = [row for variant, row in record["rows"].items() if variant != "dense" and row in record["plans"]]
    try:
        model = Path(out) / model_to_ship(record).folder
    except ConfigError:
        model = None
    dense = record["rows"].get("dense")
    if until == "report" and list(record["rows"].values()) == [dense]:
        tuned = (record["variants"][dense]["finetune"] or {}).get("output")
        suggest("report of the dense model alone", out=out, model=Path(out) / tuned if tuned else None)
        return
    plan = Path(out) / "plans" / f"{pruned[0]}.json" if pruned else None
    suggest(until, out=out, plan=plan, model=model)
