"""The command `cost`: time and memory of a pruned model against the dense one, measured or per device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradpruner.cli.executing import prepare, tell
from gradpruner.cli.models import kept_layers, parse_size
from gradpruner.cli.options import ENDING, Chosen, takes, words
from gradpruner.common.errors import ConfigError, ResourceError
from gradpruner.evaluation.costing.workload import MODES, Workload, checked_modes

if TYPE_CHECKING:
    from gradpruner.evaluation.costing.comparison import CostComparison
    from gradpruner.evaluation.costing.scaling import Scaling
    from gradpruner.evaluation.costing.subject import Subject
    from gradpruner.plans.layer_plan import PruningPlan


WORKLOAD: dict[str, Any] = {
    "batch_size": Annotated[int, typer.Option(help="Sequences per training step and per generation.")],
    "tokens": Annotated[int, typer.Option(help="Tokens per sample and per prompt.")],
    "learned_tokens": Annotated[
        int | None,
        typer.Option(help="Tokens at the end of each sample that count in the loss.", show_default="all"),
    ],
    "new_tokens": Annotated[int, typer.Option(help="Tokens generated per prompt.")],
    "repeats": Annotated[int, typer.Option(help="Measured steps per model.")],
    "warmup": Annotated[int, typer.Option(help="Unmeasured steps before them.")],
    "dtype": Annotated[
        str, typer.Option(help="Dtype of the weights: auto (as in a run), float32, bfloat16, float16.")
    ],
    "device": Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:1.")],
    "attn": Annotated[
        str | None,
        typer.Option(
            help="Attention implementation: sdpa, eager, flash_attention_2.",
            show_default="chosen by transformers",
        ),
    ],
    "gradient_checkpointing": Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations in training.")
    ],
    "rank": Annotated[int, typer.Option(help="LoRA rank.")],
    "seed": Annotated[int, typer.Option(help="Random seed.")],
}
"""The options of a `Workload`; their defaults are its own."""
LEFT_OUT: dict[str, Any] = {
    "keep": Annotated[
        str | None, typer.Option("--keep", help="Instead of PRUNED: keep only these layers, e.g. 0-17,31.")
    ],
    "drop": Annotated[
        str | None, typer.Option("--drop", help="Instead of PRUNED: drop these layers, e.g. 18-30.")
    ],
    "num_prune": Annotated[
        int | None,
        typer.Option(
            "--num-prune", help="Instead of PRUNED: drop this many layers just before the last one."
        ),
    ],
    "plan": Annotated[
        Path | None, typer.Option("--plan", help="Instead of PRUNED: drop the layers this plan removes.")
    ],
}
"""Ways to say which layers are removed, instead of giving a pruned model."""
SCALED: dict[str, Any] = {
    "world_size": Annotated[
        int | None,
        typer.Option("--world-size", help="With --dry-run: what each of this many devices would hold."),
    ],
    "strategy": Annotated[
        str | None,
        typer.Option(
            "--strategy",
            help="With --world-size: ddp, fsdp, zero1, zero2, zero3; comma-separated.",
            show_default="all",
        ),
    ],
    "device_memory": Annotated[
        str | None,
        typer.Option(
            "--device-memory", help="With --world-size: memory of each device, to show what fits, e.g. 80GB."
        ),
    ],
    "optim": (
        Annotated[
            str, typer.Option("--optim", help="With --world-size: optimizer, e.g. adamw_8bit or adafactor.")
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
    out=Annotated[Path | None, typer.Option("--out", help="Also write the result to this JSON file.")],
    dry_run=(
        Annotated[
            bool,
            typer.Option("--dry-run", help="Compute sizes, operations and floors; load and run nothing."),
        ],
        False,
    ),
)
def cost(
    dense: Annotated[
        str,
        typer.Argument(help="The dense model: folder, hub id, or a known shape (`gradpruner ls shapes`)."),
    ],
    chosen: Chosen,
    pruned: Annotated[
        str | None,
        typer.Argument(help="The pruned model, or one of --keep, --drop, --num-prune and --plan instead."),
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Use random weights: only config.json is read.")
    ] = False,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            help="What to measure: full, lora, inference (with --world-size: full, lora, qlora); "
            "comma-separated.",
            show_default="all",
        ),
    ] = None,
) -> None:
    """Measure the time and memory a pruned model saves.

    Example: gradpruner cost DENSE PRUNED

    Measures training step, generation, memory and operations of both models, and shows each as a ratio to the
    dense model beside the floor: the ratio if only the number of layers counted. The models run in turns,
    each in its own process.

    With --world-size N --dry-run: computes what each of N devices holds in training, and how much data
    recording, gathering and pruning move.
    """
    from gradpruner.evaluation.costing.comparison import measure_cost
    from gradpruner.evaluation.costing.subject import find_subject

    prepare(chosen.quiet)
    options = chosen.others
    scales = options["world_size"] is not None
    _check_options(chosen, pruned, scales)
    workload = Workload(**{name: options[name] for name in WORKLOAD})
    names = tuple(words(mode or ""))
    subject = find_subject(dense, random=random or scales, fetch=not chosen.dry_run)
    other: Any = pruned if pruned is not None else _chosen_plan(subject, options)
    if scales:
        _tell(_scaling(subject, workload, other, names, options), chosen)
        return
    modes = checked_modes(names if mode is not None else MODES)
    comparison = measure_cost(subject, other, workload, modes=modes, random=random, dry_run=chosen.dry_run)
    _tell(comparison, chosen)
    if comparison.errors and len(comparison.errors) == 2 * len(modes):
        raise ResourceError("Nothing could be measured; see the reasons above.")


def _check_options(chosen: Chosen, pruned: str | None, scales: bool) -> None:
    """Raises ConfigError if options contradict each other or name no pruned model."""
    options = chosen.others
    ways = {"PRUNED": pruned} | {f"--{name.replace('_', '-')}": options[name] for name in LEFT_OUT}
    given = [name for name, value in ways.items() if value is not None]
    if not scales and (options["strategy"] or options["device_memory"]):
        raise ConfigError("--strategy and --device-memory need --world-size.")
    if scales and (not chosen.dry_run or pruned is not None):
        raise ConfigError(
            "--world-size computes what each device would hold: it takes one model and needs --dry-run.",
            hint="For example: gradpruner cost MODEL --world-size 8 --dry-run --num-prune 13",
        )
    if len(given) != 1 and not (scales and not given):
        raise ConfigError(
            f"{' and '.join(given) or 'No pruned model is'} given.",
            hint=f"Give exactly one of {', '.join(ways)}.",
        )


def _tell(found: CostComparison | Scaling, chosen: Chosen) -> None:
    """Prints the result, and writes it to --out."""
    from gradpruner.common.json_files import write_json

    if chosen.out is not None:
        write_json(Path(chosen.out), found.to_dict())
    tell(found, found.to_dict(), chosen.as_json)


def _chosen_plan(subject: Subject, options: Mapping[str, Any]) -> PruningPlan:
    """Returns the plan the options give; by default, the default number of layers is removed."""
    from gradpruner.evaluation.costing.subject import plan_by_count
    from gradpruner.gradients.scores import default_num_prune
    from gradpruner.plans.layer_plan import PruningPlan

    keep, drop = options["keep"], options["drop"]
    if options["plan"] is not None:
        return PruningPlan.load(options["plan"])
    if keep is not None or drop is not None:
        return PruningPlan.from_keep(subject.depth, kept_layers(keep, drop, subject.depth))
    count = options["num_prune"]
    return plan_by_count(subject.depth, default_num_prune(subject.depth) if count is None else count)


def _scaling(
    subject: Subject,
    workload: Workload,
    plan: PruningPlan,
    modes: tuple[str, ...],
    options: Mapping[str, Any],
) -> Scaling:
    from gradpruner.evaluation.costing.scaling import plan_scaling
    from gradpruner.plans.options import PlanOptions

    return plan_scaling(
        subject,
        workload,
        plan,
        processes=options["world_size"],
        strategies=tuple(words(options["strategy"] or "")),
        modes=modes,
        device_bytes=parse_size(options["device_memory"]) if options["device_memory"] else None,
        optim=options["optim"],
        num_merge=min(PlanOptions().num_merge, len(plan.pruned)),
    )
