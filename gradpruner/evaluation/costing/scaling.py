"""What a job of several processes needs, from shapes alone: memory per device, and bytes of other stages."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from gradpruner.common.errors import ConfigError
from gradpruner.common.printing import Printed, num_bytes
from gradpruner.common.provenance import provenance, utc_now
from gradpruner.common.registry import check_known
from gradpruner.evaluation.costing.per_device import (
    STRATEGIES,
    Held,
    Spread,
    Training,
    hold_training,
    memory_table,
    trace_bytes,
)
from gradpruner.evaluation.costing.rehearsal import working_bytes
from gradpruner.evaluation.costing.subject import Subject
from gradpruner.evaluation.costing.workload import Workload
from gradpruner.models.sizes import ModelSizes
from gradpruner.plans.layer_plan import PruningPlan

if TYPE_CHECKING:
    from rich.console import Console

SCALED_MODES = ("full", "lora", "qlora")
RECORD_STEPS = 40


@dataclass(frozen=True, repr=False)
class Scaling(Printed):
    """The result of `plan_scaling`.

    Attributes:
        device_bytes: Memory of each device; None if not given.
        workload: Batch size and lengths on each device.
        rows: Mode and strategy -> what each device holds.
        stages: Bytes that other stages hold or move: "checkpoint", "trace", "trace_in_memory", "gathered",
            "gathered_at_a_time", "surgery_read", "surgery_written".
        pruned: Layers to prune.
        merged: How many of these are merged into kept layers.
    """

    name: str
    parameters: int
    processes: int
    device_bytes: int | None
    workload: Workload
    optim: str
    rows: dict[tuple[str, str], Held]
    stages: dict[str, int]
    pruned: tuple[int, ...]
    merged: int

    def show(self, console: Console) -> None:
        """Prints what each device holds, and the bytes that the stages around training move."""
        have = f" ({num_bytes(self.device_bytes)})" if self.device_bytes else ""
        each = "one device" if self.processes == 1 else f"each of {self.processes} devices"
        title = f"{self.name}, {self.parameters / 1e9:.3g} B parameters: {each}{have}"
        rows = {f"{row['mode']}, {row['strategy']}": row for row in self._rows()}
        console.print(memory_table(title, rows))
        moved, work = {name: num_bytes(count) for name, count in self.stages.items()}, self.workload
        console.print(
            f"recording: {moved['trace']} on disk, {moved['trace_in_memory']} in the first process's memory. "
            f"Gathering after sharded full training: {moved['gathered']} on the first process's host, "
            f"{moved['gathered_at_a_time']} of it on its device at a time. Pruning {len(self.pruned)} layers "
            f"({self.merged} merged): {moved['surgery_read']} read, {moved['surgery_written']} written, "
            "without checks.",
            highlight=False,
        )
        console.print(
            f"Computed, nothing was run: batches of {work.batch_size} x {work.tokens} tokens on each device, "
            f"{self.optim}, weights in bfloat16 (float32 if all are trained), bf16 autocast. DeepSpeed's "
            f"buffers are not counted.{' QLoRA works with ddp only.' if self.processes > 1 else ''}",
            style="dim",
            highlight=False,
        )

    def _rows(self) -> list[dict[str, Any]]:
        """One entry for each mode and strategy; "fits" is None if the memory of a device is not given."""
        have = self.device_bytes
        return [
            {"mode": mode, "strategy": strategy, "fits": None if have is None else held.peak <= have}
            | held.to_dict()
            for (mode, strategy), held in self.rows.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as JSON values, with its provenance."""
        return {
            "what": "bytes on each device and of each stage, computed from shapes; nothing was run",
            "when": utc_now(),
            "model": self.name,
            "parameters": self.parameters,
            "processes": self.processes,
            "device_bytes": self.device_bytes,
            "optim": self.optim,
            "workload": asdict(self.workload),
            "rows": self._rows(),
            "stages": self.stages,
            "pruned": list(self.pruned),
            "merged": self.merged,
            "provenance": provenance(self.workload.seed),
        }


