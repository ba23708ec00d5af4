"""Field types for reading records; a missing or malformed value reads as empty.

That way an interrupted run, or a record written by somebody else, still gives a report. With the context
`REFUSE`, a malformed value is an error: a study computes only with what is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationInfo,
    model_validator,
)

from gradpruner.common.printing import number

REFUSE = {"malformed": "refused"}
"""Context for `model_validate` with which a malformed value is refused."""
FEW_EXAMPLES = 100
"""Results on fewer examples are marked: their intervals are about 20 points wide."""


def count(value: Any) -> int | None:
    """Returns a whole number, or None."""
    finite = number(value)
    return None if finite is None else round(finite)


def _mapping(value: Any) -> dict[str, Any] | None:
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else None


def _list(value: Any) -> list[Any] | None:
    return list(value) if isinstance(value, list | tuple) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _read(
    value: Any, info: ValidationInfo, kind: Callable[[Any], Any], empty: Callable[[], Any] = lambda: None
) -> Any:
    """Returns `kind(value)`, or `empty()` if that is None; with `REFUSE`, only a missing value is empty."""
    found = kind(value)
    if found is None and value is not None and info.context is REFUSE:
        raise ValueError("malformed")
    return empty() if found is None else found


def _reads(kind: Callable[[Any], Any], empty: Callable[[], Any] = lambda: None) -> BeforeValidator:
    return BeforeValidator(lambda value, info: _read(value, info, kind, empty))


def _numbers(values: Any) -> list[float]:
    found = map(number, values if isinstance(values, list | tuple) else [])
    return [value for value in found if value is not None]


Number = Annotated[float | None, _reads(number)]
Known = Annotated[Any, _reads(number)]
"""A number that an entry must have: entries without it are left out, so that nobody need check for None."""
Count = Annotated[int | None, _reads(count)]
Each = _reads(_list, list)
"""For a list field: anything but a list reads as an empty one."""
Named = _reads(_mapping, dict)
"""For an object field: anything but an object reads as an empty one."""
Fields = Annotated[dict[str, Any], Named]
Values = Annotated[list[Any], Each]
Text = Annotated[str | None, _reads(_text)]


class JsonPart(BaseModel):
    """A JSON object; any other value reads as an empty one."""

    @model_validator(mode="before")
    @classmethod
    def _object(cls, value: Any, info: ValidationInfo) -> Any:
        return value if isinstance(value, JsonPart) else _read(value, info, _mapping, dict)


class Measured(JsonPart):
    """One metric of a model, or the difference of two models, as fractions.

    `low` and `high` are the ends of the 95 % interval; in a study, the lowest and highest seed. `n` is the
    number of examples.
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
        """Both ends of the interval; None if either is missing."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def is_small(self) -> bool:
        """Whether the value rests on too few examples."""
        return self.n is not None and self.n < FEW_EXAMPLES

    def turned(self) -> Measured:
        """Returns the same difference with its sign reversed."""
        low, high = (None if end is None else -end for end in (self.high, self.low))
        return Measured(value=-self.value, low=low, high=high, n=self.n)


def known(metrics: Mapping[str, Measured | None]) -> dict[str, Measured]:
    """Returns the metrics that have a value, in recorded order: the most informative first."""
    return {name: found for name, found in metrics.items() if found is not None and found.value is not None}


Metrics = Annotated[dict[str, Measured], Named, AfterValidator(known)]
