"""The commands `compare` and `ablate`: many methods, settings and seeds, one table."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradpruner.cli.options import (
    DataOption,
    DryOption,
    EpochsOption,
    EvalOption,
    FolderOption,
    FractionOption,
    JsonOption,
    LoraOption,
    ModelOption,
    NumPruneOption,
    QuietOption,
    RateOption,
    RecipeArgument,
    SetOption,
    SkipOption,
    TaskOption,
    TrainLimitOption,
    TrustOption,
    given,
    settled,
)
from gradpruner.errors import ConfigError

if TYPE_CHECKING:
    from gradpruner.runs.recipe import Recipe
    from gradpruner.runs.study import Outcome, StudyFile

ABLATIONS = Path(__file__).parents[1] / "recipes" / "ablations"
DEFAULT_METHODS = "gradpruner,last,random"
DEFAULT_SEEDS = "0,1,2"

SeedsOption = Annotated[
    str | None, typer.Option("--seeds", help="One run each, with commas.", show_default=DEFAULT_SEEDS)
]
SmallerOption = Annotated[
    list[str] | None,
    typer.Option("--smaller", metavar="MODEL", help="A smaller model to fine-tune beside them; repeatable."),
]
OutOption = Annotated[
    str | None, typer.Option("--out", help="Folder of the study; the same again goes on there.")
]


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command()(compare)
    app.command()(ablate)


def compare(
    recipe: RecipeArgument = None,
    model: ModelOption = None,
    data: DataOption = None,
    eval_data: EvalOption = None,
    task: TaskOption = None,
    task_folder: FolderOption = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            help="Rows, with commas (`gradpruner ls methods`), or all. gradpruner: with and without merging.",
            show_default=DEFAULT_METHODS,
        ),
    ] = None,
    smaller: SmallerOption = None,
    seeds: SeedsOption = None,
    unit: Annotated[
        str | None,
        typer.Option(
            "--unit", help="Match removed parameters or decoder_parameters.", show_default="parameters"
        ),
    ] = None,
    num_prune: NumPruneOption = None,
    layer_fraction: FractionOption = None,
    learning_rate: RateOption = None,
    epochs: EpochsOption = None,
    lora: LoraOption = None,
    train_limit: TrainLimitOption = None,
    out: OutOption = "runs/compare",
    overrides: SetOption = None,
    trust_remote_code: TrustOption = False,
    skip_bad: SkipOption = False,
    dry_run: DryOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare pruning methods at the same budget: gradpruner compare RECIPE --methods gradpruner,last.

    The dense model, every method and every seed, fine-tuned and evaluated alike; paired differences and costs
    in one table. A method that fails is a row with its error. Start it again to go on.
    """
    from gradpruner.cli import main as cli
    from gradpruner.runs.study import comparing

    values = given(
        model=model,
        data=data,
        eval_data=eval_data,
        task=task,
        task_folder=task_folder,
        unit=unit,
        num_prune=num_prune,
        layer_fraction=layer_fraction,
        learning_rate=learning_rate,
        epochs=epochs,
        lora=lora,
        train_limit=train_limit,
        trust_remote_code=trust_remote_code,
        skip_bad=skip_bad,
    )
    cli.prepare(quiet)
    # Methods as their papers have them; --set effort=fast repairs all.
    defaults = {"effort": "paper"} if recipe is None else {}
    resolved = cli.resolve(recipe, None, overrides, values, defaults)
    found = comparing.compare(
        resolved,
        out=out or comparing.FOLDER,
        methods=_words(methods, "--methods") if methods is not None else comparing.METHODS,
        smaller=smaller or (),
        seeds=parsed_seeds(seeds) if seeds is not None else comparing.SEEDS,
        dry_run=dry_run,
        command=cli.command_line(),
    )
    _tell(found, out or comparing.FOLDER, as_json)


