"""Options several commands share, so that they are called and explained alike."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeArgument = Annotated[
    str | None, typer.Argument(help="Recipe: a YAML file or the name of one (`gradpruner ls recipes`).")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Model folder or hub id.")]
DataOption = Annotated[
    str | None, typer.Option("--data", help="Training data: file, folder or hub dataset; #N samples.")
]
EvalOption = Annotated[str | None, typer.Option("--eval-data", help="Evaluation data.")]
TaskOption = Annotated[
    str | None, typer.Option("--task", help="A named task (`gradpruner ls tasks`) instead of files.")
]
FolderOption = Annotated[
    str | None, typer.Option("--task-folder", help="Local folder with the named task's splits.")
]
OutOption = Annotated[str | None, typer.Option("--out", help="Run directory.")]
PlanOption = Annotated[
    str | None, typer.Option("--plan", help="A plan file, perhaps edited, instead of the scores.")
]
NameOption = Annotated[
    str | None,
    typer.Option("--name", help="What this plan is called in the run directory: variants/<row>@NAME."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of everything random.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any recipe key, e.g. plan.num_prune=13."),
]
PortableOption = Annotated[
    str | None,
    typer.Option(
        "--portable-to",
        metavar="ENGINES",
        help="Choose layers so that these serve the result right: vllm, sglang, llama.cpp, with commas.",
    ),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that comes with the model.")
]
SkipOption = Annotated[bool, typer.Option("--skip-bad", help="Drop unusable rows instead of stopping.")]
DryOption = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, show what would happen, load no weights.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress.")]