def plan_scaling(
    subject: Subject,
    workload: Workload,
    plan: PruningPlan,
    *,
    processes: int,
    strategies: tuple[str, ...] = (),
    modes: tuple[str, ...] = (),
    device_bytes: int | None = None,
    optim: str = "adamw_torch_fused",
    num_merge: int = 0,
) -> Scaling:
    """Computes what training, recording and pruning a model need with several processes.

    Dtypes are those of a run on GPUs: bfloat16, and float32 weights if all of them are trained.

    Args:
        subject: The model.
        workload: Batch size and lengths on each device.
        plan: Which layers to prune.
        processes: Number of processes, each with one device.
        strategies: Any of `per_device.STRATEGIES`; if empty, all that this number of processes can use.
        modes: Any of `SCALED_MODES`; all if empty. Combinations that a run refuses have no row.
        device_bytes: Memory of each device, to tell what fits.
        optim: Name of the optimizer, as the Trainer takes it.
        num_merge: How many of the pruned layers are merged into kept ones.

    Raises:
        ConfigError: If a strategy or mode is unknown, a strategy does not work with this number of processes,
            or a run refuses a mode with every strategy given.
    """
    sizes = ModelSizes(subject.config)
    rows = {}
    check_known("mode", modes, SCALED_MODES)
    for mode in modes or SCALED_MODES:
        training, rehearsed = _training(mode, workload, optim), {}
        names = strategies_for(processes, strategies)
        trainings = [replace(training, spread=Spread(name, processes)) for name in names]
        trainings = [one for one in trainings if not one.refused]
        if modes and not trainings:
            raise ConfigError(
                f"A run refuses {mode} with {' or '.join(strategies)}: 4-bit weights cannot be sharded.",
                hint="Use --strategy ddp, where every process holds the 4-bit weights, or --mode lora.",
            )
        for one in trainings:
            dtype = one.computing_dtype
            if dtype not in rehearsed:
                rehearsed[dtype] = working_bytes(sizes.model, one, subject.depth)
            rows[mode, one.spread.strategy] = replace(
                hold_training(sizes.model, one), working=rehearsed[dtype]
            )
    return Scaling(
        subject.name,
        sizes.parameters,
        processes,
        device_bytes,
        workload,
        optim,
        rows,
        _stage_bytes(sizes, workload, plan, num_merge),
        plan.pruned,
        num_merge,
    )


def strategies_for(processes: int, asked: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the strategies in `asked`, or if it is empty, all that this number of processes can use.

    Raises:
        ConfigError: If a strategy is unknown or does not work with this number of processes.
    """
    if processes < 1:
        raise ConfigError(f"The number of processes is {processes}; at least 1 is needed.")
    check_known("strategy", asked, STRATEGIES)
    possible = ("one",) if processes == 1 else STRATEGIES[1:]
    for strategy in asked:
        if strategy not in possible:
            raise ConfigError(
                f"The strategy '{strategy}' does not work with {processes} process{'es' * (processes > 1)}.",
                hint=f"Give any of {', '.join(possible)}.",
            )
    return asked or possible


def _training(mode: str, workload: Workload, optim: str) -> Training:
    """Returns the training that a run on GPUs would do."""
    given = None if workload.dtype == "auto" else getattr(torch, workload.dtype)
    return Training(
        mode=mode,
        dtype=given or (torch.float32 if mode == "full" else torch.bfloat16),
        precision="fp32" if given == torch.float32 else "bf16",
        optim=optim,
        rank=workload.rank,
        batch_size=workload.batch_size,
        tokens=workload.tokens,
        head_tokens=workload.head_tokens,
        checkpointing=workload.gradient_checkpointing,
        attn=workload.attn,
    )


def _stage_bytes(sizes: ModelSizes, workload: Workload, plan: PruningPlan, num_merge: int) -> dict[str, int]:
    """Returns the bytes that the stages around training hold or move."""
    rank, biggest = workload.rank, max(weight.numel() for weight in sizes.model.parameters())
    kept = sizes.savings(plan.keep)["disk_bytes"]["after"]
    itemsize = sizes.disk_bytes // sizes.parameters
    layer = max(sizes.layer_parameters) * itemsize
    return {
        "checkpoint": sizes.disk_bytes,
        "trace": trace_bytes(sizes.model, rank, RECORD_STEPS),
        "trace_in_memory": trace_bytes(sizes.model, rank, 2),
        # Full fine-tuning keeps float32 weights, which are gathered one tensor at a time.
        "gathered": 4 * sizes.parameters,
        "gathered_at_a_time": 4 * biggest,
        "surgery_read": kept + num_merge * layer,
        "surgery_written": kept,
    }
