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
from gradpruner.reports.view import Row, View, metric_words, read

NOT_GOOD_ENOUGH = "Not good enough to ship"


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
    """The top of a report: a title, the model's folder ('' if none), the reason, and the next commands.

    `row` is the row to ship; None if there is none, which the title then says.
    """

    title: str
    path: str
    reason: str
    commands: tuple[Command, ...] = ()
    row: Row | None = None

    @property
    def heading(self) -> str:
        """The title, which says "Model to ship" only of a model to ship."""
        return f"Model to ship: {self.title}" if self.row else self.title


def model_to_ship(record: dict[str, Any], wanted: str | None = None) -> Shipped:
    """Returns the model to ship: the pruned row that `choose` picks, or the row `wanted`.

    Args:
        record: The contents of run.json.
        wanted: Return this row instead.

    Raises:
        ConfigError: If `wanted` is not in the run or failed, or if there is no row worth shipping.
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
    if why := lost_words(view, row):
        raise ConfigError(
            f"{NOT_GOOD_ENOUGH}: {why}",
            hint=f"{_what_to_change(view, row)} To take it all the same: --variant {shlex.quote(row.name)}.",
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
        within = "" if view.kind == "run" else "within the budget "
        reason = f"No pruned model {within}was evaluated; see below."
        if all(row.is_dense for row in view.rows):
            reason = "Only the dense model was evaluated; `gradpruner shrink` makes it smaller."
        return Advice("Nothing to ship", "", reason)
    verdict = judge(view)
    if verdict.word == NOT_LEARNED:
        return Advice("Nothing to ship yet", "", "The task was not learned; see below for what to change.")
    here = folder if folder is not None else Path(str(view.record.recipe.get("out") or "."))
    if why := lost_words(view, row):
        fewer = _removed(view, row) // 2
        again = f"gradpruner run --out {shlex.quote(str(here))} --num-prune {fewer}"
        steps = (Command("Remove fewer layers", again),) if fewer and view.kind == "run" else ()
        return Advice(NOT_GOOD_ENOUGH, "", f"{why} {_what_to_change(view, row)}", steps)
    reason = _reason(view, row, basis)
    title = row.label
    # The verdict of a study is about GradPruner's row, not about this one.
    if view.kind == "run" and verdict.level == "worse":
        title = f"{title}, clearly worse than the dense model"
        reason = f"{reason} {_what_to_change(view, row)}"
    if view.record.recipe.get("keep_models") == "none":
        return Advice(title, "", f"{reason} The model was not kept.", (_remake(row, here),), row)
    path = str(here / _folder(view, row))
    return Advice(title, path, reason, _next_steps(view, row, path, here), row)


def lost_words(view: View, row: Row) -> str:
    """Says that a row is too bad to ship (`View.has_lost`); '' if it is not."""
    if not view.has_lost(row) or view.dense is None:
        return ""
    pruned, dense = (percent(one.after[view.metric].value) for one in (row, view.dense))
    most = "" if view.majority is None else f", the most frequent answer alone {percent(view.majority)}"
    if view.majority is None and view.floor is not None:
        most = f", before it was tuned {percent(view.floor)}"
    return f"{row.label} scores {pruned}, the dense model {dense}{most}."


def _removed(view: View, row: Row) -> int:
    """Returns how many layers a row has lost; 0 if that is not known."""
    before = (view.dense.num_layers if view.dense else None) or view.record.model.num_layers
    return before - row.num_layers if before and row.num_layers else 0


def _what_to_change(view: View, row: Row) -> str:
    """Says what would keep more of the quality, with the values of this run."""
    recipe, removed = view.record.recipe, _removed(view, row)
    plan = found if isinstance(found := recipe.get("plan"), dict) else {}
    fewer = f"remove fewer layers (plan.num_prune={removed // 2}, now {removed})"
    ways = [fewer if removed > 1 else ""]
    ways.append("repair the cuts (plan.repair=auto, now none)" if plan.get("repair") == "none" else "")
    trained = row.recorded.recovery.model_fields_set or row.recorded.finetune.model_fields_set
    ways.append("" if trained else "train after pruning (recover.epochs=1)")
    unlimited = recipe.get("start") in ("tuned", "given") and not plan.get("max_loss")
    ways.append("limit the loss (plan.max_loss=0.05)" if unlimited else "")
    *most, last = [way for way in ways if way] or ["give more training rows"]
    return f"To keep more, {', '.join(most)}{' or ' if most else ''}{last}."


def _reason(view: View, row: Row, basis: str) -> str:
    search = row.plan.search if row.plan else Search()
    certified = f"certified on {whole(search.rows)} validation rows to lose at most {percent(search.limit)}"
    if basis == "validation":
        found, name = row.validation[view.metric], metric_words(view.metric)
        measured_on = f" on {whole(found.n)} validation rows" if found.n else " on validation rows"
        dense = view.dense.validation.get(view.metric) if view.dense else None
        against = f"; the dense model has {percent(dense.value)}" if dense else ""
        sure = f" Removing this many layers is {certified}." if search.best is not None else ""
        best = f"Of the {_candidates(view)}, it has the best {name}{measured_on}"
        return f"{best}: {percent(found.value)}{against}.{sure}"
    nothing = "no scores were compared on validation rows"
    kept = row.recorded.finetune.kept
    if kept is not None and kept.rows is not None:
        nothing = f"{nothing} (only losses, on {whole(kept.rows)} rows, to decide whether training it helped)"
    trained = row.recorded.finetune.model_fields_set and (kept is None or kept.model != "pruned")
    first = "the first plan" if _other_plans(view) else "the main variant"
    if "@" in row.name:
        first = "the first plan that was measured like the dense model and kept enough of the quality"
    decided = (
        f"It is {first}: {nothing}, and test rows must not decide. With validation rows "
        "(data.validation) the model that does best on them would be chosen."
    )
    only = "fits the budget" if view.kind != "run" else "was measured"
    return {
        "certified": f"It is the smallest model {certified}"
        + (". This holds for the pruned model before it was trained further." if trained else "."),
        "only": decided if _other_plans(view) else f"It is the only pruned model that {only}; {nothing}.",
        "recipe": decided,
    }[basis]


def _other_plans(view: View) -> bool:
    return any("@" in row.name for row in view.rows)


def _candidates(view: View) -> str:
    """Says between which models validation rows decided."""
    if view.kind != "run":
        return "pruned models that fit the budget"
    if not _other_plans(view):
        return "pruned models measured"
    if any(row.plan and row.plan.search.best is not None for row in view.first.rows if "@" not in row.name):
        return "pruned models certified with the smallest limit"
    return "pruned models no larger than that of the first plan"


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
