"""The run record: what run.json says and the report reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gradpruner._version import __version__
from gradpruner.data.examples import ExampleSet
from gradpruner.evaluation.metrics import majority_class
from gradpruner.evaluation.outputs import paired_intervals, read_examples
from gradpruner.gradients.scores import LayerScores
from gradpruner.methods import METHODS
from gradpruner.models.dtypes import stored_dtype
from gradpruner.models.sizes import decoder_parameters
from gradpruner.plans.width_plan import WidthPlan
from gradpruner.provenance import provenance, utc_now
from gradpruner.runs.directory import RunDirectory
from gradpruner.runs.job import Job, Plan, count_parameters_of, method_of
from gradpruner.runs.recipe import Recipe


def run_record(
    job: Job,
    directory: RunDirectory,
    scores: Mapping[str, LayerScores],
    plans: Mapping[str, Plan],
    variants: Mapping[str, dict[str, Any]],
    searches: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Everything measured, as the report reads it.

    Args:
        job: What was asked for.
        directory: What was done, stage by stage.
        scores: By method.
        plans: By variant.
        variants: One row of the comparison each, see `variant.Variant`.
        searches: How many layers may go, by variant, see `depth_search.search_depth`.

    Returns:
        JSON values.
    """
    recipe = job.recipe
    add_paired_differences(variants, directory.path, recipe.seed)
    add_costs(variants, recipe, directory.stages)
    return {
        "schema_version": 1,
        "gradpruner_version": __version__,
        "created": directory.manifest["created"],
        "finished": utc_now(),
        "command": job.command,
        "title": recipe.title or f"{job.folder.name} on {task_name(recipe)}",
        "provenance": provenance(recipe.seed),
        "recipe": recipe.model_dump(mode="json"),
        "model": model_facts(job),
        "data": {
            "train": data_facts(job.train) | {"supervised_tokens": job.samples.supervised_tokens},
            "eval": data_facts(job.eval),
            "overlap_rows": job.overlap,
        },
        "trace": trace_facts(directory),
        "scores": {name: score_facts(found) for name, found in scores.items()},
        "plans": {
            name: plan_facts(plan)
            | {
                "savings": job.savings_of(plan),
                "portability": [vars(v) for v in job.portability_of(plan)],
                "search": (searches or {}).get(name),
            }
            for name, plan in plans.items()
        },
        "variants": dict(variants),
        "reference": {"majority_class": majority_class([e.answer for e in job.eval.examples])},
        "stages": stage_facts(directory),
        "warnings": job.warnings,
    }


def add_paired_differences(variants: Mapping[str, dict[str, Any]], folder: Path, seed: int) -> None:
    """Compares every row with the dense one, example by example.

    Adds to each row `paired`: "task" and every further task -> metric -> difference with its interval.
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


def add_costs(
    variants: Mapping[str, dict[str, Any]], recipe: Recipe, stages: Mapping[str, dict[str, Any]]
) -> None:
    """Says of each row what it took in all: `cost`, with `seconds` by part and in total, and `tokens`.

    Parts: tuning (of the dense model, where the row is made from it or learns from it), recording, choosing
    (scores, plan, search), repairing, pruning, training. Measuring is not counted, and neither is what only
    another row needs.
    """

    def spent(*names: str) -> float:
        return sum(float(stages.get(name, {}).get("seconds") or 0.0) for name in names)

    def trained(name: str) -> int:
        found = [variants.get(name, {}).get(part) or {} for part in ("finetune", "recovery")]
        return sum(int(part.get("tokens") or 0) for part in found)

    for name, row in variants.items():
        seconds = {"training": spent(f"finetune {name}", f"recover {name}")}
        tokens = trained(name)
        if name != "dense" and METHODS.find(method_of(name)).training is None:
            method = method_of(name)
            needs_dense = recipe.start == "tuned" or (recipe.distils and recipe.start == "base")
            records = METHODS.find(method).needs_trace
            seconds = {
                "tuning": spent("finetune dense") if needs_dense else 0.0,
                "recording": spent("record") if records else 0.0,
                "choosing": spent(f"score {method}", f"plan {name}", f"search {name}"),
                "repairing": spent(f"repair {name}"),
                "pruning": spent(f"prune {name}"),
                **seconds,
            }
            tokens += trained("dense") if needs_dense else 0
            tokens += int((stages.get("record", {}).get("result") or {}).get("tokens") or 0) if records else 0
        row["cost"] = {"seconds": {**seconds, "total": sum(seconds.values())}, "tokens": tokens}


def task_name(recipe: Recipe) -> str:
    """What a run is about, in a word: its task, or the name of its training file."""
    return recipe.data.task or Path(str(recipe.data.train).partition("#")[0]).stem


def model_facts(job: Job) -> dict[str, Any]:
    """The dense model."""
    return {
        "path": job.recipe.model.path,
        "model_type": job.config.model_type,
        "num_layers": job.num_layers,
        "num_parameters": count_parameters_of(job.config),
        "decoder_parameters": decoder_parameters(job.config),
        "dtype": str(stored_dtype(job.folder)).removeprefix("torch."),
        "sha256": job.model_sha256,
    }


def data_facts(examples: ExampleSet) -> dict[str, Any]:
    """Where rows came from and how many there are."""
    return {
        "source": examples.source,
        "format": examples.format,
        "rows": len(examples),
        "dropped_rows": examples.num_dropped,
        "sha256": examples.sha256,
        "notes": list(examples.notes),
    }


def trace_facts(directory: RunDirectory) -> dict[str, Any] | None:
    """How recording went; None when nothing was recorded."""
    entry = directory.stages.get("record")
    if entry is None or entry["state"] != "done":
        return None
    facts = {key: value for key, value in entry["result"].items() if key != "notes"}
    return facts | {
        "seconds": entry["seconds"],
        "peak_memory_bytes": entry["peak_memory_bytes"],
    }


def score_facts(scores: LayerScores) -> dict[str, Any]:
    """The scores with their confidence."""
    return {
        "method": scores.method,
        "norm": scores.evidence.get("norm"),
        "values": list(scores.values),
        "low": list(scores.low),
        "high": list(scores.high),
        "stability": [{"step": step, "overlap": overlap} for step, overlap in scores.stability],
    }


def plan_facts(plan: Plan) -> dict[str, Any]:
    """What happens to every layer."""
    if isinstance(plan, WidthPlan):
        return {
            "num_layers": plan.num_layers,
            "actions": [],
            "num_kept": plan.num_layers,
            "uniform": plan.uniform,
            "widths": [
                {
                    "layer": i,
                    "heads": len(w.heads),
                    "kv_heads": len(plan.kv_heads(i)),
                    "channels": len(w.channels),
                }
                for i, w in enumerate(plan.layers)
            ],
            "hidden": len(plan.hidden),
            "shape": asdict(plan.shape),
        }
    return {
        "num_layers": plan.num_layers,
        "actions": [{"layer": i, "action": a.action, "into": a.into} for i, a in enumerate(plan.actions)],
        "num_kept": len(plan.keep),
        "rule": plan.rule,
        "density": plan.density,
    }


def stage_facts(directory: RunDirectory) -> list[dict[str, Any]]:
    """Every stage this run came by: done or skipped, how long it took, how much memory."""
    stages = directory.stages
    return [
        {
            "name": name,
            "state": state,
            "seconds": stages[name].get("seconds"),
            "peak_memory_bytes": stages[name].get("peak_memory_bytes"),
        }
        for name, state in directory.visited.items()
    ]
