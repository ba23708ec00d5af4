"""The run record: what run.json says, for reports and studies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gradpruner.common.errors import IntegrityError
from gradpruner.common.json_files import read_json
from gradpruner.common.printing import shown
from gradpruner.common.provenance import provenance, utc_now
from gradpruner.common.run_names import StageName
from gradpruner.common.version import __version__
from gradpruner.data.examples import ExampleSet
from gradpruner.evaluation.metrics import majority_class
from gradpruner.evaluation.outputs import paired_intervals, read_examples
from gradpruner.gradients.scores import LayerScores
from gradpruner.methods import METHODS
from gradpruner.models.dtypes import stored_dtype
from gradpruner.plans.reading import Plan
from gradpruner.reports.fields import REFUSE
from gradpruner.reports.record import Record
from gradpruner.runs.folder.directory import RunDirectory, stays_inside
from gradpruner.runs.folder.plan_names import MADE, differences, label_of, method_of, rows_in, scores_file
from gradpruner.runs.folder.row_names import scores_of_plan, search_of
from gradpruner.runs.job.job import Job
from gradpruner.runs.recipe.effects import effect_of
from gradpruner.runs.recipe.recipe import Recipe
from gradpruner.runs.row.planning import stored_plan
from gradpruner.runs.row.stages import RESULTS

# Without these, a study has nothing to compute with.
_NEEDED = {"recipe", "model", "plans", "scores", "variants", "warnings"}


def read_run_record(path: Path) -> dict[str, Any]:
    """Reads a run record and checks all values that a study or a report reads.

    Raises:
        IntegrityError: If the file is missing or not JSON, or a value is missing or has a wrong type.
    """
    raw: dict[str, Any] = read_json(path, "run record")
    fault = f"{path} is not a readable run record"
    try:
        record = Record.model_validate(raw, context=REFUSE)
    except ValidationError as error:
        raise IntegrityError(f"{fault}.") from error
    if _NEEDED - record.model_fields_set or record.model.num_parameters is None:
        raise IntegrityError(f"{fault}: it lacks what every record has.")
    for name, row in record.variants.items():
        file = row.evaluation.per_example
        if file and not stays_inside(file):
            raise IntegrityError(f"{fault}: the answers of {shown(name)} are outside, in {shown(file)}.")
        if row.evaluation.model_fields_set and not row.error and row.num_parameters is None:
            raise IntegrityError(f"{fault}: the row {shown(name)} has figures but no size.")
    return raw


def run_record(
    job: Job, directory: RunDirectory, asked: Mapping[str, str], errors: Mapping[str, str]
) -> dict[str, Any]:
    """Collects everything the run directory holds, from this start and earlier ones, for the report.

    Args:
        job: The recipe with its inputs.
        directory: The run directory.
        asked: Variant of the recipe -> its row, see `plan_names`; rows of other plans come after these.
        errors: Row -> why it failed.
    """
    recipe = job.recipe
    made = rows_in(directory.stages, MADE)
    others = sorted(rows_in(directory.stages, ("plan", *MADE)), key=lambda name: name != "dense")
    known = dict.fromkeys([*asked.values(), *others, *errors])
    # A folder of an older version may have rows of methods that have another name today.
    names = [name for name in known if method_of(name) in METHODS.names()]
    plans = {name: plan_facts(job, directory, name) for name in names}
    plans = {name: facts for name, facts in plans.items() if facts is not None}
    variants = {
        name: row_facts(job, directory, name, plans.get(name), errors.get(name))
        for name in names
        if name in made or name in errors
    }
    left_out = leave_out_unlike(job, directory, variants)
    add_paired_differences(variants, directory.path, recipe.seed)
    add_costs(variants, recipe, directory)
    return {
        "schema_version": 1,
        "gradpruner_version": __version__,
        "created": directory.manifest["created"],
        "finished": utc_now(),
        "command": job.command,
        "title": title_of(job),
        "provenance": provenance(recipe.seed),
        "recipe": directory.manifest["config"],
        "model": model_facts(job),
        "data": {
            "train": data_facts(job.train) | {"supervised_tokens": job.samples.supervised_tokens},
            "eval": data_facts(job.eval) if job.measures else {},
            "overlap_rows": job.overlap,
        },
        "learning_rate": rate_facts(job, directory),
        "trace": trace_facts(directory),
        "scores": {name: score_facts(found) for name, found in stored_scores(directory).items()},
        "plans": plans,
        "rows": dict(asked),
        "variants": variants,
        "reference": {"majority_class": majority_class([e.answer for e in job.eval.examples])},
        "stages": stage_facts(directory),
        "warnings": [*job.warnings, *other_settings(directory, made), *left_out],
    }


def title_of(job: Job) -> str:
    """Returns the title of the report: the recipe's, else "MODEL on TASK".

    A model that is part of another run is named after that run.
    """
    *_, run, variants, _, last = ("", "", "", *job.folder.resolve().parts)
    name = run if variants == "variants" else last
    return job.recipe.title or f"{name} on {job.recipe.task_name}"


def row_facts(
    job: Job, directory: RunDirectory, name: str, plan: Mapping[str, Any] | None, error: str | None
) -> dict[str, Any]:
    """Collects a row of the comparison: the results of its stages, the size of its model, its error."""
    found = {part: directory.result(stage.format(name)) for part, stage in RESULTS.items()}
    for part in ("before", "evaluation"):
        result = found[part]
        if result and directory.stages[RESULTS[part].format(name)].get("resumed"):
            found[part] = result | {"seconds": None}  # those of the start before it are not known
    further = {StageName.of(stage): directory.result(stage) for stage in directory.stages}
    if plan is not None:
        sizes = {unit: change["after"] for unit, change in plan["savings"].items()}
    else:
        sizes = {"layers": job.num_layers, "parameters": job.sizes.parameters} if error is None else {}
    return {
        "label": label_of(name, found["repair"] is not None),
        "plan": name if plan else None,
        **found,
        "also": {
            stage.rest.removeprefix("on "): result
            for stage, result in further.items()
            if stage[:2] == ("evaluate", name) and stage.rest.startswith("on ") and result is not None
        },
        "error": error,
        "num_layers": sizes.get("layers"),
        "num_parameters": sizes.get("parameters"),
    }


def other_settings(directory: RunDirectory, names: Iterable[str]) -> list[str]:
    """Returns warnings about rows that were trained with other settings than this recipe's."""
    found = []
    for name in names:
        recipe = directory.recipe_of(f"finetune {name}") or directory.recipe_of(f"evaluate {name}")
        changed = differences(recipe, directory.manifest["config"]) if recipe else {}
        old = [
            f"{key}={shown(value)}"
            for key, (value, _) in changed.items()
            if effect_of(key) in ("training", "execution")
        ]
        if old:
            found.append(f"The row {name} was made by an earlier start with {', '.join(old)}.")
    return found


