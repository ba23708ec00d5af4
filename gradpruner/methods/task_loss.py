"""Task loss: removes layers one by one, always the one that costs the task least once its cut is repaired.

Shape suffixes: T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from gradpruner.common.errors import ModelError, NonFiniteError, PlanError
from gradpruner.gradients.scores import LayerScores
from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions
from gradpruner.methods.sleb import greedy_scores
from gradpruner.models.layers import LayeredModel, fingerprint
from gradpruner.models.restoring import forwards_set
from gradpruner.models.walking import BATCH_SIZE, Walk, drawn, sample_batches
from gradpruner.plans.layer_plan import MIN_KEPT
from gradpruner.pruning.repair.ridge import AnySums, ChannelSums, Sums
from gradpruner.pruning.repair.target import RefitTarget, target_of
from gradpruner.training.answer_loss import mean_nll

States = list[Tensor]
"""Hidden states of all samples, batch by batch, each (samples, tokens, D)."""


class TaskLossOptions(MethodOptions):
    """Options of the choice by the task's loss."""

    num_samples: int = Field(default=64, ge=1)
    """Training samples the loss is measured on; the work is proportional to this number."""
    repair: Literal["none", "linear"] = "linear"
    """How a cut is repaired before the loss is measured: not at all, or with a fitted linear map."""
    repair_samples: int = Field(default=128, ge=2)
    """Further training samples the maps are fitted on; the loss is not measured on them."""
    ridge: float = Field(default=0.1, gt=0)
    """Ridge penalty on a map's entries, as a multiple of the mean diagonal of its normal equations."""
    shortlist: int | None = Field(default=None, ge=1)
    """Layers to try from the second round on: those that cost least when last tried; null: all."""


@torch.no_grad()
def score(context: MethodContext) -> LayerScores:
    """Ranks layers by a greedy removal that minimises the loss of the pruned and repaired model.

    The loss is the mean negative log-likelihood, in nats, of the learned tokens (labels other than -100) of
    `num_samples` training samples drawn with the seed. In every round each remaining layer that is not
    protected is left out in turn. The layer without which the loss is lowest is removed; of equal layers, the
    later one. There are n rounds, n the number of layers to prune (at least 1; 40 % of the depth if it is
    unknown). With `fits`, a layer is tried only if the rest of the n layers can be chosen such that all kept
    layers fit.

    `repair: linear` fits, for every cut that is tried, the map that fit_repair(kind="linear") would fold into
    the last linear W of the kept layer before the cut. With x the output of that linear, y the output of the
    layer, h the input that the layer after the cut gets in the dense model, and w = 1 / |h|^2:

        y + U x,   U = argmin sum w |h - y - U x|^2 + rho |U|^2,   rho = ridge * mean diagonal of sum w x x^T

    over the tokens of `repair_samples` samples that the loss is not measured on (or of the same samples, if
    there are fewer than two others). If a norm follows the last linear, x is the output of the norm and U is
    one factor per channel. Later cuts keep their maps while a layer is tried; once a layer is removed, their
    maps are fitted again, from input to output. A cut before the first kept layer is not repaired: no layer
    comes before it.

    Removed layers do not run, and the input states of every kept layer are stored, so trying a layer only
    runs the layers after it. With L layers, none protected, m = L, L - 1, ... L - n + 1 layers in a round
    and p the position (from 0) of the removed layer among them, the number of layers run on all measured
    samples is

        none    L + sum over rounds m (m - 1) / 2 + sum over rounds but the last (m - 1 - p)
        linear  the same + sum over rounds (m - 1) + (rounds but the last with p > 0)

    and on all samples the maps are fitted on, L + sum over rounds (m - 1) + sum over rounds but the last
    (m - 1 - p, and 1 more with p > 0). For 12 of 30 layers this is about 4,000 and 460, or 133 and 15 forward
    passes of the dense model. Every candidate also solves a D x D system. Memory beyond the model: L + 1
    hidden states for every token of the measured samples, and twice as many for the other samples.

    The scores are ranks, see `sleb.greedy_scores`.

    Raises:
        DataError: If there are no samples or none has a learned token.
        ModelError: If layers cannot be run one by one, or cuts cannot be repaired (mixtures of experts).
        NonFiniteError: If a loss or a hidden state is NaN or infinite.

    Source: greedy removal as in SLEB (Song et al., 2024); the map is ReplaceMe's (Shopkhoev et al., 2025).
    """
    options: TaskLossOptions = context.options or TaskLossOptions()
    pruned = _Pruned(LayeredModel(context.model()), context, options)
    num_layers = context.num_layers
    free = [layer for layer in range(num_layers) if layer not in context.protected]
    wanted = max(1, context.num_prune)
    rounds = min(wanted, len(free), num_layers - MIN_KEPT)
    tries = [len(free) - done for done in range(rounds)]
    if options.shortlist is not None:
        tries = [min(count, options.shortlist) if done else count for done, count in enumerate(tries)]
    return greedy_scores(
        "task_loss",
        context,
        free,
        tries,
        lambda gone: pruned.loss_without(gone[-1]) if gone else pruned.loss,
        evidence={"model": fingerprint(pruned.view.model), "repair": options.repair, **pruned.counts},
        can_go=partial(_can_go, context, wanted),
        remove=pruned.remove,
    )


