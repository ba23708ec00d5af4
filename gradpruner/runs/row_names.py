"""Which row of the run directory this recipe's model of a variant has: one that is there, or a new one."""

from __future__ import annotations

from collections.abc import Callable

from gradpruner.common.errors import ConfigError
from gradpruner.gradients.trace import GradientTrace
from gradpruner.methods import METHODS
from gradpruner.plans.reading import Plan
from gradpruner.runs.directory import RunDirectory
from gradpruner.runs.job import Job
from gradpruner.runs.plan_names import (
    MADE,
    derived_name,
    differences,
    method_of,
    named_row,
    rows_in,
    variant_of,
)
from gradpruner.runs.variant import Variant


def row_for(
    job: Job,
    directory: RunDirectory,
    variant: str,
    alike: Callable[[str], Plan | None],
    trace: Callable[[], GradientTrace],
) -> str:
    """The row of the run directory in which this recipe's model of a variant is, or is to be.

    `alike` gives the plan this recipe makes, if it is that of the row asked about, else None; methods that
    decide while they train have none.

    Raises:
        ConfigError: If the name the recipe gives belongs to another plan.
    """
    wanted = job.recipe.plan.name
    shrinks = METHODS.find(method_of(variant)).shrink is not None
    planned = [row for row in rows_in(directory.stages, ("plan", "prune")) if variant_of(row) == variant]
    made = [row for row in rows_in(directory.stages, MADE) if variant_of(row) == variant]

    def is_this(row: str) -> bool:
        plan = alike(row)
        if plan is None and not shrinks:
            return False
        inputs = Variant(job, directory, row, plan, trace).prune_inputs
        return directory.result(f"prune {row}") is None or directory.is_done(f"prune {row}", inputs)

    if wanted is not None:
        row = named_row(variant, wanted)
        if row in made and not is_this(row):
            raise ConfigError(
                f"{directory.path} has a plan '{wanted}' already, and it is another one: "
                f"variants/{row} was made by it.",
                hint="Choose another name, or leave it out.",
            )
        return row
    for row in planned:
        if is_this(row):
            return row
    if variant not in made:  # what nothing was made of is planned anew
        return variant
    first = directory.recipe_of(f"prune {variant}")
    return named_row(variant, derived_name(variant, first, directory.manifest["config"], made))


def row_of_failed(directory: RunDirectory, variant: str) -> str:
    """The row of a variant that failed before it had a plan; never that of a finished one."""
    made = rows_in(directory.stages, MADE)
    if variant not in made:
        return variant
    first = directory.recipe_of(f"prune {variant}")
    now = directory.manifest["config"]
    other = bool(differences(first, now)) and variant != "dense"
    return named_row(variant, derived_name(variant, first, now, made)) if other else variant
