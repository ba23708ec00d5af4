"""The ways to a smaller, trained model that the study measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One way to a smaller, trained model.

    Attributes:
        start: The model to prune: "base"; "tuned", the dense model tuned on the same rows; "twice", the same
            tuned for twice the epochs; or "quarter", the dense model tuned on the first quarter of the rows.
            Then the pruned model trains on the rest.
        choice: A name in `choices.CHOICES`, or "paper": GradPruner with three layers merged.
        repair: "none", "least_squares" or "influence", see `study.repaired`.
        distil: Whether a dense model is the teacher: the one that was pruned, or from base the tuned one.
        prompts: Weight of what the teacher says on prompt tokens.
        passes: Passes over the training rows, relative to the dense model's tuning.
        rows: Number of training rows that the repair is fitted on, or None for the usual number.
    """

    start: str
    choice: str
    repair: str
    distil: bool = False
    prompts: float = 0.0
    passes: float = 1
    rows: int | None = None

    @property
    def name(self) -> str:
        """The row's part of the key of a cell."""
        learns = "distil" if self.distil else "labels"
        learns += f"-prompts-{self.prompts:g}" if self.prompts else ""
        learns += f"-x{self.passes:g}" if self.passes != 1 else ""
        repair = f"{self.repair}-{self.rows}" if self.rows else self.repair
        return f"{self.start}/{self.choice}/{repair}/{learns}"


TRAINED = (
    Row("base", "igia", "influence"),
    Row("tuned", "igia", "influence", distil=True),
    Row("base", "igia", "least_squares"),
    Row("tuned", "igia", "least_squares", distil=True),
    Row("base", "igia", "none"),
    Row("tuned", "igia", "least_squares"),
    Row("base", "paper", "none"),
    Row("base", "last", "none"),
    Row("tuned", "igia", "none"),
    Row("base", "gate", "least_squares"),
    Row("base", "shortgpt", "none"),
    Row("base", "random", "none"),
    Row("base", "last", "least_squares"),
    Row("base", "last", "least_squares", rows=1200),
    Row("base", "angular", "least_squares"),
    Row("base", "igia", "least_squares", distil=True),
    Row("tuned", "gate", "influence", distil=True),
    Row("tuned", "gate", "influence", distil=True, prompts=1.0),
    Row("tuned", "gate", "influence", distil=True, rows=512),
    Row("quarter", "igia", "influence"),
    Row("tuned", "igia", "influence", distil=True, prompts=1.0),
    Row("tuned", "igia", "influence", distil=True, prompts=0.1),
    Row("tuned", "igia", "influence", distil=True, prompts=1.0, passes=3),
)
"""The rows in the order in which they are measured."""


FULL_ROWS = (Row("tuned", "igia", "influence", distil=True), Row("base", "last", "least_squares"))
"""The rows that are measured at every depth; first the one whose repair has just been fitted."""

LONGER = tuple(Row("twice", choice, "influence", distil=True) for choice in ("igia", "gate"))
"""From a dense model tuned for twice the epochs: does the pruned model keep what these gain?"""

BRIEF = tuple(Row("tuned", "igia", "influence", distil=True, passes=passes) for passes in (0.125, 0.25, 0.5))
"""Shorter recoveries, at the default rate."""