def _can_go(context: MethodContext, count: int, gone: Sequence[int]) -> bool:
    """Whether these layers can be among `count` pruned layers such that all others fit at their positions."""
    if context.fits is None:
        return True
    values = tuple(-1.0 if layer in gone else 0.0 for layer in range(context.num_layers))
    try:
        plan = context.plan_by(LayerScores("task_loss", values), num_prune=count)
    except PlanError:
        return False
    return set(gone) <= set(plan.pruned)


class _Pruned:
    """The model as pruned so far: its kept layers, the maps at its cuts, and the states between its layers.

    The model itself is never changed. Of the lists of states, entry i is the input of the i-th kept layer,
    and the last entry is the output of the last kept layer.

    Attributes:
        kept: Kept layers, ascending.
        updates: Kept layer -> the map U added to its output, (D, D), or (D,) if a norm ends the layer.
        loss: Loss of the dense model.
        counts: Samples and tokens, for the evidence.
    """

    def __init__(self, view: LayeredModel, context: MethodContext, options: TaskLossOptions) -> None:
        self.view, self.ridge, self.repairs = view, options.ridge, options.repair != "none"
        self.kept = list(range(view.num_layers))
        self.updates: dict[int, Tensor] = {}
        self._targets: dict[int, RefitTarget] = {}
        number, others = options.num_samples, options.repair_samples if self.repairs else 0
        samples = drawn(context.samples, number + others, context.seed)
        measured, fitted = samples[:number], samples[number:]
        if self.repairs and len(fitted) < 2:
            fitted = measured
        self._measured = self._walk(context, measured)
        self._states = self._all_states(self._measured)
        self.loss = self._loss(self._states[-1], "with all layers")
        self.counts = {"samples": len(measured)}
        if self.repairs:
            self._fitted = self._walk(context, fitted)
            self._dense = self._all_states(self._fitted)
            self._fitted_states = list(self._dense)
            tokens = sum(int(counted.sum()) for counted in self._fitted.counted)
            self.counts |= {"repair_samples": len(fitted), "repair_tokens": tokens}

    def loss_without(self, layer: int) -> float:
        """Returns the loss without one more layer, its cut repaired."""
        place = self.kept.index(layer)
        states, _, _ = self._after_cut(place)
        for later in self.kept[place + 1 :]:
            states = self._run(self._measured, later, states)
        gone = sorted(set(range(self.view.num_layers)) - set(self.kept) | {layer})
        return self._loss(states, f"without layers {gone}")

    def remove(self, layer: int) -> None:
        """Removes a layer, repairs its cut, and repairs the later cuts again."""
        place = self.kept.index(layer)
        states, fitted_states, update = self._after_cut(place)
        self.updates.pop(layer, None)
        if update is not None:
            self.updates[self.kept[place - 1]] = update
        del self.kept[place], self._states[place]
        self._states[place] = states
        if self.repairs:
            del self._fitted_states[place]
            self._fitted_states[place] = fitted_states
        for here in range(place, len(self.kept)):
            layer = self.kept[here]
            if layer in self.updates:
                repaired = self._repaired(here, self._states[here], self._fitted_states[here], here + 1)
                self._states[here + 1], self._fitted_states[here + 1], self.updates[layer] = repaired
                continue
            self._states[here + 1] = self._measured.layer(layer, self._states[here])
            if self.repairs:
                self._fitted_states[here + 1] = self._fitted.layer(layer, self._fitted_states[here])

    def _after_cut(self, place: int) -> tuple[States, States, Tensor | None]:
        """Returns the states after a cut, of measured and fitted samples, and the map that repairs it."""
        if not self.repairs:
            return self._states[place], [], None
        if place == 0:
            return self._states[0], self._fitted_states[0], None
        return self._repaired(place - 1, self._states[place - 1], self._fitted_states[place - 1], place + 1)

    def _repaired(
        self, place: int, states: States, fitted_states: States, after: int
    ) -> tuple[States, States, Tensor]:
        """Refits a kept layer to output what the layer at `after` gets in the dense model.

        Returns its outputs for measured and fitted samples, and the map.
        """
        layer = self.kept[place]
        target = self._dense[self.kept[after] if after < len(self.kept) else self.view.num_layers]
        layer_out, linear_out = self._with_output(self._fitted, layer, fitted_states)
        refitted = self._target_of(layer)
        size = target[0].shape[-1]
        on_cpu = target[0].device.type == "mps"  # no double precision there
        device = torch.device("cpu") if on_cpu else target[0].device
        by_channel = refitted.offset is not None
        sums: AnySums = ChannelSums.empty(size, device) if by_channel else Sums.empty(size, size, device)
        for counted, h, y, x in zip(self._fitted.counted, target, layer_out, linear_out, strict=True):
            h_TD, y_TD, x_TD = (part[counted].to(device, torch.float64) for part in (h, y, x))
            weight_T = 1 / h_TD.square().sum(dim=1).clamp_min(1e-12)
            sums.add(x_TD, (h_TD - y_TD) / refitted.factor, weight_T)
        if not sums.is_finite:
            raise NonFiniteError(
                f"Hidden states of the training samples are NaN or infinite after layer {layer}.",
                hint="The model's number format is too narrow: try float32.",
            )
        update = sums.solve(self.ridge)
        ours = self._with_output(self._measured, layer, states)
        return self._added(layer, update, *ours), self._added(layer, update, layer_out, linear_out), update

    def _run(self, walk: Walk, layer: int, states: States) -> States:
        """Returns the output states of a kept layer, its map included."""
        if layer not in self.updates:
            return walk.layer(layer, states)
        return self._added(layer, self.updates[layer], *self._with_output(walk, layer, states))

    def _added(self, layer: int, update: Tensor, layer_out: States, linear_out: States) -> States:
        scaled = (update * self._target_of(layer).factor).to(layer_out[0])
        if scaled.ndim == 1:
            return [y + x * scaled for y, x in zip(layer_out, linear_out, strict=True)]
        return [y + x @ scaled.T for y, x in zip(layer_out, linear_out, strict=True)]

    def _with_output(self, walk: Walk, layer: int, states: States) -> tuple[States, States]:
        """Returns the outputs of a layer, and of its last linear (or the norm after it) without the bias."""
        module: Any = self._target_of(layer).module
        linear_out: States = []

        def keep(_: Any, __: Any, output: Tensor) -> None:
            bias = getattr(module, "bias", None)
            linear_out.append(output if bias is None else output - bias)

        with module.register_forward_hook(keep):
            layer_out = walk.layer(layer, states)
        return layer_out, [x.view_as(y) for x, y in zip(linear_out, layer_out, strict=True)]

    def _target_of(self, layer: int) -> RefitTarget:
        if layer not in self._targets:
            state = self._states[self.kept.index(layer)][0]
            try:
                self._targets[layer] = target_of(self.view, self._measured, layer, state)
            except ModelError as error:
                raise ModelError(error.message, "Set methods.task_loss.repair to none.") from error
        return self._targets[layer]

    def _walk(self, context: MethodContext, samples: Sequence[Any]) -> Walk:
        device = next(self.view.model.parameters()).device
        return Walk(self.view, list(sample_batches(samples, context.collator, device, BATCH_SIZE)))

    def _all_states(self, walk: Walk) -> list[States]:
        found = [walk.start]
        for layer in range(self.view.num_layers):
            found.append(walk.layer(layer, found[-1]))
        return found

    def _loss(self, states: States, which: str) -> float:
        """Returns the loss of final states: runs the model's norm and head; its layers pass states on."""
        current: States = []

        def pass_on(*args: Any, **kwargs: Any) -> Any:
            return (current[0],) if self._measured.tuples else current[0]

        def batches() -> Iterator[dict[str, Tensor]]:
            for batch, state in zip(self._measured.batches, states, strict=True):
                current[:] = [state]
                yield batch

        modules = list(self.view.layers)
        with forwards_set(modules, [pass_on] * len(modules)):
            return mean_nll(self.view.model, batches(), which)


METHODS.register("task_loss")(
    Method(
        "task loss: removes layers one by one, always the one that costs least once its cut is repaired",
        score,
        options=TaskLossOptions,
        label="Task loss",
    )
)
