"""The paper's ablations: every study file names keys and values the recipe knows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import gradpruner
from gradpruner.runs.recipe.recipe import Recipe, key_names, load_recipe
from gradpruner.runs.study.design import make_study
from gradpruner.runs.study.file import read_study

PACKAGE = Path(gradpruner.__file__).parent
ABLATIONS = PACKAGE / "recipes" / "ablations"
FILES = sorted(ABLATIONS.glob("*.yaml"))
KEYS = {
    "base", "recipe", "title", "figure", "what", "methods", "smaller", "seeds", "sweep", "points", "plot",
}  # fmt: skip
PAPER = {
    "Table 3", "Table 4", "Tables 5 and 10", "Table 6", "Tables 8 and 9", "Table 13", "Figure 2",
    "Figures 5 and 8", "Figure 6", "Figure 7", "Figure 9",
}  # fmt: skip


def settings(study: dict[str, Any]) -> list[dict[str, Any]]:
    """What every point of a study changes."""
    if "sweep" in study:
        return [{study["sweep"]["key"]: value} for value in study["sweep"]["values"]]
    return [point["set"] for point in study.get("points", [])] or [{}]


def base(study: dict[str, Any], tmp_path: Path) -> Path:
    if "base" in study:
        return PACKAGE / "recipes" / f"{study['base']}.yaml"
    written = tmp_path / "base.yaml"
    written.write_text(yaml.safe_dump({"effort": "paper", **study["recipe"]}), encoding="utf-8")
    return written


def test_every_ablation_of_the_paper_is_there() -> None:
    figures = [yaml.safe_load(path.read_text(encoding="utf-8"))["figure"] for path in FILES]
    assert sorted(figures) == sorted(PAPER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_keys_and_values_are_those_of_the_recipe(path: Path, tmp_path: Path) -> None:
    study = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(study) <= KEYS
    assert ("base" in study) != ("recipe" in study) and study["title"] and study["what"]
    assert study["seeds"] == [0, 1, 2]
    known = key_names(Recipe)
    for changes in settings(study):
        for key, value in changes.items():
            assert key in known
            recipe = load_recipe(base(study, tmp_path), (), changes)
            section, _, name = key.partition(".")
            assert getattr(getattr(recipe, section), name) == value


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_says_what_it_is_and_how_it_is_run(path: Path) -> None:
    head = path.read_text(encoding="utf-8").splitlines()
    study = yaml.safe_load("\n".join(head))
    assert head[0].startswith(f"# {study['figure']}: ")
    assert head[1] == f"# gradpruner ablate {path.stem} --out runs/{path.stem.partition('_')[0]}"
    assert "# Difference from the paper: " in "\n".join(head)
    assert max(map(len, head)) <= 140


def test_the_document_names_every_file_and_no_other() -> None:
    document = PACKAGE.parent / "docs" / "ablations.md"
    if not document.exists():
        pytest.skip("the documents are not part of an installed package")
    named = re.findall(r"^\|[^|]*\| `(\w+)` \|", document.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == [path.stem for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_makes_a_study(path: Path, tmp_path: Path) -> None:
    file = read_study(path)
    recipe = load_recipe(base(yaml.safe_load(path.read_text(encoding="utf-8")), tmp_path))
    study = make_study(
        recipe,
        out=tmp_path / "out",
        methods=file.methods,
        seeds=file.seeds,
        sweep=file.sweep,
        points=file.points,
        kind="ablation",
        base_folder=path.parent,
    )
    assert len(study.points) == len(settings(yaml.safe_load(path.read_text(encoding="utf-8"))))
    assert [row.name for row in study.rows] == ["dense", *(file.methods or [])]
