"""Merging one linear of pruned layers into the same linear of a retained layer: pure tensor functions.

Shape suffixes: S recorded steps, O out_features, I in_features, R LoRA rank, P rank pairs r <= r'.

The importance of every entry (IGIA matrix, paper Eq. 3) is formed here and nowhere else, for one linear
at a time: `sum_s (B_s A_s)**2` is one matrix product of row-wise Khatri-Rao products, because
`(sum_r b_r a_r)**2 = sum_{r,r'} b_r b_r' a_r a_r'`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradpruner.errors import ConfigError, ShapeError
from gradpruner.registry import Registry

# Rows are visited in blocks of about this many entries, so that temporaries stay near 16 MB in fp32.
BLOCK_ENTRIES = 4_194_304
# The kept set of every source is one bit of a uint8 matrix, which bounds the sources of one target.
MAX_SOURCES = 8


@dataclass(frozen=True)
class Factors:
    """The LoRA gradients of one linear over all recorded steps.

    Attributes:
        grad_b_SOR: Gradients of LoRA B, shape (steps, out_features, rank), any float dtype.
        grad_a_SRI: Gradients of LoRA A, shape (steps, rank, in_features).
    """

    grad_b_SOR: Tensor
    grad_a_SRI: Tensor

    def __post_init__(self) -> None:
        b, a = self.grad_b_SOR, self.grad_a_SRI
        if b.ndim != 3 or a.ndim != 3 or b.shape[0] != a.shape[0] or b.shape[2] != a.shape[1]:
            raise ShapeError(
                f"LoRA gradients of shape {tuple(b.shape)} and {tuple(a.shape)} do not belong "
                "together; (steps, out_features, rank) and (steps, rank, in_features) are needed."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's (out_features, in_features)."""
        return self.grad_b_SOR.shape[1], self.grad_a_SRI.shape[2]


@dataclass(frozen=True)
class Source:
    """One pruned linear on its way into a retained one.

    Attributes:
        weight: Shape (out_features, in_features), any float dtype.
        factors: Its recorded LoRA gradients.
    """

    weight: Tensor
    factors: Factors


class _Importance:
    """IGIA matrix of one linear, row block by row block, in units of `scale`.

    The recorded products are tiny (1e-17 is common), so their squares leave the range of fp32. Both
    factors are divided by their largest entry and the common unit is kept apart in double precision.
    """

    def __init__(self, factors: Factors) -> None:
        b_SOR, a_SRI = factors.grad_b_SOR.float(), factors.grad_a_SRI.float()
        steps, _, rank = b_SOR.shape
        max_b, max_a = float(b_SOR.abs().amax()), float(a_SRI.abs().amax())
        self.scale = (max_b * max_a) ** 2 / steps
        left, right = torch.triu_indices(rank, rank, device=b_SOR.device)
        # Off-diagonal pairs stand for (r, r') and (r', r).
        weight_P = torch.where(left == right, 1.0, 2.0).to(b_SOR.device)
        a_SRI = a_SRI / (max_a or 1.0)
        pairs_a_SPI = a_SRI[:, left] * a_SRI[:, right] * weight_P[:, None]
        self._pairs_a_KI = pairs_a_SPI.reshape(-1, a_SRI.shape[2])
        self._b_OSR = (b_SOR / (max_b or 1.0)).permute(1, 0, 2)
        self._left, self._right = left, right

    def rows(self, start: int, stop: int) -> Tensor:
        """Importance of rows [start, stop) divided by `scale`, float32, >= 0."""
        b_OSR = self._b_OSR[start:stop]
        pairs_b_OK = (b_OSR[..., self._left] * b_OSR[..., self._right]).flatten(1)
        # Rounding of cancelling terms can fall a hair below zero.
        return (pairs_b_OK @ self._pairs_a_KI).clamp_min_(0)