def leave_out_unlike(job: Job, directory: RunDirectory, variants: Mapping[str, dict[str, Any]]) -> list[str]:
    """Removes figures that cannot be compared with the others; returns a warning about each such row.

    Rows of other plans keep their results while this start evaluates on other rows or with other settings, or
    tunes the dense model anew that they were made from. What this start does not evaluate must agree with the
    dense model's evaluation.
    """
    ordered, left = sorted(variants, key=lambda name: name != "dense"), {}
    for what in (
        "",
        "before",
        *dict.fromkeys(f"on {task}" for row in variants.values() for task in row["also"]),
    ):
        stages = {name: f"evaluate {name} {what}".rstrip() for name in ordered}
        found = {name: stage for name, stage in stages.items() if directory.result(stage) is not None}
        first = sorted(found.values(), key=lambda stage: stage not in directory.visited)
        for name, stage in found.items():
            if directory.conditions_of(stage) != directory.conditions_of(first[0]):
                left[name] = "evaluated on other rows or with other settings than the others"
                _leave_out(variants[name], what)
    for name in ordered if job.origin != job.folder else ():
        origin = directory.conditions_of(f"prune {name}")
        if origin and origin != job.origin_sha256:
            left[name] = "made from a dense model that was tuned otherwise and is no longer here"
            for what in ("", "before", *(f"on {task}" for task in variants[name]["also"])):
                _leave_out(variants[name], what)
    again = "Start it again with its own settings to have it like the others."
    return [f"The row {name} was {why}, so its figures are left out. {again}" for name, why in left.items()]


