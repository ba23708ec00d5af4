"""What a layer-importance method is and what it may look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradpruner.registry import Registry
from gradpruner.scores import LayerScores
from gradpruner.trace import GradientTrace


@dataclass(frozen=True)
class MethodContext:
    """Everything a method may rest its scores on; expensive parts are made when first asked for.

    Attributes:
        num_layers: Decoder layers of the model.
        seed: The run's seed.
        trace: Gives the recorded LoRA gradients.
        model: Gives the dense model, in evaluation mode; not to be changed.
        samples: Encoded training samples (`input_ids`, `labels`), the calibration data.
        collator: Makes a padded batch of samples.
        norm: GradPruner's norm, "squared" or "frobenius".
        num_keep: Layers that will be kept.
    """

    num_layers: int
    seed: int
    trace: Callable[[], GradientTrace]
    model: Callable[[], nn.Module]
    samples: Sequence[dict[str, list[int]]]
    collator: Callable[[Any], dict[str, Any]]
    norm: str = "squared"
    num_keep: int | None = None


@dataclass(frozen=True)
class Method:
    """A way to say how important every layer is.

    Attributes:
        description: One line for `gradpruner ls methods`.
        score: Makes the scores; higher is more important, one finite number per layer, the same for
            the same context.
        needs_trace: Whether it reads recorded gradients; also whether its layers can be merged.
    """

    description: str
    score: Callable[[MethodContext], LayerScores]
    needs_trace: bool = False


METHODS: Registry[Method] = Registry("method")
