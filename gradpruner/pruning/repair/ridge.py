"""Ridge regressions from sums over tokens: tokens are added to the sums and not kept.

Shape suffixes: T tokens, D outputs (the hidden size), P regressors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradpruner.common.errors import ConfigError, NonFiniteError
from gradpruner.common.world import World


@dataclass
class AnySums:
    """The weighted sums over tokens that a ridge regression needs, in float64.

    For regressors x, residuals r and weights w:

    Attributes:
        gram: Sum of w times products of regressors.
        cross: Sum of w times products of residuals and regressors.
        energy: Sum of w |r|^2.
        tokens: Number of tokens.
    """

    gram: Tensor
    cross: Tensor
    energy: float = 0.0
    tokens: int = 0

    def take(self, other: AnySums) -> None:
        """Adds the sums of other tokens, in place."""
        self.gram += other.gram
        self.cross += other.cross
        self.energy, self.tokens = self.energy + other.energy, self.tokens + other.tokens

    def sum_on_first(self, world: World) -> None:
        """Adds up the sums of all processes, in place; the result is valid on the first process only."""
        world.sum_on_first((self.gram, self.cross))
        found = world.gathered([(self.energy, self.tokens)])
        self.energy, self.tokens = (sum(values) for values in zip(*found, strict=True))

    @property
    def is_finite(self) -> bool:
        """Whether no sum is NaN or infinite."""
        return math.isfinite(self.energy + float(self.gram.sum()) + float(self.cross.sum()))

    def add(self, x: Tensor, residual: Tensor, weight: Tensor) -> None:
        """Adds tokens: their regressors, residuals and weights; all float64."""
        raise NotImplementedError

    def solve(self, ridge: float) -> Tensor:
        """Returns `U = argmin sum w |r - U x|^2 + rho |U|^2`, float64.

        Args:
            ridge: rho, > 0, in units of the mean diagonal of `gram`. As it grows, U goes to 0, which leaves
                the weights unchanged.

        Raises:
            ConfigError: If the ridge is too small for the system to be solved.
        """
        raise NotImplementedError

    def error(self, update: Tensor | None) -> float:
        """Returns the mean of w |r - U x|^2 over the tokens; of w |r|^2 if there is no update."""
        if update is None:
            return self.energy / max(1, self.tokens)
        return max(0.0, self._remaining(update)) / max(1, self.tokens)

    def _remaining(self, update: Tensor) -> float:
        """Returns the energy that remains with an update."""
        raise NotImplementedError


class Sums(AnySums):
    """Sums for a regression of every output on all regressors: `U = cross (gram + rho I)^-1`.

    gram is (P, P); cross and U are (D, P).
    """

    @classmethod
    def empty(cls, regressors: int, outputs: int, device: torch.device | str = "cpu") -> Sums:
        """Returns sums over no tokens."""
        gram_PP = torch.zeros(regressors, regressors, dtype=torch.float64, device=device)
        return cls(gram_PP, torch.zeros(outputs, regressors, dtype=torch.float64, device=device))

    def add(self, x_TP: Tensor, residual_TD: Tensor, weight_T: Tensor) -> None:  # noqa: D102
        root_T1 = weight_T.sqrt()[:, None]
        x_TP, residual_TD = x_TP * root_T1, residual_TD * root_T1
        self.gram.addmm_(x_TP.T, x_TP)
        self.cross.addmm_(residual_TD.T, x_TP)
        self.energy += float(residual_TD.square().sum())
        self.tokens += len(x_TP)

    def solve(self, ridge: float) -> Tensor:  # noqa: D102
        system = self.gram.clone()
        diagonal = system.diagonal()
        diagonal += ridge * _positive(diagonal.mean())
        factor, failed = torch.linalg.cholesky_ex(system)
        if int(failed):
            raise ConfigError(
                f"A ridge of {ridge:g} is too small: with {self.tokens} tokens the regression has no unique "
                "solution in double precision.",
                hint="Use a larger ridge (1e-9 or more), or more rows.",
            )
        return torch.cholesky_solve(self.cross.T, factor).T

    def _remaining(self, update_DP: Tensor) -> float:
        explained = 2 * float((update_DP * self.cross).sum())
        own = float(((update_DP @ self.gram) * update_DP).sum())
        return self.energy - explained + own


class ChannelSums(AnySums):
    """Sums for a regression of each channel on one regressor: `u_c = sum w r_c x_c / (sum w x_c^2 + rho)`.

    gram, cross and u are (D,). This fits one factor per channel of a norm.
    """

    @classmethod
    def empty(cls, outputs: int, device: torch.device | str = "cpu") -> ChannelSums:
        """Returns sums over no tokens."""
        zeros = torch.zeros(outputs, dtype=torch.float64, device=device)
        return cls(zeros, zeros.clone())

    def add(self, x_TD: Tensor, residual_TD: Tensor, weight_T: Tensor) -> None:  # noqa: D102
        self.gram += weight_T @ x_TD.square()
        self.cross += weight_T @ (x_TD * residual_TD)
        self.energy += float((weight_T @ residual_TD.square()).sum())
        self.tokens += len(x_TD)

    def solve(self, ridge: float) -> Tensor:  # noqa: D102
        return self.cross / (self.gram + ridge * _positive(self.gram.mean()))

    def _remaining(self, update_D: Tensor) -> float:
        return self.energy + float((update_D * (update_D * self.gram - 2 * self.cross)).sum())


def _positive(mean: Tensor) -> Tensor:
    return mean.clamp_min(1e-200)  # if every regressor is 0, the update is 0, not NaN


def choose_update(fitted: AnySums, held_out: AnySums, ridges: Sequence[float]) -> tuple[float | None, float]:
    """Chooses the ridge with the lowest error on held-out tokens.

    Returns:
        The ridge and its error; (None, the error without an update) if no ridge lowers it.

    Raises:
        NonFiniteError: If the sums hold NaN or Inf; it would look as if no ridge helped.
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