def _row_blocks(num_rows: int, num_columns: int) -> list[tuple[int, int]]:
    step = max(1, BLOCK_ENTRIES // max(1, num_columns))
    return [(i, min(num_rows, i + step)) for i in range(0, num_rows, step)]


def _normalised_importance(importance: _Importance, shape: tuple[int, int]) -> Tensor:
    out_OI = torch.empty(shape, device=importance._pairs_a_KI.device)
    for start, stop in _row_blocks(*shape):
        out_OI[start:stop] = importance.rows(start, stop)
    return out_OI


def simulated_gradient(grad_b_OR: Tensor, grad_a_RI: Tensor) -> Tensor:
    """Simulated gradient of one weight at one step, the product of its two LoRA gradients.

    Args:
        grad_b_OR: Gradient of LoRA B, shape (out_features, rank).
        grad_a_RI: Gradient of LoRA A, shape (rank, in_features).

    Returns:
        Shape (out_features, in_features), float32. Not a gradient of anything: its scale depends on
        the LoRA scaling, which enters twice.

    Source: GradPruner, Eq. 2.
    """
    return grad_b_OR.float() @ grad_a_RI.float()


def element_importance(grad_b_SOR: Tensor, grad_a_SRI: Tensor) -> Tensor:
    """Mean squared simulated gradient of every entry of one linear weight (the IGIA matrix).

    Args:
        grad_b_SOR: Gradients of LoRA B, shape (steps, out_features, rank), any float dtype.
        grad_a_SRI: Gradients of LoRA A, shape (steps, rank, in_features).

    Returns:
        Importance, shape (out_features, in_features), float32, >= 0; comparable only within one
        trace. Values below 1e-45 round to zero here; merging itself works in scaled units and loses
        none of them.

    Raises:
        ShapeError: If the two disagree on steps or rank.

    Source: GradPruner, Eq. 2-3.
    """
    factors = Factors(grad_b_SOR, grad_a_SRI)
    importance = _Importance(factors)
    normalised_OI = _normalised_importance(importance, factors.shape)
    return (normalised_OI.double() * importance.scale).float()


def kth_largest(values: Tensor, k: int) -> float:
    """The k-th largest entry, exactly, without sorting and without a copy of `values`.

    A strided sample brackets the answer; only the few entries inside the bracket are partitioned.

    Args:
        values: Any shape, float32, no NaN.
        k: 1-based rank from the top, 1 <= k <= values.numel().
    """
    flat = values.reshape(-1)
    count = flat.numel()
    if not 1 <= k <= count:
        raise ShapeError(f"k = {k} is outside 1..{count}.")
    low, high = -torch.inf, torch.inf
    if count > 65_536:
        stride = count // 65_536
        sample = flat[::stride].sort(descending=True).values
        middle = int((k - 1) / count * sample.numel())
        # Six standard deviations of the sample rank, so a second look is very rarely needed.
        margin = int(6 * (sample.numel() * 0.25) ** 0.5) + 1
        if middle - margin >= 0:
            high = float(sample[middle - margin])
        if middle + margin < sample.numel():
            low = float(sample[middle + margin])
    above = int((flat > high).sum()) if high < torch.inf else 0
    inside = flat[(flat >= low) & (flat <= high)] if count > 65_536 else flat
    rank_inside = k - above
    if not 1 <= rank_inside <= inside.numel():  # the sample was not representative
        inside, rank_inside = flat, k
    return float(inside.kthvalue(inside.numel() - rank_inside + 1).values)


def top_density_mask(importance: Tensor, density: float) -> Tensor:
    """Mask of the `floor(density * numel)` most important entries of one matrix.

    Args:
        importance: Shape (out_features, in_features), float32, no NaN.
        density: Fraction of entries kept, in (0, 1]; the paper's "80 % sparsity" is 0.2.

    Returns:
        Boolean mask of the same shape with exactly `floor(density * numel)` true entries; of equally
        important entries the one with the lower flat index is kept.

    Source: GradPruner, section 3.2, step 1 (sparsification).
    """
    check_density(density)
    count = int(density * importance.numel())
    if count == 0:
        return torch.zeros_like(importance, dtype=torch.bool)
    threshold = kth_largest(importance, count)
    mask = importance > threshold
    # Of the entries equal to the threshold only the first ones fit.
    missing = count - int(mask.sum())
    ties = (importance.reshape(-1) == threshold).nonzero()[:missing, 0]
    mask.reshape(-1)[ties] = True
    return mask


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
    return (torch.sign(weight) == torch.sign(target)) & (target != 0)


# ---------------------------------------------------------------------------------------------------
# Combine rules. Each sees one block of rows in fp32 and the entries that survived sparsification, and
# returns the merged block.

CombineRule = Callable[[Tensor, list[Tensor], list[Tensor], list[Tensor] | None], Tensor]
MERGE_RULES: Registry[CombineRule] = Registry("merge rule")


@MERGE_RULES.register("sum")
def combine_sum(
    target: Tensor, weights: list[Tensor], kept: list[Tensor], _: list[Tensor] | None = None
) -> Tensor:
    """`W_1 + sum_q agree_q * W_q`; the paper's Eq. 5, the released code, and the default."""
    total = target.clone()
    for weight, mask in zip(weights, kept, strict=True):
        total += weight * (mask & signs_agree(weight, target))
    return total


@MERGE_RULES.register("mean")
def combine_mean(
    target: Tensor, weights: list[Tensor], kept: list[Tensor], _: list[Tensor] | None = None
) -> Tensor:
    """Average of W_1 and the agreeing terms, entry by entry; the paper's Eq. 6 for one source."""
    terms = torch.ones_like(target)
    for weight, mask in zip(weights, kept, strict=True):
        terms += mask & signs_agree(weight, target)
    return combine_sum(target, weights, kept) / terms


@MERGE_RULES.register("weighted_average")
def combine_weighted_average(
    target: Tensor, weights: list[Tensor], kept: list[Tensor], _: list[Tensor] | None = None
) -> Tensor:
    """Equal-weight average of W_1 and every kept entry whatever its sign; the ablation of Fig. 7."""
    total, terms = target.clone(), torch.ones_like(target)
    for weight, mask in zip(weights, kept, strict=True):
        total += weight * mask
        terms += mask
    return total / terms


@MERGE_RULES.register("fisher")
def combine_fisher(
    target: Tensor, weights: list[Tensor], kept: list[Tensor], importance: list[Tensor] | None = None
) -> Tensor:
    """Importance-weighted average of W_1 and the agreeing terms; the paper's Appendix B.2.

    `importance` holds the target's block first, then one per source. Where all weights of an entry
    are zero, or nothing agrees, W_1 stays as it is.
    """
    if importance is None:
        raise ConfigError("The fisher rule needs the importance of the target and of every source.")
    weight_total, total = importance[0].clone(), importance[0] * target
    for weight, mask, fisher in zip(weights, kept, importance[1:], strict=True):
        agreeing = fisher * (mask & signs_agree(weight, target))
        weight_total += agreeing
        total += agreeing * weight
    return torch.where(weight_total > 0, total / weight_total.clamp_min(1e-45), target)


@MERGE_RULES.register("norm_preserving")
def combine_norm_preserving(
    target: Tensor, weights: list[Tensor], kept: list[Tensor], _: list[Tensor] | None = None
) -> Tensor:
    """The sum, rescaled to the Frobenius norm of W_1 (a sum of three inflates it by about 31 %)."""
    total = combine_sum(target, weights, kept)
    return total * (target.double().norm() / total.double().norm().clamp_min(1e-300)).float()


def merge_linear(
    target: Tensor,
    sources: Sequence[Source],
    *,
    rule: str = "sum",
    density: float = 0.2,
    target_factors: Factors | None = None,
) -> Tensor:
    """Merges the same linear of one or more pruned layers into that of a retained layer.

    Per source: keep the top `density` entries by importance, of those the ones whose sign agrees with
    the *original* target (so the order of sources does not matter), then combine by `rule`.

    Memory beyond the weights and the result: one float32 matrix (the importance of one source at a
    time), one uint8 matrix (which entries survived) and blocks of rows.

    Args:
        target: W_1, shape (out_features, in_features), any float dtype; not modified.
        sources: The pruned linears, at most 8, all of the target's shape.
        rule: A name in `MERGE_RULES`.
        density: Fraction of each source's entries kept, in (0, 1].
        target_factors: The target's own LoRA gradients; needed by `fisher` only.

    Returns:
        The merged weight in the target's shape, dtype and device; computed in float32.

    Raises:
        ShapeError: If shapes differ or there are more than 8 sources.
        ConfigError: If the rule is unknown, the density is out of range, or `fisher` lacks factors.

    Source: GradPruner, Eq. 5 and 6, Appendix B.2; released code `process_important.py`.
    """
    combine = MERGE_RULES.find(rule)
    check_density(density)
    _check_sources(target, sources)
    survived_OI = torch.zeros(target.shape, dtype=torch.uint8, device=target.device)
    for bit, source in enumerate(sources):
        importance = _Importance(source.factors)
        mask = top_density_mask(
            _normalised_importance(importance, source.factors.shape), density
        ).to(target.device)
        for start, stop in _row_blocks(*target.shape):
            survived_OI[start:stop] |= mask[start:stop].to(torch.uint8) << bit
        del mask, importance
    if rule == "norm_preserving":  # the only rule that looks at the whole matrix at once
        merged = _combine_rows(target.float(), sources, survived_OI, combine_sum, None)
        old, new = target.double().norm(), merged.double().norm().clamp_min(1e-300)
        return (merged * (old / new).float()).to(target.dtype)
    importances = _comparable_importances(target_factors, sources) if rule == "fisher" else None
    return _combine_rows(target, sources, survived_OI, combine, importances).to(target.dtype)


def _check_sources(target: Tensor, sources: Sequence[Source]) -> None:
    if len(sources) > MAX_SOURCES:
        raise ShapeError(f"{len(sources)} layers into one; at most {MAX_SOURCES} can be merged.")
    for source in sources:
        if source.weight.shape != target.shape or source.factors.shape != tuple(target.shape):
            raise ShapeError(
                f"A weight of shape {tuple(source.weight.shape)} with gradients for "
                f"{source.factors.shape} cannot be merged into one of shape {tuple(target.shape)}."
            )


def _comparable_importances(
    target_factors: Factors | None, sources: Sequence[Source]
) -> list[tuple[_Importance, float]]:
    """Importance of target and sources with the factor that brings them to one common unit."""
    if target_factors is None:
        raise ConfigError("The fisher rule needs the recorded gradients of the retained layer too.")
    parts = [_Importance(target_factors)] + [_Importance(s.factors) for s in sources]
    largest = max(part.scale for part in parts) or 1.0
    return [(part, part.scale / largest) for part in parts]


def _combine_rows(
    target: Tensor,
    sources: Sequence[Source],
    survived_OI: Tensor,
    combine: CombineRule,
    importances: list[tuple[_Importance, float]] | None,
) -> Tensor:
    merged = torch.empty_like(target)
    for start, stop in _row_blocks(*target.shape):
        rows = slice(start, stop)
        kept = [(survived_OI[rows] & (1 << bit)) != 0 for bit in range(len(sources))]
        weights = [source.weight[rows].to(target.device).float() for source in sources]
        values = (
            [(part.rows(start, stop) * unit).to(target.device) for part, unit in importances]
            if importances
            else None
        )
        merged[rows] = combine(target[rows].float(), weights, kept, values).to(merged.dtype)
    return merged
