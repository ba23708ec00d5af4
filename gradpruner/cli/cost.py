"""The command `cost`: a pruned model against the dense one, and what several processes would hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradpruner.cli.executing import prepare, tell
from gradpruner.cli.models import kept_layers, num_bytes
from gradpruner.cli.options import ENDING, Chosen, takes, words
from gradpruner.common.errors import ConfigError, ResourceError
from gradpruner.evaluation.costing.workload import MODES, Workload, checked_modes

if TYPE_CHECKING:
    from gradpruner.evaluation.costing.comparison import CostComparison
    from gradpruner.evaluation.costing.scaling import Scaling
    from gradpruner.evaluation.costing.subject import Subject
    from gradpruner.plans.layer_plan import PruningPlan


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
    names = tuple(words(mode or ""))
    subject = find_subject(dense, random=random or scales, fetch=not chosen.dry_run)
    other: Any = pruned if pruned is not None else _chosen_plan(subject, said)
    if scales:
        _tell(_scaling(subject, workload, other, names, said), chosen)
        return
    modes = checked_modes(names if mode is not None else MODES)
    comparison = measure_cost(subject, other, workload, modes=modes, random=random, dry_run=chosen.dry_run)
    _tell(comparison, chosen)
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


def _tell(found: CostComparison | Scaling, chosen: Chosen) -> None:
    """Writes and prints what was found."""
    from gradpruner.common.json_files import write_json

    if chosen.out is not None:
        write_json(Path(chosen.out), found.to_dict())
    tell(found, found.to_dict(), chosen.as_json)


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
    from gradpruner.evaluation.costing.scaling import plan_scaling
    from gradpruner.plans.defaults import NUM_MERGE

    return plan_scaling(
        subject,
        workload,
        plan,
        processes=said["world_size"],
        strategies=tuple(words(said["strategy"] or "")),
        modes=modes,
        device_bytes=num_bytes(said["device_memory"]) if said["device_memory"] else None,
        optim=said["optim"],
        num_merge=min(NUM_MERGE, len(plan.pruned)),
    )
