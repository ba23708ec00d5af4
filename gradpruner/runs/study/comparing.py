"""compare: methods at the same budget, over seeds; the study of `gradpruner compare` as one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gradpruner.runs.recipe.recipe import Recipe
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
    """Compares pruning methods at the same budget over seeds, all with the same fine-tuning and evaluation.

    A method that fails becomes a row with its error. The same call resumes an interrupted comparison.

    Args:
        recipe: Model, data, budget and fine-tuning that all rows share.
        methods: Methods (`gradpruner ls methods`), or "all". Each is a row; "gradpruner" makes two rows, with
            and without merging, and the dense model is always a row.
        smaller: Smaller models to fine-tune for comparison: folders or hub ids.
        seeds: Seeds; each is a run.
        out: Folder of the study and its report.
        dry_run: Only check everything and return what would be run; load no weights.
        command: How the user called it, for the report.

    Returns:
        The results; `print` shows the table and the verdict.

    Raises:
        GradPrunerError: An error in recipe, data, model or folder that is found before the first run.
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
    """Runs a study, or only checks it (`dry_run`)."""
    return Preview(preview_study(study), measured=False) if dry_run else run_study(study, command=command)


def cleared(recipe: Recipe) -> Recipe:
    """Returns the recipe with `keep_models: none`, unless it sets that key itself."""
    if "keep_models" in recipe.model_fields_set:
        return recipe
    return recipe.model_copy(update={"keep_models": "none"})
