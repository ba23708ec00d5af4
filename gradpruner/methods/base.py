"""What a pruning method is, and what it is given to decide by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from transformers import TrainerCallback

from gradpruner.common.errors import ConfigError, DataError, ModelError, PlanError
from gradpruner.common.options import validated
from gradpruner.common.registry import Registry
from gradpruner.data.encoding import Collator
from gradpruner.gradients.scores import LayerScores, default_num_prune
from gradpruner.gradients.trace import GradientTrace
from gradpruner.plans.layer_plan import MIN_KEPT, PruningPlan
from gradpruner.plans.options import RepairOptions
from gradpruner.plans.reading import Plan
from gradpruner.plans.selection import Placeable, plan_pruning
from gradpruner.plans.width_plan import WidthPlan
from gradpruner.training.options import FinetuneOptions

_COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class MethodOptions(BaseModel):
    """Options of a method (`methods.<name>` in a recipe); used as it is by methods without options."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


@dataclass(frozen=True)
class MethodContext:
    """Everything a method may base its decision on. Trace and model are loaded only when they are called for.

    Attributes:
        num_layers: Decoder layers of the model.
        trace: Returns the recorded LoRA gradients.
        model: Returns the dense model in evaluation mode. Every call loads it again. Methods that only score
            or plan must not change it.
        samples: Encoded training samples (`input_ids`, `labels`), used as calibration data.
        norm: GradPruner's norm, "squared" or "frobenius".
        num_keep: Layers to keep, for methods that prune layers.
        num_remove: Parameters to remove, for all other methods: the parameters of the layers that a
            layer-pruning method would remove. A method may miss this number by less than one of its units.
        unit: What `num_remove` counts: "parameters" (of the whole model) or "decoder_parameters" (without
            embeddings and head).
        validation: Encoded samples that nothing is fitted or trained on, to compare models by; None if there
            are none, or if they certify a loss later.
        protected: Layers that must not be pruned, ascending.
        fits: Which layers are allowed at which position, see `selection.plan_pruning`; None allows all.
        make_plan: Returns the plan that the run makes of scores, without merging; None if there is no run.
        options: The method's own options, an instance of `Method.options`.
        options_of: Returns the options of another method, by its name, for methods that ask others; None
            takes their defaults.
        pruned_work: Estimated work of a pruned row (recording, repair, teacher, training) as a multiple of
            the dense model's fine-tuning; computed from steps and layers.
        repair: How the result is repaired later; kind "none" if it is not.
        trained: Whether the result is fine-tuned later, or stays as it is after the repair.
        finetune: How the result is fine-tuned later. Methods that train take batch size, precision and
            device from it.
        folder: Where a method that trains for long may save checkpoints, and one that compares repaired
            models the winner's repair; None if it must not save any.
    """

    num_layers: int
    seed: int
    trace: Callable[[], GradientTrace]
    model: Callable[[], nn.Module]
    samples: Sequence[dict[str, list[int]]]
    collator: Collator
    norm: str = "squared"
    num_keep: int | None = None
    num_remove: int | None = None
    unit: str = "parameters"
    validation: Sequence[dict[str, list[int]]] | None = None
    protected: tuple[int, ...] = ()
    fits: Placeable | None = None
    make_plan: Callable[[LayerScores], PruningPlan] | None = None
    options: Any = None
    options_of: Callable[[str], Any] | None = None
    pruned_work: float = 1.0
    repair: RepairOptions = field(default_factory=RepairOptions)
    trained: bool = True
    finetune: FinetuneOptions = field(default_factory=FinetuneOptions)
    folder: Path | None = None

    @property
    def num_prune(self) -> int:
        """Layers to prune; 40 % of the depth if `num_keep` is unknown."""
        if self.num_keep is None:
            return default_num_prune(self.num_layers)
        return self.num_layers - self.num_keep

    def checked_num_prune(self) -> int:
        """Returns `num_prune`; raises ConfigError if `num_keep` is unknown or out of range."""
        if self.num_keep is None:
            raise ConfigError(
                "This method needs to know how many layers to keep, and num_keep is None.",
                hint="Give MethodContext a num_keep.",
            )
        if not MIN_KEPT <= self.num_keep <= self.num_layers:
            raise ConfigError(
                f"num_keep is {self.num_keep}; {MIN_KEPT} to {self.num_layers} layers can be kept."
            )
        return self.num_prune

    def plan_by(self, scores: LayerScores, **which: Any) -> PruningPlan:
        """Returns the plan that follows from scores, without merging; `which` is passed to `plan_pruning`."""
        known = {"num_merge": 0, "protect_first": 0, "protect": self.protected, "fits": self.fits}
        return plan_pruning(scores, **known, **which)  # type: ignore[arg-type]

    def budget(self) -> int:
        """Returns `num_remove`; raises ConfigError if it is unknown, PlanError if it is negative."""
        if self.num_remove is None:
            raise ConfigError(
                "This method needs to know how many parameters to remove, and num_remove is None.",
                hint="Give MethodContext a num_remove.",
            )
        if self.num_remove < 0:
            raise PlanError(f"num_remove is {self.num_remove}; 0 or more parameters can be removed.")
        return self.num_remove

    def checked_samples(self) -> Sequence[dict[str, list[int]]]:
        """Returns the samples; raises DataError if there are none."""
        if len(self.samples) == 0:
            raise DataError("This method needs training samples, and there are none.")
        return self.samples

    def floating_model(self) -> nn.Module:
        """Loads the dense model; raises ModelError if it is quantised."""
        model = self.model()
        for name, parameter in model.named_parameters():
            if parameter.dtype not in _COMPUTED:
                raise ModelError(
                    f"'{name}' is stored as {parameter.dtype}: the model is quantised, but this method "
                    "computes with its weights.",
                    hint="Prune the original model, in float32 or bfloat16, and quantise the result.",
                )
        return model


