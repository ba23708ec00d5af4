"""The tree of all errors this package raises on purpose.

    GradPrunerError            1   base class
    ├── ConfigError            2   a wrong command line, recipe or option
    │   └── PlanError          2   a pruning plan that cannot be carried out
    ├── DataError              3   unusable data files, rows or prompts
    ├── ModelError             4   an unusable model folder, model family or weight format
    ├── ResourceError          5   not enough disk or memory, or a computation that cannot continue
    │   └── NonFiniteError     5   NaN or Inf in a loss, gradient or score
    ├── IntegrityError         6   a damaged, unsafe or mismatched file
    └── ShapeError             1   tensors whose shapes do not match (also a ValueError)

The number is the exit code of the command line. The message says what was given and what is allowed; the
hint says what to do.
"""

from __future__ import annotations


class GradPrunerError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class ConfigError(GradPrunerError):
    """The command line, the recipe or an option is wrong."""

    exit_code = 2


class PlanError(ConfigError):
    """A pruning plan contradicts itself, the model or the trace."""


class DataError(GradPrunerError):
    """A data file is missing, unreadable or does not hold what the task needs."""

    exit_code = 3


class ModelError(GradPrunerError):
    """The model folder, family or weight format cannot be used."""

    exit_code = 4


class ResourceError(GradPrunerError):
    """There is not enough disk or memory, or the computation cannot continue."""

    exit_code = 5


class NonFiniteError(ResourceError):
    """A loss, gradient or score became NaN or Inf."""


class IntegrityError(GradPrunerError):
    """A file is damaged or unsafe, or belongs to another model, plan or run."""

    exit_code = 6


class ShapeError(GradPrunerError, ValueError):
    """Tensors disagree on a dimension they must share."""
