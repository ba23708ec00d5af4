"""SLEB: one layer after another goes, always the one whose absence costs least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gradpruner.gradients.scores import LayerScores
from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions
from gradpruner.methods.calibration import calibration_batches, mean_nll
from gradpruner.models.layers import LayeredModel
from gradpruner.progress import Progress


class SlebOptions(MethodOptions):
    """What can be set about SLEB."""

    num_samples: int = Field(default=128, ge=1)
    """Training samples whose likelihood is compared; the work is proportional to it."""


@torch.inference_mode()
def score(context: MethodContext) -> LayerScores:
    """Order of a greedy removal by the mean negative log-likelihood of the learned tokens.

    In every round each layer still there, protected ones and the first and the last apart, is switched off
    in turn, and the one without which the likelihood is best is removed; of equal ones the later. There are
    n rounds, n the number of layers to prune (at least 1; 40 % of the depth when it is unknown), or fewer
    where fewer layers can go. The score is a rank: of the removed layers the round, above them the others by
    what their removal would have cost in the last round, then the last and the first layer, on top the
    protected ones.

    Work: with L layers and none protected `1 + n (L - 2) - n (n - 1) / 2` evaluations, 313 for 13 of 32, each
    of `num_samples / 16` forward passes of 16 samples. Layers that are switched off still run.

    The tokens are those that fine-tuning learns from (labels other than -100) in the first training samples.

    Raises:
        DataError: If there are no samples or none has a learned token.
        NonFiniteError: If a likelihood is NaN or infinite.

    Source: SLEB (Song et al., 2024).
    """
    options: SlebOptions = context.options or SlebOptions()
    view = LayeredModel(context.model())
    device = next(view.model.parameters()).device
    batches = list(calibration_batches(context, device, options.num_samples))
    middle = [layer for layer in range(1, view.num_layers - 1) if layer not in context.protected]
    rounds = min(max(1, context.num_prune), len(middle))
    removed: list[int] = []
    costs: dict[int, float] = {}  # of the last round
    with Progress(1 + sum(len(middle) - i for i in range(rounds)), "score sleb") as progress:
        history = [_mean_nll(view, batches, removed)]
        progress.advance()
        for _ in range(rounds):
            costs = {}
            for layer in (i for i in middle if i not in removed):
                costs[layer] = _mean_nll(view, batches, [*removed, layer])
                progress.advance()
            removed.append(cheapest_first(costs)[0])
            history.append(costs[removed[-1]])
    others = [layer for layer in cheapest_first(costs) if layer not in removed]
    ends = [layer for layer in (view.num_layers - 1, 0) if layer not in context.protected]
    order = list(dict.fromkeys([*removed, *others, *ends, *sorted(context.protected, reverse=True)]))
    evidence = {
        "num_layers": view.num_layers,
        "samples": sum(len(batch["labels"]) for batch in batches),
        "removed": removed,
        "nll": history,
        "next_nll": {str(layer): costs[layer] for layer in others},
    }
    return ranked("sleb", order, evidence)


def cheapest_first(costs: dict[int, float]) -> list[int]:
    """Layers by what their absence costs; of equal ones the later comes first."""
    return sorted(costs, key=lambda layer: (costs[layer], -layer))


def ranked(method: str, order: Sequence[int], evidence: dict[str, Any]) -> LayerScores:
    """Scores that are ranks: the layers in the order in which they go."""
    return LayerScores(method, tuple(float(order.index(i)) for i in range(len(order))), evidence=evidence)


def _mean_nll(view: LayeredModel, batches: Sequence[dict[str, Tensor]], without: Sequence[int]) -> float:
    """Mean negative log-likelihood of the learned tokens, in nats, with some layers switched off."""
    with view.passed_through(without):
        return mean_nll(view.model, batches, f"without layers {sorted(without)}")


METHODS.register("sleb")(
    Method(
        "SLEB: the layer whose absence costs least likelihood goes, again and again",
        score,
        options=SlebOptions,
        label="SLEB",
    )
)
