"""Fits a repair: refits linears by least squares on the hidden states of the task's own samples.

The dense and the pruned model run side by side, layer by layer (`walking.Walk`). At a cut, the dense model
also runs the removed layers, and the kept layer before them is refitted so that the pruned model's hidden
states come close to the dense ones; `layer_wise` refits every kept layer behind the first cut. Each layer is
fitted on the hidden states that the pruned model, with its earlier repairs, feeds it. Labels only say which
tokens are answers: states on which these depend much count more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from gradpruner.common.errors import ConfigError, DataError, NonFiniteError, PlanError
from gradpruner.common.options import changed
from gradpruner.common.printing import runs_of
from gradpruner.common.world import World
from gradpruner.data.encoding import Collator, check_encoded
from gradpruner.gradients.trace import QUANTISED, GradientTrace
from gradpruner.models.kernels import with_fast_products
from gradpruner.models.layers import LayeredModel, fingerprint, refuse_adapters
from gradpruner.models.restoring import modes_kept
from gradpruner.models.walking import BATCH_SIZE, drawn, sample_batches
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.options import RepairKind, RepairOptions
from gradpruner.plans.repair import Repair, RepairedCut, places_of, unrepaired
from gradpruner.pruning.in_memory import check_merging, merge_planned, shapes_of
from gradpruner.pruning.repair.ridge import AnySums, ChannelSums, Sums, choose_update
from gradpruner.pruning.repair.target import RefitTarget, target_of, weight_set
from gradpruner.pruning.repair.tokens import Tokens

MAX_REGRESSORS = 16_384
"""Largest least-squares system: four matrices of 2 GiB in float64. Above it, the linear form is fitted."""
FEWEST_ROWS = 512
TOKENS_AT_ONCE = 2048
"""Tokens converted to float64 at a time."""


@torch.inference_mode(False)  # the influences need gradients
@torch.no_grad()
@with_fast_products
def fit_repair(
    model: nn.Module,
    plan: PruningPlan,
    samples: Sequence[dict[str, list[int]]],
    collator: Callable[[Any], dict[str, Tensor]] | None = None,
    options: RepairOptions | None = None,
    *,
    trace: GradientTrace | None = None,
    progress: Callable[[int], None] | None = None,
    world: World | None = None,
    **changes: Any,
) -> Repair:
    """Refits linears of kept layers so that removing the other layers changes the hidden states least.

    For a run of removed layers behind a kept layer, let A be the input of that layer's last linear W in the
    pruned model, y the layer's output, h the dense model's hidden states after the run, f the factor by which
    the layer multiplies what it adds (1 except for Granite), and w = c / |h|^2, so that tokens with massive
    activations do not dominate; c is larger the more the answer depends on h (see `tokens.influences`):

        least_squares   W' = W + argmin_U sum w |h - y - f U A|^2 + rho |U|^2
        linear          W' = (I + U) W, with U from the regression on W A instead of A (ReplaceMe's map)
        layer_wise      least_squares in every kept layer behind the first cut (h is taken after the layer
                        itself if no run follows), so that later layers reduce the error that is left

    If a norm follows the last linear (Gemma 2 and 3, OLMo 2), each kind instead fits one factor per channel
    of the norm's output n, and multiplies it into the norm's weight: n_c becomes (1 + u_c) n_c.

    The ridge rho is chosen on held-out samples; then all samples are fitted. If no ridge lowers the error
    there, the linear stays as it is, so the error on held-out tokens never rises. Padding and the first token
    of each sample do not count. Biases stay as they are.

    Cost: one run of the dense and of the pruned model up to the last refitted layer, and for each refitted
    layer two more runs, tokens x P^2 multiplications and six solves of a P x P system. P is the linear's
    in_features (least_squares; above `MAX_REGRESSORS` the linear form is fitted) or the hidden size (linear).
    For the influences, two more runs of the dense model and a backward pass to the first refitted layer.
    Memory beyond the model: the hidden states of all tokens twice, the linears of one layer, and in float64
    four P x P and four hidden x P matrices and the linear three times: about 9 GiB for Llama-3.1-8B
    (P 14336), 2.3 GiB in the linear form. Before that, a batch's hidden states after every layer.

    Args:
        model: The dense causal LM, without adapters; not changed.
        plan: Which layers are removed. Merged layers are merged first; that needs the trace if the rule does.
        samples: Encoded samples (`input_ids`, `labels`), at least two, as `encode_all` returns them. Labels
            only say which tokens belong to answers.
        collator: Makes batches of them, padded on the right; None pads with token 0.
        options: A `plans.options.RepairOptions`: what is refitted (kind), on how many rows (rows, seed), how
            much of the weight goes by influence on answers (answers), and the ridges to try (ridges). None:
            least_squares on as many rows as `enough_rows` returns, four fifths of the weight by influence.
        trace: The recorded gradients, if the plan merges by them.
        progress: Called with the number of layers done since the last call; for the influences, if there are
            any, all layers of the model count once before.
        world: Processes that share the batches. Each must call this function, and each gets the repair. The
            first one adds up the sums and solves.
        changes: Single options to change: `rows=384` sets `RepairOptions.rows`.

    Raises:
        ConfigError: If the kind is "none", or an option is unknown or out of range.
        PlanError: If the plan is for another model, or the model is quantised or has adapters.
        ModelError: If the layers cannot be refitted: they are mixtures of experts, depend on more than the
            hidden state, or end in neither a linear nor a norm.
        DataError: If there are fewer than two samples, or they are not encoded.
        NonFiniteError: If hidden states or refitted weights are NaN or infinite.

    Source: ReplaceMe (Shopkhoev et al., 2025), linear transform; its closed form is applied to the linear
    itself and to a norm's weight.
    """
    options = changed(RepairOptions, options, changes)
    if options.kind == "none":
        raise ConfigError(
            "There is nothing to fit for repair 'none'.",
            hint=f"Allowed: {', '.join(get_args(RepairKind)[1:])}.",
        )
    world = world or World()
    started = time.perf_counter()
    view = LayeredModel(model)
    _check_model(view, plan, trace)
    check_encoded(samples)
    device = next(model.parameters()).device
    chosen = drawn(samples, options.rows or enough_rows(view, samples, options), options.seed)
    if len(chosen) < 2:
        raise DataError(
            "There is only one sample; a repair is fitted on some and checked on others.",
            hint="Give two rows or more.",
        )
    batches = list(sample_batches(chosen, collator or Collator(), device, BATCH_SIZE))
    with modes_kept(model):
        model.eval()
        first = min((layer for layer, _ in places_of(plan, options.kind)), default=view.num_layers - 1)
        counted = world.in_step(lambda: Tokens(view, batches, options.answers, world, first, progress))
        fitting = _Refitting(view, plan, counted, options, trace)
        fitting.run(progress)
    tokens = sum(world.gathered([sum(int(some.sum()) for some in counted.walk.counted)]))
    return Repair(
        kind=options.kind,
        pruned=plan.pruned,
        cuts=tuple(fitting.cuts),
        weights=fitting.weights,
        model=fingerprint(model),
        rows=len(chosen),
        tokens=tokens,
        answers=options.answers,
        seconds=time.perf_counter() - started,
        notes=tuple(dict.fromkeys(fitting.notes)),
    )


def enough_rows(view: LayeredModel, samples: Sequence[dict[str, list[int]]], options: RepairOptions) -> int:
    """Returns how many samples hold `options.tokens_per_unknown` tokens per regressor, or `FEWEST_ROWS`."""
    regressors = num_regressors(view, options.kind)
    tokens = sum(len(sample["input_ids"]) - 1 for sample in samples)  # the first token does not count
    rows = math.ceil(options.tokens_per_unknown * regressors * len(samples) / max(tokens, 1))
    return min(max(rows, FEWEST_ROWS), max(len(samples), 2))


def num_regressors(view: LayeredModel, kind: str) -> int:
    """Returns how many regressors a repair of this kind has: the widest linear's inputs, or its outputs."""
    widest = max(int(weight.shape[1]) for weight in view.weights(0).values())
    return int(view.config.hidden_size) if _form(kind, widest) == "linear" else widest


