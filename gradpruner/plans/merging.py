"""Merging one linear of pruned layers into the same linear of a retained layer: pure tensor functions.

Shape suffixes: O out_features, I in_features.

Two steps: the most important entries of every source are kept (sparsification), then a combine rule puts
those that agree with the target into it. Importance comes from importance.py. LaCo's rules take every entry
and need no recorded gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from gradpruner.common.errors import ConfigError, ShapeError
from gradpruner.common.registry import Registry
from gradpruner.gradients.importance import BLOCK_ENTRIES, Factors, ScaledImportance, row_blocks
from gradpruner.plans.defaults import DENSITY

# Entries that are sorted to bracket the threshold of a matrix.
SAMPLE_ENTRIES = 65_536
# The kept set of every source is one bit of an integer matrix, which bounds the sources of one target.
MAX_SOURCES = 63


@dataclass(frozen=True)
class Source:
    """One pruned linear on its way into a retained one.

    Attributes:
        weight: Shape (out_features, in_features), any float dtype.
        factors: Its recorded LoRA gradients; None for a rule that needs none.
    """

    weight: Tensor
    factors: Factors | None = None


def kth_largest(values: Tensor, k: int) -> tuple[float, int]:
    """The k-th largest entry, exactly, and how many entries are above it; without sorting or a copy.

    A strided sample brackets the answer; only the few entries inside the bracket are partitioned.

    Args:
        values: Any shape, float32, no NaN.
        k: 1-based rank from the top, 1 <= k <= values.numel().
    """
    flat = values.reshape(-1)
    count = flat.numel()
    if not 1 <= k <= count:
        raise ShapeError(f"k = {k} is outside 1..{count}.")
    low, high = _bracket(flat, k, row_length=values.shape[-1])
    # Block by block: masks of the whole matrix would take as much memory as the matrix.
    above, parts = 0, []
    for block in flat.split(BLOCK_ENTRIES):
        not_above = block <= high
        above += block.numel() - int(not_above.count_nonzero())
        parts.append(block[not_above.logical_and_(block >= low).nonzero()[:, 0]])
    inside = torch.cat(parts)
    if not 1 <= k - above <= inside.numel():  # the sample was not representative
        inside, above = flat, 0
    kth = inside.kthvalue(inside.numel() - (k - above) + 1).values
    return float(kth), above + int((inside > kth).count_nonzero())


def _bracket(flat: Tensor, k: int, row_length: int) -> tuple[float, float]:
    """Two values with the k-th largest almost surely between them, from a strided sample."""
    if flat.numel() <= SAMPLE_ENTRIES:
        return -math.inf, math.inf
    stride = flat.numel() // SAMPLE_ENTRIES
    # A stride that shares a factor with the row length would only ever meet some of the columns, and the
    # entries of a column resemble each other: the bracket would miss, and the whole matrix be partitioned.
    while math.gcd(stride, row_length) > 1:
        stride += 1
    sample = flat[::stride].sort(descending=True).values
    middle = int((k - 1) / flat.numel() * sample.numel())
    # Six standard deviations of the sample rank, so a second look is very rarely needed.
    margin = int(6 * (sample.numel() * 0.25) ** 0.5) + 1
    low = float(sample[middle + margin]) if middle + margin < sample.numel() else -math.inf
    high = float(sample[middle - margin]) if middle >= margin else math.inf
    return low, high


def mark_top_(importance: Tensor, density: float, survived_OI: Tensor, bit: int) -> None:
    """Marks the `floor(density * numel)` most important entries of one matrix, block by block.

    Args:
        importance: Shape (out_features, in_features), float32, no NaN.
        density: Fraction of entries kept, in (0, 1]; the paper's "80 % sparsity" is 0.2.
        survived_OI: Bytes of the same shape, contiguous. One bit is set in exactly that many of them; of
            equally important entries the one with the lower flat index is kept.
        bit: Which.

    Source: GradPruner, section 3.2, step 1 (sparsification).
    """
    # As the decimal number that was asked for: in binary, 0.29 * 100 falls below 29.
    count = math.floor(Fraction(str(density)) * importance.numel())
    if count == 0:
        return
    threshold, above = kth_largest(importance, count)
    missing = count - above  # of the entries equal to the threshold only the first ones fit
    blocks = importance.reshape(-1).split(BLOCK_ENTRIES), survived_OI.view(-1).split(BLOCK_ENTRIES)
    for values, marks in zip(*blocks, strict=True):
        kept = values > threshold
        if missing:
            ties = (values == threshold).nonzero()[:missing, 0]
            kept[ties] = True
            missing -= ties.numel()
        marks |= kept.to(marks.dtype) << bit


def check_density(density: float) -> None:
    """Raises ConfigError unless `density` is a fraction in (0, 1]."""
    if not 0 < density <= 1:  # also false for NaN
        raise ConfigError(
            f"density is {density}; a fraction above 0 and at most 1 is needed.",
            hint="0.2 keeps the top 20 % of entries, the paper's 80 % sparsity.",
        )


def signs_agree(weight: Tensor, target: Tensor) -> Tensor:
    """Where both have the same non-zero sign; zero agrees with nothing.

    Source: GradPruner, section 3.2, step 2 (symbol-based merging).
    """
    return weight * torch.sign(target) > 0  # weight * target could underflow to zero


# ------------------------------------------------------------------------------------------------------------
# Combine rules. Each sees one block of rows in fp32 and the entries that survived sparsification, and returns
# the merged block. Sources may come in any order: the result is the same to the bit (`laco_released` apart).

CombineRule = Callable[[Tensor, list[Tensor], list[Tensor], list[Tensor] | None], Tensor]
MERGE_RULES: Registry[CombineRule] = Registry("merge rule")
_WITHOUT_IMPORTANCE = ("laco", "laco_released")


def needs_importance(rule: str) -> bool:
    """Whether a rule chooses entries by recorded gradients; one that does not takes all of them."""
    return rule not in _WITHOUT_IMPORTANCE


def _ordered_sum(terms: list[Tensor]) -> Tensor:
    """Sum of terms of one shape; every entry adds up from its smallest term to its largest.

    Floating-point addition is not associative; in sorted order it is the same for every order of terms.
    """
    terms = list(terms)
    for end in range(len(terms) - 1, 0, -1):  # a bubble sort along the list, of all entries at once
        for i in range(end):
            one, two = terms[i], terms[i + 1]
            terms[i], terms[i + 1] = torch.minimum(one, two), torch.maximum(one, two)
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _agreeing(target: Tensor, weights: list[Tensor], kept: list[Tensor]) -> list[Tensor]:
    return [mask & signs_agree(weight, target) for weight, mask in zip(weights, kept, strict=True)]


def _masked(values: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    return [torch.where(mask, value, 0.0) for value, mask in zip(values, masks, strict=True)]


@MERGE_RULES.register("sum")
def combine_sum(
    target: Tensor, weights: list[Tensor], kept: list[Tensor], _importance: list[Tensor] | None
) -> Tensor:
    """`W_1 + sum_q agree_q * W_q`; the paper's Eq. 5, the released code, and the default."""
    if not weights:
        return target.clone()
    return target + _ordered_sum(_masked(weights, _agreeing(target, weights, kept)))


