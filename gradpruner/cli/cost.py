"""The command `cost`: time, memory and operations of a pruned model against the dense one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradpruner.cli.models import kept_layers
from gradpruner.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from gradpruner.evaluation.costing.comparison import CostComparison
    from gradpruner.evaluation.costing.figures import Figure
    from gradpruner.evaluation.costing.subject import Subject
    from gradpruner.plans.layer_plan import PruningPlan


def add_to(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(cost)


def cost(
    dense: Annotated[str, typer.Argument(help="Model folder, hub id, or a shape (`gradpruner ls shapes`).")],
    pruned: Annotated[
        str | None, typer.Argument(help="The pruned model, likewise; or leave layers out with an option.")
    ] = None,
    keep: Annotated[str | None, typer.Option("--keep", help="Pruned = these layers: 0-17,31.")] = None,
    drop: Annotated[str | None, typer.Option("--drop", help="Pruned = without these: 18-30.")] = None,
    num_prune: Annotated[
        int | None, typer.Option("--num-prune", help="Pruned = without so many of the last layers but one.")
    ] = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="Pruned = what this plan leaves.")] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights; only config.json is read.")
    ] = False,
    mode: Annotated[
        str, typer.Option("--mode", help="What to measure: full, lora, inference, with commas.")
    ] = "full,lora,inference",
    batch_size: Annotated[int, typer.Option(help="Sequences per step and per generation.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of every sample and prompt.")] = 128,
    learned_tokens: Annotated[
        int | None, typer.Option(help="Tokens at the end of a sample that carry loss.", show_default="all")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated after every prompt.")] = 32,
    repeats: Annotated[int, typer.Option(help="Measured steps of either model.")] = 7,
    warmup: Annotated[int, typer.Option(help="Steps before these.")] = 2,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto (as in a run), float32, bfloat16, float16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    attn: Annotated[
        str | None,
        typer.Option(help="Attention: sdpa, eager, flash_attention_2.", show_default="transformers'"),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations in training.")
    ] = False,
    rank: Annotated[int, typer.Option(help="Rank of LoRA adapters.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file to write.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Sizes, operations and floors; load nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Measure what a pruned model saves: gradpruner cost DENSE PRUNED.

    Training step, generation, memory, operations; each as a ratio to the dense model, beside the floor that
    depth alone allows. The two models are run in turns, each in a process of its own.
    """
    from gradpruner.cli import main as cli
    from gradpruner.evaluation.costing.comparison import measure_cost
    from gradpruner.evaluation.costing.subject import find_subject
    from gradpruner.evaluation.costing.workload import Workload, checked_modes
    from gradpruner.json_files import write_json

    cli.prepare(quiet)
    options = {"PRUNED": pruned, "--keep": keep, "--drop": drop, "--num-prune": num_prune, "--plan": plan}
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        raise ConfigError(
            f"{' and '.join(given) or 'No pruned model is'} given.",
            hint=f"Exactly one of {', '.join(options)} is needed.",
        )
    workload = Workload(
        batch_size=batch_size,
        tokens=tokens,
        learned_tokens=learned_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        warmup=warmup,
        dtype=dtype,
        device=device,
        attn=attn,
        gradient_checkpointing=gradient_checkpointing,
        rank=rank,
        seed=seed,
    )
    modes = checked_modes([name.strip() for name in mode.split(",") if name.strip()])
    subject = find_subject(dense, random=random, fetch=not dry_run)
    other = pruned if pruned is not None else _chosen_plan(subject, keep, drop, num_prune, plan)
    comparison = measure_cost(subject, other, workload, modes=modes, random=random, dry_run=dry_run)
    if out is not None:
        write_json(out, comparison.to_dict())
    if as_json:
        typer.echo(json.dumps(comparison.to_dict(), indent=2))
    else:
        _print(comparison)
    if comparison.errors and len(comparison.errors) == 2 * len(modes):
        raise ResourceError("Nothing could be measured; the reasons stand above.")


def _chosen_plan(
    subject: Subject, keep: str | None, drop: str | None, num_prune: int | None, plan: Path | None
) -> PruningPlan:
    from gradpruner.evaluation.costing.subject import plan_by_count
    from gradpruner.plans.layer_plan import PruningPlan

    if plan is not None:
        return PruningPlan.load(plan)
    if num_prune is not None:
        return plan_by_count(subject.depth, num_prune)
    return PruningPlan.from_keep(subject.depth, kept_layers(keep, drop, subject.depth))


def _print(comparison: CostComparison) -> None:
    from rich.table import Table
    from rich.text import Text

    from gradpruner.cli.main import console

    workload, screen = comparison.workload, console()
    dense, pruned = comparison.names
    table = Table(
        "", "dense", "pruned", "ratio", "pairs", "floor", "ratio/floor", title=f"{dense} | {pruned}",
        title_justify="left", caption_justify="left",
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    groups = ["model"]
    for figure in comparison.figures:
        if figure.group != groups[-1]:
            groups.append(figure.group)
            table.add_section()
            table.add_row(Text(figure.group, style="bold"))
        first, second = figure.medians
        table.add_row(
            figure.label if figure.group == "model" else f"  {figure.label}",
            shown(first, figure.unit),
            shown(second, figure.unit),
            _ratio(figure.ratio),
            _spread(figure),
            _ratio(figure.floor),
            _ratio(figure.above_floor),
        )
    screen.print(table)
    learned = "all" if workload.learned_tokens is None else f"the last {workload.learned_tokens}"
    measured = f", median of {workload.repeats}" if comparison.measured else ""
    weights = f"{'random' if comparison.random_weights else 'stored'} weights ({_dtypes(comparison)})"
    screen.print(
        f"{comparison.device}, {weights}, batch {workload.batch_size} x {workload.tokens} tokens ({learned} "
        f"learned), {workload.new_tokens} new tokens{measured}. floor: what depth alone leaves; ratio/floor: "
        "1 when nothing is lost to fixed costs.",
        style="dim",
        highlight=False,
    )
    for warning in comparison.warnings:
        screen.print(Text(f"warning: {warning}", style="yellow"))
    for cell, reason in comparison.errors.items():
        screen.print(Text(f"failed: {cell}: {reason}", style="red"))


def _dtypes(comparison: CostComparison) -> str:
    """The type of the weights, or that of every mode where they differ."""
    kinds = comparison.dtypes
    if len(set(kinds.values())) == 1:
        return next(iter(kinds.values()))
    return ", ".join(f"{mode} {dtype}" for mode, dtype in kinds.items())


def shown(value: float | None, unit: str) -> str:
    """A value as people read it; durations below a second in milliseconds."""
    from gradpruner.reports import formats

    if value is None:
        return formats.MISSING
    if unit == "seconds":
        return formats.duration(value) if value >= 0.9995 else f"{1000 * value:.3g} ms"
    if unit == "bytes":
        return formats.num_bytes(value)
    if unit in ("MAC", "FLOP"):
        return f"{value / 1e9:,.3f} G{unit}s"
    if unit == "tokens/s":
        return f"{value:.3g}/s"
    return formats.short(value)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _spread(figure: Figure) -> str:
    pairs = figure.pairs
    return f"{pairs[0]:.3f}-{pairs[-1]:.3f}" if len(pairs) > 1 else ""
