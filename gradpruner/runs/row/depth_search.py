"""The search for how many layers may go: a tuned model is pruned, repaired and measured on validation rows.

Nothing is trained: each number of layers that is tried costs one repair and one evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from gradpruner.common.errors import PlanError
from gradpruner.common.world import this_world
from gradpruner.evaluation.certification import Search, largest_certified, rows_to_certify
from gradpruner.evaluation.outputs import values_of
from gradpruner.evaluation.quality import evaluate
from gradpruner.gradients.trace import GradientTrace
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.pruning.in_memory import prune_
from gradpruner.pruning.repair.refitting import fit_repair
from gradpruner.runs.job.budget import placeholder_scores, plan_for
from gradpruner.runs.job.evaluation_data import options_of
from gradpruner.runs.job.job import Job
from gradpruner.runs.row.together import together

_MORE = (
    "Give more validation rows (data.validation, data.validation_limit), a higher plan.max_loss, or a number "
    "of layers (plan.num_prune)."
)


def search_depth(job: Job, make_plan: Callable[[int], PruningPlan], trace: Path) -> dict[str, Any]:
    """Finds the largest number of layers whose loss on validation rows is certified (`largest_certified`).

    Args:
        job: Has validation rows and a `plan.max_loss`.
        make_plan: Returns the plan that removes a number of layers.
        trace: Folder of the recorded gradients; opened only if layers are merged.

    Returns:
        JSON values: `best` (None if no number was certified), `metric`, `rows`, `limit`, `confidence`, and
        `curve`: one certificate for each number that was tried, with the `parameters` that stay.
    """
    options = job.recipe.plan
    assert options.max_loss is not None and job.validation is not None
    dense = together(job, validated, None, str(trace))
    metric = next(iter(dense))

    def measure(count: int) -> tuple[list[float], list[float]]:
        found = together(job, validated, make_plan(count).to_dict(), str(trace))
        return dense[metric], found[metric]

    possible = possible_plans(job)
    certified = partial(
        largest_certified,
        candidates=list(possible),
        limit=options.max_loss,
        confidence=options.confidence,
        first=_first_of(job, possible),
    )
    unchanged = certified(lambda count: (dense[metric], dense[metric]))
    if unchanged.best is None:  # `check_validation_rows` asked the same of a dense model with full marks
        raise _hopeless(dense[metric], unchanged, options.max_loss)
    found = certified(measure)
    return {
        "best": found.best,
        "metric": metric,
        "rows": len(job.validation.examples),
        "limit": options.max_loss,
        "confidence": found.confidence,
        "curve": [
            {
                "num_prune": count,
                "parameters": job.savings_of(possible[count])["parameters"]["after"],
                **certificate.as_dict(),
            }
            for count, certificate in found.curve
        ],
    }


def check_validation_rows(job: Job) -> None:
    """Refuses a search that could not even certify a removal without any loss: its rows are too few.

    Raises:
        PlanError: Says how many rows are needed at least.
    """
    options, possible = job.recipe.plan, possible_plans(job) if job.recipe.plan.max_loss else {}
    if options.max_loss is None or job.validation is None or not possible:
        return
    first, rows = _first_of(job, possible), len(job.validation.examples)
    needed = rows_to_certify(list(possible), options.max_loss, confidence=options.confidence, first=first)
    if rows < needed:
        raise PlanError(
            f"To certify a loss of at most {options.max_loss:.2%}, {needed} validation rows are needed at "
            f"least, and there are {rows}: not even a removal that loses nothing could be certified.",
            hint=_MORE,
        )


def _hopeless(dense: list[float], found: Search, limit: float) -> PlanError:
    """Returns the error for rows that would not even certify a model with the dense model's own scores."""
    needed = min((certificate.rows_needed or 0 for _, certificate in found.measured), default=0)
    return PlanError(
        f"The dense model scores {sum(dense) / len(dense):.1%} on {len(dense)} validation rows. They cannot "
        f"certify a loss of at most {limit:.2%}, not even of a removal that loses nothing"
        f"{f': about {needed} are needed' if needed else ''}.",
        hint=_MORE,
    )


def _first_of(job: Job, possible: dict[int, PruningPlan]) -> int | None:
    """Returns the number of layers to try first: the default, if it is possible."""
    default = job.num_layers - job.num_keep
    return default if default in possible else None


def possible_plans(job: Job) -> dict[int, PruningPlan]:
    """Returns the numbers of layers that can go, each with a plan.

    The model's family, protected layers and engines restrict them.
    """
    found = {}
    for count in range(1, job.num_layers):
        with suppress(PlanError):
            scores = placeholder_scores(job.num_layers)
            found[count] = plan_for(job, scores, merging=False, num_prune=count)
    return found


def validated(job: Job, plan: dict[str, Any] | None, trace: str) -> dict[str, list[float]]:
    """Prunes and repairs the model by a plan; returns the score of every validation row by metric.

    The main metric comes first. Without a plan the dense model is measured.
    """
    model = job.load(job.origin)
    if plan is not None:
        found = PruningPlan.from_dict(plan)
        recorded = GradientTrace.load(trace) if found.needs_trace else None
        repair = None
        if job.repair.kind != "none":
            samples: Any = job.samples
            world = this_world()
            repair = fit_repair(model, found, samples, job.collator, job.repair, trace=recorded, world=world)
        prune_(model, found, recorded, repair=repair)
    return _scores_of(job, model)


def _scores_of(job: Job, model: Any) -> dict[str, list[float]]:
    options = options_of(job.recipe, job.metrics, job.max_length)
    questions = job.questions("validation")
    result = evaluate(model, job.tokenizer, questions, options, progress="validate", world=this_world())
    job.release(model)
    return values_of(result.outputs)


def refuse_uncertified(found: dict[str, Any]) -> int:
    """Returns the number of layers that a search found.

    Raises:
        PlanError: If it found none; the message says what was measured and what would help.
    """
    if found["best"] is not None:
        return int(found["best"])
    least = found["curve"][0]
    needed = f" About {least['rows_needed']} rows are needed." if least["rows_needed"] else ""
    raise PlanError(
        f"No number of layers is certified to lose at most {found['limit']:.2%} of {found['metric']} on "
        f"{found['rows']} validation rows: removing {least['num_prune']} loses {least['loss']:.2%}, at most "
        f"{least['upper']:.2%} with confidence ({least['verdict']}).{needed}",
        hint=_MORE,
    )
