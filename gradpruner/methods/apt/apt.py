"""APT-like pruning: removes heads and channels step by step while LoRA adapters train and grow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import set_seed

from gradpruner.common.errors import ConfigError
from gradpruner.methods.apt.growing_ranks import GrowingRanks
from gradpruner.methods.apt.salience import UnitMasks
from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions
from gradpruner.methods.sat.sliced import check_linear
from gradpruner.models.narrowing import prune_width_
from gradpruner.models.widths import WidthView
from gradpruner.plans.width_plan import LayerWidths, WidthPlan
from gradpruner.training.adapters import attach_lora
from gradpruner.training.callbacks import ClosingCallback, NonFiniteGuard, ProgressCallback
from gradpruner.training.finetuning import LOGGED_POINTS, planned_steps, training_arguments
from gradpruner.training.options import DistillationOptions, FinetuneOptions
from gradpruner.training.teacher import DistillationTrainer
from gradpruner.training.trainer import CausalTrainer

ADAPTED = ("q_proj", "v_proj", "gate_proj", "up_proj")
MASK_STEP = 0.01
"""How far masks move in an optimizer step, unless the run is too short for that."""
LAST_PART = 0.25
"""Largest share of the steps that masks may take to reach their targets after the last pruning."""
# Keys of the recipe's fine-tuning that apply here too.
_SHARED = {"accumulation", "batch_size", "batching", "device", "gradient_checkpointing", "precision"}


class APTOptions(MethodOptions):
    """The training during which APT prunes."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training samples."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps instead of epochs."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate; cosine decay after 3 % of warm-up."""
    num_prunings: int = Field(default=16, ge=1)
    """Number of times that units are chosen and masked; smaller if there are fewer steps."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps before the first pruning, in [0, 1)."""
    rank: int = Field(default=8, ge=1)
    """Initial LoRA r."""
    alpha: float = Field(default=16, gt=0)
    """Initial LoRA alpha; alpha / r stays the same."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """LoRA dropout."""
    growth: float = Field(default=4.0, ge=1)
    """Largest size of all adapters together, as a multiple of their first size; 1: they do not grow."""
    distil: bool = False
    """Self-distillation: also learn, with growing weight, the predictions of the model without masks."""


def shrink(context: MethodContext) -> tuple[nn.Module, WidthPlan]:
    """Trains LoRA while masking heads and channels; returns the model without them, with LoRA merged.

    Units are KV groups (a KV head with all its query heads) and MLP channels. With H the masked input of
    o_proj or down_proj, the salience of a unit is

        S(unit) = sum over its entries of  (sum_{b,t} |H|) (sum_{b,t} |dL/dH|),

    averaged over optimizer steps with weight 0.85 for earlier steps, plus, for every entry,
    `sqrt(max(kurtosis, 0))` of its column of o_proj or down_proj (`salience.outlier_term`). Its density is
    the salience divided by its number of parameters. At each of `num_prunings` steps the units of all layers
    are sorted by density, and the least dense are masked, as many as the cubic schedule (`kept_share`) asks
    for. If a group is too large for the rest of the budget, channels are masked instead, so the budget is met
    to less than one channel as long as there are channels. Every layer keeps its best group and channel;
    `protected` layers keep all. Masks move towards 0 or 1 by 0.01 a step, or faster if that would take more
    than a quarter of the run. A unit whose mask has not reached 0 at the end is removed nevertheless.

    LoRA is on q, v, gate and up. At every pruning the more salient half of the adapters grows
    (`growing_ranks`) until all adapters together have 1 + (growth - 1) (1 - u^3) times their first
    parameters, with u as in `kept_share`.

    All tokens count, padding included. No checkpoint is written: an interrupted run starts again.

    With `distil` the loss is `mu KL + (1 - mu) L`, where L is the loss of the task and KL the divergence from
    the same model without masks (`SelfDistillationTrainer`). This costs a second forward pass but no memory
    for a teacher. mu rises linearly from 0 to 1 between warm-up and the last pruning.

    Raises:
        ConfigError: If `num_remove` parameters cannot be removed, with fp16, or on several GPUs.
        ModelError: If heads and channels cannot be told apart, or a linear is quantised.
        NonFiniteError: If a loss or gradient becomes NaN or Inf.

    Source: APT: Adaptive Pruning and Tuning (Zhao et al., 2024), section 4, and its released code.
    """
    options = context.options or APTOptions()
    num_remove = context.budget()
    context.checked_samples()
    _check(context.finetune)
    view = WidthView(context.model())
    whole = view.whole()
    pruning = AdaptivePruning(view, options, num_remove, context.protected, context.seed)
    set_seed(context.seed)
    try:
        adapted = attach_lora(
            view.model, rank=options.rank, alpha=options.alpha, dropout=options.dropout, only=ADAPTED
        )
        trainer = _trainer(adapted, context, options, pruning)
        trainer.train()
    finally:
        pruning.close()
    model: Any = adapted.merge_and_unload().eval()
    if hasattr(model, "peft_config"):
        del model.peft_config
    evidence = whole.evidence | pruning.evidence()
    plan = dataclasses.replace(whole, layers=pruning.widths(), method="apt", evidence=evidence)
    # Training has changed the model, so the fingerprint in the plan's evidence no longer matches.
    prune_width_(model, dataclasses.replace(plan, evidence={}))
    return model.requires_grad_(True), plan


def _check(tuning: FinetuneOptions) -> None:
    """Raises ConfigError for fp16."""
    if tuning.precision == "fp16":
        raise ConfigError(
            "APT adds a term of the gradients to a term of the weights, but fp16 training scales gradients.",
            hint="Set finetune.precision to bf16 or fp32.",
        )


def kept_share(step: float, warmup: float, end: float) -> float:
    """Returns the share of the budget not yet removed at step t: `u^3`, `u = (end - t) / (end - warmup)`.

    u is clipped to [0, 1].
    """
    u = min(1.0, max(0.0, (end - step) / (end - warmup)))
    return float(u**3)


def pruning_steps(total: int, num_prunings: int, warmup: float) -> tuple[list[int], int, float]:
    """Returns when units are chosen and how fast masks move.

    Args:
        total: Optimizer steps, >= 1.
        num_prunings: Number of prunings, evenly spaced.
        warmup: Share of the steps before the first pruning, in [0, 1).

    Returns:
        The steps after which units are chosen, ascending, the last one early enough for masks to reach their
        targets; the steps of warm-up; how far masks move in a step.
    """
    mask_step = max(MASK_STEP, 1 / max(1.0, LAST_PART * total))
    end = max(1, total - math.ceil(round(1 / mask_step, 9)))
    begin = min(end - 1, round(warmup * total))
    steps = {begin + math.ceil((i + 1) * (end - begin) / num_prunings) for i in range(num_prunings)}
    return sorted(steps), begin, mask_step


def lightest(densities: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """Chooses units to remove: the least dense first, skipping those too large for the rest of the budget.

    Args:
        densities: Salience per parameter, shape (units,); ties are broken by index.
        sizes: Parameters of each unit, int64, shape (units,).
        budget: Largest number of parameters to remove.
    """
    order = densities.argsort(stable=True)
    gone = []
    while len(order := order[sizes[order] <= budget]):
        totals = sizes[order].cumsum(0)
        count = int((totals <= budget).sum())
        gone.append(order[:count])
        budget -= int(totals[count - 1])
        order = order[count:]
    return torch.cat(gone) if gone else order


class AdaptivePruning(ClosingCallback):
    """Masks the least dense heads and channels of a model in training, and grows its adapters.

    `view` was made before the model got its adapters. o_proj and down_proj must have no adapters.

    Raises:
        ConfigError: If `num_remove` parameters cannot be removed.
        ModelError: If a linear is quantised.
    """

    def __init__(
        self, view: WidthView, options: APTOptions, num_remove: int, protected: tuple[int, ...], seed: int
    ) -> None:
        self.view, self.options, self.num_remove, self.seed = view, options, num_remove, seed
        shape, sizes = view.shape, view.unit_parameters()
        kinds = {"o_proj": (shape.num_kv_heads, "group"), "down_proj": (shape.intermediate_size, "channel")}
        self._open = [layer for layer in range(shape.num_layers) if layer not in protected]
        removable = len(self._open) * sum((count - 1) * sizes[name] for count, name in kinds.values())
        if num_remove > removable:
            raise ConfigError(
                f"APT was asked to remove {num_remove} parameters. The {len(self._open)} layers that are not "
                f"protected can lose {removable} if each keeps one KV group and one channel.",
                hint="Remove fewer parameters, or protect fewer layers.",
            )
        for layer in range(shape.num_layers):
            for module in vars(view.parts(layer)).values():
                check_linear(module)
        self._masks: list[UnitMasks] = []
        self._sizes: list[int] = []
        for layer in self._open:
            for role, (count, name) in kinds.items():
                self._masks.append(UnitMasks(getattr(view.parts(layer), role), count))
                self._sizes.append(sizes[name])
        self._cuts: list[dict[str, Any]] = []
        self._steps: list[int] = []
        self._begin, self._mask_step = 0, 1.0
        self._ranks: GrowingRanks  # set when training begins
        self._adapters = (0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Computes the schedule."""
        if args.n_gpu > 1 or args.world_size > 1:
            raise ConfigError(
                "APT grows adapters while they train, which works on one GPU only.",
                hint="Set CUDA_VISIBLE_DEVICES to one GPU and start without a launcher.",
            )
        self._steps, self._begin, self._mask_step = pruning_steps(
            state.max_steps, self.options.num_prunings, self.options.warmup
        )
        self._ranks = GrowingRanks(kwargs["model"], self.seed)
        self._adapters = (self._ranks.parameters(),) * 2

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Updates the saliences of the adapters while they have gradients."""
        self._ranks.end_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Updates the saliences of the units, moves the masks, and prunes at the scheduled steps."""
        for masks in self._masks:
            masks.end_step()
            masks.move(self._mask_step)
        if state.global_step in self._steps:
            left = kept_share(state.global_step, self._begin, self._steps[-1])
            self._prune(state.global_step, round(self.num_remove * (1 - left)))
            self._ranks.grow(1 + (self.options.growth - 1) * (1 - left), kwargs["optimizer"])
            self._adapters = (self._adapters[0], self._ranks.parameters())

    def close(self) -> None:
        """Removes the masks."""
        for masks in self._masks:
            masks.close()

    def widths(self) -> tuple[LayerWidths, ...]:
        """Returns the heads and channels of every layer that are left after the last pruning."""
        shape = self.view.shape
        kept = [tuple(masks.targets.nonzero()[:, 0].tolist()) for masks in self._masks]
        all_kept = LayerWidths(tuple(range(shape.num_heads)), tuple(range(shape.intermediate_size)))
        widths = dict.fromkeys(range(shape.num_layers), all_kept)
        for place, layer in enumerate(self._open):
            widths[layer] = LayerWidths(shape.heads_of(kept[2 * place]), kept[2 * place + 1])
        return tuple(widths.values())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block, nothing is masked."""
        for masks in self._masks:
            masks.paused = True
        try:
            yield
        finally:
            for masks in self._masks:
                masks.paused = False

    def distilled_share(self, step: int) -> float:
        """Returns mu, the weight of distillation: 0 until warm-up ends, 1 from the last pruning on."""
        return min(1.0, max(0.0, (step - self._begin) / max(1, self._steps[-1] - self._begin)))

    def evidence(self) -> dict[str, Any]:
        """Returns the prunings and the growth of the adapters, as JSON values."""
        return {
            "cuts": self._cuts,
            "mask_step": self._mask_step,
            "adapter_parameters": list(self._adapters),
            "ranks": self._ranks.ranks(),
        }

    def _prune(self, step: int, budget: int) -> None:
        """Sends the masks of the least dense units to 0 and all others to 1."""
        densities = [masks.scores() / size for masks, size in zip(self._masks, self._sizes, strict=True)]
        for density in densities:
            density[density.argmax()] = math.inf  # no layer is emptied
        counts = [len(density) for density in densities]
        sizes = torch.tensor(self._sizes).repeat_interleave(torch.tensor(counts))
        joined = torch.cat(densities)
        free = joined.isfinite().nonzero()[:, 0]
        gone = free[lightest(joined[free], sizes[free], budget)]
        targets = torch.ones(len(joined))
        targets[gone] = 0
        for masks, target in zip(self._masks, targets.split(counts), strict=True):
            masks.targets = target.to(masks.masks.device)
        self._cuts.append({"step": step, "removed": int(sizes[gone].sum()), "units": len(gone)})


class SelfDistillationTrainer(DistillationTrainer):
    """A `DistillationTrainer` that learns from the labels and from its own model without masks."""

    def __init__(self, *, pruning: AdaptivePruning, **kwargs: Any) -> None:
        super().__init__(teacher=self._whole, **kwargs)
        self.pruning = pruning

    def _whole(self, **inputs: Any) -> Any:
        """Runs the model without masks and without dropout."""
        model: Any = self.model
        with self.pruning.paused():
            model.eval()
            try:
                return model(**inputs)
            finally:
                model.train()

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        mu = self.pruning.distilled_share(self.state.global_step)
        self.options = DistillationOptions(ce=1 - mu, answers=mu, prompts=0)
        return super()._loss(outputs, labels, num_items_in_batch)


def _trainer(
    model: Any, context: MethodContext, options: APTOptions, pruning: AdaptivePruning
) -> CausalTrainer:
    made: Any = partial(SelfDistillationTrainer, pruning=pruning) if options.distil else CausalTrainer
    tuning = FinetuneOptions(
        **context.finetune.model_dump(include=_SHARED),
        learning_rate=options.learning_rate,
        epochs=options.epochs,
        max_steps=options.steps,
        schedule="cosine",
        seed=context.seed,
    )
    steps = planned_steps(len(context.samples), tuning)
    tuning = tuning.model_copy(update={"max_steps": steps})
    trainer: CausalTrainer = made(
        model=model,
        args=training_arguments(tuning, logging_steps=max(1, steps // LOGGED_POINTS)),
        samples=context.samples,
        collator=context.collator,
        batching=tuning.batching,
        callbacks=[NonFiniteGuard(), ProgressCallback("prune apt"), pruning],
    )
    return trainer


METHODS.register("apt")(
    Method(
        "APT-like: prunes the least salient heads and channels step by step while LoRA trains",
        shrink=shrink,
        check=lambda tuning, steps: _check(tuning),
        options=APTOptions,
        label="APT-like",
        uniform=False,
    )
)
