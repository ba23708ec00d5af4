"""Chooses the layers to prune: the least important ones, among the choices the model's shape allows.

Source: GradPruner, Algorithm 1 step 4, section 3.2, C.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from gradpruner.common.errors import PlanError
from gradpruner.common.options import changed
from gradpruner.common.printing import runs_of
from gradpruner.gradients.scores import LayerScores, default_num_prune
from gradpruner.plans.layer_plan import MIN_KEPT, LayerAction, PruningPlan, checked_layers
from gradpruner.plans.options import PlanOptions

# fits(old, new, kept): whether layer `old` may become layer `new` of a model with `kept` layers.
Placeable = Callable[[int, int, int], bool]


def plan_pruning(
    scores: LayerScores,
    options: PlanOptions | None = None,
    *,
    layer_parameters: Sequence[int] | None = None,
    total_parameters: int | None = None,
    fits: Placeable | None = None,
    kinds: Sequence[Hashable] | None = None,
    **changes: Any,
) -> PruningPlan:
    """Chooses the least important layers to prune, and which of them to merge instead of drop.

    Args:
        scores: One score per layer.
        options: A `plans.options.PlanOptions`: the budget, in at most one unit (num_prune, layer_fraction,
            parameter_fraction or layers), the layers that stay (protect_first, protect_last, protect), how
            the others are chosen (contiguous) and merged (num_merge, target, rule, density). None prunes 40 %
            of the layers and merges three of them. Of a fraction, the closest number of layers is taken.
        layer_parameters: Number of parameters of every layer; for `parameter_fraction`.
        total_parameters: Number of parameters of the model; for `parameter_fraction`.
        fits: `fits(old, new, kept)` says whether layer `old` may become layer `new` of a model with `kept`
            layers (`engines.slots`). Of the choices that fit, the one with the lowest total score is taken.
        kinds: One value per layer. A layer is merged only into a layer with the same value, for models that
            mix layers of several shapes. None if all layers have the same shape.
        **changes: Single options, for example num_prune=13.

    Returns:
        The plan. No weight is changed.

    Raises:
        ConfigError: If an option is unknown or not allowed, or two budgets are given.
        PlanError: If the budget cannot be met, a merged layer has no kept layer to go into, or no choice
            leaves layers that fit.

    Source: GradPruner, Algorithm 1 step 4, section 3.2, C.2.
    """
    options = changed(PlanOptions, options, changes)
    total = scores.num_layers
    free = _free_layers(total, options)
    if options.layers is not None:
        pruned = _listed(options.layers, free, total, fits)
    else:
        count = _budget(total, options, layer_parameters, total_parameters)
        pruned = _choose(scores, free, count, options.contiguous, fits)
    actions = [LayerAction("keep")] * total
    for layer in pruned:
        actions[layer] = LayerAction("drop")
    by_score = [layer for layer in scores.ascending() if layer in set(pruned)]
    for layer in by_score[max(0, len(by_score) - options.num_merge) :]:
        same_kind = [i for i in range(total) if kinds is None or kinds[i] == kinds[layer]]
        kept = [i for i in same_kind if i not in set(pruned)]
        actions[layer] = LayerAction("merge", _target_of(layer, kept, options.target))
    return PruningPlan(tuple(actions), options.rule, options.density, scores.method, dict(scores.evidence))


def _free_layers(total: int, options: PlanOptions) -> list[int]:
    first, last = options.protect_first, options.protect_last
    if first + last > total:
        raise PlanError(
            f"protect_first is {first} and protect_last is {last} in a model of {total} layers; "
            f"together they can be at most {total}."
        )
    protected = set(checked_layers(options.protect, total, "protect"))
    return [layer for layer in range(first, total - last) if layer not in protected]


def _listed(layers: Sequence[int], free: list[int], total: int, fits: Placeable | None) -> list[int]:
    """Returns the layers listed by the user, after checking that all of them can be pruned."""
    pruned = checked_layers(layers, total, "layers")
    _check_count(len(pruned), total)
    clash = sorted(set(pruned) - set(free))
    if clash:
        raise PlanError(f"Layers {', '.join(map(str, clash))} are both listed for pruning and protected.")
    wrong = list(_misfits(pruned, total, fits))
    if wrong:
        raise PlanError(
            f"Without layers {runs_of(pruned)}, layers {runs_of(wrong)} do not fit at their new positions.",
            hint="Give a number of layers instead of a list, so that layers that fit are chosen; or plan "
            "without the restriction (portable_to).",
        )
    return pruned


def _misfits(pruned: Sequence[int], total: int, fits: Placeable | None) -> Iterator[int]:
    """Yields the kept layers that do not fit at their new position."""
    gone = set(pruned)
    keep = [layer for layer in range(total) if layer not in gone]
    return (old for new, old in enumerate(keep) if fits is not None and not fits(old, new, len(keep)))


def _budget(
    total: int, options: PlanOptions, layer_parameters: Sequence[int] | None, total_parameters: int | None
) -> int:
    """Returns the number of layers to prune, converted from the unit in which the budget was given."""
    if options.parameter_fraction is not None:
        if layer_parameters is None or total_parameters is None:
            raise PlanError("parameter_fraction needs layer_parameters and total_parameters.")
        if len(layer_parameters) != total:
            raise PlanError(
                f"layer_parameters has {len(layer_parameters)} numbers; there are scores of {total} layers."
            )
        per_layer = sum(layer_parameters) / total
        count = math.floor(options.parameter_fraction * total_parameters / per_layer + 0.5)
    elif options.layer_fraction is not None:
        count = default_num_prune(total, options.layer_fraction)
    else:
        count = options.num_prune if options.num_prune is not None else default_num_prune(total)
    _check_count(count, total)
    return count


def _check_count(count: int, total: int) -> None:
    if not 0 <= count <= total - MIN_KEPT:
        raise PlanError(
            f"Pruning {count} of {total} layers is not possible; 0 to {max(0, total - MIN_KEPT)} are, since "
            f"at least {MIN_KEPT} layers must stay."
        )


def _choose(
    scores: LayerScores, free: list[int], count: int, contiguous: bool, fits: Placeable | None
) -> list[int]:
    if count > len(free):
        raise PlanError(
            f"{count} layers are to be pruned but only {len(free)} of {scores.num_layers} are not protected.",
            hint="Protect fewer layers or prune fewer.",
        )
    if contiguous:
        pruned = _best_block(scores, free, count, fits)
    elif fits is not None:
        pruned = _best_fit(scores, free, count, fits)
    else:
        allowed = set(free)
        return sorted([layer for layer in scores.ascending() if layer in allowed][:count])
    if pruned is not None:
        return pruned
    raise _no_fit(scores, free, count, contiguous, fits)


def _best_block(scores: LayerScores, free: list[int], count: int, fits: Placeable | None) -> list[int] | None:
    """Returns the block of adjacent layers with the lowest total score whose removal fits, or None."""
    allowed = set(free)
    starts = range(free[0], free[-1] - count + 2) if free else range(1)
    totals = {
        start: math.fsum(scores.values[start : start + count])
        for start in starts
        if allowed.issuperset(range(start, start + count))
        and next(_misfits(range(start, start + count), scores.num_layers, fits), None) is None
    }
    if not totals:
        return None
    best = min(totals, key=lambda start: (totals[start], -start))
    return list(range(best, best + count))


def _best_fit(scores: LayerScores, free: list[int], count: int, fits: Placeable) -> list[int] | None:
    """Returns the layers with the lowest total score whose removal fits, or None.

    Dynamic programming: goes through the layers once and stores, for every number of layers kept so far, the
    best way to keep that many. The best way has the highest total of kept scores and, on a tie, the lowest
    layer numbers. If everything fits, the result is therefore the choice by rank. Totals are exact integers,
    because rounding could break ties.
    """
    total, kept = scores.num_layers, scores.num_layers - count
    values, allowed = _exact(scores.values), set(free)
    best: dict[int, tuple[int, int]] = {0: (0, 0)}
    # For every layer: the numbers of layers kept before it with which it is kept itself.
    keeps: list[set[int]] = []
    for layer in range(total):
        ahead: dict[int, tuple[int, int]] = {}
        if layer in allowed:
            ahead = {n: value for n, value in best.items() if n + total - layer > kept}
        chosen = set()
        for n, (score, order) in best.items():
            if n < kept and fits(layer, n, kept):
                candidate = (score + values[layer], order - layer)
                if n + 1 not in ahead or candidate > ahead[n + 1]:
                    ahead[n + 1] = candidate
                    chosen.add(n)
        best = ahead
        keeps.append(chosen)
    if kept not in best:
        return None
    pruned, n = [], kept
    for layer in reversed(range(total)):
        if n - 1 in keeps[layer]:
            n -= 1
        else:
            pruned.append(layer)
    return pruned[::-1]


def _exact(values: Sequence[float]) -> list[int]:
    """Returns the scores as integers, all multiplied by the same power of two."""
    ratios = [value.as_integer_ratio() for value in values]
    common = max(denominator for _, denominator in ratios)
    return [numerator * (common // denominator) for numerator, denominator in ratios]


def _no_fit(
    scores: LayerScores, free: list[int], count: int, contiguous: bool, fits: Placeable | None
) -> PlanError:
    """Returns an error that names the nearest numbers of layers that could be pruned instead."""
    flat = LayerScores("any", (0.0,) * scores.num_layers)
    search = _best_block if contiguous else _best_fit
    most = min(len(free), scores.num_layers - MIN_KEPT)
    near = []
    for others in (range(count - 1, 0, -1), range(count + 1, most + 1)):
        found = (n for n in others if fits is not None and search(flat, free, n, fits) is not None)
        near += [n for n in [next(found, None)] if n is not None]
    block = "adjacent layers" if contiguous else "layers"
    return PlanError(
        f"There is no way to prune {count} {block} of {scores.num_layers} so that all others fit at their "
        "new positions.",
        hint=(f"Prune {' or '.join(map(str, near))} layers." if near else "No other number of layers helps.")
        + " You can also protect fewer layers, or plan without the restriction (portable_to).",
    )


def _target_of(layer: int, kept: Sequence[int], target: str) -> int:
    """Returns the kept layer that a layer is merged into."""
    before = [i for i in kept if i < layer]
    after = [i for i in kept if i > layer]
    if target == "preceding" or not before + after:
        if not before:
            raise PlanError(
                f"Layer {layer} is to be merged, but no kept layer of the same kind precedes it.",
                hint="Use target: nearest, protect_first: 1, or a smaller num_merge.",
            )
        return before[-1]
    near = before[-1:] + after[:1]
    return min(near, key=lambda i: (abs(i - layer), i))