def _leave_out(row: dict[str, Any], what: str) -> None:
    """Removes an evaluation of a row: "" of its finished model, "before", or "on TASK"."""
    if what.startswith("on "):
        row["also"] = {task: found for task, found in row["also"].items() if f"on {task}" != what}
    else:
        row[what or "evaluation"] = None


def stored_scores(directory: RunDirectory) -> dict[str, LayerScores]:
    """Reads the scores of every method that has scored the layers, and of every plan that has its own."""
    names = rows_in(directory.stages, ("score",))
    return {
        name: LayerScores.load(directory.path / scores_file(name))
        for name in names
        if directory.has_files(f"score {name}")
    }


def add_paired_differences(variants: Mapping[str, dict[str, Any]], folder: Path, seed: int) -> None:
    """Compares each row with the dense one, example by example.

    Adds `paired` to each row: "task" or the name of a further task -> metric -> difference and its interval.
    """

    def answered(row: dict[str, Any]) -> dict[str, Path]:
        measured = {"task": row.get("evaluation"), **row.get("also", {})}
        found = {name: entry.get("per_example") for name, entry in measured.items() if entry}
        return {name: folder / file for name, file in found.items() if file and (folder / file).is_file()}

    dense = {name: read_examples(path) for name, path in answered(variants.get("dense", {})).items()}
    for name, row in variants.items():
        if name != "dense":
            row["paired"] = {
                task: paired_intervals(dense[task], read_examples(path), seed)
                for task, path in answered(row).items()
                if task in dense
            }


def add_costs(variants: Mapping[str, dict[str, Any]], recipe: Recipe, directory: RunDirectory) -> None:
    """Adds its whole cost to each row: `cost`, with `seconds` by part and in total, and trained `tokens`.

    The parts are tuning (of the dense model, if the row is made from it or learns from it), recording,
    choosing (scores, plan, search), repairing, pruning and training. Evaluations are not counted, and neither
    is what only other rows need. `method_seconds` and `method_peak_memory_bytes` are those of a pruned row
    without fine-tuning, but with the recovery that its method brings. `resumed` names the stages that resumed
    an interrupted start; if that start was killed, its seconds are missing.
    """

    stages = directory.stages

    def trained(name: str) -> int:
        found = [variants.get(name, {}).get(part) or {} for part in ("finetune", "recovery")]
        return sum(int(part.get("tokens") or 0) for part in found)

    for name, row in variants.items():
        method = METHODS.find(method_of(name))
        prunes = name != "dense" and method.training is None
        parts: dict[str, list[str]] = {
            "tuning": ["finetune dense"] if recipe.tunes_first else [],
            "recording": ["record"] if method.needs_trace else [],
            "choosing": [
                f"score {scores_of_plan(directory, name)}",
                f"plan {name}",
                *([f"search {name}"] if search_of(directory, name) else []),
            ],
            "repairing": [f"repair {name}"],
            "pruning": [f"prune {name}"],
        }
        parts = parts if prunes else {}
        parts["training"] = [f"finetune {name}", f"recover {name}"]
        counted = [stage for names in parts.values() for stage in names if stage in stages]
        seconds = {
            part: sum(_seconds(stages[stage]) for stage in names if stage in stages)
            for part, names in parts.items()
        }
        of_method = [stages[stage] for stage in counted if StageName.of(stage).verb != "finetune"]
        recorded = directory.result("record") or {} if parts.get("recording") else {}
        row["cost"] = {
            "seconds": {**seconds, "total": sum(seconds.values())},
            "method_seconds": sum(map(_seconds, of_method)) if name != "dense" else None,
            "method_peak_memory_bytes": max(
                (s.get("peak_memory_bytes") or 0 for s in of_method), default=None
            ),
            "tokens": trained(name)
            + (trained("dense") if parts.get("tuning") else 0)
            + int(recorded.get("tokens") or 0),
            "resumed": [stage for stage in counted if stages[stage].get("resumed")],
        }


def _seconds(stage: Mapping[str, Any]) -> float:
    return float(stage.get("seconds", 0.0))


