"""Which layers go: the least important ones, of the choices that leave a model of the right shape.

Source: GradPruner, Algorithm 1 step 4, section 3.2, C.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence

from gradpruner.common.errors import PlanError
from gradpruner.common.registry import check_known
from gradpruner.gradients.scores import LayerScores, default_num_prune
from gradpruner.plans.defaults import DENSITY, NUM_MERGE, PROTECT_FIRST
from gradpruner.plans.layer_plan import MIN_KEPT, LayerAction, PruningPlan, checked_layers, runs_of

TARGETS = ("preceding", "nearest")
# fits(old, new, kept): whether layer `old` may become layer `new` of the `kept` that stay.
Fits = Callable[[int, int, int], bool]


def plan_pruning(
    scores: LayerScores,
    *,
    num_prune: int | None = None,
    layer_fraction: float | None = None,
    parameter_fraction: float | None = None,
    num_merge: int = NUM_MERGE,
    protect_first: int = PROTECT_FIRST,
    protect_last: int = 0,
    protect: Sequence[int] = (),
    contiguous: bool = False,
    layers: Sequence[int] | None = None,
    target: str = "preceding",
    rule: str = "sum",
    density: float = DENSITY,
    layer_parameters: Sequence[int] | None = None,
    total_parameters: int | None = None,
    fits: Fits | None = None,
    kinds: Sequence[Hashable] | None = None,
) -> PruningPlan:
    """Chooses the least important layers, and which of them are merged instead of dropped.

    Give the budget in one unit; without any, 40 % of the layers go.

    Args:
        scores: One score per layer.
        num_prune: Layers to prune, 0 <= num_prune <= layers - 2.
        layer_fraction: Fraction of the layers to prune, in [0, 1).
        parameter_fraction: Fraction of all parameters to remove, in [0, 1); needs `layer_parameters`
            and `total_parameters`; the number of layers that comes nearest is pruned.
        num_merge: How many of the pruned layers, the best-scored ones, are merged; the rest is
            dropped. At most `num_prune` are.
        protect_first: This many layers at the input are never pruned; 1 by default, as in recipes, so that
            every merged layer has one before it.
        protect_last: This many layers at the output are never pruned.
        protect: Further layers that are never pruned.
        contiguous: Prune one block of neighbouring layers, that with the lowest total score (of equal ones
            the later block).
        layers: Prune exactly these (instead of a budget).
        target: "preceding" merges into the nearest kept layer before (the paper); "nearest" into the
            nearest kept layer on either side, the earlier one on a tie.
        rule: Combine rule, see `merging.MERGE_RULES`.
        density: Fraction of a merged layer's entries that survive, in (0, 1].
        layer_parameters: Parameters of every layer.
        total_parameters: Parameters of the model.
        fits: `fits(old, new, kept)` says whether layer `old` may become layer `new` of `kept`
            (`engines.slots`); of the choices that fit, that with the lowest total score is taken.
        kinds: What makes two layers alike, one value per layer: a layer is merged only into one of its kind
            (of models that mix layers of several shapes). None: all are alike.

    Returns:
        The plan; no weight is touched.

    Raises:
        PlanError: If the budget cannot be met, options contradict each other, a merged layer has
            no kept layer before it, or the kept layers cannot fit.

    Source: GradPruner, Algorithm 1 step 4, section 3.2, C.2.
    """
    total = scores.num_layers
    check_known("target", target, TARGETS, PlanError)
    if num_merge < 0:
        raise PlanError(f"num_merge is {num_merge}; 0 or more is needed.")
    free = _free_layers(total, protect_first, protect_last, protect)
    if layers is not None:
        if any(b is not None for b in (num_prune, layer_fraction, parameter_fraction)):
            raise PlanError("Give either the layers to prune or a budget, not both.")
        pruned = _listed(layers, free, total, fits)
    else:
        count = _budget(
            total, num_prune, layer_fraction, parameter_fraction, layer_parameters, total_parameters
        )
        pruned = _choose(scores, free, count, contiguous, fits)
    actions = [LayerAction("keep")] * total
    for layer in pruned:
        actions[layer] = LayerAction("drop")
    by_score = [layer for layer in scores.ascending() if layer in set(pruned)]
    for layer in by_score[max(0, len(by_score) - num_merge) :]:
        alike = [i for i in range(total) if kinds is None or kinds[i] == kinds[layer]]
        retained = [i for i in alike if i not in set(pruned)]
        actions[layer] = LayerAction("merge", _target_of(layer, retained, target))
    return PruningPlan(tuple(actions), rule, density, scores.method, dict(scores.evidence))


def _free_layers(total: int, protect_first: int, protect_last: int, protect: Sequence[int]) -> list[int]:
    if protect_first < 0 or protect_last < 0 or protect_first + protect_last > total:
        raise PlanError(
            f"protect_first = {protect_first} and protect_last = {protect_last} in a model of {total} "
            f"layers; both must be >= 0 and together at most {total}."
        )
    held = set(checked_layers(protect, total, "protect"))
    return [layer for layer in range(protect_first, total - protect_last) if layer not in held]


def _listed(layers: Sequence[int], free: list[int], total: int, fits: Fits | None) -> list[int]:
    """The layers given by hand, when they can all go."""
    pruned = checked_layers(layers, total, "layers")
    _check_count(len(pruned), total)
    clash = sorted(set(pruned) - set(free))
    if clash:
        raise PlanError(f"Layers {', '.join(map(str, clash))} are both listed for pruning and protected.")
    wrong = list(_misfits(pruned, total, fits))
    if wrong:
        raise PlanError(
            f"Without layers {runs_of(pruned)}, layers {runs_of(wrong)} do not fit at their new positions.",
            hint="Give a number of layers instead of a list, and ones that fit are chosen; or plan without "
            "the restriction (portable_to).",
        )
    return pruned


def _misfits(pruned: Sequence[int], total: int, fits: Fits | None) -> Iterator[int]:
    """Kept layers that do not fit at their new position."""
    gone = set(pruned)
    keep = [layer for layer in range(total) if layer not in gone]
    return (old for new, old in enumerate(keep) if fits is not None and not fits(old, new, len(keep)))


def _budget(
    total: int,
    num_prune: int | None,
    layer_fraction: float | None,
    parameter_fraction: float | None,
    layer_parameters: Sequence[int] | None,
    total_parameters: int | None,
) -> int:
    """Number of layers to prune, whatever the unit it was asked in."""
    given = [b for b in (num_prune, layer_fraction, parameter_fraction) if b is not None]
    if len(given) > 1:
        raise PlanError("Give the budget in one unit: num_prune, layer_fraction or parameter_fraction.")
    for name, fraction in (
        ("layer_fraction", layer_fraction),
        ("parameter_fraction", parameter_fraction),
    ):
        if fraction is not None and not 0 <= fraction < 1:
            raise PlanError(f"{name} is {fraction}; a fraction from 0 to below 1 is needed.")
    if parameter_fraction is not None:
        if layer_parameters is None or total_parameters is None:
            raise PlanError("A parameter fraction needs the model's parameter counts.")
        per_layer = sum(layer_parameters) / total
        count = math.floor(parameter_fraction * total_parameters / per_layer + 0.5)
    elif layer_fraction is not None:
        count = default_num_prune(total, layer_fraction)
    else:
        count = num_prune if num_prune is not None else default_num_prune(total)
    _check_count(count, total)
    return count


def _check_count(count: int, total: int) -> None:
    if not 0 <= count <= total - MIN_KEPT:
        raise PlanError(
            f"Pruning {count} of {total} layers is not possible; 0 to {max(0, total - MIN_KEPT)} are, since "
            f"at least {MIN_KEPT} layers must stay."
        )


def _choose(
    scores: LayerScores, free: list[int], count: int, contiguous: bool, fits: Fits | None
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


def _best_block(scores: LayerScores, free: list[int], count: int, fits: Fits | None) -> list[int] | None:
    """The neighbouring layers with the lowest total whose absence leaves a model that fits."""
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


def _best_fit(scores: LayerScores, free: list[int], count: int, fits: Fits) -> list[int] | None:
    """The layers with the lowest total whose absence leaves a model that fits; None when there are none.

    Goes through the layers once and remembers, for every number of layers kept so far, the best way to keep
    so many. Better is a higher total of the kept scores and, of equal totals, lower layer numbers: without a
    restriction that is the choice by rank. Totals are exact integers, or rounding would break ties.
    """
    total, kept = scores.num_layers, scores.num_layers - count
    values, allowed = _exact(scores.values), set(free)
    best: dict[int, tuple[int, int]] = {0: (0, 0)}
    keeps: list[set[int]] = []  # per layer: after how many kept ones it is kept itself
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
    """The scores times one power of two that makes all of them whole."""
    ratios = [value.as_integer_ratio() for value in values]
    common = max(denominator for _, denominator in ratios)
    return [numerator * (common // denominator) for numerator, denominator in ratios]


def _no_fit(
    scores: LayerScores, free: list[int], count: int, contiguous: bool, fits: Fits | None
) -> PlanError:
    """An error that names the nearest numbers of layers that could be pruned instead."""
    flat = LayerScores("any", (0.0,) * scores.num_layers)
    search = _best_block if contiguous else _best_fit
    most = min(len(free), scores.num_layers - MIN_KEPT)
    near = []
    for others in (range(count - 1, 0, -1), range(count + 1, most + 1)):
        found = (n for n in others if fits is not None and search(flat, free, n, fits) is not None)
        near += [n for n in [next(found, None)] if n is not None]
    block = "neighbouring layers" if contiguous else "layers"
    return PlanError(
        f"There are no {count} {block} of {scores.num_layers} that can go so that all others fit at their "
        "new positions.",
        hint=(f"Prune {' or '.join(map(str, near))} layers" if near else "No other number of layers helps")
        + "; or protect fewer, or plan without the restriction (portable_to).",
    )


def _target_of(layer: int, retained: Sequence[int], target: str) -> int:
    before = [i for i in retained if i < layer]
    after = [i for i in retained if i > layer]
    if target == "preceding" or not before + after:
        if not before:
            raise PlanError(
                f"Layer {layer} is to be merged but no kept layer of its kind precedes it.",
                hint="Use target: nearest, protect_first: 1, or a smaller num_merge.",
            )
        return before[-1]
    near = before[-1:] + after[:1]
    return min(near, key=lambda i: (abs(i - layer), i))
