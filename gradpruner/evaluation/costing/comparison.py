"""Cost of a pruned model compared with the dense one, measured side by side: the paper's Tables 2 and 11."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from gradpruner.common.errors import ConfigError, ModelError
from gradpruner.common.printing import Printed
from gradpruner.common.progress import Progress
from gradpruner.common.provenance import provenance, utc_now
from gradpruner.evaluation.costing.figures import LABELS, Figure, measured_figures, size_figures, with_unit
from gradpruner.evaluation.costing.per_device import held_bytes
from gradpruner.evaluation.costing.sizing import depth_alone, size_facts
from gradpruner.evaluation.costing.subject import Subject, find_subject, shorten
from gradpruner.evaluation.costing.turns import Measurement, Order, measure_pair
from gradpruner.evaluation.costing.workload import MODES, Workload, checked_modes
from gradpruner.models.loading import resolve_device, resolve_dtype
from gradpruner.models.shards import open_shards
from gradpruner.models.sizes import ModelSizes
from gradpruner.plans.layer_plan import PruningPlan

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, repr=False)
class CostComparison(Printed):
    """The result of `measure_cost`.

    Attributes:
        names: Names of the dense and the pruned model, in this order; `sizes` has the same order.
        sizes: What is known of both models without running them (`sizing.size_facts`).
        device: Name of the device.
        random_weights: Whether the models got random weights.
        dtypes: Mode -> dtype of the weights.
        errors: Model and mode ("dense, full fine-tuning") -> why it could not be measured.
        measured: Whether the models were run; False after a dry run.
    """

    names: tuple[str, str]
    sizes: tuple[dict[str, Any], dict[str, Any]]
    workload: Workload
    device: str
    random_weights: bool
    figures: tuple[Figure, ...]
    dtypes: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    measured: bool = False

    def find(self, name: str) -> Figure:
        """Returns the figure called `name`.

        Raises:
            ConfigError: If there is no such figure.
        """
        for figure in self.figures:
            if figure.name == name:
                return figure
        raise ConfigError(
            f"No figure '{name}'.", hint=f"There are {', '.join(f.name for f in self.figures)}."
        )

    def show(self, console: Console) -> None:
        """Prints a table with each figure of both models, their ratio, and the ratio over its floor."""
        columns = ("", "dense", "pruned", "ratio", "pairs", "floor", "ratio/floor")
        table = Table(
            *columns, title=escape(" | ".join(self.names)), title_justify="left", caption_justify="left"
        )
        for column in table.columns[1:]:
            column.justify = "right"
        group = "model"
        for figure in self.figures:
            if figure.group != group:
                group = figure.group
                table.add_section()
                table.add_row(Text(group, style="bold"))
            pairs = figure.pairs
            table.add_row(
                figure.label if group == "model" else f"  {figure.label}",
                *(with_unit(median, figure.unit) for median in figure.medians),
                _three(figure.ratio),
                f"{_three(pairs[0])}-{_three(pairs[-1])}" if len(pairs) > 1 else "",
                _three(figure.floor),
                _three(figure.above_floor),
            )
        console.print(table)
        work, dtypes = self.workload, self.dtypes
        learned = "all" if work.learned_tokens is None else f"the last {work.learned_tokens}"
        measured = f", median of {work.repeats}" if self.measured else ""
        by_mode = ", ".join(f"{mode} {dtype}" for mode, dtype in dtypes.items())
        dtype = by_mode if len({*dtypes.values()}) > 1 else next(iter(dtypes.values()))
        console.print(
            f"{self.device}, {'random' if self.random_weights else 'stored'} weights ({dtype}), batch "
            f"{work.batch_size} x {work.tokens} tokens ({learned} learned), {work.new_tokens} new "
            f"tokens{measured}. floor: the ratio that depth alone gives; ratio/floor: 1 if fixed costs take "
            "nothing.",
            style="dim",
            highlight=False,
        )
        for warning in self.warnings:
            console.print(Text(f"warning: {warning}", style="yellow"))
        for cell, reason in self.errors.items():
            console.print(Text(f"failed: {cell}: {reason}", style="red"))

    def to_dict(self) -> dict[str, Any]:
        """Returns the comparison as JSON values, with its provenance."""
        return {
            "what": "cost of a pruned model against the dense one; ratio = pruned / dense",
            "when": utc_now(),
            "dense": {"name": self.names[0], **self.sizes[0]},
            "pruned": {"name": self.names[1], **self.sizes[1]},
            "workload": asdict(self.workload),
            "device": self.device,
            "random_weights": self.random_weights,
            "dtypes": self.dtypes,
            "measured": self.measured,
            "figures": [figure.to_dict() for figure in self.figures],
            "errors": self.errors,
            "warnings": list(self.warnings),
            "provenance": provenance(self.workload.seed),
        }


def measure_cost(
    dense: str | Path | Subject,
    pruned: str | Path | Subject | PruningPlan,
    workload: Workload | None = None,
    *,
    modes: Sequence[str] = MODES,
    random: bool = False,
    dry_run: bool = False,
) -> CostComparison:
    """Measures time and memory of a dense and a pruned model in turns, with the floors set by depth alone.

    Both models are in memory at once, each in its own process. A model that does not fit becomes an entry of
    `errors`; the other model and the other modes are still measured.

    Args:
        dense: Model folder, hub id or name of a shape (`gradpruner ls shapes`).
        pruned: Model folder, hub id or name of a shape; or a plan to apply to the dense model.
        workload: What is run, and how often.
        modes: Which of "full", "lora" (a training step each) and "inference" to run.
        random: Use random weights even if weights are stored. If one model has no stored weights, both get
            random ones in any case: time and memory do not depend on the weights, except for mixtures of
            experts, where the data choose the experts.
        dry_run: Load no weights; give sizes, operations and floors only. Works for models of any size.

    Raises:
        ConfigError: If an option is out of range, or the pruned model has more layers than the dense one.
        PlanError: If the plan does not fit the dense model.
        ModelError: If a model cannot be found or used.

    Source: GradPruner, Tables 2 and 11.
    """
    workload = workload or Workload()
    wanted = checked_modes(modes)
    pair = _find_pair(dense, pruned, random, fetch=not dry_run)
    if not dry_run:
        _check_buildable(pair)
    sizes = (ModelSizes(pair[0].config), ModelSizes(pair[1].config))
    facts = (_facts(pair[0], sizes[0], workload), _facts(pair[1], sizes[1], workload))
    differs = depth_alone(*sizes)
    _check_pair(pair, workload)
    device = resolve_device(workload.device)
    dtypes = {mode: resolve_dtype(workload.weight_dtype(mode), device) for mode in wanted}
    figures = size_figures(facts, workload.tokens)
    errors: dict[str, str] = {}
    with Progress(0 if dry_run else 2 * workload.steps * len(wanted), "cost") as progress:
        for mode in wanted:
            found = (Measurement({}), Measurement({}))
            if not dry_run:
                progress.update(progress.completed, mode=mode)
                orders = (Order(pair[0], mode, workload), Order(pair[1], mode, workload))
                found = measure_pair(orders, progress.advance)
            held = [held_bytes(one.model, mode, workload, dtypes[mode]) for one in sizes]
            figures += measured_figures(
                found, mode, sizes, workload, (held[0], held[1]), with_floors=not differs
            )
            for side, one in zip(("dense", "pruned"), found, strict=True):
                if one.error:
                    errors[f"{side}, {LABELS[mode]}"] = one.error
    return CostComparison(
        names=(pair[0].name, pair[1].name),
        sizes=facts,
        workload=workload,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        random_weights=pair[0].folder is None,
        figures=tuple(figures),
        dtypes={mode: str(dtype).removeprefix("torch.") for mode, dtype in dtypes.items()},
        errors=errors,
        warnings=_warnings(differs, facts),
        measured=not dry_run,
    )


def _find_pair(
    dense: str | Path | Subject, pruned: str | Path | Subject | PruningPlan, random: bool, fetch: bool
) -> tuple[Subject, Subject]:
    """Returns both models, either both with stored weights or both with random ones."""
    first = dense if isinstance(dense, Subject) else find_subject(dense, random=random, fetch=fetch)
    if isinstance(pruned, str | Path):
        second = find_subject(pruned, random=random, fetch=fetch)
    else:
        second = pruned if isinstance(pruned, Subject) else shorten(first, pruned)
    if random or first.folder is None or second.folder is None:
        return replace(first, folder=None), replace(second, folder=None)
    return first, second


def _check_buildable(pair: tuple[Subject, Subject]) -> None:
    """Raises ModelError for a decoder that transformers can build only inside a multimodal model."""
    for subject in pair:
        if subject.folder is None and type(subject.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ModelError(
                f"{subject.name} is the decoder of a multimodal model, which transformers cannot build with "
                "random weights.",
                hint="Prune the model first (gradpruner prune MODEL NEW) and give both folders, or use "
                "--dry-run for sizes and operations.",
            )


def _facts(subject: Subject, sizes: ModelSizes, workload: Workload) -> dict[str, Any]:
    """Returns the sizes from the config; stored weights count with their bytes on disk."""
    facts = size_facts(sizes, tokens=workload.tokens, rank=workload.rank)
    stored = {} if subject.folder is None else {"disk_bytes": open_shards(subject.folder).total_bytes}
    return facts | stored


def _check_pair(pair: tuple[Subject, Subject], workload: Workload) -> None:
    """Raises ConfigError if the models are in the wrong order or the sequences too long for one of them."""
    if pair[1].depth > pair[0].depth:
        raise ConfigError(
            f"The pruned model has {pair[1].depth} layers, the dense one only {pair[0].depth}.",
            hint="Give the dense model first: gradpruner cost DENSE PRUNED.",
        )
    longest = workload.tokens + workload.new_tokens
    for subject in pair:
        limit = getattr(subject.config, "max_position_embeddings", None)
        if isinstance(limit, int) and longest > limit:
            raise ConfigError(
                f"{workload.tokens} tokens and {workload.new_tokens} new tokens are more than the {limit} "
                f"positions of {subject.name}.",
                hint="Lower --tokens or --new-tokens.",
            )


def _warnings(differs: str, facts: tuple[dict[str, Any], ...]) -> tuple[str, ...]:
    """Returns warnings for the reader of the figures."""
    warnings = []
    if differs:
        warnings.append(f"The models differ in more than depth ({differs}); no floors are shown.")
    if any(one["flops"] is None for one in facts):
        warnings.append("torch cannot count the FLOPs of this family without weights; that row is left out.")
    return tuple(warnings)


def _three(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