def model_facts(job: Job) -> dict[str, Any]:
    """Returns what the record says about the dense model."""
    return {
        "path": job.recipe.model.path,
        "model_type": job.config.model_type,
        "num_layers": job.num_layers,
        "num_parameters": job.sizes.parameters,
        "decoder_parameters": job.sizes.decoder_parameters,
        "dtype": str(stored_dtype(job.folder)).removeprefix("torch."),
        "sha256": job.model_sha256,
    }


def data_facts(examples: ExampleSet) -> dict[str, Any]:
    """Returns what the record says about a set of rows."""
    return {
        "source": examples.source,
        "format": examples.format,
        "rows": len(examples),
        "dropped_rows": examples.num_dropped,
        "sha256": examples.sha256,
        "notes": list(examples.notes),
    }


def rate_facts(job: Job, directory: RunDirectory) -> dict[str, Any]:
    """Returns the learning rate, where it comes from, and the loss at each rate that was tried."""
    tried = [directory.result(name) for name in directory.visited if StageName.of(name).verb == "rate"]
    found = sorted(filter(None, tried), key=lambda entry: float(entry["rate"]))
    facts = {"value": job.recipe.finetune.learning_rate, "source": job.rate_source}
    return facts | ({"tried": found} if found and job.recipe.find_rate else {})


def trace_facts(directory: RunDirectory) -> dict[str, Any] | None:
    """Returns how recording went; None if nothing was recorded."""
    entry = directory.stages.get("record")
    if entry is None or entry["state"] != "done":
        return None
    facts = {key: value for key, value in entry["result"].items() if key != "notes"}
    return facts | {
        "seconds": entry["seconds"],
        "peak_memory_bytes": entry["peak_memory_bytes"],
    }


def score_facts(scores: LayerScores) -> dict[str, Any]:
    """Returns what the record says about scores: values, intervals and stability."""
    return {
        "method": scores.method,
        "norm": scores.evidence.get("norm"),
        "values": list(scores.values),
        "low": list(scores.low),
        "high": list(scores.high),
        "stability": [{"step": step, "overlap": overlap} for step, overlap in scores.stability],
    }


def plan_facts(job: Job, directory: RunDirectory, row: str) -> dict[str, Any] | None:
    """Returns what a row's plan does and saves, and which engines serve its model; None without a plan."""
    plan = stored_plan(directory, row)
    if plan is None:
        return None
    same_model = plan.num_layers == job.num_layers
    saved = job.savings_of(plan) if same_model else directory.result(f"plan {row}") or {}
    return plan.facts() | {
        "savings": {unit: change for unit, change in saved.items() if unit != "scores"},
        "scores": scores_of_plan(directory, row),
        "portability": [vars(v) for v in job.portability_of(plan)] if same_model else [],
        "search": search_of(directory, row),
        "comparison": comparison_facts(plan),
    }


def comparison_facts(plan: Plan) -> dict[str, Any]:
    """Returns which of two choices of layers a plan took, and their losses; {} if the plan says otherwise."""
    found: Any = getattr(plan, "evidence", {}).get("comparison")
    if not isinstance(found, dict) or not isinstance(found.get("pruned"), dict):  # plans can be edited
        return {}
    pruned = found["pruned"].get(str(found.get("chosen")))
    if not isinstance(pruned, list):
        return {}
    facts = {key: found.get(key) for key in ("chosen", "losses", "held_out", "rows", "skipped")}
    # A search goes on from the comparison to other numbers of layers; an edited plan is no longer its result.
    return facts | {"num_prune": len(pruned), "same": list(plan.pruned) == pruned}


def stage_facts(directory: RunDirectory) -> list[dict[str, Any]]:
    """Returns every stage of this start: done, skipped or failed, its seconds, its peak memory.

    `resumed` says that it resumed an interrupted start; if that start was killed, its seconds are missing.
    """
    stages = directory.stages
    return [
        {
            "name": name,
            "state": state,
            "seconds": stages[name].get("seconds"),
            "peak_memory_bytes": stages[name].get("peak_memory_bytes"),
            "resumed": stages[name].get("resumed", False),
        }
        for name, state in directory.visited.items()
    ]
