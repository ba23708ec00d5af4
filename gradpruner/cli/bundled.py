"""Recipes and studies that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from gradpruner.common.errors import ConfigError
from gradpruner.common.registry import suggest

RECIPES = Path(__file__).parents[1] / "recipes"
ABLATIONS = RECIPES / "ablations"


def recipe_names() -> list[str]:
    """Every recipe that comes with the package, by its path without the ending."""
    names = (str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("ablations/"))  # those are studies


def ablation_names() -> list[str]:
    """Every study that comes with the package."""
    return sorted(path.stem for path in ABLATIONS.glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """The file of a recipe given by path or name.

    Raises:
        ConfigError: If a recipe of this name does not come along.
    """
    if Path(name).is_file() or name.endswith((".yaml", ".yml")):
        return Path(name)
    known, names = RECIPES / f"{name}.yaml", recipe_names()
    if known.exists():
        return known
    if "/" in name and not any(other.startswith(name.split("/")[0]) for other in names):
        raise ConfigError(
            f"There is no recipe, model folder or other file at {name}.",
            hint=f"Recipes that come along: {', '.join(names)}.",
        )
    raise ConfigError(
        f"There is no recipe file or built-in recipe '{name}'.{suggest(name, names)}",
        hint=f"Built in: {', '.join(names)}.",
    )


def study_file(name: str) -> Path:
    """The file of a study given by path or name.

    Raises:
        ConfigError: If there is none.
    """
    known, names = ABLATIONS / f"{name}.yaml", ablation_names()
    for path in (Path(name), known):
        if path.is_file():
            return path
    raise ConfigError(
        f"There is no study file or built-in study '{name}'.{suggest(name, names)}",
        hint=f"Built in: {', '.join(names)}.",
    )
