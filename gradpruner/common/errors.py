"""Every error a user can meet, drawn once.

    GradPrunerError            1   anything of ours
    ├── ConfigError            2   the command line, the recipe, an option
    │   └── PlanError          2   a pruning plan that cannot be carried out
    ├── DataError              3   the task's files, rows or prompts
    ├── ModelError             4   the model folder, its family or its format
    ├── ResourceError          5   disk, memory, or numbers that blew up
    │   └── NonFiniteError     5   NaN or Inf in a loss or gradient
    ├── IntegrityError         6   a file that is not what it claims to be
    └── ShapeError             1   tensors that do not belong together (also a ValueError)

The number is the process exit code of the command line. Messages say what was given and what is allowed;
`hint` says what to do.
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
    """Not enough disk or memory, or the computation cannot go on."""

    exit_code = 5


class NonFiniteError(ResourceError):
    """A loss or gradient became NaN or Inf."""


class IntegrityError(GradPrunerError):
    """A file is damaged, unsafe, or belongs to something else."""

    exit_code = 6


class ShapeError(GradPrunerError, ValueError):
    """Tensors disagree on a dimension they must share."""
