"""The command `cost`: a pruned model against the dense one, and what several processes would hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradpruner.cli.executing import console, prepare
from gradpruner.cli.models import kept_layers, num_bytes
from gradpruner.cli.options import ENDING, Chosen, takes
from gradpruner.errors import ConfigError, ResourceError
from gradpruner.evaluation.costing.workload import MODES, Workload, checked_modes

if TYPE_CHECKING:
    from gradpruner.evaluation.costing.comparison import CostComparison
    from gradpruner.evaluation.costing.figures import Figure
    from gradpruner.evaluation.costing.scaling import Scaling
    from gradpruner.evaluation.costing.subject import Subject
    from gradpruner.plans.layer_plan import PruningPlan


def add_to(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(cost)


WORKLOAD: dict[str, Any] = {
    "batch_size": Annotated[int, typer.Option(help="Sequences per step and per generation.")],
    "tokens": Annotated[int, typer.Option(help="Tokens of every sample and prompt.")],
    "learned_tokens": Annotated[
        int | None, typer.Option(help="Tokens at the end of a sample that carry loss.", show_default="all")
    ],
    "new_tokens": Annotated[int, typer.Option(help="Tokens generated after every prompt.")],
    "repeats": Annotated[int, typer.Option(help="Measured steps of either model.")],
    "warmup": Annotated[int, typer.Option(help="Steps before these.")],
    "dtype": Annotated[
        str, typer.Option(help="Of the weights: auto (as in a run), float32, bfloat16, float16.")
    ],
    "device": Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")],
    "attn": Annotated[
        str | None,
        typer.Option(help="Attention: sdpa, eager, flash_attention_2.", show_default="transformers'"),
    ],
    "gradient_checkpointing": Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations in training.")
    ],
    "rank": Annotated[int, typer.Option(help="Rank of LoRA adapters.")],
    "seed": Annotated[int, typer.Option(help="Seed of everything random.")],
}
"""Options of a `Workload`, with its defaults."""
LEFT_OUT: dict[str, Any] = {
    "keep": Annotated[str | None, typer.Option("--keep", help="Pruned = these layers: 0-17,31.")],
    "drop": Annotated[str | None, typer.Option("--drop", help="Pruned = without these: 18-30.")],
    "num_prune": Annotated[
        int | None, typer.Option("--num-prune", help="Pruned = without so many of the last layers but one.")
    ],
    "plan": Annotated[Path | None, typer.Option("--plan", help="Pruned = what this plan leaves.")],
}
"""Ways to say which layers go, instead of a pruned model."""
SCALED: dict[str, Any] = {
    "world_size": Annotated[
        int | None,
        typer.Option("--world-size", help="With --dry-run: what each of so many devices would hold."),
    ],
    "strategy": Annotated[
        str | None,
        typer.Option(
            "--strategy", help="How it is spread: ddp, fsdp, zero1, zero2, zero3.", show_default="all"
        ),
    ],
    "device_memory": Annotated[
        str | None, typer.Option("--device-memory", help="Of each device, to say what fits: 80GB.")
    ],
    "optim": (
        Annotated[
            str, typer.Option("--optim", help="Optimizer, with --world-size: adamw_8bit, adafactor ...")
        ],
        "adamw_torch_fused",
    ),
}


@takes(
    f"dense pruned {' '.join(LEFT_OUT)} random mode {' '.join(SCALED)} {' '.join(WORKLOAD)} out {ENDING}",
    keys={},
    **LEFT_OUT,
    **SCALED,
    **{name: (kind, getattr(Workload, name)) for name, kind in WORKLOAD.items()},
    out=Annotated[Path | None, typer.Option("--out", help="JSON file to write.")],
    dry_run=(
        Annotated[bool, typer.Option("--dry-run", help="Sizes, operations and floors; load nothing.")],
        False,
    ),
)
def cost(
    dense: Annotated[str, typer.Argument(help="Model folder, hub id, or a shape (`gradpruner ls shapes`).")],
    chosen: Chosen,
    pruned: Annotated[
        str | None, typer.Argument(help="The pruned model, likewise; or leave layers out with an option.")
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights; only config.json is read.")
    ] = False,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            help="What to measure: full, lora, inference, with commas; with --world-size full, lora, qlora.",
            show_default="all",
        ),
    ] = None,
) -> None:
    """Measure what a pruned model saves: gradpruner cost DENSE PRUNED.

    Training step, generation, memory, operations; each as a ratio to the dense model, beside the floor that
    depth alone allows. The two models are run in turns, each in a process of its own. With --world-size N
    --dry-run: what each of N devices holds in training, and what recording, gathering and pruning move.
    """
    from gradpruner.evaluation.costing.comparison import measure_cost
    from gradpruner.evaluation.costing.subject import find_subject

    prepare(chosen.quiet)
    said = chosen.others
    scales = said["world_size"] is not None
    _check_asked(chosen, pruned, scales)
    workload = Workload(**{name: said[name] for name in WORKLOAD})
    names = tuple(name.strip() for name in (mode or "").split(",") if name.strip())
    subject = find_subject(dense, random=random or scales, fetch=not chosen.dry_run)
    other: Any = pruned if pruned is not None else _chosen_plan(subject, said)
    if scales:
        _tell(_scaling(subject, workload, other, names, said), _print_scaling, chosen)
        return
    modes = checked_modes(names if mode is not None else MODES)
    comparison = measure_cost(subject, other, workload, modes=modes, random=random, dry_run=chosen.dry_run)
    _tell(comparison, _print, chosen)
    if comparison.errors and len(comparison.errors) == 2 * len(modes):
        raise ResourceError("Nothing could be measured; the reasons stand above.")


def _check_asked(chosen: Chosen, pruned: str | None, scales: bool) -> None:
    """ConfigError unless the options say one thing to compare with, and go together."""
    said = chosen.others
    options = {"PRUNED": pruned} | {f"--{name.replace('_', '-')}": said[name] for name in LEFT_OUT}
    given = [name for name, value in options.items() if value is not None]
    if not scales and (said["strategy"] or said["device_memory"]):
        raise ConfigError("--strategy and --device-memory need --world-size.")
    if scales and (not chosen.dry_run or pruned is not None):
        raise ConfigError(
            "--world-size computes what devices would hold, of one model, and runs nothing.",
            hint="gradpruner cost MODEL --world-size 8 --dry-run, perhaps with --num-prune.",
        )
    if len(given) != 1 and not (scales and not given):
        raise ConfigError(
            f"{' and '.join(given) or 'No pruned model is'} given.",
            hint=f"Exactly one of {', '.join(options)} is needed.",
        )


def _tell(found: Any, show: Callable[[Any], None], chosen: Chosen) -> None:
    """Writes and prints what was found."""
    from gradpruner.json_files import write_json

    if chosen.out is not None:
        write_json(Path(chosen.out), found.to_dict())
    if chosen.as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        show(found)


def _chosen_plan(subject: Subject, said: Mapping[str, Any]) -> PruningPlan:
    """What the options leave of a model; the default share of its layers goes where they say nothing."""
    from gradpruner.evaluation.costing.subject import plan_by_count
    from gradpruner.gradients.scores import default_num_prune
    from gradpruner.plans.layer_plan import PruningPlan

    keep, drop = said["keep"], said["drop"]
    if said["plan"] is not None:
        return PruningPlan.load(said["plan"])
    if keep is not None or drop is not None:
        return PruningPlan.from_keep(subject.depth, kept_layers(keep, drop, subject.depth))
    count = said["num_prune"]
    return plan_by_count(subject.depth, default_num_prune(subject.depth) if count is None else count)


def _scaling(
    subject: Subject, workload: Workload, plan: PruningPlan, modes: tuple[str, ...], said: Mapping[str, Any]
) -> Scaling:
    from gradpruner.evaluation.costing.scaling import SCALED_MODES, plan_scaling
    from gradpruner.plans.defaults import NUM_MERGE

    return plan_scaling(
        subject,
        workload,
        plan,
        processes=said["world_size"],
        strategies=tuple(said["strategy"].split(",")) if said["strategy"] else (),
        modes=modes or SCALED_MODES,
        device_bytes=num_bytes(said["device_memory"]) if said["device_memory"] else None,
        optim=said["optim"],
        num_merge=min(NUM_MERGE, len(plan.pruned)),
    )


def _print_scaling(found: Scaling) -> None:
    from rich.table import Table

    from gradpruner.reports import formats

    def size(value: int | None) -> str:
        return formats.MISSING if value is None else formats.num_bytes(value)

    have = f" ({size(found.device_bytes)})" if found.device_bytes else ""
    each = "one device" if found.processes == 1 else f"each of {found.processes} devices"
    title = f"{found.name}, {found.parameters / 1e9:.3g} B parameters: {each}{have}"
    head = ("mode", "strategy", "weights", "gradients", "optimizer", "exchange", "activations", "at most")
    table = Table(*head, *(["fits"] if have else []), title=title, title_justify="left")
    for row in found.rows:
        held = row.held
        parts = (held.weights, held.gradients, held.optimizer, held.exchange, held.working, held.peak)
        fits = [] if row.fits is None else ["yes" if row.fits else "no"]
        table.add_row(row.mode, row.strategy, *map(size, parts), *fits)
    stages, work, screen = found.stages, found.workload, console()
    screen.print(table)
    screen.print(
        f"recording: {size(stages['trace'])} on disk, {size(stages['trace_in_memory'])} in the first "
        f"process's memory. Gathering after sharded full training: {size(stages['gathered'])} on the first "
        f"process's host, {size(stages['gathered_at_a_time'])} of it on its device at a time. Pruning "
        f"{len(found.pruned)} layers ({found.merged} merged): {size(stages['surgery_read'])} read, "
        f"{size(stages['surgery_written'])} written, without checks.",
        highlight=False,
    )
    screen.print(
        f"Computed, nothing was run: batches of {work.batch_size} x {work.tokens} tokens on each device, "
        f"{found.optim}, weights in bfloat16 (float32 where all are trained), bf16 autocast. DeepSpeed's "
        "buffers are not counted.",
        style="dim",
        highlight=False,
    )


def _print(comparison: CostComparison) -> None:
    from rich.table import Table
    from rich.text import Text

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
