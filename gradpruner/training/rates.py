"""Default learning rates, by the size of the model and by what is trained; and a search for the best one.

Smaller models need higher rates. For full fine-tuning the default is the paper's rate at 8 B, carried to
other sizes by the power of the published Step Law; for LoRA it is ten times that at 8 B and rises with the
square root, because ten times is too much for small models (docs/paper.md has what this was checked against).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from gradpruner.common.errors import NonFiniteError
from gradpruner.models.sizes import ModelSizes
from gradpruner.training.options import FinetuneOptions

PAPER_RATE = 1e-5
PAPER_PARAMETERS = 6.98e9
"""Of the decoder layers of Llama-3.1-8B."""
_FULL_POWER = 0.713
_LORA_POWER = 0.5
_LORA_TIMES = 10.0
_HIGHEST = {"full": 2e-3, "lora": 3e-3}  # what was best for the smallest model that was measured
_MOST_RATES = 12


def default_rate(parameters: int, mode: str) -> float:
    """The default learning rate by the number of decoder parameters, without embeddings and head; one digit.

    Source: GradPruner, C.2 (1e-5 at 8 B). The power is that of N in Step Law (Li et al., 2025,
        arXiv:2503.04715); ten times for LoRA is what LoRA Without Regret (Schulman et al., 2025) finds.
    """
    smaller = PAPER_PARAMETERS / parameters
    rate = PAPER_RATE * (smaller**_FULL_POWER if mode == "full" else _LORA_TIMES * smaller**_LORA_POWER)
    return float(f"{min(rate, _HIGHEST['full' if mode == 'full' else 'lora']):.0e}")


def default_rate_source(parameters: int, mode: str) -> str:
    """Where the default rate comes from, in words."""
    what = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}[mode]
    return f"the default for {what} of {in_millions(parameters)} decoder parameters"


def in_millions(count: int) -> str:
    """A number of parameters in words: 7.0 B, 106 M, 0.4 M."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} B"
    return f"{count / 1e6:.0f} M" if count >= 1e7 else f"{count / 1e6:.1f} M"


def with_rate(options: FinetuneOptions, model: nn.Module) -> FinetuneOptions:
    """The options with a learning rate: their own, or the default for the model."""
    if options.learning_rate is not None:
        return options
    rate = default_rate(ModelSizes(model).decoder_parameters, options.mode)
    return options.model_copy(update={"learning_rate": rate})


def best_rate(losses: dict[float, float], loss_at: Callable[[float], float]) -> float:
    """The rate with the lowest loss; doubled or halved until the best one has a worse one on either side.

    Args:
        losses: Rate -> loss of at least one rate, infinite where training did not stay finite; rates that
            are tried are added.
        loss_at: Trains and measures at a rate.

    Raises:
        NonFiniteError: If training stayed finite at no rate.
    """
    for _ in range(_MOST_RATES):
        best = min(losses, key=lambda rate: (losses[rate], rate))
        finite = math.isfinite(losses[best])
        further = best / 2 if best == min(losses) else None
        if finite and best == max(losses):
            further = best * 2
        if further is None:
            return best
        losses[further] = loss_at(further)
    if math.isfinite(min(losses.values())):
        return min(losses, key=lambda rate: losses[rate])
    raise NonFiniteError(
        f"Training stayed finite at no learning rate from {min(losses):g} to {max(losses):g}.",
        hint="Look at the rows, or try another precision: --set finetune.precision=fp32.",
    )
