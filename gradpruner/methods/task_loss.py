"""Task loss: one after another, the layer goes whose absence, with its cut repaired, costs the task least.

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
from gradpruner.methods.calibration import mean_nll
from gradpruner.methods.sleb import greedy_scores
from gradpruner.models.layers import LayeredModel, fingerprint
from gradpruner.models.walking import BATCH_SIZE, Output, Walk, drawn, output_of, sample_batches
from gradpruner.plans.layer_plan import MIN_KEPT
from gradpruner.pruning.ridge import AnySums, ChannelSums, Sums

States = list[Tensor]
"""Hidden states of all samples, batch by batch, each (samples, tokens, D)."""


class TaskLossOptions(MethodOptions):
    """What can be set about the choice by the task's loss."""

    num_samples: int = Field(default=64, ge=1)
    """Training samples the loss is measured on; the work is proportional to it."""
    repair: Literal["none", "linear"] = "linear"
    """How a cut is repaired before its loss is measured: not at all, or by a linear map fitted to it."""
    repair_samples: int = Field(default=128, ge=2)
    """Further training samples, whose loss is not measured, that the maps are fitted on."""
    ridge: float = Field(default=0.1, gt=0)
    """Pull of a map towards changing nothing, in units of the mean diagonal of its normal equations."""
    shortlist: int | None = Field(default=None, ge=1)
    """From the second round on try only so many layers, those that cost least when last tried; null: all."""


