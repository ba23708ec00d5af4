"""Commands that work on model folders, without a recipe or data: prune, verify, diff, rebuild."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradpruner.cli.executing import execute, prepare, resolve
from gradpruner.cli.messages import console
from gradpruner.cli.options import ENDING, Chosen, JsonOption, QuietOption, given, takes
from gradpruner.cli.suggestions import suggest
from gradpruner.common.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from gradpruner.gradients.trace import GradientTrace
    from gradpruner.plans.layer_plan import PruningPlan
    from gradpruner.plans.width_plan import WidthPlan
    from gradpruner.pruning.verification import VerifyReport

LARGEST_SHARD = "5GB"
SourceOption = Annotated[
    str | None, typer.Option("--source", help="The model it was pruned from. Default: the recorded one.")
]
PlanFileOption = Annotated[
    Path | None, typer.Option("--plan", help="Plan file (plans/<variant>.json of a run).")
]
TraceOption = Annotated[
    Path | None,
    typer.Option(
        "--trace", help="Folder of recorded gradients. Default: that of the run the plan belongs to."
    ),
]
LevelOption = Annotated[
    str,
    typer.Option(
        "--verify", help="How to verify: full, structure (computes nothing), auto (full if memory allows)."
    ),
]


@takes(
    f"source destination plan trace keep drop repair max_shard_size level out overrides {ENDING}",
    out=Annotated[str | None, typer.Option("--out", help="Run directory whose variants are to be pruned.")],
    dry_run=(Annotated[bool, typer.Option("--dry-run", help="Check everything; write nothing.")], False),
)
def prune(
    chosen: Chosen,
    source: Annotated[
        str | None,
        typer.Argument(help="A model folder or hub id, or a recipe to run up to pruning."),
    ] = None,
    destination: Annotated[Path | None, typer.Argument(help="Folder to write the pruned model to.")] = None,
    plan: PlanFileOption = None,
    trace: TraceOption = None,
    keep: Annotated[
        str | None, typer.Option("--keep", help="Instead of --plan: keep only these layers, e.g. 0-17,30,31.")
    ] = None,
    drop: Annotated[
        str | None, typer.Option("--drop", help="Instead of --plan: drop these layers, e.g. 18-29.")
    ] = None,
    repair: Annotated[
        Path | None,
        typer.Option("--repair", help="Fitted repair of that plan (variants/<variant>/repair of a run)."),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest size of one weight file, e.g. 5GB or 500MB.")
    ] = LARGEST_SHARD,
    level: LevelOption = "auto",
) -> None:
    """Prune a checkpoint on disk, without loading the model.

    Example: gradpruner prune MODEL NEW --plan PLAN

    Copies the tensors of kept layers and computes merged ones one at a time; the new folder appears only
    after it is verified. A plan that removes heads, channels or hidden dimensions does load the model.

    Without a second folder: runs a recipe, or the run in --out, up to pruning.
    """
    for_layers: dict[str, Any] = {"--trace": trace, "--repair": repair}
    for_layers |= {"--max-shard-size": max_shard_size != LARGEST_SHARD, "--verify": level != "auto"}
    if destination is None:
        _refuse_for_runs(source, {"--keep": keep, "--drop": drop, **for_layers})
        chosen = replace(chosen, values=given(plan=str(plan) if plan else None))
        execute(resolve(source, chosen, chosen.out), "prune", chosen)
        return
    if source is None or chosen.out is not None or chosen.overrides:
        raise ConfigError(
            "--out and --set belong to a run, but two folders are given.",
            hint="To prune a model folder: gradpruner prune MODEL NEW with --plan, --keep or --drop.",
        )
    prepare(chosen.quiet)
    which = _Choice(plan, trace, keep, drop, repair)
    extra = [name for name, value in for_layers.items() if value]
    if extra and which.width_plan is not None:
        raise ConfigError(
            f"{extra[0]} works only with plans of whole layers; this plan removes heads, channels or hidden "
            "dimensions.",
            hint=f"Leave {extra[0]} out.",
        )
    _prune_folder(
        source, destination, which, chosen, max_shard_bytes=parse_size(max_shard_size), verify=level
    )


def _refuse_for_runs(source: str | None, options: dict[str, Any]) -> None:
    """Refuses options that only mean something with two folders; a run would ignore them."""
    for name in (name for name, value in options.items() if value):
        hint = "A run prunes by its recipe: set plan.num_prune, plan.file or plan.repair with --set."
        if source is not None and Path(source, "config.json").is_file():
            hint = f"Name the folder to write: gradpruner prune {source} NEW {name} ..."
        raise ConfigError(f"{name} needs a model folder and a second folder to prune it into.", hint=hint)


@dataclass(frozen=True)
class _Choice:
    """Which layers to remove: the values of --plan, --keep and --drop, with the plan's trace and repair."""

    plan_file: Path | None
    trace_folder: Path | None
    keep: str | None
    drop: str | None
    repair_folder: Path | None

    def __post_init__(self) -> None:
        options = {"--plan": self.plan_file, "--keep": self.keep, "--drop": self.drop}
        given = [name for name, value in options.items() if value]
        if len(given) != 1:
            what = " and ".join(given) or "None of --plan, --keep and --drop"
            raise ConfigError(f"{what} given; give exactly one of --plan, --keep and --drop.")

    @property
    def width_plan(self) -> WidthPlan | None:
        """The plan, if it removes heads, channels or hidden dimensions; otherwise None."""
        from gradpruner.plans.reading import load_plan

        if self.plan_file is None or not self.plan_file.is_file():
            return None
        plan = load_plan(self.plan_file)
        return plan if plan.kind == "width" else None

    def resolve(self, source: Path) -> tuple[PruningPlan, GradientTrace | None]:
        """Returns the plan and, if it merges by recorded gradients, the trace."""
        from gradpruner.gradients.trace import GradientTrace
        from gradpruner.models.config_patch import text_config
        from gradpruner.models.loading import load_config
        from gradpruner.plans.layer_plan import PruningPlan

        if self.plan_file is None:
            depth = text_config(load_config(source, native=True)).num_hidden_layers
            return PruningPlan.from_keep(depth, kept_layers(self.keep, self.drop, depth)), None
        plan = PruningPlan.load(self.plan_file)
        folder = self.trace_folder
        beside = self.plan_file.resolve().parent.parent / "trace"
        if folder is None and plan.needs_trace and beside.is_dir():
            folder = beside
        return plan, GradientTrace.load(folder) if folder is not None and plan.needs_trace else None


