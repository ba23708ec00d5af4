"""Merges a linear of one or more pruned layers into the same linear of a kept layer. Pure tensor functions.

The kept linear is the target, the pruned ones are the sources. Merging has two steps. Sparsification keeps
the most important entries of every source (importance comes from importance.py). Then a combine rule adds
the kept entries whose sign agrees with the target. LaCo's rules use all entries and need no recorded
gradients.

Shape suffixes: O out_features, I in_features.
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
from gradpruner.plans.options import DENSITY

# Size of the sample of a matrix that is sorted to bracket its threshold.
SAMPLE_ENTRIES = 65_536
# Most sources per target: each source takes one bit of an integer matrix that marks the kept entries.
MAX_SOURCES = 63


@dataclass(frozen=True)
class Source:
    """A pruned linear to be merged into a kept one.

    Attributes:
        weight: Shape (out_features, in_features), any float dtype.
        factors: Its recorded LoRA gradients; None if the rule needs none.
    """

    weight: Tensor
    factors: Factors | None = None


def kth_largest(values: Tensor, k: int) -> tuple[float, int]:
    """Returns the exact k-th largest entry and the number of larger entries, without sorting all entries.

    A sorted sample gives a bracket for the answer. Only the few entries inside the bracket are partitioned.

    Args:
        values: Any shape, float32, no NaN.
        k: Rank from the top, 1 <= k <= values.numel().

    Raises:
        ShapeError: If `k` is out of range.
    """
    flat = values.reshape(-1)
    count = flat.numel()
    if not 1 <= k <= count:
        raise ShapeError(f"k is {k}; 1 to {count} is allowed.")
    low, high = _bracket(flat, k, row_length=values.shape[-1])
    # Block by block, because masks of the whole matrix would take as much memory as the matrix.
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
    """Returns two values that almost surely enclose the k-th largest, from a sample at a regular stride."""
    if flat.numel() <= SAMPLE_ENTRIES:
        return -math.inf, math.inf
    stride = flat.numel() // SAMPLE_ENTRIES
    # A stride that shares a factor with the row length would visit some of the columns only. The entries of a
    # column are similar, so the bracket would miss, and the whole matrix would have to be partitioned.
    while math.gcd(stride, row_length) > 1:
        stride += 1
    sample = flat[::stride].sort(descending=True).values
    middle = int((k - 1) / flat.numel() * sample.numel())
    # Six standard deviations of the sample rank, so the bracket very rarely misses.
    margin = int(6 * (sample.numel() * 0.25) ** 0.5) + 1
    low = float(sample[middle + margin]) if middle + margin < sample.numel() else -math.inf
    high = float(sample[middle - margin]) if middle >= margin else math.inf
    return low, high


def mark_top_(importance: Tensor, density: float, survived_OI: Tensor, bit: int) -> None:
    """Marks the `floor(density * numel)` most important entries of one matrix.

    On ties, the entries with the lowest flat indices are marked.

    Args:
        importance: Shape (out_features, in_features), float32, no NaN.
        density: Fraction of entries to mark, in (0, 1]; the paper's "80 % sparsity" is 0.2.
        survived_OI: Integers of the same shape, contiguous. Bit `bit` is set at the marked entries.
        bit: Number of the bit, from 0.

    Source: GradPruner, section 3.2, step 1 (sparsification).
    """
    # Exact decimal arithmetic: in binary floating point, 0.29 * 100 is less than 29.
    count = math.floor(Fraction(str(density)) * importance.numel())
    if count == 0:
        return
    threshold, above = kth_largest(importance, count)
    missing = count - above  # this many of the entries equal to the threshold are marked
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
            hint="0.2 keeps the top 20 % of entries, which the paper calls 80 % sparsity.",
        )


def signs_agree(weight: Tensor, target: Tensor) -> Tensor:
    """Returns a mask of the entries where both tensors have the same non-zero sign.

    Source: GradPruner, section 3.2, step 2 (symbol-based merging).
    """
    return weight * torch.sign(target) > 0  # weight * target could underflow to zero


# ------------------------------------------------------------------------------------------------------------
# Combine rules. Each gets a block of rows of the target and of every source in fp32, masks of the entries
# that sparsification kept, and (`fisher` only) their importance. It returns the merged block. Except for
# `laco_released`, the order of the sources does not change a bit of the result.

CombineRule = Callable[[Tensor, list[Tensor], list[Tensor], list[Tensor] | None], Tensor]
MERGE_RULES: Registry[CombineRule] = Registry("merge rule")
_WITHOUT_IMPORTANCE = ("laco", "laco_released")


def needs_importance(rule: str) -> bool:
    """Returns whether a rule selects entries by their recorded gradients. Other rules use all entries."""
    return rule not in _WITHOUT_IMPORTANCE


def _ordered_sum(terms: list[Tensor]) -> Tensor:
    """Returns the sum of tensors of the same shape, adding every entry's terms from smallest to largest.

    Floating-point addition depends on the order. Sorting first makes the sum the same for any order of terms.
    """
    terms = list(terms)
    for end in range(len(terms) - 1, 0, -1):  # a bubble sort of the list, for all entries at the same time
        for i in range(end):
            one, two = terms[i], terms[i + 1]
            terms[i], terms[i + 1] = torch.minimum(one, two), torch.maximum(one, two)
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _agreeing(target: Tensor, weights: list[Tensor], kept: list[Tensor]) -> list[Tensor]:
    """Returns, for every source, a mask of its kept entries whose sign agrees with the target."""
    return [mask & signs_agree(weight, target) for weight, mask in zip(weights, kept, strict=True)]


def _masked(values: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    return [torch.where(mask, value, 0.0) for value, mask in zip(values, masks, strict=True)]


@MERGE_RULES.register("sum")
def combine_sum(
    target: Tensor, weights: list[Tensor], kept: list[Tensor], _importance: list[Tensor] | None
) -> Tensor:
    """Returns `W_1 + sum_q agree_q * W_q`: the paper's Eq. 5, the released code, and the default."""
    if not weights:
        return target.clone()
    return target + _ordered_sum(_masked(weights, _agreeing(target, weights, kept)))


