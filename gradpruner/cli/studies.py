"""The commands `compare` and `ablate`: many methods, settings and seeds in one table."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradpruner.cli.bundled import study_file
from gradpruner.cli.executing import command_line, prepare, resolve, tell
from gradpruner.cli.messages import console
from gradpruner.cli.options import ENDING, ROWS, TUNING, Chosen, Text, settled, takes, words
from gradpruner.common.errors import ConfigError

if TYPE_CHECKING:
    from gradpruner.runs.recipe.recipe import Recipe
    from gradpruner.runs.study.carrying_out import Outcome
    from gradpruner.runs.study.file import StudyFile

DEFAULT_METHODS = "gradpruner,last,random"
DEFAULT_SEEDS = "0,1,2"


_SMALLER = Annotated[
    list[str] | None,
    typer.Option(
        "--smaller", metavar="MODEL", help="Also fine-tune this smaller model, for comparison; repeatable."
    ),
]


@takes(
    f"recipe {ROWS} methods smaller seeds unit num_prune layer_fraction {TUNING} out overrides "
    f"trust_remote_code skip_bad {ENDING}",
    methods=Annotated[
        Text,
        typer.Option(
            "--methods",
            help="Methods, comma-separated (`gradpruner ls methods`), or all. gradpruner is run with and "
            "without merging.",
            show_default=DEFAULT_METHODS,
        ),
    ],
    smaller=_SMALLER,
    seeds=Annotated[
        Text,
        typer.Option("--seeds", help="Seeds, comma-separated; one run each.", show_default=DEFAULT_SEEDS),
    ],
    unit=Annotated[
        Text,
        typer.Option(
            "--unit",
            help="What every method removes the same amount of: parameters or decoder_parameters.",
            show_default="parameters",
        ),
    ],
    out=(
        Annotated[Text, typer.Option("--out", help="Folder of the study.")],
        "runs/compare",
    ),
)
def compare(chosen: Chosen) -> None:
    """Compare pruning methods at the same budget.

    Example: gradpruner compare RECIPE --methods gradpruner,last

    Fine-tunes and evaluates the dense model and every method, for every seed, in the same way; one table
    shows paired differences and costs. A method that fails becomes a row with its error. Run the same command
    again to resume.
    """
    from gradpruner.runs.study import comparing

    prepare(chosen.quiet)
    # Without a recipe, methods follow their papers; with --set effort=fast all are repaired.
    tuning = {"finetune.accumulation": None}  # as in a run: fewer rows a step if there are few
    defaults = {"effort": "paper", **tuning} if chosen.recipe is None else {}
    recipe = resolve(chosen.recipe, chosen, defaults=defaults)
    asked = _asked(chosen, comparing.METHODS, (), comparing.SEEDS)
    out = chosen.out or comparing.FOLDER
    found = comparing.compare(recipe, out=out, **asked, dry_run=chosen.dry_run, command=command_line())
    _tell(found, out, chosen.as_json)


@takes(
    f"study {ROWS} methods smaller seeds out overrides trust_remote_code skip_bad {ENDING}",
    methods=Annotated[
        Text,
        typer.Option("--methods", help="Methods, comma-separated.", show_default="those of the study"),
    ],
    smaller=_SMALLER,
    seeds=Annotated[
        Text, typer.Option("--seeds", help="Seeds, comma-separated.", show_default="those of the study")
    ],
    out=Annotated[Text, typer.Option("--out", help="Folder of the study.", show_default="runs/NAME")],
)
def ablate(
    study: Annotated[
        str,
        typer.Argument(help="Study: a YAML file, or the name of a built-in one (`gradpruner ls ablations`)."),
    ],
    chosen: Chosen,
) -> None:
    """Repeat an ablation of the paper, or run your own.

    Example: gradpruner ablate table5_training_rows --model MODEL --data ROWS --eval-data ROWS

    Sweeps over values of recipe keys, with several seeds, and shows the results in one table and one figure.
    Run the same command again to resume.
    """
    from gradpruner.runs.study.comparing import carried_out, cleared
    from gradpruner.runs.study.design import make_study
    from gradpruner.runs.study.file import read_study

    path = study_file(study)
    prepare(chosen.quiet)
    file = read_study(path)
    recipe = _base_recipe(file, path, chosen)
    plan = make_study(
        cleared(recipe),
        out=chosen.out or f"runs/{path.stem}",
        **_asked(chosen, file.methods, file.smaller, file.seeds),
        sweep=file.sweep,
        points=file.points,
        kind="ablation",
        title=file.title,
        figure=file.figure,
        what=file.what,
        plot=file.plot,
        base_folder=path.parent,
    )
    found = carried_out(plan, dry_run=chosen.dry_run, command=command_line())
    _tell(found, plan.out, chosen.as_json)


def _asked(
    chosen: Chosen, methods: Sequence[str] | None, smaller: Sequence[str], seeds: Sequence[int]
) -> dict[str, Any]:
    """Returns methods, smaller models and seeds from the options, with these defaults."""
    options = chosen.others
    if options["methods"] is not None:
        methods = words(options["methods"])
        if not methods:
            raise ConfigError("--methods is empty.", hint="`gradpruner ls methods` lists the methods.")
    return {
        "methods": methods,
        "smaller": options["smaller"] or smaller,
        "seeds": seeds if options["seeds"] is None else parsed_seeds(options["seeds"]),
    }


def parsed_seeds(text: str) -> list[int]:
    """Parses seeds such as "0,1,2".

    Raises:
        ConfigError: If a seed is not a whole number >= 0.
    """
    for word in words(text):
        if not word.isdecimal():
            raise ConfigError(
                f"--seeds {text}: '{word}' is not a seed.",
                hint="Seeds are whole numbers of at least 0: --seeds 0,1,2.",
            )
    return [int(word) for word in words(text)]


def _base_recipe(file: StudyFile, path: Path, chosen: Chosen) -> Recipe:
    """Returns the recipe that a study varies."""
    from gradpruner.runs.recipe.recipe import load_recipe, resolve_paths

    if file.base is not None:
        beside = path.parent / file.base
        named = file.base.endswith((".yaml", ".yml")) and beside.is_file()
        return resolve(str(beside) if named else file.base, chosen)
    raw = {"effort": "paper", **copy.deepcopy(file.recipe or {})}
    resolve_paths(raw, path.parent)
    return load_recipe(None, chosen.overrides, raw | settled(chosen))


def _tell(found: Outcome, out: str | Path, as_json: bool) -> None:
    """Prints the result of a study; raises the error of the first failed row."""
    from gradpruner.common.printing import print_line
    from gradpruner.reports.folders import REPORT

    tell(found, found.study, as_json)
    if found.measured and not as_json:
        print_line(console(), f"study done: {Path(out) / REPORT}")
    if found.error is not None:
        raise found.error
