"""The built-in recipes and studies, by name."""

from __future__ import annotations

from pathlib import Path

from gradpruner.common.errors import ConfigError
from gradpruner.common.registry import suggest

RECIPES = Path(__file__).parents[1] / "recipes"
ABLATIONS = RECIPES / "ablations"


def recipe_names() -> list[str]:
    """Returns the built-in recipes: their paths without the suffix."""
    names = (str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("ablations/"))  # ablations are studies


def ablation_names() -> list[str]:
    """Returns the names of the built-in studies."""
    return sorted(path.stem for path in ABLATIONS.glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """Returns the file of a recipe, given its path or built-in name.

    Raises:
        ConfigError: If there is no such recipe.
    """
    if Path(name).is_file() or name.endswith((".yaml", ".yml")):
        return Path(name)
    known, names = RECIPES / f"{name}.yaml", recipe_names()
    if known.exists():
        return known
    if Path(name, "manifest.json").is_file():
        raise ConfigError(f"{name} is a run, not a recipe or a model.", hint=f"Go on in it: --out {name}")
    if "/" in name and not any(other.startswith(name.split("/")[0]) for other in names):
        raise ConfigError(
            f"There is no recipe, model folder or other file at {name}.",
            hint=f"Built-in recipes: {', '.join(names)}.",
        )
    raise ConfigError(
        f"There is no recipe file or built-in recipe '{name}'.{suggest(name, names)}",
        hint=f"Built in: {', '.join(names)}.",
    )


def study_file(name: str) -> Path:
    """Returns the file of a study, given its path or built-in name.

    Raises:
        ConfigError: If there is no such study.
    """
    known, names = ABLATIONS / f"{name}.yaml", ablation_names()
    for path in (Path(name), known):
        if path.is_file():
            return path
    raise ConfigError(
        f"There is no study file or built-in study '{name}'.{suggest(name, names)}",
        hint=f"Built in: {', '.join(names)}.",
    )
