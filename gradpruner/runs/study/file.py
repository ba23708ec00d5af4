"""The file that describes a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from gradpruner.common.options import Section
from gradpruner.runs.recipe.recipe import check_section
from gradpruner.runs.recipe.yaml_files import read_yaml


class Sweep(Section):
    """One recipe key and the values it takes."""

    key: str
    """Dotted recipe key: plan.num_merge."""
    values: list[Any] = Field(min_length=1)
    """Its values, each a point."""
    label: str = ""
    """Name of the key in the figure; "" takes the key itself."""
    log: bool = False
    """Whether its axis is logarithmic."""


class NamedPoint(Section):
    """One point that changes several keys."""

    label: str = Field(min_length=1)
    """Its name."""
    changes: dict[str, Any] = Field(alias="set")
    """Dotted recipe key -> value."""


class StudyFile(Section):
    """The file of a study, for `gradpruner ablate`."""

    base: str | None = None
    """The recipe that all runs start from: a name (`gradpruner ls recipes`) or a file."""
    recipe: dict[str, Any] | None = None
    """The recipe written out here, instead of base."""
    title: str = ""
    """Title of the report."""
    figure: str = ""
    """The table or figure of the paper that the study repeats: Table 3."""
    what: str = ""
    """What the paper did and what is done here, in a sentence."""
    methods: list[str] | None = Field(default=None, min_length=1)
    """Rows, as for `gradpruner compare --methods`; null takes the recipe's variants."""
    smaller: list[str] = Field(default_factory=list)
    """Smaller models, fine-tuned for comparison: folders or hub ids."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0, 1, 2], min_length=1)
    """Seeds; each is a run at every point."""
    sweep: Sweep | None = None
    """A recipe key and its values."""
    points: list[NamedPoint] | None = Field(default=None, min_length=1)
    """Points that change several keys, instead of a sweep."""
    plot: dict[str, Any] = Field(default_factory=dict)
    """Hints for the figure: kind (line, bars, stability, scores), y (quality, training_seconds ...)."""

    @model_validator(mode="after")
    def _consistent(self) -> StudyFile:
        if (self.base is None) == (self.recipe is None):
            raise ValueError("give base (the name or file of a recipe) or recipe, one of the two")
        if self.sweep is not None and self.points is not None:
            raise ValueError("sweep and points exclude each other")
        return self


def read_study(path: Path) -> StudyFile:
    """Reads a study file.

    Raises:
        ConfigError: Lists all faults at once.
    """
    return check_section(
        StudyFile, read_yaml(path), str(path), "\nKeys: " + ", ".join(StudyFile.model_fields)
    )
