"""Magnitude: how large a layer's weights are."""

from __future__ import annotations

import torch
from torch import Tensor

from gradpruner.gradients.scores import LayerScores
from gradpruner.methods.base import METHODS, Method, MethodContext
from gradpruner.models.layers import LayeredModel


@torch.inference_mode()
def score(context: MethodContext) -> LayerScores:
    """Returns per layer `sum over linears of sum |W| / sum over linears of entries of W`.

    Only weights are read: no data, no forward pass. Expert weights that a model stores as one tensor are not
    linears and do not count.

    Source: Shortened LLaMA (Kim et al., 2024), criterion "Mag", `norm_power` 1.
    """
    view = LayeredModel(context.floating_model())
    values, entries = [], []
    for layer in range(view.num_layers):
        weights = view.weights(layer).values()
        entries.append(sum(weight.numel() for weight in weights))
        values.append(sum(_absolute_sum(weight) for weight in weights) / entries[-1])
    evidence = {"num_layers": view.num_layers, "entries": entries}
    return LayerScores("magnitude", tuple(values), evidence=evidence)


def _absolute_sum(weight: Tensor) -> float:
    # Sums each row in fp32 and the rows in fp64: neither rounds much, and the weight is not copied.
    rows = torch.linalg.vector_norm(weight, ord=1, dim=1, dtype=torch.float32)
    return float(rows.cpu().double().sum())


METHODS.register("magnitude")(
    Method("mean absolute weight of a layer's linears; needs no data", score, label="Magnitude")
)