def ablate(
    study: Annotated[
        str, typer.Argument(help="Study: a YAML file or the name of one (`gradpruner ls ablations`).")
    ],
    model: ModelOption = None,
    data: DataOption = None,
    eval_data: EvalOption = None,
    task: TaskOption = None,
    task_folder: FolderOption = None,
    methods: Annotated[str | None, typer.Option("--methods", help="Other rows, with commas.")] = None,
    smaller: SmallerOption = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="Other seeds, with commas.", show_default="the study's")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Folder of the study.", show_default="runs/NAME")
    ] = None,
    overrides: SetOption = None,
    trust_remote_code: TrustOption = False,
    skip_bad: SkipOption = False,
    dry_run: DryOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Repeat an ablation of the paper, or your own: gradpruner ablate NAME --model ... --data ...

    A sweep over recipe keys, with seeds; one table and one figure. Start it again to go on.
    """
    from gradpruner.cli import main as cli
    from gradpruner.runs.study import make_study, read_study
    from gradpruner.runs.study.comparing import carried_out, cleared

    path = _study_path(study)
    cli.prepare(quiet)
    file = read_study(path)
    values = given(
        model=model,
        data=data,
        eval_data=eval_data,
        task=task,
        task_folder=task_folder,
        trust_remote_code=trust_remote_code,
        skip_bad=skip_bad,
    )
    recipe = _base_recipe(file, path, values, overrides or [])
    plan = make_study(
        cleared(recipe),
        out=out or f"runs/{path.stem}",
        methods=_words(methods, "--methods") if methods is not None else file.methods,
        smaller=smaller or file.smaller,
        seeds=parsed_seeds(seeds) if seeds is not None else file.seeds,
        sweep=file.sweep,
        points=file.points,
        kind="ablation",
        title=file.title,
        figure=file.figure,
        what=file.what,
        plot=file.plot,
        base_folder=path.parent,
    )
    found = carried_out(plan, dry_run=dry_run, command=cli.command_line())
    _tell(found, plan.out, as_json)


def parsed_seeds(text: str) -> list[int]:
    """Seeds from "0,1,2".

    Raises:
        ConfigError: If one is no whole number of at least 0.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if not word.isdecimal():
            raise ConfigError(
                f"--seeds {text}: '{word}' is no seed.",
                hint="Seeds are whole numbers from 0 on: --seeds 0,1,2.",
            )
    return [int(word) for word in words]


def ablation_names() -> list[str]:
    """Studies that come along."""
    return sorted(path.stem for path in ABLATIONS.glob("*.yaml"))


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError(f"{option} names nothing.", hint="`gradpruner ls methods` lists what there is.")
    return words


def _study_path(name: str) -> Path:
    from gradpruner.registry import suggest

    path = Path(name)
    if path.is_file():
        return path
    known = ABLATIONS / f"{name}.yaml"
    if known.is_file():
        return known
    names = ablation_names()
    raise ConfigError(
        f"There is no study file or built-in study '{name}'.{suggest(name, names)}",
        hint=f"Built in: {', '.join(names) or 'none'}.",
    )


def _base_recipe(file: StudyFile, path: Path, values: dict[str, Any], overrides: list[str]) -> Recipe:
    """The recipe a study starts from."""
    from gradpruner.cli import main as cli
    from gradpruner.runs.recipe import load_recipe, resolve_paths

    if file.base is not None:
        beside = path.parent / file.base
        named = file.base.endswith((".yaml", ".yml")) and beside.is_file()
        return cli.resolve(str(beside) if named else file.base, None, overrides, values)
    raw = {"effort": "paper", **copy.deepcopy(file.recipe or {})}
    resolve_paths(raw, path.parent)
    return load_recipe(None, tuple(overrides), raw | settled(values, overrides))


def _tell(found: Outcome, out: str | Path, as_json: bool) -> None:
    """Prints what a study came to; the first row that failed decides how the command ends."""
    from gradpruner.cli import main as cli
    from gradpruner.runs.study.carrying_out import REPORT

    cli.tell(found, found.study, as_json)
    if found.measured and not as_json:
        cli.console().print(f"study done: {Path(out) / REPORT}", highlight=False)
    if found.error is not None:
        raise found.error
