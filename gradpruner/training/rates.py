"""Default learning rates by model size and mode.

Smaller models need higher rates. For full fine-tuning, the default is the paper's rate at 8 B, scaled to
other sizes by the power of the published Step Law. For LoRA, it is ten times the paper's rate at 8 B, and
rises with the square root as models get smaller: ten times the full rate is too much for them (docs/paper.md
says what this was checked against).
"""

from __future__ import annotations

from torch import nn

from gradpruner.common.printing import short
from gradpruner.models.sizes import ModelSizes
from gradpruner.training.options import FinetuneOptions

PAPER_RATE = 1e-5
PAPER_PARAMETERS = 6.98e9
"""Parameters of the decoder layers of Llama-3.1-8B."""
_FULL_POWER = 0.713
_LORA_POWER = 0.5
_LORA_TIMES = 10.0
_HIGHEST = {"full": 2e-3, "lora": 3e-3}  # the best rates of the smallest model measured


def default_rate(parameters: int, mode: str) -> float:
    """Returns the default learning rate for so many decoder parameters (no embeddings, no head); one digit.

    Source: GradPruner, C.2 (1e-5 at 8 B). The power is that of N in Step Law (Li et al., 2025,
        arXiv:2503.04715); the factor of ten for LoRA is from LoRA Without Regret (Schulman et al., 2025).
    """
    smaller = PAPER_PARAMETERS / parameters
    rate = PAPER_RATE * (smaller**_FULL_POWER if mode == "full" else _LORA_TIMES * smaller**_LORA_POWER)
    return float(f"{min(rate, _HIGHEST['full' if mode == 'full' else 'lora']):.0e}")


def default_rate_source(parameters: int, mode: str) -> str:
    """Says in words where the default rate comes from."""
    what = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}[mode]
    return f"the default for {what} of {short(parameters)} decoder parameters"


def with_rate(options: FinetuneOptions, model: nn.Module) -> FinetuneOptions:
    """Returns the options with a learning rate: their own, or the default for the model."""
    if options.learning_rate is not None:
        return options
    rate = default_rate(ModelSizes(model).decoder_parameters, options.mode)
    return options.model_copy(update={"learning_rate": rate})