def _prune_folder(source: str, destination: Path, which: _Choice, chosen: Chosen, **options: Any) -> None:
    from gradpruner.common.progress import show_bytes
    from gradpruner.models.folder import locate_model
    from gradpruner.plans.repair import Repair
    from gradpruner.pruning.blueprint import Blueprint
    from gradpruner.pruning.on_disk import check_request, write_pruned

    folder = locate_model(source)
    if (widths := which.width_plan) is not None:
        _prune_widths(folder, source, destination, widths, chosen)
        return
    plan, trace = which.resolve(folder)
    replaces = _has_files(destination)
    repair = Repair.load(which.repair_folder) if which.repair_folder is not None else None
    blueprint = Blueprint(folder, plan, trace, repair=repair)
    facts = blueprint.summary()
    if not chosen.as_json:
        _print_summary(facts, plan)
    if chosen.dry_run:
        check_request(folder, destination, **options)
    else:
        with show_bytes(facts["bytes"][1], "prune") as progress:
            report = write_pruned(blueprint, destination, name=source, progress=progress, **options)
        facts |= _made(destination, report, chosen, replaces)
    if chosen.as_json:
        typer.echo(json.dumps(facts, indent=2))


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _made(
    destination: Path, report: VerifyReport, chosen: Chosen, replaced: bool, what: str = "layers"
) -> dict[str, Any]:
    """Prints that the folder was written; returns what --json adds."""
    if not chosen.as_json:
        _print_report(report)
        typer.echo(f"pruned: {destination}{', which replaces the earlier one there' if replaced else ''}")
        suggest(f"prune {what}", folder=destination)
    return {"folder": str(destination), "verified": report.to_dict()}


