"""SLEB, and greedy removal in general: removes layers one by one, always the one that costs least."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from pydantic import Field

from gradpruner.common.progress import Progress
from gradpruner.gradients.scores import LayerScores
from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions
from gradpruner.methods.calibration import calibration_batches
from gradpruner.models.layers import LayeredModel
from gradpruner.training.answer_loss import mean_nll


class SlebOptions(MethodOptions):
    """Options of SLEB."""

    num_samples: int = Field(default=128, ge=1)
    """Training samples the loss is measured on; the work is proportional to this number."""


@torch.inference_mode()
def score(context: MethodContext) -> LayerScores:
    """Ranks layers by a greedy removal that minimises the mean negative log-likelihood of the learned tokens.

    In every round each remaining layer is switched off in turn, except protected layers, the first and the
    last. The layer without which the loss is lowest is removed; of equal layers, the later one. There are n
    rounds, n the number of layers to prune (at least 1; 40 % of the depth if it is unknown), or fewer if
    fewer layers can be removed. The scores are ranks, see `greedy_scores`.

    Work: with L layers, none of them protected, `1 + n (L - 2) - n (n - 1) / 2` evaluations (313 for 13 of
    32), each of `num_samples / 16` forward passes of 16 samples. Layers that are switched off still run.

    The learned tokens are those that fine-tuning learns from (labels other than -100), in the first training
    samples.

    Raises:
        DataError: If there are no samples or none has a learned token.
        NonFiniteError: If a loss is NaN or infinite.

    Source: SLEB (Song et al., 2024).
    """
    options: SlebOptions = context.options or SlebOptions()
    view = LayeredModel(context.model())
    batches = list(calibration_batches(context, view.model, options.num_samples))
    middle = [layer for layer in range(1, view.num_layers - 1) if layer not in context.protected]
    rounds = min(max(1, context.num_prune), len(middle))

    def loss_without(layers: Sequence[int]) -> float:
        with view.passed_through(layers):
            return mean_nll(view.model, batches, f"without layers {sorted(layers)}")

    return greedy_scores(
        "sleb",
        context,
        middle,
        [len(middle) - done for done in range(rounds)],
        loss_without,
        evidence={"samples": sum(len(batch["labels"]) for batch in batches)},
    )


def greedy_scores(
    name: str,
    context: MethodContext,
    free: Collection[int],
    tries: Sequence[int],
    loss_without: Callable[[Sequence[int]], float],
    *,
    evidence: dict[str, Any],
    can_go: Callable[[Sequence[int]], bool] = lambda layers: True,
    remove: Callable[[int], None] = lambda layer: None,
) -> LayerScores:
    """Removes layers one by one, always the one whose absence costs least; of equal layers, the later one.

    The scores are ranks. Lowest are the removed layers, in the order of their removal; then the other layers
    that were tried, by their cost when last tried; then layers that were never tried, the first one highest;
    then the protected layers.

    Args:
        name: Name of the scores.
        context: Gives the number of layers and the protected layers.
        free: Layers that may be removed.
        tries: For every round, the largest number of layers to try: those that cost least when last tried.
        loss_without: Returns the loss without some layers; the last of them is the one being tried.
        evidence: Evidence to add to the losses.
        can_go: Returns whether some layers may be removed together.
        remove: Called with the layer that was removed, after every round but the last.
    """
    removed: list[int] = []
    costs: dict[int, float] = {}  # loss without a layer, when last tried
    history = [loss_without([])]
    with Progress(sum(tries), f"score {name}") as progress:
        for number in tries:
            left = sorted(
                (layer for layer in free if layer not in removed),
                key=lambda layer: (costs.get(layer, -math.inf), -layer),
            )
            tried = [layer for layer in left if can_go([*removed, layer])][:number]
            for layer in tried:
                costs[layer] = loss_without([*removed, layer])
                progress.advance()
            if not tried:
                break
            removed.append(_cheapest_first(costs, tried)[0])
            history.append(costs[removed[-1]])
            progress.advance(number - len(tried))
            if len(removed) < len(tries):
                remove(removed[-1])
    others = _cheapest_first(costs, set(costs) - set(removed))
    protected = sorted(set(context.protected), reverse=True)
    rest = [i for i in reversed(range(context.num_layers)) if i not in costs and i not in protected]
    order = [*removed, *others, *rest, *protected]
    evidence = {
        "num_layers": context.num_layers,
        **evidence,
        "removed": removed,
        "nll": history,
        "next_nll": {str(layer): costs[layer] for layer in others},
    }
    return LayerScores(name, tuple(float(order.index(i)) for i in range(len(order))), evidence=evidence)


def _cheapest_first(costs: dict[int, float], layers: Collection[int]) -> list[int]:
    return sorted(layers, key=lambda layer: (costs[layer], -layer))


METHODS.register("sleb")(
    Method(
        "SLEB: removes layers one by one, always the one that costs least likelihood",
        score,
        options=SlebOptions,
        label="SLEB",
    )
)