@MERGE_RULES.register("mean")
def combine_mean(
    target: Tensor, weights: list[Tensor], kept: list[Tensor], _importance: list[Tensor] | None
) -> Tensor:
    """Average of W_1 and the agreeing terms, entry by entry; the paper's Eq. 6 for one source."""
    terms = torch.ones_like(target)
    for agrees in _agreeing(target, weights, kept):
        terms += agrees
    return combine_sum(target, weights, kept, None) / terms


@MERGE_RULES.register("weighted_average")
def combine_weighted_average(
    target: Tensor, weights: list[Tensor], kept: list[Tensor], _importance: list[Tensor] | None
) -> Tensor:
    """Equal-weight average of W_1 and every kept entry whatever its sign; the ablation of Fig. 7."""
    terms = torch.ones_like(target)
    for mask in kept:
        terms += mask
    total = target + _ordered_sum(_masked(weights, kept)) if weights else target
    return total / terms


@MERGE_RULES.register("fisher")
def combine_fisher(
    target: Tensor, weights: list[Tensor], kept: list[Tensor], importance: list[Tensor] | None
) -> Tensor:
    """Importance-weighted average of W_1 and the agreeing terms; the paper's Appendix B.2.

    `importance` holds the target's block first, then one per source. Where nothing agrees, or the
    importances of an entry are all zero (or below what fp32 holds in full), W_1 stays as it is.
    """
    if importance is None:
        raise ConfigError("The fisher rule needs the importance of the target and of every source.")
    agreeing = _agreeing(target, weights, kept)
    if not agreeing:
        return target.clone()
    fishers = importance[1:]
    merged_weight = _ordered_sum(_masked(fishers, agreeing))
    products = [fisher * weight for fisher, weight in zip(fishers, weights, strict=True)]
    total = importance[0] * target + _ordered_sum(_masked(products, agreeing))
    weight_sum = importance[0] + merged_weight
    changed = (merged_weight > 0) & (weight_sum >= torch.finfo(torch.float32).tiny)
    return torch.where(changed, total / weight_sum, target)