def _prune_widths(folder: Path, source: str, destination: Path, plan: WidthPlan, chosen: Chosen) -> None:
    from gradpruner.models.classes import model_class
    from gradpruner.models.engine_widths import portability_of
    from gradpruner.models.engines import layer_facts
    from gradpruner.models.folder import PRUNING_FILE, check_output
    from gradpruner.models.layers import skeleton
    from gradpruner.models.loading import load_config
    from gradpruner.models.narrowing import check_widths
    from gradpruner.models.widths import WidthView
    from gradpruner.pruning.widths_on_disk import prune_width_checkpoint

    config = load_config(folder)
    view = WidthView(skeleton(model_class(config), config))
    plan.check_model(view.shape)
    check_widths(view, plan)
    saved = view.savings(plan)
    facts: dict[str, Any] = {
        "model_type": config.model_type,
        "uniform": plan.uniform,
        "savings": saved,
        "portability": [vars(verdict) for verdict in portability_of(plan, layer_facts(config))],
    }
    if not chosen.as_json:
        before, after = saved["parameters"]["before"], saved["parameters"]["after"]
        typer.echo(f"{config.model_type}: {before:,} -> {after:,} parameters in {plan.num_layers} layers")
        _print_portability(facts["portability"])
    check_output(destination, inputs=(folder,), marker=PRUNING_FILE)
    if not chosen.dry_run:
        replaces = _has_files(destination)
        report = prune_width_checkpoint(folder, destination, plan, name=source)
        facts |= _made(destination, report, chosen, replaces, "widths")
    if chosen.as_json:
        typer.echo(json.dumps(facts, indent=2))


def _print_portability(verdicts: list[dict[str, Any]]) -> None:
    for verdict in verdicts:
        typer.echo(f"  {verdict['engine']}: {verdict['status']}. {verdict['reason']}".rstrip(". ") + ".")


def _print_summary(facts: dict[str, Any], plan: PruningPlan) -> None:
    from gradpruner.common.printing import num_bytes, runs_of

    before, after = (num_bytes(size) for size in facts["bytes"])
    typer.echo(
        f"{facts['model_type']}: {facts['layers'][0]} -> {facts['layers'][1]} layers, {before} -> "
        f"{after}; removes {'layer' if len(plan.pruned) == 1 else 'layers'} {runs_of(plan.pruned)}"
        + (f", {sum(map(len, plan.merged.values()))} of them merged" if plan.merged else "")
    )
    _print_portability(facts["portability"])
    for warning in facts["warnings"]:
        typer.echo(f"  warning: {warning}")


def _print_report(report: VerifyReport) -> None:
    from rich.markup import escape
    from rich.table import Table

    title = escape(f"{report.folder} ({report.level})")
    table = Table("check", "", "found", title=title, title_justify="left")
    marks = {True: "[green]ok[/green]", False: "[red]FAILED[/red]", None: "-"}
    for check in report.checks:
        table.add_row(check.name, marks[check.passed], escape(check.detail))
    console().print(table)


