"""Which row of the run directory belongs to this recipe's plan of a variant: an existing row or a new one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradpruner.common.errors import ConfigError
from gradpruner.gradients.trace import GradientTrace
from gradpruner.methods import METHODS
from gradpruner.plans.reading import Plan
from gradpruner.runs.folder.directory import RunDirectory
from gradpruner.runs.folder.plan_names import (
    MADE,
    MARK,
    derived_name,
    differences,
    method_of,
    named_row,
    rows_in,
    variant_of,
)
from gradpruner.runs.job.job import Job
from gradpruner.runs.row.variant import Variant


def row_for(
    job: Job,
    directory: RunDirectory,
    variant: str,
    plan_in: Callable[[str], Plan | None],
    trace: Callable[[], GradientTrace],
) -> str:
    """Returns the row that has this recipe's model of a variant, or will have it.

    Args:
        job: The recipe with its inputs.
        directory: The run directory.
        variant: An entry of the recipe's `variants`.
        plan_in: Returns this recipe's plan if the row given has it, else None; always None for methods that
            plan while they train.
        trace: Opens the recorded gradients.

    Raises:
        ConfigError: If the recipe's `plan.name` belongs to another plan.
    """
    wanted = job.recipe.plan.name
    shrinks = METHODS.find(method_of(variant)).shrink is not None
    planned = [row for row in rows_in(directory.stages, ("plan", "prune")) if variant_of(row) == variant]
    made = [row for row in rows_in(directory.stages, MADE) if variant_of(row) == variant]

    def is_ours(row: str) -> bool:
        plan = plan_in(row)
        if plan is None and not shrinks:
            return False
        ours = Variant(job, directory, row, plan, trace)
        if directory.result(f"finetune {row}") is not None and not ours.trains:
            return False  # its model was trained further, and this recipe trains none
        done = f"prune {row}"
        return directory.result(done) is None or directory.is_done(done, ours.prune_inputs)

    if wanted is not None:
        row = named_row(variant, wanted)
        if row in made and not is_ours(row):
            raise ConfigError(
                f"{directory.path} already has another plan called '{wanted}', or the same one trained "
                f"further: variants/{row}.",
                hint="Choose another name, or leave it out.",
            )
        return row
    for row in planned:
        if is_ours(row):
            return row
    if variant not in made:  # no model was made from its plan, which can be replaced
        return variant
    first = directory.recipe_of(f"prune {variant}")
    return named_row(variant, derived_name(variant, first, directory.manifest["config"], made))


def scores_name(directory: RunDirectory, method: str, inputs: Any) -> str:
    """Returns the name of a method's scores: the method or, if plans rest on other scores of it, METHOD@N.

    Only scores that depend on the budget (`Method.compares`) are kept for every plan; others are replaced.
    """
    if not METHODS.find(method).compares:
        return method
    found = [name for name in rows_in(directory.stages, ("score",)) if variant_of(name) == method]
    used = {scores_of_plan(directory, row) for row in rows_in(directory.stages, ("plan",))}
    names = [method, *(f"{method}{MARK}{number}" for number in range(2, len(used) + 2))]
    same = (name for name in found if directory.is_done(f"score {name}", inputs))
    return next(same, None) or next(name for name in names if name not in used)


def scores_of_plan(directory: RunDirectory, row: str) -> str | None:
    """Returns the name of the scores behind a row's plan; None if the plan was given."""
    found: str | None = (directory.result(f"plan {row}") or {}).get("scores", method_of(row))
    return found


def search_of(directory: RunDirectory, row: str) -> dict[str, Any] | None:
    """Returns the search that set the number of layers of a row's plan; None if it was given."""
    made_for = directory.recipe_of(f"plan {row}")
    given = made_for and made_for["plan"]["max_loss"] is None
    return None if given else directory.result(f"search {row}")


def row_of_failed(directory: RunDirectory, variant: str) -> str:
    """Returns a row for a variant that failed before it had a plan; never the row of a finished model."""
    made = rows_in(directory.stages, MADE)
    if variant not in made:
        return variant
    first = directory.recipe_of(f"prune {variant}")
    now = directory.manifest["config"]
    other = bool(differences(first, now)) and variant != "dense"
    return named_row(variant, derived_name(variant, first, now, made)) if other else variant
