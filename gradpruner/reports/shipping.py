"""What to do with the result: the row to ship, where it lies, why this one, and the next commands.

A row is chosen on validation rows, never on test rows.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradpruner.common.errors import ConfigError
from gradpruner.common.printing import percent, text, whole
from gradpruner.reports.record import Search
from gradpruner.reports.verdict import NOT_LEARNED, judge
from gradpruner.reports.view import Row, View, metric_label, read

_KEEP_MORE = (
    "Fewer layers (plan.num_prune), training after the cut (recover.epochs) or a limit on the loss "
    "(plan.max_loss) keep more."
)


@dataclass(frozen=True)
class Shipped:
    """The model to ship: its row, where it lies (in the run directory, or as it was given), and why."""

    row: str
    folder: str
    reason: str


@dataclass(frozen=True)
class Command:
    """One next step: what it does, the command, and what to know of it."""

    title: str
    command: str
    note: str = ""


@dataclass(frozen=True)
class Advice:
    """What stands on top of a report: what to ship, its folder ('' if there is none), why, and what next."""

    title: str
    path: str
    reason: str
    commands: tuple[Command, ...] = ()


def model_to_ship(record: dict[str, Any], wanted: str | None = None) -> Shipped:
    """The best pruned row by validation among those no larger than what the recipe asks for.

    Args:
        record: run.json.
        wanted: A row to take instead.

    Raises:
        ConfigError: If there is no such row, it failed, or there is none to ship.
    """
    view = read(record)
    made = {row.name: row for row in view.rows if row.error is None}
    if wanted is not None:
        if wanted not in made:
            state = "failed in this run" if wanted in view.names else "is not in this run"
            raise ConfigError(
                f"The row '{wanted}' {state}.", hint=f"Rows that have a model: {', '.join(made) or 'none'}."
            )
        return Shipped(wanted, _folder(view, made[wanted]), "You asked for it.")
    row, basis = view.choice
    if row is None:
        raise ConfigError(
            "This run has no pruned model that is measured.",
            hint="Start it again, and it goes on where it stopped; or name a row yourself.",
        )
    return Shipped(row.name, _folder(view, row), _reason(view, row, basis))


def advice(view: View, folder: Path | None = None) -> Advice | None:
    """What to do with a run or a comparison; None for an ablation, and where nothing was measured.

    Args:
        view: The record.
        folder: Where it lies; by default where it was made.
    """
    row, basis = view.choice
    if view.kind == "ablation" or not any(view.metric in (*row.after, *row.before) for row in view.rows):
        return None
    if row is None:
        reason = "No pruned row within the budget is measured; see below."
        if all(row.is_dense for row in view.rows):
            reason = "Only the dense model was measured; `gradpruner shrink` makes it smaller."
        return Advice("Nothing to ship", "", reason)
    verdict = judge(view)
    if verdict.word == NOT_LEARNED:
        return Advice("Nothing to ship yet", "", "The task was not learned; what to change is said below.")
    here = folder if folder is not None else Path(str(view.record.recipe.get("out") or "."))
    reason = _reason(view, row, basis)
    title = row.label
    if view.kind == "run" and verdict.level == "worse":  # of a study it is said of GradPruner's row
        title, reason = f"{title}, clearly worse than the dense model", f"{reason} {_KEEP_MORE}"
    if view.record.recipe.get("keep_models") == "none":
        return Advice(title, "", f"{reason} The model was not kept.", (_remake(row, here),))
    path = str(here / _folder(view, row))
    return Advice(title, path, reason, _next_steps(view, row, path, here))


def _reason(view: View, row: Row, basis: str) -> str:
    search = row.plan.search if row.plan else Search()
    certified = f"certified to lose at most {percent(search.limit)}"
    rows = f"{whole(search.rows)} validation rows"
    if basis == "validation":
        found, name = row.validation[view.metric], metric_label(view.metric).lower()
        measured_on = f" on {whole(found.n)} validation rows" if found.n else " on validation rows"
        dense = view.dense.validation.get(view.metric) if view.dense else None
        against = f", where the dense model has {percent(dense.value)}" if dense else ""
        sure = f" Removing so many layers is {certified}, on {rows}." if search.best is not None else ""
        best = f"It has the best {name}{measured_on} of those that fit the budget"
        return f"{best}: {percent(found.value)}{against}.{sure}"
    nothing = "nothing was compared on validation rows"
    return {
        "certified": f"It is the smallest model {certified}, on {rows}.",
        "only": f"It is the only pruned row that fits the budget; {nothing}.",
        "recipe": f"It is the row this is about: {nothing}, and test rows do not choose. With "
        "data.validation in the recipe the rows are measured on validation rows, and the best is taken.",
    }[basis]


def _folder(view: View, row: Row) -> str:
    """Where the finished model of a row lies, relative to the record; a given dense one lies elsewhere."""
    if view.kind != "run":
        return f"{row.first_run or '.'}/variants/{row.name}/model"
    found = row.recorded
    if found.finetune.output:
        return str(found.finetune.output)
    if found.recovery.model_fields_set:
        return f"variants/{row.name}/recovered"
    return str(view.record.model.path) if row.is_dense else f"variants/{row.name}/pruned"


def _next_steps(view: View, row: Row, path: str, here: Path) -> tuple[Command, ...]:
    """Serve, convert, continue training."""
    engines = {str(e.engine): e for e in row.plan.portability} if row.plan else {}
    faults = {name: text(e.reason) for name, e in engines.items() if e.status in ("wrong", "refused")}
    loading = f"from transformers import pipeline; print(pipeline('text-generation', {path!r})('Hello'))"
    if row.uniform is False or (row.plan is not None and row.plan.widths):
        loading = f"import gradpruner; print(gradpruner.load_model({path!r}))"
    odd = set('"$`\\!') & set(loading)
    python = f"python -c {shlex.quote(loading)}" if odd else f'python -c "{loading}"'
    serve = Command("Serve", f"vllm serve {shlex.quote(path)}", f"With transformers alone: {python}")
    if "vllm" in faults:
        serve = Command("Serve", python, f"vLLM does not serve it: {faults['vllm']}")
    fault = faults.get("llama.cpp")
    of_run = shlex.quote(str(here) if view.kind == "run" else path)
    note = f"llama.cpp does not take it: {fault}" if fault else ""
    export = Command("Convert for llama.cpp and Ollama", f"gradpruner export {of_run} --gguf", note)
    sft = (
        f"trl sft --model_name_or_path {shlex.quote(path)} --dataset_name FOLDER_OF_ROWS "
        f"--output_dir {shlex.quote(f'{path}-tuned')}"
    )
    note = (
        "FOLDER_OF_ROWS holds rows of prompt and completion, or of messages, and nothing else; without a GPU "
        "add --bf16 false --use_cpu true. Any other trainer of Hugging Face models takes the model, too."
    )
    return serve, export, Command("Continue training", sft, note)


def _remake(row: Row, here: Path) -> Command:
    """How to make a row whose model was not kept."""
    recipe = here / (row.first_run or ".") / "recipe.yaml"
    command = (
        f"gradpruner run {shlex.quote(str(recipe))} --set keep_models=all "
        f"--set {shlex.quote(f'variants=[dense,{row.name}]')} --out {shlex.quote(f'{here}-{row.name}')}"
    )
    return Command("Make it again, and keep it", command, "The report of that run has the next steps.")
