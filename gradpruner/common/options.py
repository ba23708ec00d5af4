"""Options as objects: checked when they are made, and passed on as they are."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gradpruner.common.errors import ConfigError

T = TypeVar("T", bound=BaseModel)


class Section(BaseModel):
    """A part of the recipe; unknown keys are errors."""

    # Defaults are validated too, so that 32 for a float becomes 32.0, as when the recipe is read back.
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


def validated(kind: type[T], raw: dict[str, Any], where: str = "") -> T:
    """Makes options from plain values; raises ConfigError if one is unknown or not allowed.

    `where` comes before their names in messages, for example "methods.laco.".
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        name = (where + ".".join(map(str, fault["loc"]))).rstrip(".")
        message = fault["msg"].removeprefix("Value error, ")
        given = "" if isinstance(fault["input"], dict) else f" (given: {fault['input']!r})"
        raise ConfigError(
            f"{name}: {message}{given}." if name else f"{message}.",
            hint=f"Options: {', '.join(kind.model_fields) or 'none'}.",
        ) from error


def changed(kind: type[T], options: T | None, changes: dict[str, Any]) -> T:
    """Returns options (None: the defaults) with some values changed; raises ConfigError like `validated`."""
    options = options or kind()
    return validated(type(options), options.model_dump() | changes) if changes else options
