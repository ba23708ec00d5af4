"""compare: methods at the same budget, with seeds, in one call; the study that `gradpruner compare` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gradpruner.runs.recipe import Recipe
from gradpruner.runs.study.carrying_out import Outcome, run_study
from gradpruner.runs.study.design import Study, make_study
from gradpruner.runs.study.preview import Preview, preview_study

METHODS = ("gradpruner", "last", "random")
SEEDS = (0, 1, 2)
FOLDER = "runs/compare"


def compare(
    recipe: Recipe,
    *,
    methods: str | Sequence[str] = METHODS,
    smaller: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
    out: str | Path = FOLDER,
    dry_run: bool = False,
    command: str = "gradpruner.compare",
) -> Outcome:
    """Compares pruning methods at the same budget, each fine-tuned and measured alike, over seeds.

    A method that fails is a row with its error. Called again, it goes on where it was.

    Args:
        recipe: Model, data, budget and fine-tuning that all rows share.
        methods: Rows (`gradpruner ls methods`), or "all". The dense model always is one, and "gradpruner"
            is two: with and without merging.
        smaller: Smaller models to fine-tune and show beside them: folders or hub ids.
        seeds: One run each.
        out: Folder of the study, with a report.
        dry_run: Check everything and say what would be run; load no weights.
        command: How the user called it, for the report.

    Returns:
        What was found; `print` shows the table and the verdict.

    Raises:
        GradPrunerError: A fault of recipe, data, model or folder that is found before the first run.
    """
    study = make_study(
        cleared(recipe),
        out=out,
        methods=[methods] if isinstance(methods, str) else methods,
        smaller=smaller,
        seeds=seeds,
        title=recipe.title and f"{recipe.title}: methods compared",
    )
    return carried_out(study, dry_run=dry_run, command=command)


def carried_out(study: Study, *, dry_run: bool, command: str) -> Outcome:
    """What a study comes to, or would."""
    return Preview(preview_study(study), measured=False) if dry_run else run_study(study, command=command)


def cleared(recipe: Recipe) -> Recipe:
    """The recipe of a study: models go once they are measured, unless it says otherwise."""
    if "keep_models" in recipe.model_fields_set:
        return recipe
    return recipe.model_copy(update={"keep_models": "none"})
