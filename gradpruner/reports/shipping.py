"""What to do with a result: which model to ship, its folder, the reason, and the next commands.

The model is chosen on validation rows, never on test rows.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradpruner.common.errors import ConfigError
from gradpruner.common.printing import percent, text, whole
from gradpruner.common.run_names import row_file
from gradpruner.reports.record import Search
from gradpruner.reports.verdict import NOT_LEARNED, judge
from gradpruner.reports.view import Row, View, metric_label, read

_KEEP_MORE = (
    "To keep more quality, remove fewer layers (plan.num_prune), train after pruning (recover.epochs) or "
    "limit the loss (plan.max_loss)."
)


@dataclass(frozen=True)
class Shipped:
    """The model to ship: its row, its folder and the reason.

    The folder is relative to the run directory; a dense model that was not tuned has the path the recipe
    gives.
    """

    row: str
    folder: str
    reason: str


@dataclass(frozen=True)
class Command:
    """A next step: its title, the command, and a note on it."""

    title: str
    command: str
    note: str = ""


@dataclass(frozen=True)
class Advice:
    """The top of a report: the model to ship, its folder ('' if none), the reason, and the next commands."""

    title: str
    path: str
    reason: str
    commands: tuple[Command, ...] = ()


def model_to_ship(record: dict[str, Any], wanted: str | None = None) -> Shipped:
    """Returns the model to ship: the pruned row that `choose` picks, or the row `wanted`.

    Args:
        record: The contents of run.json.
        wanted: Return this row instead.

    Raises:
        ConfigError: If `wanted` is not in the run or failed, or if there is no row to ship.
    """
    view = read(record)
    made = {row.name: row for row in view.rows if row.error is None}
    if wanted is not None:
        if wanted not in made:
            state = "failed in this run" if wanted in view.names else "is not in this run"
            raise ConfigError(
                f"The variant '{wanted}' {state}.",
                hint=f"Variants with a model: {', '.join(made) or 'none'}.",
            )
        return Shipped(wanted, _folder(view, made[wanted]), "You asked for this variant.")
    row, basis = view.choice
    if row is None:
        raise ConfigError(
            "This run has no evaluated pruned model.",
            hint="Run the same command again to resume it, or name a variant with --variant.",
        )
    return Shipped(row.name, _folder(view, row), _reason(view, row, basis))


def advice(view: View, folder: Path | None = None) -> Advice | None:
    """Returns what to do with a run or a comparison; None for an ablation, or if nothing was evaluated.

    Args:
        view: The record.
        folder: The record's folder; by default the folder it was written to.
    """
    row, basis = view.choice
    if view.kind == "ablation" or not any(view.metric in (*row.after, *row.before) for row in view.rows):
        return None
    if row is None:
        reason = "No pruned model within the budget was evaluated; see below."
        if all(row.is_dense for row in view.rows):
            reason = "Only the dense model was evaluated; `gradpruner shrink` makes it smaller."
        return Advice("Nothing to ship", "", reason)
    verdict = judge(view)
    if verdict.word == NOT_LEARNED:
        return Advice("Nothing to ship yet", "", "The task was not learned; see below for what to change.")
    here = folder if folder is not None else Path(str(view.record.recipe.get("out") or "."))
    reason = _reason(view, row, basis)
    title = row.label
    # The verdict of a study is about GradPruner's row, not about this one.
    if view.kind == "run" and verdict.level == "worse":
        title, reason = f"{title}, clearly worse than the dense model", f"{reason} {_KEEP_MORE}"
    if view.record.recipe.get("keep_models") == "none":
        return Advice(title, "", f"{reason} The model was not kept.", (_remake(row, here),))
    path = str(here / _folder(view, row))
    return Advice(title, path, reason, _next_steps(view, row, path, here))


def _reason(view: View, row: Row, basis: str) -> str:
    search = row.plan.search if row.plan else Search()
    certified = f"certified on {whole(search.rows)} validation rows to lose at most {percent(search.limit)}"
    if basis == "validation":
        found, name = row.validation[view.metric], metric_label(view.metric).lower()
        measured_on = f" on {whole(found.n)} validation rows" if found.n else " on validation rows"
        dense = view.dense.validation.get(view.metric) if view.dense else None
        against = f"; the dense model has {percent(dense.value)}" if dense else ""
        sure = f" Removing this many layers is {certified}." if search.best is not None else ""
        best = f"Of the models that fit the budget, it has the best {name}{measured_on}"
        return f"{best}: {percent(found.value)}{against}.{sure}"
    nothing = "nothing was compared on validation rows"
    return {
        "certified": f"It is the smallest model {certified}.",
        "only": f"It is the only pruned model that fits the budget; {nothing}.",
        "recipe": f"It is the main variant: {nothing}, and test rows must not decide. Set data.validation in "
        "the recipe to ship the model that does best on validation rows.",
    }[basis]


def _folder(view: View, row: Row) -> str:
    """Returns the folder of a row's finished model, relative to the record, or the path of an untuned one."""
    if view.kind != "run":
        return f"{row.first_run or '.'}/{row_file(row.name, 'model')}"
    found = row.recorded
    if found.finetune.output:
        return str(found.finetune.output)
    if found.recovery.model_fields_set:
        return row_file(row.name, "recovered")
    return str(view.record.model.path) if row.is_dense else row_file(row.name, "pruned")


def _next_steps(view: View, row: Row, path: str, here: Path) -> tuple[Command, ...]:
    """Returns the commands to serve, convert and further train a row's model."""
    engines = {str(e.engine): e for e in row.plan.portability} if row.plan else {}
    faults = {name: text(e.reason) for name, e in engines.items() if e.status in ("wrong", "refused")}
    loading = f"from transformers import pipeline; print(pipeline('text-generation', {path!r})('Hello'))"
    if row.uniform is False or (row.plan is not None and row.plan.widths):
        loading = f"import gradpruner; print(gradpruner.load_model({path!r}))"
    odd = set('"$`\\!') & set(loading)
    python = f"python -c {shlex.quote(loading)}" if odd else f'python -c "{loading}"'
    serve = Command("Serve", f"vllm serve {shlex.quote(path)}", f"With transformers only: {python}")
    if "vllm" in faults:
        serve = Command("Serve", python, f"vLLM cannot serve this model: {faults['vllm']}")
    fault = faults.get("llama.cpp")
    of_run = shlex.quote(str(here) if view.kind == "run" else path)
    note = f"llama.cpp cannot run this model: {fault}" if fault else ""
    export = Command("Convert for llama.cpp and Ollama", f"gradpruner export {of_run} --gguf", note)
    sft = (
        f"trl sft --model_name_or_path {shlex.quote(path)} --dataset_name FOLDER_OF_ROWS "
        f"--output_dir {shlex.quote(f'{path}-tuned')}"
    )
    note = (
        "FOLDER_OF_ROWS must hold only rows of prompt and completion, or of messages. Without a GPU, add "
        "--bf16 false --use_cpu true. Any other trainer for Hugging Face models works too."
    )
    return serve, export, Command("Continue training", sft, note)


def _remake(row: Row, here: Path) -> Command:
    """Returns the command that makes a row's model again, if it was not kept."""
    recipe = here / (row.first_run or ".") / "recipe.yaml"
    command = (
        f"gradpruner run {shlex.quote(str(recipe))} --set keep_models=all "
        f"--set {shlex.quote(f'variants=[dense,{row.name}]')} --out {shlex.quote(f'{here}-{row.name}')}"
    )
    return Command("Make it again and keep it", command, "The report of that run shows the next steps.")
