"""The commands `compare` and `ablate`: many methods, settings and seeds, one table."""

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
    from gradpruner.runs.recipe import Recipe
    from gradpruner.runs.study.carrying_out import Outcome
    from gradpruner.runs.study.file import StudyFile

DEFAULT_METHODS = "gradpruner,last,random"
DEFAULT_SEEDS = "0,1,2"


_SMALLER = Annotated[
    list[str] | None,
    typer.Option("--smaller", metavar="MODEL", help="A smaller model to fine-tune beside them; repeatable."),
]


@takes(
    f"recipe {ROWS} methods smaller seeds unit num_prune layer_fraction {TUNING} out overrides "
    f"trust_remote_code skip_bad {ENDING}",
    methods=Annotated[
        Text,
        typer.Option(
            "--methods",
            help="Rows, with commas (`gradpruner ls methods`), or all. gradpruner: with and without merging.",
            show_default=DEFAULT_METHODS,
        ),
    ],
    smaller=_SMALLER,
    seeds=Annotated[
        Text, typer.Option("--seeds", help="One run each, with commas.", show_default=DEFAULT_SEEDS)
    ],
    unit=Annotated[
        Text,
        typer.Option(
            "--unit", help="Match removed parameters or decoder_parameters.", show_default="parameters"
        ),
    ],
    out=(
        Annotated[Text, typer.Option("--out", help="Folder of the study; the same again goes on there.")],
        "runs/compare",
    ),
)
def compare(chosen: Chosen) -> None:
    """Compare pruning methods at the same budget: gradpruner compare RECIPE --methods gradpruner,last.

    The dense model, every method and every seed, fine-tuned and evaluated alike; paired differences and costs
    in one table. A method that fails is a row with its error. Start it again to go on.
    """
    from gradpruner.runs.study import comparing

    prepare(chosen.quiet)
    # Methods as their papers have them; --set effort=fast repairs all.
    defaults = {"effort": "paper"} if chosen.recipe is None else {}
    recipe = resolve(chosen.recipe, chosen, defaults=defaults)
    asked = _asked(chosen, comparing.METHODS, (), comparing.SEEDS)
    out = chosen.out or comparing.FOLDER
    found = comparing.compare(recipe, out=out, **asked, dry_run=chosen.dry_run, command=command_line())
    _tell(found, out, chosen.as_json)


@takes(
    f"study {ROWS} methods smaller seeds out overrides trust_remote_code skip_bad {ENDING}",
    methods=Annotated[Text, typer.Option("--methods", help="Other rows, with commas.")],
    smaller=_SMALLER,
    seeds=Annotated[
        Text, typer.Option("--seeds", help="Other seeds, with commas.", show_default="the study's")
    ],
    out=Annotated[Text, typer.Option("--out", help="Folder of the study.", show_default="runs/NAME")],
)
def ablate(
    study: Annotated[
        str, typer.Argument(help="Study: a YAML file or the name of one (`gradpruner ls ablations`).")
    ],
    chosen: Chosen,
) -> None:
    """Repeat an ablation of the paper, or your own: gradpruner ablate NAME --model ... --data ...

    A sweep over recipe keys, with seeds; one table and one figure. Start it again to go on.
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
    """Rows and seeds: what was said, otherwise these."""
    said = chosen.others
    if said["methods"] is not None:
        methods = words(said["methods"])
        if not methods:
            raise ConfigError("--methods names nothing.", hint="`gradpruner ls methods` lists what there is.")
    return {
        "methods": methods,
        "smaller": said["smaller"] or smaller,
        "seeds": seeds if said["seeds"] is None else parsed_seeds(said["seeds"]),
    }


def parsed_seeds(text: str) -> list[int]:
    """Seeds from "0,1,2".

    Raises:
        ConfigError: If one is not a whole number of at least 0.
    """
    for word in words(text):
        if not word.isdecimal():
            raise ConfigError(
                f"--seeds {text}: '{word}' is not a seed.",
                hint="Seeds are whole numbers from 0 on: --seeds 0,1,2.",
            )
    return [int(word) for word in words(text)]


def _base_recipe(file: StudyFile, path: Path, chosen: Chosen) -> Recipe:
    """The recipe a study starts from."""
    from gradpruner.runs.recipe import load_recipe, resolve_paths

    if file.base is not None:
        beside = path.parent / file.base
        named = file.base.endswith((".yaml", ".yml")) and beside.is_file()
        return resolve(str(beside) if named else file.base, chosen)
    raw = {"effort": "paper", **copy.deepcopy(file.recipe or {})}
    resolve_paths(raw, path.parent)
    return load_recipe(None, chosen.overrides, raw | settled(chosen))


def _tell(found: Outcome, out: str | Path, as_json: bool) -> None:
    """Prints what a study came to; the first row that failed decides how the command ends."""
    from gradpruner.runs.study.carrying_out import REPORT

    tell(found, found.study, as_json)
    if found.measured and not as_json:
        console().print(f"study done: {Path(out) / REPORT}", highlight=False)
    if found.error is not None:
        raise found.error
