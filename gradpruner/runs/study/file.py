"""A study as it is written down."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from gradpruner.runs.recipe import check_section
from gradpruner.runs.yaml_files import read_yaml
from gradpruner.training.options import Section


class Sweep(Section):
    """One recipe key and the values it takes."""

    key: str
    """Dotted recipe key: plan.num_merge."""
    values: list[Any] = Field(min_length=1)
    """One point each."""
    label: str = ""
    """What the key is called in the figure; "" takes the key."""
    log: bool = False
    """Logarithmic axis."""


class NamedPoint(Section):
    """One point that changes several keys."""

    label: str = Field(min_length=1)
    """What it is called."""
    changes: dict[str, Any] = Field(alias="set")
    """Dotted recipe key -> value."""


class StudyFile(Section):
    """A study as it is written down, for `gradpruner ablate`."""

    base: str | None = None
    """Recipe all runs start from: a name (`gradpruner ls recipes`) or a file."""
    recipe: dict[str, Any] | None = None
    """The same, written out here."""
    title: str = ""
    """Headline."""
    figure: str = ""
    """The table or figure of the paper it repeats: Table 3."""
    what: str = ""
    """What the paper did and what is done here, in a sentence."""
    methods: list[str] | None = Field(default=None, min_length=1)
    """Rows, as for `gradpruner compare --methods`; null takes the recipe's variants."""
    smaller: list[str] = Field(default_factory=list)
    """Smaller models, fine-tuned for comparison: folders or hub ids."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0, 1, 2], min_length=1)
    """One run each at every point."""
    sweep: Sweep | None = None
    """Values of one key."""
    points: list[NamedPoint] | None = Field(default=None, min_length=1)
    """Points that change several keys, instead of a sweep."""
    plot: dict[str, Any] = Field(default_factory=dict)
    """Hints for the figure: kind (line, bars, stability, scores), y (quality, training_seconds ...)."""

    @model_validator(mode="after")
    def _consistent(self) -> StudyFile:
        if (self.base is None) == (self.recipe is None):
            raise ValueError("give base, the name or file of a recipe, or recipe")
        if self.sweep is not None and self.points is not None:
            raise ValueError("sweep and points exclude each other")
        return self


def read_study(path: Path) -> StudyFile:
    """Reads a study file.

    Raises:
        ConfigError: Naming every fault at once.
    """
    return check_section(
        StudyFile, read_yaml(path), str(path), "\nKeys: " + ", ".join(StudyFile.model_fields)
    )