def verify(
    folder: Annotated[Path, typer.Argument(help="A pruned model folder.")],
    source: SourceOption = None,
    plan: PlanFileOption = None,
    trace: TraceOption = None,
    level: LevelOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Check a pruned model against its plan and source.

    Checks files, shapes, logits, KV cache and generation.
    """
    from gradpruner.gradients.trace import GradientTrace
    from gradpruner.plans.layer_plan import PruningPlan
    from gradpruner.pruning.verification import verify_checkpoint

    prepare(True)
    if not folder.expanduser().is_dir():
        raise ModelError(
            f"There is no model folder at {folder}.",
            hint="Give a folder that `gradpruner prune` or a run wrote.",
        )
    report = verify_checkpoint(
        folder,
        source,
        PruningPlan.load(plan) if plan else None,
        GradientTrace.load(trace) if trace else None,
        level=level,
    )
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), **report.to_dict()}, indent=2))
    else:
        _print_report(report)
    report.raise_on_failure()


def diff(
    source: Annotated[str, typer.Argument(help="The model before pruning: folder or hub id.")],
    pruned: Annotated[Path, typer.Argument(help="The pruned model folder.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write the difference to.")],
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Store a pruned model as a small difference.

    The folder holds the plan, the tensors that are not the source's own, and hashes; `gradpruner rebuild`
    makes the pruned model from it again.
    """
    from gradpruner.common.progress import show_bytes
    from gradpruner.models.shards import open_shards
    from gradpruner.pruning.delta import diff_checkpoint, existing_folder

    prepare(quiet)
    shards = open_shards(existing_folder(pruned, "pruned checkpoint"))
    size = shards.total_bytes + sum(header.file_bytes for header in shards.headers)  # compared, then hashed
    with show_bytes(size, "diff") as progress:
        summary = diff_checkpoint(source, pruned, destination, progress=progress)
    if as_json:
        typer.echo(json.dumps(vars(summary), indent=2, default=str))
    else:
        from gradpruner.common.printing import num_bytes

        typer.echo(
            f"delta: {summary.folder}, {num_bytes(summary.num_bytes)} for a checkpoint of "
            f"{num_bytes(summary.checkpoint_bytes)}; {summary.copied} tensors come from the source, "
            f"{summary.stored} are stored"
        )


def rebuild(
    source: Annotated[str, typer.Argument(help="The model before pruning: folder or hub id.")],
    delta: Annotated[Path, typer.Argument(help="A folder written by `gradpruner diff`.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write the pruned model to.")],
    quiet: QuietOption = False,
) -> None:
    """Rebuild a pruned model from its source and difference.

    Every hash is checked.
    """
    from gradpruner.common.progress import show_bytes
    from gradpruner.pruning.delta import existing_folder
    from gradpruner.pruning.delta_record import read_record
    from gradpruner.pruning.rebuilding import rebuild_checkpoint

    prepare(quiet)
    with show_bytes(read_record(existing_folder(delta, "delta")).tensor_bytes, "rebuild") as progress:
        folder = rebuild_checkpoint(source, delta, destination, progress=progress)
    typer.echo(f"rebuilt: {folder}")


def parse_size(size: str) -> int:
    """Parses a size such as 5GB, 80GiB or 1000000 into bytes; GB is decimal, GiB binary.

    Raises:
        ConfigError: If the text is not a positive size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", size.strip().lower())
    unit = (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " ") if match else 0
    count = int(float(match[1]) * unit) if match else 0
    if count < 1:
        raise ConfigError(f"'{size}' is not a size.", hint="Write for example 5GB, 80GiB or 1000000.")
    return count


def kept_layers(keep: str | None, drop: str | None, depth: int) -> list[int]:
    """Returns the layers that stay, from the text of --keep or of --drop (see `layer_numbers`)."""
    named = layer_numbers(keep or drop or "", depth)
    return named if keep else [i for i in range(depth) if i not in set(named)]


def layer_numbers(text: str, depth: int) -> list[int]:
    """Parses layers such as '0-17,30,31'.

    Raises:
        ConfigError: If a part is neither a number nor a rising range, or the model has no such layer.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first = int(match[1]) if match else 0
        last = int(match[2] or match[1]) if match else -1
        if last < first or last >= depth:
            raise ConfigError(
                f"'{part.strip()}' is not a layer or range of layers of this model.",
                hint=f"Layers are 0 to {depth - 1}; write them like 1,2 or 3-5.",
            )
        numbers += range(first, last + 1)
    return numbers
