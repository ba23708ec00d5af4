"""LoRA adapters on the decoder layers of a model: attaches them, and finds them again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gradpruner.common.errors import ConfigError, ModelError
from gradpruner.gradients.trace import LinearRef
from gradpruner.models.layers import LayeredModel, refuse_adapters, unwrap

WEIGHTS_KEPT = (True, False, "gaussian", "eva", "orthogonal")
"""Values of PEFT's `init_lora_weights` that leave the model's own weights as they are."""

TAKEN_AWAY = ("lora_", "modules_to_save", "trainable_tokens_", "token_adapter")
"""Parts of the names of trained parameters that PEFT takes away with the adapters."""


def attach_lora(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 32,
    dropout: float = 0.05,
    adapter: str = "lora",
    only: Sequence[str] = (),
) -> Any:
    """Puts LoRA on every linear of every decoder layer of a causal LM, and nowhere else.

    Args:
        model: The causal LM (4-bit quantised for "qlora").
        rank: LoRA r, >= 1.
        alpha: LoRA alpha.
        dropout: In [0, 1).
        adapter: "lora", "rslora", "dora" or "qlora".
        only: Names of the linears that get an adapter, for example "q_proj"; all if empty.

    Returns:
        The PeftModel; its `unload()` returns the original model.

    Raises:
        PlanError: If the model carries adapters already; it is unchanged then.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    refuse_adapters(model, "new ones cannot be put on top of them")
    if adapter == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=LayeredModel(model).lora_target_pattern(only),
        use_rslora=adapter == "rslora",
        use_dora=adapter == "dora",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def is_4bit(model: Any) -> bool:
    """Returns whether a model, with or without adapters, was loaded in 4 bits."""
    return bool(getattr(unwrap(model), "is_loaded_in_4bit", False))


@dataclass(frozen=True)
class Adapters:
    """Trained adapters without their model, to be put on another model with the same linears.

    Adapters trained on 4-bit weights belong on the unquantised weights: when they are added to the 4-bit
    weights, rounding removes most of what was learned.

    Attributes:
        config: The PEFT config.
        weights: The A and B matrices by name, on the CPU.
    """

    config: Any
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, model: Any) -> Adapters:
        """Returns copies of the adapters of a PeftModel."""
        from peft import get_peft_model_state_dict

        weights = {name: w.detach().cpu().clone() for name, w in get_peft_model_state_dict(model).items()}
        return cls(model.peft_config["default"], weights)

    def put_on(self, model: nn.Module, *, merge: bool) -> Any:
        """Puts the adapters on a model, merged or not; raises ModelError if they do not fit."""
        from peft import get_peft_model, set_peft_model_state_dict

        config = copy.deepcopy(self.config)
        config.base_model_name_or_path = None  # PEFT takes it from the model
        adapted: Any = get_peft_model(model, config)
        try:
            left = set_peft_model_state_dict(adapted, self.weights)
        except RuntimeError as error:
            raise ModelError(f"The adapters do not fit the model: {error}") from error
        if left.unexpected_keys:
            raise ModelError(f"The model has no place for {', '.join(left.unexpected_keys[:3])}.")
        return adapted.merge_and_unload() if merge else adapted


def find_lora_linears(
    model: nn.Module,
) -> tuple[list[tuple[nn.Parameter, nn.Parameter]], list[LinearRef]]:
    """Returns the trainable LoRA (A, B) weights of all decoder layers, in order, and their linears.

    Raises:
        ConfigError: If a decoder layer has no trainable LoRA, so that it could not be scored.
    """
    view = LayeredModel(model)
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    linears: list[LinearRef] = []
    for layer in range(view.num_layers):
        for name, module in view.linears(layer).items():
            lora_a: Any = getattr(module, "lora_A", None)
            active = [a for a in getattr(module, "active_adapters", ()) if a in (lora_a or ())]
            if not active:
                continue
            lora_b: Any = module.lora_B
            weight_a, weight_b = lora_a[active[0]].weight, lora_b[active[0]].weight
            if not (weight_a.requires_grad and weight_b.requires_grad):
                continue
            pairs.append((weight_a, weight_b))
            linears.append(
                LinearRef(layer, name, module.out_features, module.in_features, weight_a.shape[0])  # type: ignore[arg-type]
            )
    bare = sorted(set(range(view.num_layers)) - {ref.layer for ref in linears})
    if bare:
        what = "The model has" if len(bare) == view.num_layers else f"Layers {bare} have"
        raise ConfigError(
            f"{what} no trainable LoRA linear, so there are no gradients to record.",
            hint="Use LoraConfig(target_modules='all-linear') on the whole model.",
        )
    return pairs, linears


def trained_in_place(model: nn.Module) -> list[str]:
    """Returns the names of the model's own parameters that are trained too, and stay so after `unload()`."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(part in name for part in TAKEN_AWAY)
    ]


def adapter_kind(model: Any) -> tuple[str, float, bool]:
    """Returns the kind of adapter, its alpha, and whether the base model is quantised.

    Raises:
        ConfigError: If putting the adapters on changed the model's own weights (PiSSA, OLoRA, CorDA, LoftQ,
            LoRA-GA): without them it is then not the model that was given, and must not be pruned as that.
    """
    configs = list(getattr(model, "peft_config", {}).values())
    for start in (getattr(config, "init_lora_weights", True) for config in configs):
        if start not in WEIGHTS_KEPT:
            raise ConfigError(
                f"init_lora_weights is {start!r}, which may change the model's own weights: without the "
                "adapters it is no longer the model that was given.",
                hint=f"Allowed: {', '.join(map(str, WEIGHTS_KEPT))}.",
            )
    if not configs:
        return "lora", 0.0, False
    config = configs[0]
    quantised = is_4bit(model)
    kinds = {"dora": config.use_dora, "rslora": config.use_rslora, "qlora": quantised, "lora": True}
    kind = next(kind for kind, holds in kinds.items() if holds)
    return kind, float(config.lora_alpha), quantised
