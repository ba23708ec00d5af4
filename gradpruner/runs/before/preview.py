"""The dry run: what a run would do, from config and data alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gradpruner.common.errors import GradPrunerError, ResourceError
from gradpruner.common.printing import Printed, duration, num_bytes, print_line
from gradpruner.data.encoding import labelled_text
from gradpruner.evaluation.costing.per_device import memory_table
from gradpruner.runs.before.disk import bytes_to_write
from gradpruner.runs.before.done import done_before
from gradpruner.runs.before.fitting import fault_of, memory_need
from gradpruner.runs.before.forecast import forecast, num_devices
from gradpruner.runs.folder.plan_names import label_of
from gradpruner.runs.folder.run_record import title_of
from gradpruner.runs.job.data_warnings import leading_spaces
from gradpruner.runs.job.evaluation_data import HELD_OUT
from gradpruner.runs.job.job import Job
from gradpruner.runs.recipe.recipe import Recipe
from gradpruner.runs.row.depth_search import check_validation_rows

NUM_SAMPLES = 2


def preview_run(recipe: Recipe) -> dict[str, Any]:
    """Checks a recipe against its model and data; returns what a run would do.

    Returns:
        JSON values: counts of rows, steps, savings (which layers go is known only after recording), bytes
        of the trace and of the models, time, memory, warnings, and samples with their label masks.
    """
    job = Job(recipe)
    check_validation_rows(job)
    recipe = job.recipe
    rate, source = _learning_rate(job)
    plan = job.expected_plan
    done = done_before(job)
    needs = bytes_to_write(job, done)
    saved = job.sizes.savings(plan.keep)
    taken = forecast(job, done)
    need = memory_need(job, rehearse=True)
    fault = str(fault_of(job, need)) if need.impossible else None
    ignored = [fault] if fault is not None and recipe.memory == "warn" else []
    return {
        "title": title_of(job),
        "model": str(job.folder),
        "num_layers": job.num_layers,
        "num_prune": len(plan.pruned),
        "variants": [label_of(v, recipe.plan.repair != "none") for v in recipe.variants],
        "done": sorted(done),
        "train_rows": len(job.train),
        "held_out": [note for note in job.train.notes if HELD_OUT in note],
        "eval_rows": len(job.eval),
        "metrics": list(job.metrics),
        "format": job.train.format,
        "supervised_tokens": job.samples.supervised_tokens,
        "longest_sample_tokens": max(job.samples.lengths),
        "answers_with_space": leading_spaces(job),
        "record_steps": job.recorded_steps,
        "record_learning_rate": recipe.record.learning_rate,
        "mode": recipe.finetune.mode,
        "learning_rate": rate,
        "learning_rate_source": source,
        "batch": {
            "samples": recipe.finetune.batch_size,
            "accumulation": recipe.finetune.accumulation,
            "devices": num_devices(job),
        },
        "finetune_steps": job.finetune_steps,
        "start": recipe.start,
        "repair": recipe.plan.repair,
        "repair_rows": job.repair_rows,
        "compares": any(job.repairs_of(name) > 1 for name in recipe.variants if name != "dense"),
        "recover_steps": job.recover_steps,
        "recover_learning_rate": job.recover_rate,
        "teacher": recipe.distil.teacher,
        "max_loss": recipe.plan.max_loss,
        "validation_rows": len(job.validation) if job.validation is not None else None,
        "finetunings": len(recipe.variants),
        "savings": saved,
        "trace_bytes": needs["trace"],
        "written_bytes": needs["trace"] + needs["models"],
        "temporary_bytes": needs["temporary"],
        "model_bytes": job.sizes.disk_bytes,
        "memory": need.to_dict(),
        "memory_fault": fault,
        "seconds_estimate": {**asdict(taken), "all": taken.seconds},
        "warnings": [*job.warnings, *need.warnings, *ignored],
        "samples": [
            [[text, supervised] for text, supervised in labelled_text(job.tokenizer, one)]
            for one in job.samples.encoded[:NUM_SAMPLES]
        ],
    }


def _learning_rate(job: Job) -> tuple[float | None, str]:
    """The learning rate of fine-tuning, or of the recovery of a given model, and where it comes from."""
    if job.recipe.start == "given":
        halved = job.recover_rate == (job.recipe.finetune.learning_rate or 0) / 2
        return job.recover_rate, f"half of {job.rate_source}" if halved else "as given"
    search = "; the search on held-out training rows begins there" if job.recipe.find_rate else ""
    return job.recipe.finetune.learning_rate, job.rate_source + search


@dataclass(frozen=True, repr=False)
class DryRun(Printed):
    """What a run would do; prints what `gradpruner run --dry-run` prints.

    Attributes:
        facts: JSON values, see `preview_run`.
        error: Why the run would be refused: it cannot fit into memory, and the recipe does not say
            `memory: warn`.
    """

    facts: dict[str, Any]
    error: GradPrunerError | None = None

    def show(self, console: Console) -> None:
        """Prints data, steps, savings, memory, samples and warnings."""
        _print_facts(self.facts, console)


def dry_run(recipe: Recipe) -> DryRun:
    """Checks everything about a run and returns what it would do; loads no weights and writes nothing.

    Args:
        recipe: The recipe of the run.

    Raises:
        GradPrunerError: The first error in the recipe, the data, the model or the machine, as in `run`.
    """
    facts = preview_run(recipe)
    refused = facts["memory_fault"] and recipe.memory == "refuse"
    return DryRun(facts, ResourceError(facts["memory_fault"]) if refused else None)


def _print_facts(facts: dict[str, Any], console: Console) -> None:
    # Text and `escape`: a name such as "[red]" must not be read as markup.
    console.print(Text.assemble(("Dry run", "bold"), f" of {facts['title']}"))
    print_line(
        console,
        f"{facts['train_rows']} training rows ({facts['format']}, {facts['supervised_tokens']} "
        f"learned tokens, longest sample {facts['longest_sample_tokens']}), "
        f"{''.join(f'{note}, ' for note in facts['held_out'])}"
        f"{facts['eval_rows']} evaluation rows ({', '.join(facts['metrics'])}){_spaces(facts)}\n"
        f"{_steps(facts)}\n{_training(facts)}",
    )
    title = f"prune {facts['num_prune']} of {facts['num_layers']} layers"
    if facts["max_loss"] is not None:
        title += ", as an example: the search finds how many"
    console.print(savings_table(facts["savings"], title))
    console.print(
        f"disk: trace {num_bytes(facts['trace_bytes'])}, everything written "
        f"{num_bytes(facts['written_bytes'])}",
        highlight=False,
    )
    need = facts["memory"]
    several = f", {need['strategy']}: each of {need['processes']} processes" if need["processes"] > 1 else ""
    title = f"{need['device']}, {num_bytes(need['available_bytes'])}{several}"
    console.print(memory_table(title, need["stages"], need["peak_stage"]))
    for number, pieces in enumerate(facts["samples"], start=1):
        line = Text(f"sample {number}: ")
        for text, supervised in pieces:
            # Brackets show the mask without colours too.
            shown, style = (f"⟦{text}⟧", "bold green") if supervised else (text, "dim")
            line.append(shown, style=style)
        console.print(line, soft_wrap=True)  # an added line break would look like a part of the sample
    console.print("Only ⟦bracketed⟧ text is learned.", style="dim")
    for warning in facts["warnings"]:
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"))


def _spaces(facts: dict[str, Any]) -> str:
    counted = facts["answers_with_space"]
    if counted is None:
        return ""
    said = {0: "no answer begins", counted[1]: "every answer begins"}
    return f"; {said.get(counted[0], f'{counted[0]} of {counted[1]} answers begin')} with a space"


def _training(facts: dict[str, Any]) -> str:
    """Learning rates, samples per step, and the estimated time."""
    batch, taken = facts["batch"], facts["seconds_estimate"]
    of = " x ".join(str(count) for count in batch.values())
    lines = []
    if facts["start"] != "given" or facts["recover_steps"]:
        lines.append(
            f"training ({facts['mode']}): learning rate {facts['learning_rate']:g} "
            f"({facts['learning_rate_source']}), "
            f"{math.prod(batch.values())} samples per step ({of}: batch, accumulation, devices)"
        )
        if facts["record_steps"]:
            lines[-1] += f"; recording: learning rate {facts['record_learning_rate']:g}"
    parts = {"recording": "record", "repair": "repair", "training": "train", "evaluation": "evaluate"}
    spent = ", ".join(f"{name} {duration(taken[key])}" for name, key in parts.items() if taken[key])
    lines.append(
        f"time: about {duration(taken['all'])} ({spent}); estimated from {taken['basis']}; loading, writing "
        "and searches come on top"
    )
    return "\n".join(lines)


def _steps(facts: dict[str, Any]) -> str:
    """What the run does, in order, in a sentence."""
    rows, steps = ", ".join(facts["variants"]), facts["finetune_steps"]
    done = {name: " (done before)" if name in facts["done"] else "" for name in ("finetune dense", "record")}
    parts = (
        [f"fine-tune dense for {steps} steps{done['finetune dense']}"] if facts["start"] == "tuned" else []
    )
    parts += [f"record {facts['record_steps']} steps{done['record']}"] if facts["record_steps"] else []
    if facts["max_loss"] is not None:
        parts.append(
            f"find how many layers lose at most {facts['max_loss']:.2%} on {facts['validation_rows']} "
            "validation rows"
        )
    if facts["compares"]:
        parts.append("choose the layers by IGIA or the gate, comparing losses after a repair of each")
    if facts["repair"] != "none":
        kind = facts["repair"].replace("_", " ")
        parts.append(f"prune and repair ({kind}, {facts['repair_rows']} rows)")
    if facts["start"] == "base":
        parts.append(f"then {steps} fine-tuning steps for each of: {rows}")
    else:
        trained = facts["recover_steps"]
        at = f"recover for {trained} steps at {facts['recover_learning_rate']:g}"
        parts.append(at if trained else "nothing is trained after that")
        parts[-1] += f"; rows: {rows}"
    teacher = "; pruned models also learn from the tuned dense one" if facts["teacher"] != "none" else ""
    return (", ".join(parts) + teacher).removeprefix("then ")


def savings_table(saved: dict[str, dict[str, int]], title: str) -> Table:
    """Returns a table of every unit of cost before and after pruning, with the ratio."""
    table = Table("", "before", "after", "ratio", title=escape(title), title_justify="left")
    for name, change in saved.items():
        before, after = change["before"], change["after"]
        show = num_bytes if name in ("disk_bytes", "kv_bytes_per_token") else "{:,}".format
        table.add_row(name.replace("_", " "), show(before), show(after), f"{after / before:.3f}")
    return table
