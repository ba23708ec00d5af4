"""Ridge regressions from sums over tokens: nothing of a token is kept once it has been added.

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

RIDGES = (0.01, 0.1, 1.0, 10.0)


@dataclass
class AnySums:
    """Weighted sums over tokens of everything a ridge regression needs, in float64.

    With regressors x, what is missing r and weights w:

    Attributes:
        gram: Of regressors with each other.
        cross: Of what is missing with regressors.
        energy: sum w |r|^2.
        tokens: How many.
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
        """Adds the sums of all processes, in place; only the first one can use them afterwards."""
        world.sum_on_first((self.gram, self.cross))
        found = world.gathered([(self.energy, self.tokens)])
        self.energy, self.tokens = (sum(values) for values in zip(*found, strict=True))

    @property
    def is_finite(self) -> bool:
        """Whether no token brought in NaN or Inf."""
        return math.isfinite(self.energy + float(self.gram.sum()) + float(self.cross.sum()))

    def add(self, x: Tensor, missing: Tensor, weight: Tensor) -> None:
        """Adds tokens: regressors, what is missing, and how much each counts; all float64."""
        raise NotImplementedError

    def solve(self, ridge: float) -> Tensor:
        """`U = argmin sum w |r - U x|^2 + rho |U|^2`, float64.

        Args:
            ridge: rho in units of the mean diagonal of the regressors' sums, > 0. As it grows U goes to 0:
                the old weights.

        Raises:
            ConfigError: If the ridge is so small that the system cannot be solved.
        """
        raise NotImplementedError

    def error(self, update: Tensor | None) -> float:
        """Mean weighted |r - U x|^2 over the tokens; |r|^2 without an update."""
        if update is None:
            return self.energy / max(1, self.tokens)
        return max(0.0, self._left(update)) / max(1, self.tokens)

    def _left(self, update: Tensor) -> float:
        """The energy that an update leaves."""
        raise NotImplementedError


class Sums(AnySums):
    """Every output by all regressors: gram is (P, P), cross (D, P), and so is U = C (G + rho I)^-1."""

    @classmethod
    def empty(cls, regressors: int, outputs: int, device: torch.device | str = "cpu") -> Sums:
        """No tokens yet."""
        gram_PP = torch.zeros(regressors, regressors, dtype=torch.float64, device=device)
        return cls(gram_PP, torch.zeros(outputs, regressors, dtype=torch.float64, device=device))

    def add(self, x_TP: Tensor, missing_TD: Tensor, weight_T: Tensor) -> None:  # noqa: D102
        root_T1 = weight_T.sqrt()[:, None]
        x_TP, missing_TD = x_TP * root_T1, missing_TD * root_T1
        self.gram.addmm_(x_TP.T, x_TP)
        self.cross.addmm_(missing_TD.T, x_TP)
        self.energy += float(missing_TD.square().sum())
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

    def _left(self, update_DP: Tensor) -> float:
        explained = 2 * float((update_DP * self.cross).sum())
        own = float(((update_DP @ self.gram) * update_DP).sum())
        return self.energy - explained + own


class ChannelSums(AnySums):
    """Every output channel by a regressor of its own alone: `u_c = sum w r_c x_c / (sum w x_c^2 + rho)`.

    gram, cross and u are (D,): what fits one factor per channel of a norm.
    """

    @classmethod
    def empty(cls, outputs: int, device: torch.device | str = "cpu") -> ChannelSums:
        """No tokens yet."""
        zeros = torch.zeros(outputs, dtype=torch.float64, device=device)
        return cls(zeros, zeros.clone())

    def add(self, x_TD: Tensor, missing_TD: Tensor, weight_T: Tensor) -> None:  # noqa: D102
        self.gram += weight_T @ x_TD.square()
        self.cross += weight_T @ (x_TD * missing_TD)
        self.energy += float((weight_T @ missing_TD.square()).sum())
        self.tokens += len(x_TD)

    def solve(self, ridge: float) -> Tensor:  # noqa: D102
        return self.cross / (self.gram + ridge * _positive(self.gram.mean()))

    def _left(self, update_D: Tensor) -> float:
        return self.energy + float((update_D * (update_D * self.gram - 2 * self.cross)).sum())


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
