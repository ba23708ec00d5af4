"""Block influence: how much a layer turns the hidden state, on average over tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradpruner.gradients.scores import LayerScores
from gradpruner.methods.base import MethodContext
from gradpruner.methods.calibration import MAX_SAMPLES, calibration_batches
from gradpruner.models.layers import LayeredModel


@torch.inference_mode()
def block_influence(context: MethodContext, max_samples: int = MAX_SAMPLES) -> LayerScores:
    """`BI_l = mean over tokens of 1 - cos(x_l, x_{l+1})`, x the input and output of layer l.

    Inputs and outputs are read at the layers themselves: `hidden_states[-1]` of transformers comes
    after the final norm and would compare the last layer's raw state with a normed one. Calibrated on
    the first training samples, padding left out.

    Args:
        context: Gives the model and the samples.
        max_samples: Samples taken at most.

    Returns:
        Scores from 0 (a layer that turns no state) to 2.

    Raises:
        DataError: If there are no samples.

    Source: ShortGPT (Men et al., 2025), Block Influence.
    """
    view = LayeredModel(context.model())
    device = next(view.model.parameters()).device
    latest_L = [torch.empty(0)] * view.num_layers  # per layer: 1 - cos of the batch in hand, (batch, length)
    total_L = torch.zeros(view.num_layers, dtype=torch.float64)
    num_samples = num_tokens = 0
    hooks = [
        layer.register_forward_hook(_hook(latest_L, index), with_kwargs=True)
        for index, layer in enumerate(view.layers)
    ]
    try:
        for batch in calibration_batches(context, device, max_samples):
            real = batch["attention_mask"].bool().cpu()
            num_samples += len(real)
            num_tokens += int(real.sum())
            view.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            total_L += torch.stack([turned.cpu().double()[real].sum() for turned in latest_L])
    finally:
        for hook in hooks:
            hook.remove()
    evidence = {"num_layers": view.num_layers, "samples": num_samples, "tokens": num_tokens}
    return LayerScores("block_influence", tuple((total_L / num_tokens).tolist()), evidence=evidence)


def _hook(latest_L: list[Tensor], index: int) -> Callable[..., None]:
    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        before, after = (_one_state(x.float()) for x in (before, after))
        latest_L[index] = 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1)

    return hook


def _one_state(x: Tensor) -> Tensor:
    """Gemma 3n has four streams, in an axis before the samples: together they are the state."""
    return x if x.ndim == 3 else x.movedim(0, -2).flatten(-2)
