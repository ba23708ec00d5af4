"""Ridge regressions from sums over tokens: nothing of a token is kept once it has been added.

Shape suffixes: T tokens, D outputs (the hidden size), P regressors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradpruner.errors import ConfigError, NonFiniteError
from gradpruner.world import World

RIDGES = (0.01, 0.1, 1.0, 10.0)


@dataclass
class Sums:
    """Weighted sums over tokens of everything a ridge regression needs, in float64.

    Attributes:
        gram_PP: sum of w x x^T.
        cross_DP: sum of w r x^T, r what is missing in the residual stream.
        energy: sum of w |r|^2.
        tokens: How many.
    """

    gram_PP: Tensor
    cross_DP: Tensor
    energy: float = 0.0
    tokens: int = 0

    @classmethod
    def empty(cls, regressors: int, outputs: int, device: torch.device | str = "cpu") -> Sums:
        """No tokens yet."""
        gram_PP = torch.zeros(regressors, regressors, dtype=torch.float64, device=device)
        return cls(gram_PP, torch.zeros(outputs, regressors, dtype=torch.float64, device=device))

    def add(self, x_TP: Tensor, missing_TD: Tensor, weight_T: Tensor) -> None:
        """Takes in tokens: regressors, what is missing, and how much each counts; all float64."""
        root_T1 = weight_T.sqrt()[:, None]
        x_TP, missing_TD = x_TP * root_T1, missing_TD * root_T1
        self.gram_PP.addmm_(x_TP.T, x_TP)
        self.cross_DP.addmm_(missing_TD.T, x_TP)
        self.energy += float(missing_TD.square().sum())
        self.tokens += len(x_TP)

    def take(self, other: AnySums) -> None:
        """Takes in the tokens of another one of the same kind, in place."""
        assert isinstance(other, Sums)
        self.gram_PP += other.gram_PP
        self.cross_DP += other.cross_DP
        self.energy, self.tokens = self.energy + other.energy, self.tokens + other.tokens

    def sum_on_first(self, world: World) -> None:
        """Takes in the tokens of all processes, in place; only the first one can use the sums then."""
        _sum_on_first(self, (self.gram_PP, self.cross_DP), world)

    def solve(self, ridge: float) -> Tensor:
        """`U = argmin sum w |r - U x|^2 + rho |U|^2`, float64: U = C (G + rho I)^-1, shape (D, P).

        Args:
            ridge: rho in units of the mean diagonal of G, > 0. As it grows U goes to 0: the old weights.

        Raises:
            ConfigError: If the ridge is so small that the system cannot be solved.
        """
        system = self.gram_PP.clone()
        diagonal = system.diagonal()
        diagonal += ridge * _positive(diagonal.mean())
        factor, failed = torch.linalg.cholesky_ex(system)
        if int(failed):
            raise ConfigError(
                f"A ridge of {ridge:g} is too small: with {self.tokens} tokens the regression has no unique "
                "solution in double precision.",
                hint="Use a larger ridge (1e-9 or more), or more rows.",
            )
        return torch.cholesky_solve(self.cross_DP.T, factor).T

    def error(self, update_DP: Tensor | None) -> float:
        """Mean weighted |r - U x|^2 over the tokens; |r|^2 without an update."""
        if update_DP is None:
            return self.energy / max(1, self.tokens)
        explained = 2 * float((update_DP * self.cross_DP).sum())
        own = float(((update_DP @ self.gram_PP) * update_DP).sum())
        return max(0.0, self.energy - explained + own) / max(1, self.tokens)

    @property
    def is_finite(self) -> bool:
        """Whether no token brought in NaN or Inf."""
        return math.isfinite(self.energy + float(self.gram_PP.sum()) + float(self.cross_DP.sum()))


@dataclass
class ChannelSums:
    """The same for one coefficient per channel: r_c is explained by u_c x_c alone.

    Attributes:
        gram_D: sum of w x_c^2.
        cross_D: sum of w r_c x_c.
        energy: sum of w |r|^2.
        tokens: How many.
    """

    gram_D: Tensor
    cross_D: Tensor
    energy: float = 0.0
    tokens: int = 0

    @classmethod
    def empty(cls, outputs: int, device: torch.device | str = "cpu") -> ChannelSums:
        """No tokens yet."""
        zeros = torch.zeros(outputs, dtype=torch.float64, device=device)
        return cls(zeros, zeros.clone())

    def add(self, x_TD: Tensor, missing_TD: Tensor, weight_T: Tensor) -> None:
        """Takes in tokens, as `Sums.add`."""
        self.gram_D += weight_T @ x_TD.square()
        self.cross_D += weight_T @ (x_TD * missing_TD)
        self.energy += float((weight_T @ missing_TD.square()).sum())
        self.tokens += len(x_TD)

    def take(self, other: AnySums) -> None:
        """Takes in the tokens of another one of the same kind, in place."""
        assert isinstance(other, ChannelSums)
        self.gram_D += other.gram_D
        self.cross_D += other.cross_D
        self.energy, self.tokens = self.energy + other.energy, self.tokens + other.tokens

    def sum_on_first(self, world: World) -> None:
        """As `Sums.sum_on_first`."""
        _sum_on_first(self, (self.gram_D, self.cross_D), world)

    def solve(self, ridge: float) -> Tensor:
        """`u_c = sum w r_c x_c / (sum w x_c^2 + rho)`, shape (D,)."""
        return self.cross_D / (self.gram_D + ridge * _positive(self.gram_D.mean()))

    def error(self, update_D: Tensor | None) -> float:
        """Mean weighted |r - u x|^2 over the tokens; |r|^2 without an update."""
        if update_D is None:
            return self.energy / max(1, self.tokens)
        change = float((update_D * (update_D * self.gram_D - 2 * self.cross_D)).sum())
        return max(0.0, self.energy + change) / max(1, self.tokens)

    @property
    def is_finite(self) -> bool:
        """Whether no token brought in NaN or Inf."""
        return math.isfinite(self.energy + float(self.gram_D.sum()) + float(self.cross_D.sum()))


AnySums = Sums | ChannelSums


def _sum_on_first(sums: AnySums, tensors: Sequence[Tensor], world: World) -> None:
    world.sum_on_first(tensors)
    found = world.gathered([(sums.energy, sums.tokens)])
    sums.energy, sums.tokens = (sum(values) for values in zip(*found, strict=True))


def _positive(mean: Tensor) -> Tensor:
    return mean.clamp_min(1e-200)  # where every regressor is 0 the update is 0, not NaN


def check_ridges(ridges: Sequence[float]) -> None:
    """Raises ConfigError unless there is a ridge and all of them are positive numbers."""
    if not ridges or not all(0 < ridge < math.inf for ridge in ridges):
        raise ConfigError(
            f"Ridges {list(ridges)} cannot be tried.", hint="Allowed: one or more finite numbers above 0."
        )


def choose_update(
    fitted: AnySums, held_out: AnySums, ridges: Sequence[float] = RIDGES
) -> tuple[float | None, float]:
    """The ridge that is best on tokens that were not fitted on, and the error there.

    Returns:
        (None, the error without an update) when no ridge lowers it.

    Raises:
        NonFiniteError: If the sums hold NaN or Inf, which no ridge can tell apart from "no help".
    """
    if not (fitted.is_finite and held_out.is_finite):
        raise NonFiniteError(
            "Hidden states hold NaN or Inf.", hint="The model's number format is too narrow: try float32."
        )
    before = held_out.error(None)
    if fitted.tokens == 0 or held_out.tokens == 0:
        return None, before
    found = [(held_out.error(fitted.solve(ridge)), ridge) for ridge in ridges]
    error, ridge = min(found)
    return (ridge, error) if error < before else (None, before)
