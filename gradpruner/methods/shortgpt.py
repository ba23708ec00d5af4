"""ShortGPT: prunes the layers that turn the hidden state least."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gradpruner.gradients.scores import LayerScores
from gradpruner.methods.base import METHODS, Method, MethodContext
from gradpruner.methods.calibration import MAX_SAMPLES, calibration_batches, run, watched
from gradpruner.models.layers import LayeredModel


@torch.inference_mode()
def score(context: MethodContext, max_samples: int = MAX_SAMPLES, method: str = "shortgpt") -> LayerScores:
    """Returns block influence, `BI_l = mean over tokens of 1 - cos(x_l, x_{l+1})`, x_l the input of layer l.

    Values are between 0 (the layer turns no state) and 2. The layers with the lowest values are pruned all at
    once, neighbours or not. Measured on the first `max_samples` training samples, without padding. `method`
    is the name that the scores get.

    Source: ShortGPT (Men et al., 2025), Block Influence.
    """
    view = LayeredModel(context.model())
    latest_L = [torch.empty(0)] * view.num_layers  # per layer: 1 - cos for the current batch, (batch, length)
    total_L = torch.zeros(view.num_layers, dtype=torch.float64)
    num_samples = num_tokens = 0

    def see(index: int, before: Tensor, after: Tensor) -> None:
        latest_L[index] = 1 - cosine_similarity(before.float(), after.float(), dim=-1)

    with watched(view, see):
        for batch in calibration_batches(context, view.model, max_samples):
            real = batch["attention_mask"].bool().cpu()
            num_samples += len(real)
            num_tokens += int(real.sum())
            run(view.model, batch)
            total_L += torch.stack([influence.cpu().double()[real].sum() for influence in latest_L])
    evidence = {"num_layers": view.num_layers, "samples": num_samples, "tokens": num_tokens}
    return LayerScores(method, tuple((total_L / num_tokens).tolist()), evidence=evidence)


METHODS.register("shortgpt")(
    Method("ShortGPT's block influence: how much a layer turns the hidden state", score, label="ShortGPT")
)