@MERGE_RULES.register("norm_preserving")
def combine_norm_preserving(
    target: Tensor, weights: list[Tensor], kept: list[Tensor], _importance: list[Tensor] | None
) -> Tensor:
    """The sum, rescaled to the Frobenius norm of W_1 (a sum of three inflates it by about 31 %).

    The norm is that of what is given; `merge_linear` rescales the whole matrix, not each block.
    """
    total = combine_sum(target, weights, kept, None)
    return total * _norm_ratio(target, total)


@MERGE_RULES.register("laco")
def combine_laco(
    target: Tensor, weights: list[Tensor], _kept: list[Tensor], _importance: list[Tensor] | None
) -> Tensor:
    """`W_1 + sum_q (W_q - W_1)`, all entries whatever their sign; LaCo's rule as its paper states it.

    Source: LaCo (Yang et al., 2024), reserving differences while seeking common (RDSC).
    """
    if not weights:
        return target.clone()
    return target + _ordered_sum([weight - target for weight in weights])


@MERGE_RULES.register("laco_released")
def combine_laco_released(
    target: Tensor, weights: list[Tensor], _kept: list[Tensor], _importance: list[Tensor] | None
) -> Tensor:
    """The last source itself; what LaCo's released code comes to.

    It adds the differences one after another and takes each from what is there by then: the sum telescopes,
    and of all sources only the last is left. The one rule for which their order matters.
    """
    return (weights[-1] if weights else target).clone()


def _norm_ratio(old: Tensor, new: Tensor) -> float:
    """`||old||_F / ||new||_F`, accumulated over row blocks; 1 when `new` is all zero."""
    norms = []
    for matrix in (old, new):
        blocks = (matrix[start:stop].float().norm() for start, stop in row_blocks(*matrix.shape))
        norms.append(math.hypot(*map(float, blocks)))
    return norms[0] / norms[1] if norms[1] > 0 else 1.0