@MERGE_RULES.register("mean")
def combine_mean(
    target: Tensor, weights: list[Tensor], kept: list[Tensor], _importance: list[Tensor] | None
) -> Tensor:
    """Returns the mean of W_1 and the agreeing entries; for one source, the paper's Eq. 6."""
    terms = torch.ones_like(target)
    for agrees in _agreeing(target, weights, kept):
        terms += agrees
    return combine_sum(target, weights, kept, None) / terms


@MERGE_RULES.register("weighted_average")
def combine_weighted_average(
    target: Tensor, weights: list[Tensor], kept: list[Tensor], _importance: list[Tensor] | None
) -> Tensor:
    """Returns the mean of W_1 and all kept entries, whatever their sign: the ablation of Fig. 7."""
    terms = torch.ones_like(target)
    for mask in kept:
        terms += mask
    total = target + _ordered_sum(_masked(weights, kept)) if weights else target
    return total / terms


@MERGE_RULES.register("fisher")
def combine_fisher(
    target: Tensor, weights: list[Tensor], kept: list[Tensor], importance: list[Tensor] | None
) -> Tensor:
    """Returns the importance-weighted mean of W_1 and the agreeing entries: the paper's Appendix B.2.

    `importance` holds the target's block, then one block per source. An entry of W_1 stays unchanged where no
    source agrees, or where the total importance is zero or too small for a normal fp32 number.
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
    """Returns the sum, rescaled to the Frobenius norm of W_1 (a sum of three inflates it by about 31 %).

    Uses the norm of the tensors it is given. `merge_linear` therefore rescales the whole matrix instead of
    calling this rule on each block.
    """
    total = combine_sum(target, weights, kept, None)
    return total * _norm_ratio(target, total)


@MERGE_RULES.register("laco")
def combine_laco(
    target: Tensor, weights: list[Tensor], _kept: list[Tensor], _importance: list[Tensor] | None
) -> Tensor:
    """Returns `W_1 + sum_q (W_q - W_1)` over all entries: LaCo's rule as its paper states it.

    Source: LaCo (Yang et al., 2024), reserving differences while seeking common (RDSC).
    """
    if not weights:
        return target.clone()
    return target + _ordered_sum([weight - target for weight in weights])


@MERGE_RULES.register("laco_released")
def combine_laco_released(
    target: Tensor, weights: list[Tensor], _kept: list[Tensor], _importance: list[Tensor] | None
) -> Tensor:
    """Returns the last source unchanged, which is the result of LaCo's released code.

    That code adds each source's difference from the weight merged so far, not from W_1. The sum telescopes
    to the last source. This is the only rule for which the order of the sources matters.
    """
    return (weights[-1] if weights else target).clone()


def _norm_ratio(old: Tensor, new: Tensor) -> float:
    """Returns `||old||_F / ||new||_F`, computed block by block; 1 if `new` is all zero."""
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
    """Merges a linear of one or more pruned layers into the same linear of a kept layer.

    The top `density` entries of every source are kept, by importance. Of these, the rule combines the entries
    whose sign agrees with the *original* target (`weighted_average` combines all of them). The order of the
    sources does not change a bit of the result. LaCo's rules use neither gradients nor density, and
    `laco_released` depends on the order.

    Memory beyond the weights and the result: one float32 matrix (the importance of one source at a time), one
    uint8 matrix (which entries are kept; int64 for more than 8 sources) and blocks of rows, all on the
    target's device.

    Args:
        target: W_1, shape (out_features, in_features), any float dtype; not modified.
        sources: The pruned linears, at most 63, all of the target's shape.
        rule: A name in `MERGE_RULES`.
        density: Fraction of each source's entries to keep, in (0, 1].
        target_factors: The target's own LoRA gradients; only `fisher` needs them.

    Returns:
        The merged weight with the target's shape, dtype and device, computed in float32.

    Raises:
        ShapeError: If shapes differ or there are more than 63 sources.
        ConfigError: If the rule is unknown, the density is out of range, or recorded gradients are missing
            that the rule needs.

    Source: GradPruner, Eq. 5 and 6, Appendix B.2; released code `process_important.py`.
    """
    combine = MERGE_RULES.find(rule)
    check_density(density)
    _check_sources(target, sources, rule)
    if not needs_importance(rule):
        return _combine_rows(target, sources, None, combine, None)
    survived_OI = _survivors(target, sources, density)
    if rule == "norm_preserving":  # needs the norm of the whole matrix
        merged = _combine_rows(target.float(), sources, survived_OI, combine_sum, None)
        return merged.mul_(_norm_ratio(target, merged)).to(target.dtype)
    importances = _comparable_importances(target, target_factors, sources) if rule == "fisher" else None
    return _combine_rows(target, sources, survived_OI, combine, importances)


def _survivors(target: Tensor, sources: Sequence[Source], density: float) -> Tensor:
    """Marks the entries that sparsification keeps: bit q of an entry is set if source q keeps the entry."""
    dtype = torch.uint8 if len(sources) <= 8 else torch.int64
    survived_OI = torch.zeros(target.shape, dtype=dtype, device=target.device)
    for bit, factors in enumerate(_factors_of(sources)):
        mark_top_(ScaledImportance(factors, target.device).matrix(), density, survived_OI, bit)
    return survived_OI


def _factors_of(sources: Sequence[Source]) -> list[Factors]:
    return [source.factors for source in sources if source.factors is not None]


def _check_sources(target: Tensor, sources: Sequence[Source], rule: str) -> None:
    if len(sources) > MAX_SOURCES:
        raise ShapeError(f"{len(sources)} layers are to be merged into one; at most {MAX_SOURCES} can be.")
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
    """Returns the importance of the target and every source, each with its factor to a common unit."""
    if target_factors is None:
        raise ConfigError("The fisher rule needs the recorded gradients of the kept layer too.")
    if target_factors.shape != tuple(target.shape):
        raise ShapeError(
            f"Gradients for {target_factors.shape} do not fit a weight of shape {tuple(target.shape)}."
        )
    parts = [ScaledImportance(factors, target.device) for factors in (target_factors, *_factors_of(sources))]
    largest = max(part.scale for part in parts) or 1.0
    return [(part, part.scale / largest) for part in parts]


def _combine_rows(
    target: Tensor,
    sources: Sequence[Source],
    survived_OI: Tensor | None,
    combine: CombineRule,
    importances: list[tuple[ScaledImportance, float]] | None,
) -> Tensor:
    """Applies a combine rule block by block, and returns the merged weight."""
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
