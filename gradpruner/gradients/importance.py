"""Importance from LoRA gradients, of every entry of one linear (IGIA, Eq. 2-3) and of a whole linear.

Shape suffixes: S recorded steps, O out_features, I in_features, R LoRA rank.

Only this module forms IGIA matrices, one linear at a time and one block of rows at a time. A block stays in
the processor's cache for all steps, which makes a plain loop over steps about twice as fast as one large
product of row-wise Khatri-Rao products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradpruner.common.errors import ShapeError

# A block of rows has about this many entries: 1 MiB in fp32, which stays in the processor's cache.
BLOCK_ENTRIES = 262_144


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
                f"LoRA gradients of shape {tuple(b.shape)} and {tuple(a.shape)} do not match; "
                "(steps, out_features, rank) and (steps, rank, in_features) are needed."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's (out_features, in_features)."""
        return self.grad_b_SOR.shape[1], self.grad_a_SRI.shape[2]


def gram_energies(grad_b_NOR: Tensor, grad_a_NRI: Tensor) -> Tensor:
    """Returns the squared Frobenius norms of N simulated gradients without forming the gradients.

    `||B A||_F**2 = <B^T B, A A^T>` needs only two R x R matrices per linear, which cost next to nothing. The
    computation is in double precision, because squares of real gradients (1e-20 is common) leave the range of
    fp32.

    Args:
        grad_b_NOR: Gradients of LoRA B, shape (N, out_features, rank), any float dtype.
        grad_a_NRI: Gradients of LoRA A, shape (N, rank, in_features).

    Returns:
        `||G_n||_F**2`, shape (N,), float64, >= 0, on the CPU. NaN or Inf for a linear with a NaN or Inf in
        either factor.

    Raises:
        ShapeError: If the two tensors disagree on N or rank.

    Source: GradPruner, Eq. 2 and 4.
    """
    if grad_b_NOR.shape[0] != grad_a_NRI.shape[0] or grad_b_NOR.shape[2] != grad_a_NRI.shape[1]:
        raise ShapeError(
            f"LoRA gradients of shape {tuple(grad_b_NOR.shape)} and {tuple(grad_a_NRI.shape)} do not match; "
            "(linears, out_features, rank) and (linears, rank, in_features) are needed."
        )
    if grad_b_NOR.device.type == "mps":  # has no double precision
        grad_b_NOR, grad_a_NRI = grad_b_NOR.cpu(), grad_a_NRI.cpu()
    b_NOR, a_NRI = grad_b_NOR.double(), grad_a_NRI.double()
    energy_N = ((b_NOR.mT @ b_NOR) * (a_NRI @ a_NRI.mT)).sum(dim=(1, 2))
    # Where the product is zero, rounding can give a tiny negative number.
    return energy_N.clamp_min(0).cpu()


def element_importance(grad_b_SOR: Tensor, grad_a_SRI: Tensor) -> Tensor:
    """Returns the mean squared simulated gradient of every entry of a linear's weight (the IGIA matrix).

    Args:
        grad_b_SOR: Gradients of LoRA B, shape (steps, out_features, rank), any float dtype.
        grad_a_SRI: Gradients of LoRA A, shape (steps, rank, in_features).

    Returns:
        Importance, shape (out_features, in_features), float32, >= 0, comparable within one trace only. Values
        below 1e-45 are rounded to zero here. Merging works in scaled units, so there they are kept.

    Raises:
        ShapeError: If the two tensors disagree on steps or rank.

    Source: GradPruner, Eq. 2-3.
    """
    factors = Factors(grad_b_SOR, grad_a_SRI)
    importance = ScaledImportance(factors, grad_a_SRI.device)
    # In double precision, because `scale` can be too small for fp32.
    return (importance.matrix().double() * importance.scale).float()


def row_energies(grad_b_SOR: Tensor, grad_a_SRI: Tensor) -> Tensor:
    """Returns the squared simulated gradient of every step, summed over each row of a linear's weight.

    With `G = gB gA`, the sum over row o is `gB[o] (gA gA^T) gB[o]^T`, which needs an R x R matrix per step
    instead of G. The computation is in double precision, because the squares leave the range of fp32. The
    mean over steps equals the row sums of the IGIA matrix. Arguments and errors are those of
    `element_importance`.

    Returns:
        Shape (steps, out_features), float64, >= 0.

    Source: GradPruner, Eq. 2-3.
    """
    Factors(grad_b_SOR, grad_a_SRI)  # checks the shapes
    b_SOR, a_SRI = grad_b_SOR.double(), grad_a_SRI.double()
    # Where the product is zero, rounding can give a tiny negative number.
    return ((b_SOR @ (a_SRI @ a_SRI.mT)) * b_SOR).sum(dim=2).clamp_min(0)


def column_energies(grad_b_SOR: Tensor, grad_a_SRI: Tensor) -> Tensor:
    """Returns the same sums over each column, shape (steps, in_features); see `row_energies`."""
    Factors(grad_b_SOR, grad_a_SRI)  # checks the shapes
    b_SOR, a_SRI = grad_b_SOR.double(), grad_a_SRI.double()
    return (((b_SOR.mT @ b_SOR) @ a_SRI) * a_SRI).sum(dim=1).clamp_min(0)


class ScaledImportance:
    """The IGIA matrix of one linear in units of `scale`, formed block by block.

    The recorded products are tiny (1e-17 is common), so their squares leave the range of fp32. Both factors
    are therefore scaled until their largest entry is between 1 and 2. `scale` holds the unit of the squared
    products in double precision.

    Args:
        factors: The LoRA gradients.
        device: Device on which the matrix is formed.
    """

    def __init__(self, factors: Factors, device: torch.device) -> None:
        b_SOR, a_SRI = factors.grad_b_SOR.to(device).float(), factors.grad_a_SRI.to(device).float()
        unit_b, unit_a = _unit(b_SOR), _unit(a_SRI)
        self.shape = factors.shape
        self.scale = (unit_b * unit_a) ** 2 / b_SOR.shape[0]
        self._b_SOR, self._a_SRI = b_SOR / (unit_b or 1.0), a_SRI / (unit_a or 1.0)

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns the importance of rows start to stop - 1, divided by `scale`; float32, >= 0."""
        total_OI = self._a_SRI.new_zeros(stop - start, self.shape[1])
        for b_OR, a_RI in zip(self._b_SOR[:, start:stop], self._a_SRI, strict=True):
            gradient_OI = b_OR @ a_RI
            total_OI.addcmul_(gradient_OI, gradient_OI)
        return total_OI

    def matrix(self) -> Tensor:
        """Returns the importance of all rows, divided by `scale`."""
        out_OI = self._a_SRI.new_empty(self.shape)
        for start, stop in row_blocks(*self.shape):
            out_OI[start:stop] = self.rows(start, stop)
        return out_OI


def _unit(values: Tensor) -> float:
    """Returns the largest power of two up to the largest magnitude, or 0 if all values are zero.

    Dividing by a power of two is exact.
    """
    largest = float(values.abs().amax())
    return 2.0 ** (math.frexp(largest)[1] - 1) if largest else 0.0


def row_blocks(num_rows: int, num_columns: int) -> list[tuple[int, int]]:
    """Returns (start, stop) of consecutive blocks of rows with about `BLOCK_ENTRIES` entries each."""
    step = max(1, BLOCK_ENTRIES // max(1, num_columns))
    return [(i, min(num_rows, i + step)) for i in range(0, num_rows, step)]