@torch.no_grad()
def merge_linear(
    target: Tensor,
    sources: Sequence[Source],
    *,
    rule: str = "sum",
    density: float = DENSITY,
    target_factors: Factors | None = None,
) -> Tensor:
    """Merges the same linear of one or more pruned layers into that of a retained layer.

    Per source: keep the top `density` entries by importance, of those the ones whose sign agrees with
    the *original* target, then combine by `rule`. The order of sources does not matter, to the bit. LaCo's
    rules look at neither gradients nor density, and `laco_released` at the order.

    Memory beyond the weights and the result: one float32 matrix (the importance of one source at a
    time), one uint8 matrix (which entries survived; int64 for more than 8 sources) and blocks of rows.
    All of it is on the target's device.

    Args:
        target: W_1, shape (out_features, in_features), any float dtype; not modified.
        sources: The pruned linears, at most 63, all of the target's shape, in any order.
        rule: A name in `MERGE_RULES`.
        density: Fraction of each source's entries kept, in (0, 1].
        target_factors: The target's own LoRA gradients; needed by `fisher` only.

    Returns:
        The merged weight in the target's shape, dtype and device; computed in float32.

    Raises:
        ShapeError: If shapes differ or there are more than 63 sources.
        ConfigError: If the rule is unknown, the density is out of range, or `fisher` lacks factors.

    Source: GradPruner, Eq. 5 and 6, Appendix B.2; released code `process_important.py`.
    """
    combine = MERGE_RULES.find(rule)
    check_density(density)
    _check_sources(target, sources, rule)
    if not needs_importance(rule):
        return _combine_rows(target, sources, None, combine, None)
    survived_OI = _survivors(target, sources, density)
    if rule == "norm_preserving":  # the only rule that looks at the whole matrix at once
        merged = _combine_rows(target.float(), sources, survived_OI, combine_sum, None)
        return merged.mul_(_norm_ratio(target, merged)).to(target.dtype)
    importances = _comparable_importances(target, target_factors, sources) if rule == "fisher" else None
    return _combine_rows(target, sources, survived_OI, combine, importances)


def _survivors(target: Tensor, sources: Sequence[Source], density: float) -> Tensor:
    """Which entries of which source survive sparsification: bit q of an entry stands for source q."""
    dtype = torch.uint8 if len(sources) <= 8 else torch.int64
    survived_OI = torch.zeros(target.shape, dtype=dtype, device=target.device)
    for bit, factors in enumerate(_factors_of(sources)):
        mark_top_(ScaledImportance(factors, target.device).matrix(), density, survived_OI, bit)
    return survived_OI


def _factors_of(sources: Sequence[Source]) -> list[Factors]:
    return [source.factors for source in sources if source.factors is not None]


def _check_sources(target: Tensor, sources: Sequence[Source], rule: str) -> None:
    if len(sources) > MAX_SOURCES:
        raise ShapeError(f"{len(sources)} layers into one; at most {MAX_SOURCES} can be merged.")
    for source in sources:
        if needs_importance(rule) and source.factors is None:
            raise ConfigError(f"The {rule} rule needs the recorded gradients of every source.")
        shape = tuple(source.weight.shape if source.factors is None else source.factors.shape)
        if source.weight.shape != target.shape or shape != tuple(target.shape):
            raise ShapeError(
                f"A weight of shape {tuple(source.weight.shape)} with gradients for {shape} cannot be "
                f"merged into one of shape {tuple(target.shape)}."
            )


def _comparable_importances(
    target: Tensor, target_factors: Factors | None, sources: Sequence[Source]
) -> list[tuple[ScaledImportance, float]]:
    """Importance of target and sources with the factor that brings them to one common unit."""
    if target_factors is None:
        raise ConfigError("The fisher rule needs the recorded gradients of the retained layer too.")
    if target_factors.shape != tuple(target.shape):
        raise ShapeError(
            f"Gradients for {target_factors.shape} do not fit a weight of shape {tuple(target.shape)}."
        )
    history = [target_factors, *_factors_of(sources)]
    parts = [ScaledImportance(factors, target.device) for factors in history]
    largest = max(part.scale for part in parts) or 1.0
    return [(part, part.scale / largest) for part in parts]


def _combine_rows(
    target: Tensor,
    sources: Sequence[Source],
    survived_OI: Tensor | None,
    combine: CombineRule,
    importances: list[tuple[ScaledImportance, float]] | None,
) -> Tensor:
    merged = torch.empty_like(target)
    for start, stop in row_blocks(*target.shape):
        rows = slice(start, stop)
        kept = []
        if survived_OI is not None:
            kept = [(survived_OI[rows] & (1 << bit)) != 0 for bit in range(len(sources))]
        weights = [source.weight[rows].to(target.device).float() for source in sources]
        values = [part.rows(start, stop) * unit for part, unit in importances] if importances else None
        merged[rows] = combine(target[rows].float(), weights, kept, values).to(merged.dtype)
    return merged
