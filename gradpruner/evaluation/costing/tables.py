"""What `cost` found, as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from gradpruner import printing

if TYPE_CHECKING:
    from rich.console import Console

    from gradpruner.evaluation.costing.comparison import CostComparison
    from gradpruner.evaluation.costing.figures import Figure
    from gradpruner.evaluation.costing.scaling import Scaling


def print_scaling(found: Scaling, screen: Console) -> None:
    """Prints what each device holds, and what the stages around training move."""

    def size(value: int | None) -> str:
        return printing.MISSING if value is None else printing.num_bytes(value)

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
    stages, work = found.stages, found.workload
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
        f"buffers are not counted.{' QLoRA goes with ddp alone.' if found.processes > 1 else ''}",
        style="dim",
        highlight=False,
    )


def print_comparison(comparison: CostComparison, screen: Console) -> None:
    """Prints every figure of both models, their ratio, and how far it is above the floor."""
    workload = comparison.workload
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
    if value is None:
        return printing.MISSING
    if unit == "seconds":
        return printing.duration(value) if value >= 0.9995 else f"{1000 * value:.3g} ms"
    if unit == "bytes":
        return printing.num_bytes(value)
    if unit in ("MAC", "FLOP"):
        return f"{value / 1e9:,.3f} G{unit}s"
    if unit == "tokens/s":
        return f"{value:.3g}/s"
    return printing.short(value)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _spread(figure: Figure) -> str:
    pairs = figure.pairs
    return f"{pairs[0]:.3f}-{pairs[-1]:.3f}" if len(pairs) > 1 else ""
