"""What a pruning method is and what it may look at."""

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
from gradpruner.common.registry import Registry
from gradpruner.data.encoding import Collator
from gradpruner.gradients.scores import LayerScores, default_num_prune
from gradpruner.gradients.trace import GradientTrace
from gradpruner.plans.layer_plan import MIN_KEPT, PruningPlan
from gradpruner.plans.reading import Plan
from gradpruner.plans.selection import Fits, plan_pruning
from gradpruner.plans.width_plan import WidthPlan
from gradpruner.training.options import FinetuneOptions, validated

_COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class MethodOptions(BaseModel):
    """What can be set about a method (`methods.<name>` in a recipe); this one has nothing to set."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


@dataclass(frozen=True)
class MethodContext:
    """Everything a method may base its decision on; expensive parts are made when asked for.

    Attributes:
        num_layers: Decoder layers of the model.
        trace: Gives the recorded LoRA gradients.
        model: Gives the dense model, in evaluation mode, loaded anew at every call; not to be changed by
            methods that only score or plan.
        samples: Encoded training samples (`input_ids`, `labels`), the calibration data.
        norm: GradPruner's norm, "squared" or "frobenius".
        num_keep: Layers that stay, for methods that prune layers.
        num_remove: Parameters to remove, for methods that prune anything else: as many as the layers hold
            that would go otherwise. A method may miss it by less than one of its units.
        unit: What `num_remove` counts: "parameters" (of the whole model) or "decoder_parameters" (without
            embeddings and head).
        protected: Layers that must stay whole, ascending.
        fits: Which layer may stand where, see `selection.plan_pruning`; None: any.
        options: The method's own options, an instance of `Method.options`.
        pruned_work: Work of a pruned row (recording, repair, teacher, training), in units of the dense
            model's fine-tuning; estimated from steps and layers.
        finetune: How the result is fine-tuned later; methods that train take batch size, precision and
            device from here.
        folder: Where a method that trains for long may keep checkpoints; None: nowhere.
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
    protected: tuple[int, ...] = ()
    fits: Fits | None = None
    options: Any = None
    pruned_work: float = 1.0
    finetune: FinetuneOptions = field(default_factory=FinetuneOptions)
    folder: Path | None = None

    @property
    def num_prune(self) -> int:
        """Layers to prune; 40 % of the depth while `num_keep` is unknown."""
        if self.num_keep is None:
            return default_num_prune(self.num_layers)
        return self.num_layers - self.num_keep

    def kept(self) -> int:
        """`num_keep`, for methods that need it; ConfigError if it is unknown or impossible."""
        if self.num_keep is None:
            raise ConfigError(
                "This method decides for a number of layers, and how many stay is not known.",
                hint="Give MethodContext a num_keep.",
            )
        if not MIN_KEPT <= self.num_keep <= self.num_layers:
            raise ConfigError(
                f"num_keep is {self.num_keep}; {MIN_KEPT} to {self.num_layers} layers can be kept."
            )
        return self.num_keep

    def plan_by(self, scores: LayerScores, **which: Any) -> PruningPlan:
        """The plan by these scores when nothing is merged; `which` as for `plan_pruning`."""
        known = {"num_merge": 0, "protect_first": 0, "protect": self.protected, "fits": self.fits}
        return plan_pruning(scores, **known, **which)  # type: ignore[arg-type]

    def budget(self) -> int:
        """`num_remove`, for methods that need it; ConfigError if it is unknown, PlanError if negative."""
        if self.num_remove is None:
            raise ConfigError(
                "This method removes a number of parameters, and how many is not known.",
                hint="Give MethodContext a num_remove.",
            )
        if self.num_remove < 0:
            raise PlanError(f"num_remove is {self.num_remove}; 0 or more parameters can be removed.")
        return self.num_remove

    def checked_samples(self) -> Sequence[dict[str, list[int]]]:
        """The samples; DataError if there are none."""
        if len(self.samples) == 0:
            raise DataError("This method looks at training samples and there are none.")
        return self.samples

    def floating_model(self) -> nn.Module:
        """The dense model; ModelError if it is quantised."""
        model = self.model()
        for name, parameter in model.named_parameters():
            if parameter.dtype not in _COMPUTED:
                raise ModelError(
                    f"'{name}' is stored as {parameter.dtype}: the model is quantised, and this method "
                    "computes with its weights.",
                    hint="Prune the model that was quantised, in float32 or bfloat16.",
                )
        return model


@dataclass(frozen=True)
class Method:
    """A way to make a model smaller, or cheaper to train: one of `score`, `plan`, `shrink`, `callbacks`.

    Each may also raise what the guards of `MethodContext` raise.

    Attributes:
        description: One line for `gradpruner ls methods`.
        score: One finite number per layer, higher is more important, the same for the same context.
            `selection.plan_pruning` then decides which layers go.
        plan: Decides by itself what goes; touches no weights.
        shrink: Prunes while it trains: gives the pruned, trained model and what it consists of.
        callbacks: Callbacks that change the fine-tuning; the model keeps its size.
        training: Keys of the recipe's `finetune` section that a method with `callbacks` sets itself. The row
            is then the dense model as it was given, also where others start from the tuned one.
        recover: Trains the pruned model (second argument, in place) before fine-tuning; the JSON values it
            returns go into the run record.
        needs_trace: Whether it reads recorded gradients; also whether its layers can be merged.
        merges: Whether its plan uses the recipe's `num_merge`; otherwise all pruned layers are dropped.
        uniform: Whether the model it leaves is a plain Hugging Face one: whole layers gone, or the same
            widths in every layer.
        plan_options: Keys of the recipe's `plan` section that it sets itself.
        alone: Whether it trains candidates while it plans, which works in one process only.
        label: What reports call it; "" makes one from the name. It ends in "-like" where a method is
            reconstructed from a paper without code.
    """

    description: str
    score: Callable[[MethodContext], LayerScores] | None = None
    plan: Callable[[MethodContext], Plan] | None = None
    shrink: Callable[[MethodContext], tuple[nn.Module, WidthPlan]] | None = None
    callbacks: Callable[[MethodContext], list[TrainerCallback]] | None = None
    training: Callable[[MethodContext], dict[str, Any]] | None = None
    recover: Callable[[MethodContext, nn.Module], dict[str, Any]] | None = None
    options: type[MethodOptions] = MethodOptions
    needs_trace: bool = False
    merges: bool = False
    uniform: bool = True
    plan_options: dict[str, Any] = field(default_factory=dict)
    alone: bool = False
    label: str = ""

    def __post_init__(self) -> None:
        given = [name for name in ("score", "plan", "shrink", "callbacks") if getattr(self, name)]
        if len(given) != 1:
            raise ConfigError(
                f"A method is one of score, plan, shrink or callbacks; this one is {given or 'nothing'}."
            )

    @property
    def removes(self) -> bool:
        """Whether the model it leaves is smaller."""
        return self.callbacks is None

    def read_options(self, name: str, raw: dict[str, Any]) -> MethodOptions:
        """The options a recipe gives, checked.

        Raises:
            ConfigError: If one is unknown or not allowed.
        """
        return validated(self.options, raw, f"methods.{name}.")


METHODS: Registry[Method] = Registry("method", renamed={"block_influence": "shortgpt"})