def _form(kind: str, regressors: int) -> str:
    """Returns the form in which a linear with this many inputs is refitted."""
    return "linear" if kind == "linear" or regressors > MAX_REGRESSORS else "least_squares"


def _check_model(view: LayeredModel, plan: PruningPlan, trace: GradientTrace | None) -> None:
    refuse_adapters(view.model, "a repair is fitted to the weights without them")
    identity = fingerprint(view.model)
    if identity.endswith(QUANTISED):
        raise PlanError(
            "The model is quantised; its linears cannot be refitted.",
            hint="Repair nothing (plan.repair=none), or use the unquantised model.",
        )
    plan.check_model(view.num_layers, identity)
    if plan.merged:
        check_merging(plan, trace, shapes_of(view), identity)


class _Refitting:
    """Walks dense and pruned hidden states through the layers, and fits the repair on the way."""

    def __init__(
        self,
        view: LayeredModel,
        plan: PruningPlan,
        tokens: Tokens,
        options: RepairOptions,
        trace: GradientTrace | None,
    ) -> None:
        self.view, self.plan, self.tokens, self.options, self.trace = view, plan, tokens, options, trace
        self.walk, self.world = tokens.walk, tokens.world
        self.cuts: list[RepairedCut] = []
        self.weights: dict[int, Tensor] = {}
        self.notes: list[str] = []
        if first := unrepaired(plan):
            self.notes.append(
                f"layers {runs_of(first)} are removed at the input: no layer before them can be repaired"
            )

    def run(self, progress: Callable[[int], None] | None) -> None:
        """Takes both states through all layers up to the last cut."""
        runs = dict(places_of(self.plan, self.options.kind))
        dense, self.walk.start = self.walk.start, []  # so that replaced states are freed
        pruned = dense  # the same list until the states differ
        last = max((layer + len(run) for layer, run in runs.items()), default=-1)
        layer = 0
        while layer <= last:
            run = runs.get(layer, ())
            if run or layer in self.plan.pruned or layer in self.plan.merged:
                pruned = list(pruned)
            before = pruned
            self._advance((layer, *run), dense)
            if layer in self.plan.keep and before is not dense:
                self._keep(layer, runs.get(layer), pruned, dense)
            layer += 1 + len(run)
            if progress is not None:
                progress(1 + len(run))

    def _advance(self, layers: Sequence[int], states: list[Tensor]) -> None:
        """Runs layers on states, in place; at most one batch is in memory twice."""
        for batch, state in enumerate(states):
            for layer in layers:
                state = self.walk.layer_on(layer, batch, state)
            states[batch] = state

    def _keep(
        self, layer: int, run: tuple[int, ...] | None, pruned: list[Tensor], dense: list[Tensor]
    ) -> None:
        """Takes the pruned states through a kept layer, which is refitted first if `run` is given."""
        with self._merged(layer):
            new = None if run is None else self._refitted(layer, run, pruned, dense)
            if new is None:
                self._advance((layer,), pruned)
                return
            weight = self.view.weight(layer, self.cuts[-1].linear)
            assert weight is not None
            self.weights[layer] = new
            with weight_set(weight, new):
                self._advance((layer,), pruned)

    def _refitted(
        self, layer: int, run: tuple[int, ...], pruned: list[Tensor], dense: list[Tensor]
    ) -> Tensor | None:
        """Returns the refitted weight of a layer, float32 on the CPU; None if no ridge lowers the error."""
        target = self._target(layer, pruned[0])
        form = self._form(target)
        fitted, held_out = self._sums(layer, layer + len(run), target, form, pruned, dense)

        def work() -> tuple[RepairedCut, Tensor | None]:
            before = held_out.error(None)
            ridge, after = choose_update(fitted, held_out, self.options.ridges)
            cut = RepairedCut(layer, target.name, run, ridge, before, after)
            return cut, None if ridge is None else self._solved(cut, target, form, fitted, held_out)

        cut, new = self.world.agreed(work)
        self.cuts.append(cut)
        return new

    def _target(self, layer: int, state: Tensor) -> RefitTarget:
        """Finds what to refit in a layer; its factor is estimated, so all processes use the first one's."""

        def work() -> tuple[str, float, float | None]:
            found = target_of(self.view, self.walk, layer, state)
            return found.name, found.factor, found.offset

        name, factor, offset = self.world.agreed(work)
        weight = self.view.weight(layer, name)
        assert weight is not None
        return RefitTarget(name, self.view.layers[layer].get_submodule(name), weight, factor, offset)

    def _solved(
        self, cut: RepairedCut, target: RefitTarget, form: str, fitted: AnySums, held_out: AnySums
    ) -> Tensor:
        """Returns the weight refitted on all tokens with the chosen ridge."""
        assert cut.ridge is not None
        fitted.take(held_out)
        update = fitted.solve(cut.ridge)
        old = target.weight.detach().to(update)
        if form == "scale":
            update = update * (old + (target.offset or 0.0))
        new = (old + (update @ old if form == "linear" else update)).float().cpu()
        if not bool(torch.isfinite(new.to(target.weight.dtype)).all()):
            raise NonFiniteError(
                f"Refitting '{target.name}' of layer {cut.layer} gives NaN or Inf.",
                hint="The model's number format is too narrow: try float32.",
            )
        return new

    def _form(self, target: RefitTarget) -> str:
        """Returns what to fit: "linear", "least_squares", or "scale" if a norm follows the last linear."""
        if target.offset is not None:
            self.notes.append(
                "a norm follows the last linear of each layer: its scale per channel was refitted instead"
            )
            return "scale"
        regressors = target.weight.shape[1]
        form = _form(self.options.kind, regressors)
        if form == "linear" != self.options.kind:
            self.notes.append(
                f"the linear form was fitted, because {regressors} regressors are more than {MAX_REGRESSORS}"
            )
        return form

    def _sums(
        self,
        layer: int,
        behind: int,
        target: RefitTarget,
        form: str,
        pruned: list[Tensor],
        dense: list[Tensor],
    ) -> tuple[AnySums, AnySums]:
        """Returns the sums over fitted tokens and over held-out tokens, from one run of a layer.

        The dense states are those after the layer `behind`.
        """
        weight = target.weight.detach()
        # MPS has no double precision.
        device = torch.device("cpu") if weight.device.type == "mps" else weight.device
        width = weight.shape[0]
        regressors = {"scale": 1, "linear": width}.get(form, weight.shape[-1])
        sums: list[AnySums] = [
            ChannelSums.empty(width, device) if form == "scale" else Sums.empty(regressors, width, device)
            for _ in range(2)
        ]
        wide = weight.to(device, torch.float64) if form == "linear" else None
        caught: dict[str, Tensor] = {}
        hook = target.module.register_forward_hook(
            lambda _, args, out: caught.update(x=out if form == "scale" else args[0])
        )
        try:
            for batch, state in enumerate(pruned):
                after = self.walk.layer_on(layer, batch, state)
                for part, chosen in zip(sums, self.tokens.parts(batch), strict=True):
                    for sample, token in (t.unbind(1) for t in chosen.nonzero().split(TOKENS_AT_ONCE)):
                        wanted = dense[batch][sample, token].to(device, torch.float64)
                        residual = wanted - after[sample, token].to(device, torch.float64)
                        x = caught["x"].view(*after.shape[:2], -1)[sample, token].to(device, torch.float64)
                        x = (x if wide is None else x @ wide.T) * target.factor
                        count = self.tokens.weights(behind, batch, sample, token).to(device)
                        part.add(x, residual, count / wanted.square().sum(dim=1).clamp_min(1e-12))
        finally:
            hook.remove()
        for part in sums:
            part.sum_on_first(self.world)
        self._note_tokens(sums[0].tokens + sums[1].tokens, regressors)
        return sums[0], sums[1]

    def _note_tokens(self, tokens: int, regressors: int) -> None:
        needed = self.options.tokens_per_unknown * regressors
        if tokens < needed:
            self.notes.append(
                f"only {tokens} tokens; {needed} or more make the repair "
                "reliable: give more rows, or raise plan.repair_rows"
            )

    @contextmanager
    def _merged(self, layer: int) -> Iterator[None]:
        """Within the block, a kept layer has its merged weights."""
        if layer not in self.plan.merged:
            yield
            return
        with ExitStack() as stack:
            for name, weight in self.view.weights(layer).items():
                original = partial(self._linear, name)
                new = merge_planned(self.plan, self.trace, layer, name, original)
                stack.enter_context(weight_set(weight, new))
            yield

    def _linear(self, name: str, layer: int) -> Tensor:
        return self.view.weights(layer)[name]