@torch.no_grad()
def score(context: MethodContext) -> LayerScores:
    """Order of a greedy removal by the loss of the pruned and repaired model.

    The loss is the mean negative log-likelihood, in nats, of the learned tokens (labels other than -100) of
    `num_samples` training samples drawn with the seed. In every round each remaining layer, except protected
    ones, is left out in turn, and the one without which the loss is lowest goes; of equal ones the later.
    There are n rounds, n the number of layers to prune (at least 1; 40 % of the depth when it is unknown).
    With `fits`, layers are tried only if the rest of the n can be chosen so that all kept ones fit.

    `repair: linear` fits, for every cut that is tried, the map that fit_repair(kind="linear") would build
    into the last linear W of the kept layer before the cut. With x the output of that linear, y the output
    of the layer, h what the dense model gives to the layer behind the cut, and w = 1 / |h|^2:

        y + U x,   U = argmin sum w |h - y - U x|^2 + rho |U|^2,   rho = ridge * mean diagonal of sum w x x^T

    over the tokens of `repair_samples` samples other than those the loss is measured on (the same ones where
    there are fewer than two others). Where a norm follows the last linear, x is the output of the norm, and U
    one factor per channel. Later cuts keep their maps while a layer is tried, and get new ones, from input to
    output, when it has gone. In front of a cut at the very input there is no layer to repair.

    Removed layers do not run, and states at the input of every kept layer are held, so that trying a layer
    costs the layers behind it. With L layers, none protected, m = L, L - 1, ... L - n + 1 layers in a round
    and p (from 0) the place among them of the layer that goes, the layers applied to all measured samples are

        none    L + sum over rounds m (m - 1) / 2 + sum over rounds but the last (m - 1 - p)
        linear  the same + sum over rounds (m - 1) + (rounds but the last with p > 0)

    and to all samples that maps are fitted on, L + sum over rounds (m - 1) + sum over rounds but the last
    (m - 1 - p, and 1 more with p > 0). For 12 of 30 layers about 4,000 and 460: 133 and 15 forward passes of
    the dense model. Every candidate takes the solution of a D x D system. Memory beyond the model: L + 1
    hidden states of every token of the measured samples, twice as many of the others.

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
    """Whether these layers can be among `count` that go so that all others fit at their new places."""
    if context.fits is None:
        return True
    values = tuple(-1.0 if layer in gone else 0.0 for layer in range(context.num_layers))
    try:
        plan = context.plan_by(LayerScores("task_loss", values), num_prune=count)
    except PlanError:
        return False
    return set(gone) <= set(plan.pruned)


class _Pruned:
    """The model as pruned so far: its layers, the maps before its cuts, and states at each of its layers.

    The model itself is never changed. `states[i]` are what enters the i-th kept layer; the last entry is what
    leaves the last one.

    Attributes:
        kept: Layers still there, ascending.
        updates: Kept layer -> the map U, (D, D), added after it; (D,) where a norm ends the layer.
        loss: Of the dense model.
        counts: Samples and tokens, for the evidence.
    """

    def __init__(self, view: LayeredModel, context: MethodContext, options: TaskLossOptions) -> None:
        self.view, self.ridge, self.repairs = view, options.ridge, options.repair != "none"
        self.kept = list(range(view.num_layers))
        self.updates: dict[int, Tensor] = {}
        self._outputs: dict[int, Output] = {}
        number, others = options.num_samples, options.repair_samples if self.repairs else 0
        samples = drawn(context.samples, number + others, context.seed)
        measured, fitted = samples[:number], samples[number:]
        if self.repairs and len(fitted) < 2:
            fitted = measured
        self._measured = self._walk(context, measured)
        self._states = self._all_states(self._measured)
        self.loss = self._loss(self._states[-1], "as it was given")
        self.counts = {"samples": len(measured)}
        if self.repairs:
            self._fitted = self._walk(context, fitted)
            self._dense = self._all_states(self._fitted)
            self._fitted_states = list(self._dense)
            tokens = sum(int(counted.sum()) for counted in self._fitted.counted)
            self.counts |= {"repair_samples": len(fitted), "repair_tokens": tokens}

    def loss_without(self, layer: int) -> float:
        """The loss when one more layer goes and its cut is repaired."""
        place = self.kept.index(layer)
        states, _, _ = self._behind(place)
        for later in self.kept[place + 1 :]:
            states = self._run(self._measured, later, states)
        gone = sorted(set(range(self.view.num_layers)) - set(self.kept) | {layer})
        return self._loss(states, f"without layers {gone}")

    def remove(self, layer: int) -> None:
        """Removes a layer; repairs its cut and, anew, the later ones."""
        place = self.kept.index(layer)
        states, fitted_states, update = self._behind(place)
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
                behind = self._repaired(here, self._states[here], self._fitted_states[here], here + 1)
                self._states[here + 1], self._fitted_states[here + 1], self.updates[layer] = behind
                continue
            self._states[here + 1] = self._measured.layer(layer, self._states[here])
            if self.repairs:
                self._fitted_states[here + 1] = self._fitted.layer(layer, self._fitted_states[here])

    def _behind(self, place: int) -> tuple[States, States, Tensor | None]:
        """States of both kinds of samples behind a cut, and the map that repairs it."""
        if not self.repairs:
            return self._states[place], [], None
        if place == 0:
            return self._states[0], self._fitted_states[0], None
        return self._repaired(place - 1, self._states[place - 1], self._fitted_states[place - 1], place + 1)

    def _repaired(
        self, place: int, states: States, fitted_states: States, behind: int
    ) -> tuple[States, States, Tensor]:
        """States behind a kept layer refitted to give what the dense model gives to another kept layer."""
        layer = self.kept[place]
        target = self._dense[self.kept[behind] if behind < len(self.kept) else self.view.num_layers]
        layer_out, linear_out = self._with_output(self._fitted, layer, fitted_states)
        output = self._output_of(layer)
        size = target[0].shape[-1]
        on_cpu = target[0].device.type == "mps"  # no double precision there
        device = torch.device("cpu") if on_cpu else target[0].device
        by_channel = output.offset is not None
        sums: AnySums = ChannelSums.empty(size, device) if by_channel else Sums.empty(size, size, device)
        for counted, h, y, x in zip(self._fitted.counted, target, layer_out, linear_out, strict=True):
            h_TD, y_TD, x_TD = (part[counted].to(device, torch.float64) for part in (h, y, x))
            weight_T = 1 / h_TD.square().sum(dim=1).clamp_min(1e-12)
            sums.add(x_TD, (h_TD - y_TD) / output.factor, weight_T)
        if not sums.is_finite:
            raise NonFiniteError(
                f"Hidden states of the training samples are NaN or infinite behind layer {layer}.",
                hint="The model's number format is too narrow: try float32.",
            )
        update = sums.solve(self.ridge)
        ours = self._with_output(self._measured, layer, states)
        return self._added(layer, update, *ours), self._added(layer, update, layer_out, linear_out), update

    def _run(self, walk: Walk, layer: int, states: States) -> States:
        """States behind a kept layer, its map included."""
        if layer not in self.updates:
            return walk.layer(layer, states)
        return self._added(layer, self.updates[layer], *self._with_output(walk, layer, states))

    def _added(self, layer: int, update: Tensor, layer_out: States, linear_out: States) -> States:
        scaled = (update * self._output_of(layer).factor).to(layer_out[0])
        if scaled.ndim == 1:
            return [y + x * scaled for y, x in zip(layer_out, linear_out, strict=True)]
        return [y + x @ scaled.T for y, x in zip(layer_out, linear_out, strict=True)]

    def _with_output(self, walk: Walk, layer: int, states: States) -> tuple[States, States]:
        """Outputs of a layer, and of its last linear (or the norm behind it) without the bias."""
        module: Any = self._output_of(layer).module
        linear_out: States = []

        def keep(_: Any, __: Any, output: Tensor) -> None:
            bias = getattr(module, "bias", None)
            linear_out.append(output if bias is None else output - bias)

        with module.register_forward_hook(keep):
            layer_out = walk.layer(layer, states)
        return layer_out, [x.view_as(y) for x, y in zip(linear_out, layer_out, strict=True)]

    def _output_of(self, layer: int) -> Output:
        if layer not in self._outputs:
            state = self._states[self.kept.index(layer)][0]
            try:
                self._outputs[layer] = output_of(self.view, self._measured, layer, state)
            except ModelError as error:
                raise ModelError(error.message, "Use methods.task_loss.repair: none.") from error
        return self._outputs[layer]

    def _walk(self, context: MethodContext, samples: Sequence[Any]) -> Walk:
        device = next(self.view.model.parameters()).device
        return Walk(self.view, list(sample_batches(samples, context.collator, device, BATCH_SIZE)))

    def _all_states(self, walk: Walk) -> list[States]:
        found = [walk.start]
        for layer in range(self.view.num_layers):
            found.append(walk.layer(layer, found[-1]))
        return found

    def _loss(self, states: States, which: str) -> float:
        """The loss of the final states, by the model's own norm and head: its layers only pass them on."""
        current: States = []

        def pass_on(*args: Any, **kwargs: Any) -> Any:
            return (current[0],) if self._measured.tuples else current[0]

        def batches() -> Iterator[dict[str, Tensor]]:
            for batch, state in zip(self._measured.batches, states, strict=True):
                current[:] = [state]
                yield batch

        modules = list(self.view.layers)
        for module in modules:
            module.forward = pass_on
        try:
            return mean_nll(self.view.model, batches(), which)
        finally:
            for module in modules:
                del module.__dict__["forward"]


METHODS.register("task_loss")(
    Method(
        "task loss: the layer whose absence, once repaired, costs the task least goes, again and again",
        score,
        options=TaskLossOptions,
        label="Task loss",
    )
)