@dataclass(frozen=True)
class Method:
    """A way to make a model smaller, or cheaper to train: one of `score`, `plan`, `shrink`, `callbacks`.

    Each of these may also raise the errors of the `MethodContext` methods it calls.

    Attributes:
        description: One line for `gradpruner ls methods`.
        score: Scores layers: one finite number per layer, higher is more important, always the same for the
            same context. `selection.plan_pruning` then decides which layers are pruned.
        plan: Decides by itself what is pruned; changes no weights.
        shrink: Prunes while it trains; returns the pruned, trained model and the plan of what was kept.
        callbacks: Trainer callbacks that change the fine-tuning; the model keeps its size.
        check: Raises ConfigError if the method cannot train as the recipe's fine-tuning says, given its
            options and number of optimizer steps. Called before a model is loaded.
        training: Keys of the recipe's `finetune` section that a method with `callbacks` sets itself. Its row
            then trains the original dense model, even where other rows start from the tuned one.
        recover: Trains the pruned model (second argument, in place) before fine-tuning. Returns JSON values
            for the run record.
        needs_trace: Whether it reads recorded gradients; also whether its layers can be merged.
        merges: Whether its plan uses the recipe's `num_merge`. If not, all pruned layers are dropped.
        uniform: Whether the result is a plain Hugging Face model: whole layers removed, or the same widths in
            every layer.
        plan_options: Keys of the recipe's `plan` section that it sets itself.
        compares: Whether it repairs candidates as the run does and compares their losses. Several processes
            of a job score together.
        alone: Whether it trains candidates while it plans, which works in one process only.
        asks: Methods it asks for their scores, with the options that the recipe sets for them.
        label: Name in reports; "" derives it from the registered name. It ends in "-like" if the method was
            reconstructed from a paper without code.
    """

    description: str
    score: Callable[[MethodContext], LayerScores] | None = None
    plan: Callable[[MethodContext], Plan] | None = None
    shrink: Callable[[MethodContext], tuple[nn.Module, WidthPlan]] | None = None
    callbacks: Callable[[MethodContext], list[TrainerCallback]] | None = None
    check: Callable[[FinetuneOptions, int], None] | None = None
    training: Callable[[MethodContext], dict[str, Any]] | None = None
    recover: Callable[[MethodContext, nn.Module], dict[str, Any]] | None = None
    options: type[MethodOptions] = MethodOptions
    needs_trace: bool = False
    merges: bool = False
    uniform: bool = True
    plan_options: dict[str, Any] = field(default_factory=dict)
    compares: bool = False
    alone: bool = False
    asks: tuple[str, ...] = ()
    label: str = ""

    def __post_init__(self) -> None:
        given = [name for name in ("score", "plan", "shrink", "callbacks") if getattr(self, name)]
        if len(given) != 1:
            raise ConfigError(
                "A method has exactly one of score, plan, shrink and callbacks; this one has "
                f"{', '.join(given) or 'none'}."
            )

    @property
    def removes(self) -> bool:
        """Whether the result is smaller than the dense model."""
        return self.callbacks is None

    def read_options(self, name: str, raw: dict[str, Any]) -> MethodOptions:
        """Returns the checked options of a recipe.

        Raises:
            ConfigError: If a key is unknown or a value is not allowed.
        """
        return validated(self.options, raw, f"methods.{name}.")


METHODS: Registry[Method] = Registry("method", renamed={"block_influence": "shortgpt"})
