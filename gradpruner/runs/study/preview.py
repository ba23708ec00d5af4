"""The dry run of a study: runs, rows, budget, time and disk, from configs and data alone."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradpruner.common.printing import counted, duration, num_bytes
from gradpruner.runs.before.forecast import forecast
from gradpruner.runs.before.preview import savings_table
from gradpruner.runs.study.carrying_out import Outcome, check_study, state_of
from gradpruner.runs.study.design import Study


def preview_study(study: Study) -> dict[str, Any]:
    """Checks a study against its models and data; returns what it would run.

    Returns:
        JSON values: "runs", each with its state and variants, "rows", "budgets" and "savings" by point, the
        number of fine-tunings, "seconds_left" (what runs can take over from others is not taken off),
        "disk_bytes", and the warnings of all points.
    """
    facts = check_study(study, lambda job: {"seconds": forecast(job).seconds})
    runs = [
        {
            "folder": run.folder,
            "title": run.title,
            "state": state_of(study.out, run),
            "variants": list(run.recipe.variants),
        }
        for run in study.runs()
    ]
    pruned = {point.label: facts[folder] for point, folder in study.pruning_runs()}
    # Every seed has the same runs in the same order, and the first seed's are checked.
    seconds = [fact["seconds"] for fact in facts.values()] * len(study.seeds)
    per_seed = [fact["bytes"] for fact in facts.values()]
    first = next(iter(pruned.values()), next(iter(facts.values())))
    return {
        "out": str(study.out),
        "seeds": list(study.seeds),
        "points": [point.label for point in study.points],
        "rows": [vars(row) for row in study.rows],
        "runs": runs,
        "finetunings": sum(len(run["variants"]) for run in runs),
        "finetunings_left": sum(len(run["variants"]) for run in runs if run["state"] != "done"),
        "budgets": {label: fact["budget"] for label, fact in pruned.items()},
        "savings": {label: fact["savings"] for label, fact in pruned.items()},
        **{key: first[key] for key in ("train_rows", "eval_rows", "record_steps", "finetune_steps")},
        "seconds_left": sum(s for s, run in zip(seconds, runs, strict=True) if run["state"] != "done"),
        "disk_bytes": len(study.seeds) * sum(size["trace"] + size["models"] for size in per_seed)
        + max(size["temporary"] for size in per_seed),
        "warnings": list(dict.fromkeys(text for fact in facts.values() for text in fact["warnings"])),
    }


class Preview(Outcome):
    """The result of a study's dry run."""

    def show(self, console: Console) -> None:
        """Prints the runs, rows, savings, disk space and warnings."""
        _print_preview(self.study, console)


def _print_preview(facts: dict[str, Any], console: Console) -> None:
    console.print(Text.assemble(("Dry run", "bold"), f" of a study in {facts['out']}"))
    runs, seeds, points = (counted(len(facts[f"{what}s"]), what) for what in ("run", "seed", "point"))
    tunings, rows = counted(facts["finetunings"], "fine-tuning"), counted(facts["train_rows"], "row")
    console.print(
        f"{runs} ({seeds}, {points}), {tunings} of {counted(facts['finetune_steps'], 'step')} on {rows}, of "
        f"which {facts['finetunings_left']} are left; {counted(facts['eval_rows'], 'evaluation row')}",
        highlight=False,
    )
    table = Table("row", "", title="rows", title_justify="left")
    for row in facts["rows"]:
        table.add_row(Text(row["label"]), Text(row["description"]))
    console.print(table)
    table = Table("run", "state", "rows", title="runs", title_justify="left")
    for run in facts["runs"]:
        table.add_row(Text(run["folder"]), run["state"], Text(", ".join(run["variants"])))
    console.print(table)
    for label, saved in facts["savings"].items():
        layers = facts["budgets"][label]["layers"]
        console.print(savings_table(saved, f"budget{' of ' + label if label else ''}: {layers} layers"))
    console.print(
        f"time: at most about {duration(facts['seconds_left'])} for what is left, estimated from two layers "
        "timed here; loading, writing, and searches and training of methods come on top",
        highlight=False,
    )
    console.print(f"disk: about {num_bytes(facts['disk_bytes'])}", highlight=False)
    for warning in facts["warnings"]:
        console.print(Text(f"warning: {warning}", style="yellow"))
