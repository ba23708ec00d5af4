"""How records are read: what is missing, or is not what it should be, reads as empty.

An interrupted run still has a report, and a record may come from somebody else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, Field, model_validator

from gradpruner.common.printing import number

FEW_EXAMPLES = 100
"""Below this many evaluated examples a result is marked: its interval is about 20 points wide."""


def count(value: Any) -> int | None:
    """Returns a whole number, or None."""
    finite = number(value)
    return None if finite is None else round(finite)


def _mapping(value: Any) -> dict[str, Any]:
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def _numbers(values: Any) -> list[float]:
    found = map(number, values if isinstance(values, list | tuple) else [])
    return [value for value in found if value is not None]


Number = Annotated[float | None, BeforeValidator(number)]
Known = Annotated[Any, BeforeValidator(number)]
"""A number without which the whole entry is left out: whoever uses it need not check."""
Count = Annotated[int | None, BeforeValidator(count)]
Each = BeforeValidator(lambda value: list(value) if isinstance(value, list | tuple) else [])
"""Of a list; anything else reads as an empty one."""
Named = BeforeValidator(_mapping)
"""Of an object; anything else reads as an empty one."""
Fields = Annotated[dict[str, Any], Named]
Values = Annotated[list[Any], Each]


class Part(BaseModel):
    """A JSON object; anything else reads as an empty one."""

    @model_validator(mode="before")
    @classmethod
    def _object(cls, value: Any) -> Any:
        return _mapping(value) if not isinstance(value, Part) else value


class Measured(Part):
    """One metric of one model, or the difference of two: fractions, with a 95 % interval and the examples.

    In a study `low` and `high` are the lowest and the highest seed.
    """

    value: Known = Field(default=None, validation_alias=AliasChoices("value", "mean"))
    low: Number = None
    high: Number = None
    n: Count = None
    stderr: Number = None
    per_seed: Annotated[list[float], BeforeValidator(_numbers)] = []
    before: Number = None
    paired: Measured | None = None
    paired_gradpruner: Measured | None = None

    @property
    def ends(self) -> tuple[float, float] | None:
        """Both ends of the interval; None if one is not known."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def is_small(self) -> bool:
        """Whether too few examples were evaluated to rely on the value."""
        return self.n is not None and self.n < FEW_EXAMPLES

    def turned(self) -> Measured:
        """The same difference, seen from the other side."""
        low, high = (None if end is None else -end for end in (self.high, self.low))
        return Measured(value=-self.value, low=low, high=high, n=self.n)


def known(metrics: Mapping[str, Measured | None]) -> dict[str, Measured]:
    """The metrics that have a value, in the order they were recorded: the most telling first."""
    return {name: found for name, found in metrics.items() if found is not None and found.value is not None}


Metrics = Annotated[dict[str, Measured], Named, AfterValidator(known)]
